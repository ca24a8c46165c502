from types import SimpleNamespace

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec

from lmjax.sharding.hardware import peak_flops
from lmjax.sharding.mesh import (
    DATA_PARALLEL,
    Strategy,
    activate,
    batch_sharding,
    check_batch_size,
    make_mesh,
    put_batch,
    shardings,
)

TENSOR = Strategy("tp", ("data", "model"), (("batch", ("data",)), ("mlp", ("model",))))


def test_axes_follow_the_rules_and_the_rest_is_whole():
    assert TENSOR.spec(("embed", "mlp")) == PartitionSpec(None, ("model",))
    assert DATA_PARALLEL.spec(("embed", "mlp")) == PartitionSpec(None, None)
    assert TENSOR.spec(()) == PartitionSpec()


def test_two_axes_of_an_array_on_one_axis_of_the_mesh_are_refused():
    clash = Strategy("clash", ("model",), (("mlp", ("model",)), ("heads", ("model",))))
    with pytest.raises(ValueError, match="'clash' divides two axes .*'mlp', 'heads'"):
        clash.spec(("mlp", "heads"))


def test_a_tree_gets_a_sharding_for_each_array():
    mesh = make_mesh(TENSOR)
    tree = {"kernel": np.zeros((2, 4)), "state": (np.zeros(4), ())}
    found = shardings(mesh, TENSOR, tree, {"kernel": ("embed", "mlp"), "state": (("mlp",), ())})
    assert found["state"][0].spec == PartitionSpec(("model",))
    assert jax.tree.structure(found) == jax.tree.structure(tree)


def test_rows_reach_the_devices():
    mesh = make_mesh(DATA_PARALLEL)
    rows = {"inputs": np.arange(6, dtype=np.int32).reshape(2, 3), "weights": np.ones(2)}
    batch = put_batch(rows, batch_sharding(mesh, DATA_PARALLEL))
    np.testing.assert_array_equal(batch["inputs"], rows["inputs"])
    assert batch["inputs"].sharding.spec == PartitionSpec(("data",))


@pytest.mark.parametrize(
    ("rows", "microbatches", "nearest"), [(12, 1, "8 or 16"), (3, 1, "are 8"), (40, 2, "32 or 48")]
)
def test_a_batch_that_does_not_divide_names_the_nearest_that_do(rows, microbatches, nearest):
    eight = SimpleNamespace(shape={"data": 8})
    with pytest.raises(ValueError, match=nearest):
        check_batch_size(rows, eight, DATA_PARALLEL, microbatches)
    check_batch_size(32, eight, DATA_PARALLEL, microbatches)


def test_constraints_reach_the_program():
    def program(strategy):
        mesh = make_mesh(strategy)
        with activate(mesh, strategy):
            constrained = jax.jit(lambda x: nn.with_logical_constraint(x, ("batch", "mlp")))
            return constrained.lower(jnp.ones((4, 4))).as_text()

    assert '[{"data"}, {"model"}]' in program(TENSOR)
    assert '[{"data"}, {}]' in program(DATA_PARALLEL)


@pytest.mark.parametrize(
    ("kind", "peak"),
    [
        ("TPU v3", 61.5e12),  # JAX shows each of the two cores of a chip
        ("TPU v5 lite", 197e12),
        ("TPU v5p", 459e12),
        ("TPU v6 lite", 918e12),
        ("NVIDIA A100-SXM4-80GB", 312e12),
        ("NVIDIA H100 PCIe", 756e12),
        ("NVIDIA H100 80GB HBM3", 989.4e12),
        ("cpu", None),
    ],
)
def test_peaks(kind, peak):
    assert peak_flops(SimpleNamespace(device_kind=kind)) == peak

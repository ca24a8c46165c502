from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec

from lmjax.sharding.hardware import peak_flops
from lmjax.sharding.mesh import check_batch_size, device_grid, lay_out, put_batch
from lmjax.sharding.strategies import DP, MeshOptions

PARAMS, AXES = {"kernel": jnp.zeros((4, 8))}, {"kernel": ("embed", "mlp")}


def test_rows_reach_the_devices():
    layout = lay_out(DP, MeshOptions(), PARAMS, AXES, jax.devices())
    rows = {"inputs": np.arange(6, dtype=np.int32).reshape(2, 3), "weights": np.ones(2)}
    batch = put_batch(rows, layout.batch)
    np.testing.assert_array_equal(batch["inputs"], rows["inputs"])
    assert batch["inputs"].sharding.spec == PartitionSpec(("data",))


@pytest.mark.parametrize(
    ("rows", "microbatches", "nearest"), [(12, 1, "8 or 16"), (3, 1, "are 8"), (40, 2, "32 or 48")]
)
def test_a_batch_that_does_not_divide_names_the_nearest_that_do(rows, microbatches, nearest):
    with pytest.raises(ValueError, match=nearest):
        check_batch_size(rows, 8, microbatches)
    check_batch_size(32, 8, microbatches)


def fake_devices(count, slices=1):
    return [
        SimpleNamespace(
            id=i, process_index=i // 4, slice_index=i * slices // count, platform="gpu",
            device_kind="x",
        )
        for i in range(count)
    ]  # fmt: skip


def test_slices_lie_one_after_the_other_along_the_first_axis():
    devices = fake_devices(16, slices=2)
    grid = device_grid((4, 2, 2), 2, devices[::-1])
    assert {d.slice_index for d in grid[:2].flat} == {0}
    assert {d.slice_index for d in grid[2:].flat} == {1}
    with pytest.raises(ValueError, match="form 2 slices, but mesh.slices is 1"):
        device_grid((4, 2, 2), 1, devices)


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

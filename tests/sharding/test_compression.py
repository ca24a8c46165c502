import types

import jax
import numpy as np
import pytest

from lmjax.sharding.mesh import activate
from lmjax.sharding.strategies import DP
from lmjax.training.compression import PowerSGD
from lmjax.training.optimizers import AdamW
from lmjax.training.schedules import Constant
from lmjax.training.state import abstract_parameters
from lmjax.training.step import arrange, check_compression, prepare
from tests.sharding.compressed import AXES, RANK, REPLICAS, SHAPES, TASK, gradients
from tests.sharding.conftest import printed_by
from tests.training.toy import Regression


@pytest.fixture(scope="module")
def results():
    return printed_by("compressed")


def reference(bases):
    """Algorithms 1 and 2 of the paper in float64, with sums in the place of its means: the sum of
    each step's gradients, and what each replica has not delivered in the end."""
    totals, errors = [], {name: 0 for name in bases}
    for step in range(3):
        found = {}
        for name, own in gradients(step).items():
            if name not in bases:
                found[name] = own.sum(0)
                continue
            own = own + errors[name]
            left, _ = np.linalg.qr((own @ bases[name]).sum(0))
            bases[name] = np.swapaxes(own, -1, -2).sum(0) @ left
            found[name] = left @ np.swapaxes(bases[name], -1, -2)
            errors[name] = own - found[name] / REPLICAS
        totals.append(found)
    return totals, errors


def test_sums_are_the_papers(results):
    found = results["totals"]
    totals, errors = reference({k: np.array(v, np.float64) for k, v in found["bases"].items()})
    assert found["bases"].keys() == {"matrix", "stack"}  # no embeddings, no vectors
    for ours, theirs in zip(found["totals"], totals, strict=True):
        for name, x in theirs.items():
            assert np.linalg.norm(ours[name] - x) < 1e-5 * np.linalg.norm(x), name
            if name in errors:
                assert (np.linalg.matrix_rank(x) == RANK).all()
    for name, x in errors.items():
        np.testing.assert_allclose(found["errors"][name], x, atol=1e-5)


def test_nothing_is_lost_for_good(results):
    """What all steps have summed to and what the replicas still hold is all that there was."""
    found = results["totals"]
    for name in found["errors"]:
        summed = sum(np.array(total[name]) for total in found["totals"])
        brought = sum(gradients(step)[name].sum(0) for step in range(3))
        left = np.array(found["errors"][name]).sum(0)
        np.testing.assert_allclose(summed + left, brought, atol=1e-4)


def test_training_with_compressed_sums(results):
    """The parameters divided or not, and with gradients scaled or not, it is the same."""
    plain, compressed, divided = (results[name] for name in ("as they are", "dp", "fsdp"))
    assert compressed["losses"][0] == pytest.approx(plain["losses"][0], rel=1e-6)
    assert compressed["losses"][1] != pytest.approx(plain["losses"][1], rel=1e-3)
    assert compressed["losses"][-1] < compressed["losses"][0]
    np.testing.assert_allclose(results["pieces"]["losses"], compressed["losses"], rtol=1e-5)
    # Eight replicas lose other parts of their gradients than four do.
    assert divided["losses"][0] == pytest.approx(plain["losses"][0], rel=1e-6)
    np.testing.assert_allclose(divided["losses"], compressed["losses"], rtol=1e-3)
    scales = np.array(divided["extra"]["gradient_scales"])
    np.testing.assert_allclose(scales, 2.0**13 * 2 ** (4 / 1_000), rtol=1e-5)


def test_less_is_sent(results):
    """By as much as the factors are smaller than the matrices."""
    params, axes = abstract_parameters(TASK)
    matrices = PowerSGD(RANK).matrices(params, axes)
    whole = sum(param.size for param in matrices.values())
    factors = sum(
        RANK * np.prod(param.shape[:-2]) * sum(param.shape[-2:]) for param in matrices.values()
    )
    saved = results["as they are"]["sent"]["data"] - results["dp"]["sent"]["data"]
    assert saved == pytest.approx(2 * 7 / 8 * 4 * (whole - factors), rel=0.02)


def test_what_cannot_be_compressed():
    with pytest.raises(ValueError, match="to rank 0, not 1 or more"):
        PowerSGD(0)
    with pytest.raises(ValueError, match="no gradient of this model gets smaller .* of rank 64"):
        PowerSGD(64).matrices({n: np.zeros(s) for n, s in SHAPES.items()}, AXES)
    task, optimizer = TASK, AdamW(Constant(1e-3))
    layout = arrange(task, optimizer, 8, devices=jax.devices()[:1])
    with (
        activate(layout),
        pytest.raises(ValueError, match="mesh .* has only one: leave .* out"),
    ):
        prepare(task, optimizer, layout, compression=PowerSGD(2))
    alone = arrange(task, optimizer, 8, strategy="pmap", devices=jax.devices()[:1])
    with pytest.raises(ValueError, match="pmap does not compress gradients: choose dp"):
        prepare(task, optimizer, alone, compression=PowerSGD(2))
    two = types.SimpleNamespace(strategy=DP, mesh=types.SimpleNamespace(shape={"data": 2}))
    with pytest.raises(ValueError, match="not compressed, .* from step to step: rows"):
        check_compression(Regression(), two, PowerSGD(2))
    coupled = types.SimpleNamespace(couples_rows=True)
    with pytest.raises(ValueError, match="compares all rows of a batch with each other, but compr"):
        check_compression(coupled, two, PowerSGD(2))


def test_a_step_that_is_not_finite_loses_nothing(results):
    before, after = (results["not finite"][name] for name in ("before", "after"))
    assert before.keys() and before == after


def test_errors_are_divided(results):
    """Among the replicas, and as the parameters are."""
    params, axes = abstract_parameters(TASK)
    matrices = PowerSGD(RANK).matrices(params, axes)
    whole = sum(4 * param.size for param in matrices.values())
    for name, ways in (("dp", 1), ("fsdp", 2)):
        assert results[name]["error bytes"] == pytest.approx(whole / ways, rel=0.1)

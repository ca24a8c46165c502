import itertools
import types

import jax
import numpy as np
import pytest

from lmjax.models.dalle import DALLE, PRESETS
from lmjax.models.layers import Execution
from lmjax.sharding.mesh import Layout, activate
from lmjax.sharding.strategies import DP, FSDP, FSDP_TP, MESH_AXES
from lmjax.tasks.text_to_image import TextToImage
from lmjax.training.compression import CompressedSums, Part, PowerSGD
from lmjax.training.optimizers import AdamW
from lmjax.training.schedules import Constant
from lmjax.training.state import abstract_parameters
from lmjax.training.step import arrange, compressed_sums, prepare
from tests.sharding.compressed import AXES, DIVIDED, RANK, REPLICAS, SHAPES, TASK, WHOLE, gradients
from tests.sharding.conftest import printed_by
from tests.training.toy import Regression


@pytest.fixture(scope="module")
def results():
    return printed_by("compressed")


def reference(parts, bases):
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
            found[name] = np.zeros(own.shape[1:])
            for place, basis in zip(places(parts[name]), bases[name], strict=True):
                part = own[:, *place]
                left, _ = np.linalg.qr((part @ basis).sum(0))
                basis[:] = np.swapaxes(part, -1, -2).sum(0) @ left
                found[name][place] = left @ np.swapaxes(basis, -1, -2)
            errors[name] = own - found[name] / REPLICAS
        totals.append(found)
    return totals, errors


def places(part):
    """The indices of each device's part in the whole, the first axis outermost."""
    along = (
        [slice(start, start + length) for start in range(0, whole, length)]
        for whole, length in zip(part.whole, part.shape, strict=True)
    )
    return list(itertools.product(*along))


@pytest.fixture(params=["whole", "divided"])
def summed(request, results):
    """(parts, what their gradients were summed to)."""
    return {"whole": WHOLE, "divided": DIVIDED}[request.param], results["totals"][request.param]


def test_sums_are_the_papers(summed):
    parts, found = summed
    bases = {name: np.array(basis, np.float64) for name, basis in found["bases"].items()}
    assert bases.keys() == {"matrix", "stack"}  # no embeddings, no vectors
    totals, errors = reference(parts, bases)
    for ours, theirs in zip(found["totals"], totals, strict=True):
        for name, x in theirs.items():
            assert np.linalg.norm(ours[name] - x) < 1e-5 * np.linalg.norm(x), name
    for name, part in parts.items():
        ranks = [np.linalg.matrix_rank(np.array(ours[name])[i], 1e-3) for i in places(part)]
        assert (np.array(ranks) == part.rank).all()
        np.testing.assert_allclose(found["errors"][name], errors[name], atol=1e-5)


def test_nothing_is_lost_for_good(summed):
    """What all steps have summed to and what the replicas still hold is all that there was."""
    _, found = summed
    for name in found["errors"]:
        total = sum(np.array(total[name]) for total in found["totals"])
        brought = sum(gradients(step)[name].sum(0) for step in range(3))
        left = np.array(found["errors"][name]).sum(0)
        np.testing.assert_allclose(total + left, brought, atol=1e-4)


def test_what_is_compressed():
    """Matrices and stacks of them, each device's part by its share of the rank; no tables."""
    params = {name: jax.ShapeDtypeStruct(shape, np.float32) for name, shape in SHAPES.items()}
    sums = PowerSGD(RANK).sums(params, AXES, layout_of(FSDP, data=2, fsdp=4))
    assert sums == CompressedSums(WHOLE, 5 + 20 * 8, REPLICAS)  # so small ones are not divided
    params = {"w": jax.ShapeDtypeStruct((3, 100, 120), np.float32)}
    for axes, strategy, part in (
        (("layers", "embed", "mlp"), FSDP, ((3, 100, 60), (None, None, ("fsdp",)), 3)),
        (("layers", "heads", "embed"), FSDP, ((3, 50, 120), (None, ("fsdp",), None), 3)),
        (("layers", "embed", "mlp"), FSDP_TP, ((3, 50, 30), (None, ("fsdp",), ("model",)), 1)),
        (("layers", "embed", "mlp"), DP, ((3, 100, 120), (None, None, None), 5)),
    ):
        layout = layout_of(strategy, data=2, fsdp=2, model=4)
        found = PowerSGD(5).sums(params, {"w": axes}, layout).parts["w"]
        assert found == Part((3, 100, 120), *part)


def test_the_paper_saves_as_much():
    """Ramesh et al. 2021, section E.1: parameters divided among eight devices, and rank r = 896 of
    them together, send 5 r / 8 d of the blocks' gradients."""
    config = PRESETS["12b"]
    params, axes = abstract_parameters(TextToImage(DALLE(config, Execution())))
    sums = PowerSGD(896).sums(params, axes, layout_of(FSDP, data=16, fsdp=8))
    parts = sums.parts.values()
    assert {part.rank for part in parts} == {112} and {part.count for part in parts} == {8}
    matrices = 12 * config.layers * config.width**2
    assert sum(part.size for part in parts) == matrices // 8
    sent = sum(part.factors for part in parts)
    assert sent * 8 == matrices * 5 * 896 // (8 * config.width)
    assert "PowerSGD of rank 112 on each device" in sums.summary


def layout_of(strategy, **sizes):
    mesh = jax.sharding.AbstractMesh(tuple(sizes.get(name, 1) for name in MESH_AXES), MESH_AXES)
    return Layout(strategy, mesh, strategy.rules, "as asked")


def test_training_with_compressed_sums(results):
    """In micro-batches or not, it is the same; parts of matrices are other sums, as close."""
    plain, compressed, divided = (results[name] for name in ("as they are", "dp", "fsdp"))
    np.testing.assert_allclose(results["pieces"]["losses"], compressed["losses"], rtol=1e-5)
    for found in (compressed, divided):
        assert found["losses"][0] == pytest.approx(plain["losses"][0], rel=1e-6)
        assert found["losses"][1] != pytest.approx(plain["losses"][1], rel=1e-3)
        assert found["losses"][-1] < found["losses"][0] - 0.3
    assert divided["losses"][1] == pytest.approx(compressed["losses"][1], rel=0.01)
    scales = np.array(divided["extra"]["gradient_scales"])
    np.testing.assert_allclose(scales, 2.0**13 * 2 ** (4 / 1_000), rtol=1e-5)


@pytest.mark.parametrize(("strategy", "sizes"), [(DP, {"data": 8}), (FSDP, {"data": 4, "fsdp": 2})])
def test_less_is_sent(results, strategy, sizes):
    """By as much as the factors are smaller than what a device holds of the matrices."""
    sums = PowerSGD(RANK).sums(*abstract_parameters(TASK), layout_of(strategy, **sizes))
    sent = results[strategy.name]["sent"]["data"]
    numbers = sums.others + sum(part.factors for part in sums.parts.values())
    ways = sizes["data"]
    assert sent == pytest.approx(2 * (ways - 1) / ways * 4 * numbers, rel=0.02)


def test_no_more_is_sent_between_the_parts_of_a_parameter(results):
    """Sums over both axes at once count: with compression they are over one after the other."""
    compressed, plain = (
        sum(size for axes, size in results[name]["sent"].items() if "fsdp" in axes)
        for name in ("fsdp", "fsdp as it is")
    )
    assert 0 < compressed < plain


def test_what_cannot_be_compressed():
    with pytest.raises(ValueError, match="to rank 0, not 1 or more"):
        PowerSGD(0)
    with pytest.raises(ValueError, match="no gradient of this model gets smaller .* of rank 64"):
        PowerSGD(64).sums({n: np.zeros(s) for n, s in SHAPES.items()}, AXES, layout_of(DP, data=2))
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
    two = layout_of(DP, data=2)
    with pytest.raises(ValueError, match="not compressed, .* from step to step: rows"):
        compressed_sums(Regression(), two, PowerSGD(2))
    coupled = types.SimpleNamespace(couples_rows=True)
    with pytest.raises(ValueError, match="compares all rows of a batch with each other, but compr"):
        compressed_sums(coupled, two, PowerSGD(2))


def test_a_step_that_is_not_finite_leaves_errors_as_they_were(results):
    before, after = (results["not finite"][name] for name in ("before", "after"))
    assert before.keys() and before == after


def test_errors_are_divided(results):
    """Among the replicas, and as the parameters are."""
    sums = PowerSGD(RANK).sums(*abstract_parameters(TASK), layout_of(DP, data=8))
    whole = sum(4 * part.size for part in sums.parts.values())
    for name, ways in (("dp", 1), ("fsdp", 2)):
        assert results[name]["error bytes"] == pytest.approx(whole / ways, rel=0.1)

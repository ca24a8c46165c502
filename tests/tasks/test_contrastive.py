import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lmjax.models.clip import CLIP, PRESETS, CLIPConfig, at_most
from lmjax.sharding.flops import product_flops
from lmjax.sharding.mesh import Layout
from lmjax.sharding.strategies import PMAP, STRATEGIES, MeshOptions, mesh_shape
from lmjax.tasks.contrastive import Contrastive, found
from lmjax.training.optimizers import AdamW
from lmjax.training.schedules import Constant
from lmjax.training.state import abstract_parameters
from lmjax.training.step import arrange, prepare

TINY = CLIPConfig(
    size=8,
    patch=4,
    picture_layers=1,
    picture_width=16,
    picture_heads=2,
    picture_feed_forward=24,
    vocab=20,
    positions=6,
    layers=1,
    width=8,
    heads=2,
    feed_forward=16,
    joint_width=8,
)
TASK = Contrastive(CLIP(TINY))
OPTIMIZER = AdamW(Constant(1e-2))


def pairs(rows, seed=0):
    rng = np.random.default_rng(seed)
    return {
        "pictures": rng.integers(0, 256, (rows, 8, 8, 3)).astype(np.uint8),
        "captions": rng.integers(0, 20, (rows, 6)),
        "loss_weights": np.ones(rows, np.float32),
    }


@pytest.fixture(scope="module")
def params():
    return jax.jit(lambda key: TASK.init(key)[0])(jax.random.key(0))


def traced(params, batch):
    return TASK.loss(params, {}, batch, TASK.normalizers(batch), {}, 0)


compiled = jax.jit(traced)


def loss(params, batch):
    value, (metrics, _) = compiled(params, batch)
    return float(value), {name: float(x) for name, x in metrics.items()}


def test_published_parameter_count():
    params, _ = abstract_parameters(Contrastive(CLIP(PRESETS["vit-b-32"])))
    assert sum(x.size for x in jax.tree.leaves(params)) == 151_277_313


def test_the_diagonal_is_found_among_real_rows():
    logits = np.random.default_rng(0).normal(size=(4, 4)).astype(np.float32)
    logits[0, 0], logits[1, 1], logits[1, 3] = 9, 5, 7
    nll, right = found(jnp.asarray(logits), jnp.array([True, True, True, False]))
    kept = np.float64(logits[:3, :3])
    np.testing.assert_allclose(nll[:3], np.log(np.exp(kept).sum(1)) - np.diag(kept), atol=1e-6)
    assert right[:2].all() and np.isfinite(nll).all()
    assert not found(jnp.asarray(logits), jnp.ones(4, bool))[1][1]  # the fourth fits better


def test_rows_that_fill_up_are_not_compared_with(params):
    batch, filled = pairs(3), pairs(5, seed=1)
    for name, rows in batch.items():
        filled[name][:3] = rows
    filled["loss_weights"][3:] = 0
    (expected, metrics), (value, own) = loss(params, batch), loss(params, filled)
    assert value == pytest.approx(expected, abs=1e-6)
    assert own == pytest.approx(metrics, abs=1e-6)
    gradient = jax.grad(lambda params: traced(params, filled)[0])
    gradient = jax.jit(gradient)(params)
    assert all(np.isfinite(x).all() for x in jax.tree.leaves(gradient))


def test_it_learns_which_belong_together(params):
    batch = pairs(6)
    _, axes = abstract_parameters(TASK)
    optimizer = OPTIMIZER.transformation(axes, TASK.labels(params))

    def step(params, state, batch):
        gradient = jax.grad(lambda params: traced(params, batch)[0])(params)
        updates, state = optimizer.update(gradient, state, params)
        return jax.tree.map(jnp.add, params, updates), state

    before, step = loss(params, batch)[0], jax.jit(step)
    state = optimizer.init(params)
    for _ in range(30):
        params, state = step(params, state, batch)
    evaluate = jax.jit(TASK.evaluate)
    found, _ = evaluate(params, {}, batch, TASK.normalizers(batch))
    assert found["loss"] < before / 4
    assert found["text_accuracy"] == found["picture_accuracy"] == 1


def test_similarities_count_a_hundred_times_at_most(params):
    batch = pairs(4)
    at = {s: loss({**params, "scale": jnp.log(jnp.float32(s))}, batch)[0] for s in (50, 100, 400)}
    assert at[400] == pytest.approx(at[100], rel=1e-5)
    assert at[50] != pytest.approx(at[100], rel=1e-2)


def test_a_scale_above_that_can_only_come_back(params):
    """Its gradient is that at the bound where descending lowers it, and else 0."""

    def slope(scale, towards):
        return jax.grad(lambda s: towards * jnp.exp(at_most(s, math.log(100.0))))(math.log(scale))

    assert slope(50.0, 1) == pytest.approx(50, rel=1e-5) and slope(50.0, -1) < 0
    assert slope(400.0, 1) == pytest.approx(100, rel=1e-5)
    assert slope(400.0, -1) == 0
    # Pairs that are told apart wrongly are better off with a lower scale.
    batch = pairs(4)
    high = {**params, "scale": jnp.log(jnp.float32(400))}
    value = functools.partial(TASK.loss, normalizers=TASK.normalizers(batch), rngs={}, step=0)
    gradient, _ = jax.grad(value, has_aux=True)(high, {}, batch)
    assert gradient["scale"] > 0


def test_the_scale_and_biases_do_not_decay():
    params, _ = abstract_parameters(TASK)
    labels = TASK.labels(params)
    assert labels["scale"] == labels["texts"]["final_norm"]["scale"] == "no_decay"
    assert labels["texts"]["layers"]["attention"]["query_bias"] == "no_decay"
    assert labels["texts"]["layers"]["attention"]["query"] == "decay"
    assert labels["pictures"]["patches"] == labels["texts"]["embedding"] == "decay"


def test_a_batch_is_not_taken_apart():
    layout = arrange(TASK, OPTIMIZER, 8, strategy="dp", devices=jax.devices()[:1])
    prepare(TASK, OPTIMIZER, layout)
    with pytest.raises(ValueError, match="Contrastive compares all rows .* 2 micro-batches"):
        prepare(TASK, OPTIMIZER, layout, microbatches=2)
    mesh = jax.sharding.AbstractMesh((2, 1, 1), ("data", "fsdp", "model"))
    with pytest.raises(ValueError, match="Contrastive compares all rows .* pmap .* choose dp"):
        prepare(TASK, OPTIMIZER, Layout(PMAP, mesh, PMAP.rules, ""))


def test_flops_are_those_of_the_trace(params):
    batch = pairs(3)
    trace = jax.make_jaxpr(traced)(params, batch)
    shapes = {name: x.shape for name, x in batch.items()}
    assert TASK.flops(shapes) == 3 * product_flops(trace)


@pytest.mark.parametrize("strategy", STRATEGIES.values(), ids=list(STRATEGIES))
def test_it_lies_on_eight_devices(strategy):
    params, axes = abstract_parameters(Contrastive(CLIP(PRESETS["vit-b-32"])))
    shape = mesh_shape(strategy, MeshOptions(), 8, params, axes)
    mesh = jax.sharding.AbstractMesh(tuple(shape.values()), tuple(shape))
    layout = Layout(strategy, mesh, strategy.rules, "")
    parts = layout.parameters(params, axes)
    jax.tree.map(lambda x, own: layout.sharding(own).shard_shape(x.shape), params, parts)
    layers = parts["pictures"]["layers"]
    divided = strategy.name not in ("dp", "pmap")
    assert any(layers["feed_forward"]["up"]) == any(layers["attention"]["query"]) == divided


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"size": 9}, "size is 9 pixels, .* patches of 4"),
        ({"width": 9}, "CLIPConfig.width is 9, .* 2 heads"),
        ({"picture_heads": 3}, "picture_width is 16, .* 3 heads"),
        ({"end": 20}, "end is 20, not one of 20 ids"),
        ({"joint_width": 0}, "joint_width is 0, not a positive size"),
    ],
)
def test_configs_that_cannot_be(change, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(TINY, **change)


def test_inputs_that_do_not_fit(params):
    batch = pairs(2)
    with pytest.raises(ValueError, match=r"pictures are \[4, 8, 3\], .* \[8, 8, 3\]"):
        loss(params, batch | {"pictures": batch["pictures"][:, :4]})
    with pytest.raises(ValueError, match="12 tokens do not fit the 6 positions"):
        loss(params, batch | {"captions": np.tile(batch["captions"], 2)})

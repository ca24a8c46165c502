import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments.dalle_train import EMOJI
from lmjax.models.dalle import BRANCHES, DALLE, finite_branches, unscaled
from lmjax.models.layers import Execution
from lmjax.tasks.gradient_scaling import GradientScaling
from lmjax.tasks.text_to_image import TextToImage
from lmjax.training.optimizers import AdamW
from lmjax.training.schedules import Constant
from lmjax.training.state import abstract_init
from lmjax.training.step import arrange, prepare
from tests.tasks.test_text_to_image import TINY, batch

CONFIG = dataclasses.replace(TINY, layers=5)  # one block, and a layer behind it
SHAPE = (CONFIG.layers, len(BRANCHES))


def task(dtype="float32", scaling=None):
    return TextToImage(DALLE(CONFIG, Execution(dtype)), scaling=scaling)


def gradients(task, scales=None, of=1.0):
    """Of `of` times the loss, at the parameters that every task here begins with."""
    params, rows = task.init(jax.random.key(0)).params, batch()
    normalizers = {name: value / of for name, value in task.normalizers(rows).items()}
    extra = {} if scales is None else {"gradient_scales": scales}
    return gradient_of(task)(params, extra, rows, normalizers)


@functools.cache
def gradient_of(task):
    def loss(params, extra, rows, normalizers):
        return task.loss(params, extra, rows, normalizers, {}, 0)[0]

    return jax.jit(jax.grad(loss))


def test_scales_come_out_again():
    """Powers of two, so exactly; each branch its own, so that none can stand in for another's."""
    scales = 2.0 ** jnp.arange(1, 11).reshape(SHAPE)
    plain, scaled = gradients(task()), gradients(task(), scales)
    for layer in ("layers_1", "layers_3"):
        place = int(layer[-1])
        for branch, (_, name) in enumerate(BRANCHES):
            (one, *_), (other, *_) = (
                jax.tree.leaves(g["blocks"][layer][name]) for g in (plain, scaled)
            )
            np.testing.assert_array_equal(other, one * scales[place, branch])
    found = unscaled(CONFIG, scaled, scales)
    jax.tree.map(np.testing.assert_array_equal, found, plain)
    finite = finite_branches(CONFIG, found)
    assert finite.shape == SHAPE and finite.all()


def test_float16_needs_scales():
    """Gradients of so many rows that each row's is too small for float16."""
    small = 2.0**-20

    def wrong(found):
        exact = gradients(task(), of=small)
        branches = [(tree["blocks"], tree["last_0"]) for tree in (found, exact)]
        found, exact = (
            np.concatenate([np.ravel(x) for x in jax.tree.leaves(tree)]) for tree in branches
        )
        return np.linalg.norm(found - exact) / np.linalg.norm(exact)

    assert wrong(gradients(task("float16"), of=small)) > 0.3
    scales = jnp.full(SHAPE, 2.0**20)
    found = unscaled(CONFIG, gradients(task("float16"), scales, of=small), scales)
    assert finite_branches(CONFIG, found).all() and wrong(found) < 0.01


def test_a_branch_that_overflows_leaves_the_others_alone():
    scales = jnp.full(SHAPE, 2.0**10).at[2, 1].set(2.0**40)
    found = unscaled(CONFIG, gradients(task("float16"), scales), scales)
    expected = np.ones(SHAPE, bool)
    expected[2, 1] = False
    np.testing.assert_array_equal(finite_branches(CONFIG, found), expected)
    assert np.isfinite(jax.tree.leaves(found["blocks"]["layers_0"])[0]).all()
    assert np.any(found["blocks"]["layers_0"]["attention"]["query"])
    assert np.isfinite(found["embedding"]).all()


def test_scales_follow_the_paper():
    """128 replicas: from 2^20, up by 2^(1/1000), down by the root of two, once in 125 steps."""
    scaling, rng = GradientScaling(128), np.random.default_rng(0)
    scales = scaling.init(3)
    expected, last = np.full(3, 2.0**20), np.full(3, -1_000)
    after = jax.jit(scaling.after)
    for step in range(2_000):
        # Seldom, often, and always not finite.
        finite = np.array([rng.random() > 0.001, rng.random() > 0.5, False])
        scales = after(scales, finite)
        for i in range(3):
            if finite[i]:
                expected[i] *= 2 ** (1 / 1_000)
            elif step - last[i] > 125:
                expected[i] /= 2**0.5
                last[i] = step
            expected[i] = np.clip(expected[i], 2.0**14, 2.0**31)
        np.testing.assert_allclose(scales["gradient_scales"], expected, rtol=2e-4)
    assert expected[0] > 2.0**20 > expected[1] > expected[2] and expected[2] == 2.0**14


def test_a_step_that_overflows_changes_the_scales_alone():
    scaled = task("float16", GradientScaling(start=2.0**40, highest=2.0**60))
    optimizer = AdamW(Constant(1e-3))
    layout = arrange(scaled, optimizer, 4, devices=jax.devices()[:1])
    prepared = prepare(scaled, optimizer, layout)
    before = jax.jit(prepared.build)(None)
    step = jax.jit(prepared.step)
    after, outcome = step(before, batch())
    assert not np.isfinite(outcome.squares).all() and after.step == 1
    jax.tree.map(np.testing.assert_array_equal, after.params, before.params)
    np.testing.assert_allclose(after.extra["gradient_scales"], 2.0**39.5, rtol=1e-6)

    good = after._replace(extra={**after.extra, "gradient_scales": jnp.full(SHAPE, 2.0**13)})
    later, outcome = step(good, batch())
    assert np.isfinite(outcome.squares).all()
    assert np.any(later.params["embedding"] != before.params["embedding"])
    np.testing.assert_allclose(later.extra["gradient_scales"], 2.0 ** (13 + 1e-3), rtol=1e-6)


def test_no_replicas():
    with pytest.raises(ValueError, match="0 replicas, not 1 or more"):
        GradientScaling(0)


def test_bfloat16_needs_no_scales():
    with pytest.raises(ValueError, match="computes in bfloat16, .*: leave the scaling out"):
        task("bfloat16", GradientScaling())


HALF = dataclasses.replace(EMOJI.execution, dtype="float16")
SKIPPING = dataclasses.replace(EMOJI.fit, nonfinite="skip", max_skips=1_500)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"execution": HALF}, "vanish: choose bfloat16"),
        ({"gradient_scaling": 0, "execution": HALF}, "--gradient-scaling is 0, not 1"),
        ({"gradient_scaling": 1}, "and --execution.dtype is auto: add"),
        ({"gradient_scaling": 1, "execution": HALF}, "--fit.nonfinite skip --fit.max-skips 1500"),
    ],
)
def test_options_that_do_not_go_together(changes, words):
    with pytest.raises(ValueError, match=words):
        dataclasses.replace(EMOJI, **changes)


def test_scaling_is_an_option_of_training():
    run = dataclasses.replace(EMOJI, execution=HALF, fit=SKIPPING, gradient_scaling=2)
    assert abstract_init(run.task()).extra["gradient_scales"].shape == (EMOJI.model.layers, 2)

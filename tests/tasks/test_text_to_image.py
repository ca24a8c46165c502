import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lmjax.models.dalle import DALLE, DALLEConfig, caption_tokens
from lmjax.sharding.flops import product_flops
from lmjax.tasks.text_to_image import TextToImage
from lmjax.training.state import abstract_parameters

TINY = DALLEConfig(
    text_vocab=11,
    text_length=6,
    image_vocab=9,
    grid=3,
    layers=1,
    width=16,
    heads=2,
    feed_forward=24,
    conv_extent=3,
)
TASK = TextToImage(DALLE(TINY))
DEEP = TextToImage(DALLE(dataclasses.replace(TINY, layers=7)))


@functools.cache
def params_of(task):
    """Random and large enough that losses differ."""
    shapes, _ = abstract_parameters(task)
    rng = np.random.default_rng(2)
    return jax.tree.map(lambda x: jnp.asarray(0.3 * rng.normal(size=x.shape), x.dtype), shapes)


def batch():
    rng = np.random.default_rng(0)
    return {
        "captions": rng.integers(0, 11, (4, 6)),
        "captions_lengths": np.array([6, 2, 3, 1]),
        "image_tokens": rng.integers(0, 9, (4, 9)),
        "loss_weights": np.array([1.0, 1, 0, 1], np.float32),
    }


@jax.jit
def evaluate(batch, normalizers):
    return TASK.evaluate(params_of(TASK), {}, batch, normalizers)[0]


def test_the_loss_weighs_the_means_of_text_and_image():
    """Over all positions of the rows that count, padding too, each among its own vocabulary."""
    rows = batch()
    text = caption_tokens(TINY, rows["captions"], rows["captions_lengths"])
    tokens = np.concatenate([text, rows["image_tokens"]], axis=1)
    apply = jax.jit(DALLE(TINY).apply)
    logits = apply({"params": params_of(TASK)}, tokens)
    nll = -jnp.take_along_axis(jax.nn.log_softmax(logits), tokens[..., None], -1)[..., 0]
    right = logits.argmax(-1) == tokens
    counted = np.array([0, 1, 3])

    found = evaluate(rows, TASK.normalizers(rows))
    for name, part in {"text": slice(6), "image": slice(6, None)}.items():
        np.testing.assert_allclose(found[f"{name}_nll"], nll[counted, part].mean(), rtol=1e-5)
        np.testing.assert_allclose(
            found[f"{name}_accuracy"], right[counted, part].mean(), rtol=1e-5
        )
    expected = found["text_nll"] / 8 + found["image_nll"] * 7 / 8
    np.testing.assert_allclose(found["loss"], expected, rtol=1e-6)


def test_pieces_of_a_batch_add_up():
    rows = batch()
    normalizers = TASK.normalizers(rows)
    pieces = [evaluate({k: x[i : i + 2] for k, x in rows.items()}, normalizers) for i in (0, 2)]
    for name, whole in evaluate(rows, normalizers).items():
        np.testing.assert_allclose(sum(piece[name] for piece in pieces), whole, rtol=1e-5)


def test_training_reads_some_codes_wrong_but_predicts_the_right_ones():
    rows, task = batch(), dataclasses.replace(TASK, corruption=0.25)
    tokens = np.tile(task.tokens(rows), (500, 1))
    read = task.corrupted(tokens, jax.random.key(0))
    changed = read != tokens
    assert not changed[:, :6].any() and read[:, 6:].max() == 8 and read[:, 6:].min() == 0
    # One in nine random codes is the one that it replaces.
    assert changed[:, 6:].mean() == pytest.approx(0.25 * 8 / 9, abs=0.01)

    def losses(task, rngs):
        loss, (metrics, _) = task.loss(params_of(TASK), {}, rows, task.normalizers(rows), rngs, 0)
        return [float(loss), float(metrics["text_nll"])]

    key = {"dropout": jax.random.key(1)}
    clean, wrong = losses(TASK, key), losses(task, key)
    assert clean[0] != pytest.approx(wrong[0], rel=1e-3) and clean[1] == wrong[1]
    assert losses(task, {}) == losses(TASK, {})


def test_flops_are_those_of_the_products():
    rows = batch()
    normalizers = TASK.normalizers(rows)

    def loss(params):
        return DEEP.loss(params, {}, rows, normalizers, {}, 0)[0]

    counted = product_flops(jax.make_jaxpr(jax.grad(loss))(params_of(DEEP)))
    assert DEEP.flops({name: x.shape for name, x in rows.items()}) == pytest.approx(counted)


def test_axes_and_labels():
    params, axes = abstract_parameters(DEEP)
    assert axes["blocks"]["layers_1"]["attention"]["query"] == ("layers", "embed", "heads")
    assert axes["last_0"]["feed_forward"]["up"] == ("embed", "mlp")
    labels = DEEP.labels(params)
    assert labels["rows"] == labels["output"] == "decay"
    assert labels["blocks"]["layers_0"]["attention"]["query_bias"] == "no_decay"
    assert labels["last_0"]["attention_norm"]["scale"] == "no_decay"


def test_a_weight_that_is_no_share_is_refused():
    with pytest.raises(ValueError, match="text_weight is 1.5"):
        dataclasses.replace(TASK, text_weight=1.5)
    with pytest.raises(ValueError, match="corruption is 1, not a share"):
        dataclasses.replace(TASK, corruption=1)

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lmjax.interop import bart as interop_bart
from lmjax.interop import bert as interop_bert
from lmjax.interop import xlnet as interop_xlnet
from lmjax.models.bart import Bart, BartConfig
from lmjax.models.bert import Bert, BertConfig
from lmjax.models.layers import (
    Execution,
    RMSNorm,
    attention,
    drop,
    stacked,
    unboxed,
    unstacked,
)
from lmjax.models.xlnet import XLNet, XLNetConfig

WHOLE, BLOCKED = Execution(), Execution(attention="blocked")


def draw(shape, seed, dtype="float32"):
    return jax.random.normal(jax.random.key(seed), shape).astype(dtype)


def qkv(dtype="float32"):
    """Two examples, three heads, five queries, seven keys."""
    return [draw((2, length, 3, 4), seed, dtype) for seed, length in enumerate((5, 7, 7))]


def reference(q, k, v, mask, bias=None):
    """Attention spelled out in float64."""
    q, k, v = (np.asarray(x, np.float64) for x in (q, k, v))
    scores = np.einsum("btnh,bsnh->bnts", q, k) + (0 if bias is None else np.asarray(bias))
    weights = np.where(mask, np.exp(scores - scores.max(-1, keepdims=True)), 0)
    weights /= weights.sum(-1, keepdims=True)
    return np.einsum("bnts,bsnh->btnh", weights, v)


@pytest.mark.parametrize("bias_batch", [None, 1, 2])
@pytest.mark.parametrize("mask_shape", [(1, 1, 1, 7), (2, 1, 1, 7), (2, 1, 5, 7), (2, 3, 5, 7)])
@pytest.mark.parametrize("execution", [WHOLE, BLOCKED], ids=lambda e: e.attention)
def test_attention_broadcasts_mask_and_bias(execution, mask_shape, bias_batch):
    mask = jax.random.bernoulli(jax.random.key(3), 0.6, mask_shape).at[..., 0].set(True)
    bias = None if bias_batch is None else draw((bias_batch, 3, 5, 7), 4)
    with jax.default_matmul_precision("highest"):
        found = attention(*qkv(), mask, bias, execution=execution)
    np.testing.assert_allclose(found, reference(*qkv(), mask, bias), atol=2e-6)


@pytest.mark.parametrize("bias_batch", [1, 2])
def test_blocked_attention_has_the_gradients_of_whole(bias_batch):
    mask = jax.random.bernoulli(jax.random.key(3), 0.6, (2, 1, 5, 7)).at[..., 0].set(True)
    direction = draw((2, 5, 3, 4), 5)

    def grads(execution):
        def loss(q, k, v, bias):
            return (attention(q, k, v, mask, bias, execution=execution) * direction).sum()

        with jax.default_matmul_precision("highest"):
            return jax.grad(loss, argnums=(0, 1, 2, 3))(*qkv(), draw((bias_batch, 3, 5, 7), 4))

    for whole, blocked in zip(grads(WHOLE), grads(BLOCKED), strict=True):
        assert np.abs(whole).max() > 0.01
        np.testing.assert_allclose(blocked, whole, atol=2e-6)


@pytest.mark.parametrize("execution", [WHOLE, BLOCKED], ids=lambda e: e.attention)
def test_attention_of_bfloat16_has_float32_scores(execution):
    """Weights and result are rounded once each, by at most 2**-9 of themselves; scores of size 95
    in bfloat16 would cost three times as much."""
    q, k, v = qkv("bfloat16")
    q, mask = q * 16, jnp.ones((1, 1, 1, 7), bool)
    found = attention(q, k, v, mask, execution=execution)
    assert found.dtype == jnp.bfloat16
    error = np.abs(np.asarray(found, np.float64) - reference(q, k, v, mask)).max()
    assert error < 2**-8 * np.abs(v).max()


@pytest.mark.parametrize("execution", [WHOLE, BLOCKED], ids=lambda e: e.attention)
def test_attention_drops_its_rate_of_weights_and_keeps_the_mean(execution):
    # Equal scores and unit values: the output is the sum of the kept weights, scaled up.
    batch, heads, length = 4, 8, 64
    q = k = jnp.zeros((batch, length, heads, length))
    v = jnp.broadcast_to(jnp.eye(length)[None, :, None], k.shape)  # returns the weights themselves
    mask = jnp.ones((1, 1, 1, length), bool)
    weights = attention(q, k, v, mask, rate=0.3, key=jax.random.key(0), execution=execution)
    kept = np.asarray(weights) > 0
    np.testing.assert_allclose(weights[kept], 1 / length / 0.7, rtol=1e-5)
    deviation = (0.3 * 0.7 / kept.size) ** 0.5
    assert abs(kept.mean() - 0.7) < 5 * deviation
    blocks = kept.swapaxes(1, 2).reshape(batch * heads, -1)
    assert len({block.tobytes() for block in blocks}) == batch * heads  # each its own noise

    again = attention(q, k, v, mask, rate=0.3, execution=execution)
    np.testing.assert_allclose(again, 1 / length, rtol=1e-5)  # no key, nothing dropped


def test_drop_keeps_type_and_expectation():
    x = jnp.ones(100_000, jnp.bfloat16)
    dropped = drop(x, 0.1, jax.random.key(0))
    assert dropped.dtype == jnp.bfloat16
    assert abs(float((dropped == 0).mean()) - 0.1) < 0.005
    assert set(np.unique(np.asarray(dropped, np.float32))) == {0, np.float32(jnp.bfloat16(1 / 0.9))}


def test_rms_norm_has_no_mean_and_works_in_float32():
    x = draw((3, 8), 0) * 100 + 1000
    variables = {"params": {"scale": jnp.full(8, 2.0)}}
    normed = RMSNorm(1e-6, WHOLE).apply(variables, x)
    expected = 2 * x / np.sqrt((np.asarray(x) ** 2).mean(-1, keepdims=True))
    np.testing.assert_allclose(normed, expected, rtol=1e-6)
    coarse = RMSNorm(1e-6, Execution(dtype="bfloat16")).apply(variables, x.astype("bfloat16"))
    assert coarse.dtype == jnp.bfloat16
    np.testing.assert_allclose(coarse.astype("float32"), expected, rtol=2**-7)


def test_stacked_inverts_unstacked():
    params = {"a": draw((3, 2, 2), 0), "b": {"c": draw((3, 5), 1)}}
    layers = unstacked(params, 3)
    assert len(layers) == 3 and layers[1]["b"]["c"].shape == (5,)
    jax.tree.map(np.testing.assert_array_equal, stacked(layers), params)


@pytest.mark.parametrize("field", ["dtype", "remat", "attention"])
def test_execution_names_what_it_does_not_know(field):
    with pytest.raises(ValueError, match=f"{field} is 'float8', not one of"):
        Execution(**{field: "float8"})


@pytest.mark.parametrize(
    ("model", "config", "interop", "cut"),
    [(Bert, BertConfig, interop_bert, 0.88), (Bart, BartConfig, interop_bart, 1.0),
     (XLNet, XLNetConfig, interop_xlnet, 1.0)],
    ids=["BERT", "BART", "XLNet"],
)  # fmt: skip
def test_weights_begin_at_the_scale_of_their_config(model, config, interop, cut):
    """A normal distribution cut off at twice its standard deviation has 0.88 of that."""
    small = config(vocab=500, layers=1, width=64, heads=4, feed_forward=64, init_scale=0.06)
    params, _ = unboxed(model(small).init(jax.random.key(0), jnp.ones((1, 4), jnp.int32))["params"])
    assert params["embedding"].std() == pytest.approx(0.06 * cut, rel=0.02)
    assert interop.config_from_json(interop.config_to_json(small)) == small
    with pytest.raises(ValueError, match=f"{config.__name__}.init_scale is 0, not above 0"):
        config(init_scale=0)

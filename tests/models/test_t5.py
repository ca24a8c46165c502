"""The model alone; parity with transformers as a whole is tests/interop/test_t5.py."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from transformers.models.t5.modeling_t5 import T5Attention

from lmjax.models.layers import Execution, same_segment, stacked, unboxed, unstacked
from lmjax.models.t5 import (
    PRESETS,
    T5,
    DecoderLayer,
    EncoderLayer,
    T5Config,
    relative_position_bucket,
)

TINY = T5Config(
    vocab=50, layers=3, decoder_layers=2, width=16, heads=2, head_width=4, feed_forward=24
)
GATED = dataclasses.replace(TINY, gated=True, tied=False)
PLAIN = Execution()


@functools.cache
def params_of(config):
    """Parameters with every array random: ones in the norms would hide mistakes."""
    tokens = jnp.zeros((1, 1), jnp.int32)
    init = jax.jit(T5(config).init)
    params, _ = unboxed(init(jax.random.key(0), tokens, tokens)["params"])
    rng = np.random.default_rng(0)
    return jax.tree.map(lambda x: x + 0.1 * rng.normal(size=x.shape).astype("f4"), params)


def texts(length=12, batch=2):
    rng = np.random.default_rng(0)
    inputs, decoder_inputs = rng.integers(2, 50, (2, batch, length))
    decoder_inputs[:, 0] = 0
    return jnp.asarray(inputs), jnp.asarray(decoder_inputs)


@functools.cache
def applied(config, execution, method):
    """A compiled `apply`; parameters first, then the key for dropout (or None)."""

    def run(params, key, *inputs):
        rngs = None if key is None else {"dropout": key}
        return T5(config, execution).apply({"params": params}, *inputs, rngs=rngs, method=method)

    return jax.jit(run)


def apply(config, *inputs, execution=PLAIN, key=None, params=None, method=T5.__call__):
    params = params_of(config) if params is None else params
    with jax.default_matmul_precision("highest"):
        return applied(config, execution, method)(params, key, *inputs)


# --- sizes

COUNTS = {
    "small": 60_506_624,
    "base": 222_903_552,
    "large": 737_668_096,
    "3b": 2_851_598_336,
    "11b": 11_307_321_344,
    "v1_1-small": 76_961_152,
    "v1_1-base": 247_577_856,
    "v1_1-large": 783_150_080,
    "v1_1-xl": 2_849_757_184,
    "v1_1-xxl": 11_135_332_352,
    "mt5-small": 300_176_768,
    "mt5-base": 582_401_280,
    "mt5-large": 1_229_581_312,
    "mt5-xl": 3_742_619_648,
    "mt5-xxl": 12_921_057_280,
}


def test_there_is_a_count_for_every_preset():
    assert PRESETS.keys() == COUNTS.keys()


@pytest.mark.parametrize("name", PRESETS)
def test_published_parameter_counts(name):
    tokens = jnp.zeros((1, 1), jnp.int32)
    init = T5(PRESETS[name]).init
    shapes = jax.eval_shape(lambda: unboxed(init(jax.random.key(0), tokens, tokens))[0])
    assert sum(x.size for x in jax.tree.leaves(shapes)) == COUNTS[name]


@pytest.mark.parametrize(
    "field, value",
    [
        ("vocab", 0),
        ("layers", -1),
        ("decoder_layers", 0),
        ("heads", 0),
        ("dropout", 1.0),
        ("dropout", -0.1),
        ("relative_buckets", 30),
        ("relative_distance", 16),
    ],
)
def test_an_impossible_config_is_refused_by_name(field, value):
    with pytest.raises(ValueError, match=rf"{field}\b.*[ (]{value}\b"):
        T5Config(**{field: value})


def test_the_decoder_is_as_deep_as_the_encoder_unless_told():
    assert T5Config(layers=3).decoder_layers == 3
    assert T5Config(layers=3, decoder_layers=5).decoder_layers == 5


# --- relative positions


@pytest.mark.parametrize("bidirectional", [True, False])
@pytest.mark.parametrize("buckets, max_distance", [(32, 128), (8, 20)])
def test_buckets_are_those_of_transformers(bidirectional, buckets, max_distance):
    distance = np.arange(-1000, 1001)
    found = relative_position_bucket(jnp.asarray(distance), bidirectional, buckets, max_distance)
    expected = T5Attention._relative_position_bucket(
        torch.tensor(distance), bidirectional, buckets, max_distance
    )
    np.testing.assert_array_equal(found, expected.numpy())


def test_logarithmic_buckets_begin_where_the_paper_has_them():
    distance = jnp.arange(200)
    both = np.asarray(relative_position_bucket(-distance, True, 32, 128))
    assert [np.argmax(both == b) for b in range(8, 16)] == [8, 12, 16, 23, 32, 46, 64, 91]
    causal = np.asarray(relative_position_bucket(-distance, False, 32, 128))
    starts = [16, 19, 21, 24, 27, 31, 35, 40, 46, 52, 59, 67, 77, 87, 99, 113]
    assert [np.argmax(causal == b) for b in range(16, 32)] == starts


# --- who sees whom


def test_a_position_depends_on_exactly_those_before_it():
    inputs, decoder_inputs = texts(length=7, batch=1)
    t = 3

    def logit(embedded):
        model = T5(TINY).bind({"params": params_of(TINY)})
        segments = jnp.ones_like(inputs)
        encoded = model.encode(inputs, segments)
        x = model.decoder(embedded, encoded, jnp.ones_like(decoder_inputs), segments)
        return model.scale(x)[0, t].sum()

    embedded = params_of(TINY)["embedding"][decoder_inputs]
    gradient = jax.jit(jax.grad(logit))(embedded)
    size = np.abs(gradient).sum(-1)[0]
    assert (size[: t + 1] > 1e-6).all()
    assert (size[t + 1 :] == 0).all()


def test_padding_of_the_inputs_changes_nothing():
    inputs, decoder_inputs = texts()
    padded = jnp.pad(inputs, ((0, 0), (0, 5)))
    one, other = (apply(TINY, x, decoder_inputs) for x in (inputs, padded))
    np.testing.assert_allclose(one, other, atol=1e-5)


@pytest.mark.parametrize("attention", ["whole", "blocked"])
def test_packed_texts_have_the_features_they_have_alone(attention):
    inputs, decoder_inputs = texts(length=14, batch=1)
    inputs_ids = jnp.array([[1] * 5 + [2] * 7 + [0] * 2])
    targets_ids = jnp.array([[1] * 8 + [2] * 4 + [0] * 2])
    features = apply(
        GATED,
        inputs,
        decoder_inputs,
        inputs_ids,
        targets_ids,
        execution=Execution(attention=attention),
        method=T5.features,
    )
    for source, target in [((0, 5), (0, 8)), ((5, 12), (8, 12))]:
        alone = apply(
            GATED, inputs[:, slice(*source)], decoder_inputs[:, slice(*target)], method=T5.features
        )
        np.testing.assert_allclose(features[:, slice(*target)], alone, atol=1e-5)


# --- how it runs


def test_the_scanned_stack_is_its_layers_one_by_one():
    inputs, decoder_inputs = texts()
    params, model = params_of(GATED), T5(GATED)
    with jax.default_matmul_precision("highest"):
        bound, segments = model.bind({"params": params}), jnp.ones_like(inputs)
        positions, mask = jnp.arange(inputs.shape[1]), same_segment(segments, segments)
        x, layer = bound.embed(inputs), EncoderLayer(GATED, PLAIN)
        bias = bound.encoder.relative_bias(positions, positions)[None]
        for own in unstacked(params["encoder"]["layers"], GATED.layers):
            x, _ = layer.apply({"params": own}, x, mask, bias)
        encoded = bound.encoder.final_norm(x)

        x, layer = bound.embed(decoder_inputs), DecoderLayer(GATED, PLAIN)
        bias = bound.decoder.relative_bias(positions, positions)[None]
        causal = jnp.tril(jnp.ones((12, 12), bool))[None, None]
        for own in unstacked(params["decoder"]["layers"], GATED.decoder_layers):
            x, _ = layer.apply({"params": own}, x, encoded, causal, mask, bias)
        expected = bound.logits(bound.decoder.final_norm(x))
    np.testing.assert_allclose(apply(GATED, inputs, decoder_inputs), expected, atol=2e-5)


def test_stacks_of_real_parameters_survive_unstacking():
    stack = params_of(TINY)["decoder"]["layers"]
    again = stacked(unstacked(stack, TINY.decoder_layers))
    jax.tree.map(np.testing.assert_array_equal, again, stack)


@functools.cache
def value_and_gradients(execution, seed=None):
    inputs, decoder_inputs = texts()
    # XLA's own generator, because Threefry takes long to compile.
    rngs = None if seed is None else {"dropout": jax.random.key(seed, impl="rbg")}

    def loss(params):
        model = T5(TINY, execution)
        logits = model.apply({"params": params}, inputs, decoder_inputs, rngs=rngs)
        return (jax.nn.logsumexp(logits, -1) - logits[..., 7]).mean()

    with jax.default_matmul_precision("highest"):
        return jax.jit(jax.value_and_grad(loss))(params_of(TINY))


@pytest.mark.parametrize(
    "execution, seed",
    [  # blocks draw noise of their own: tests/models/test_layers.py has its rate
        (Execution(attention="blocked"), None),
        (Execution(remat="matmuls"), 2),
        (Execution(remat="full"), 2),
        (Execution(remat="full", attention="blocked"), None),
    ],
    ids=["blocked", "matmuls", "full", "full-blocked"],
)
def test_ways_to_run_have_equal_values_and_gradients(execution, seed):
    plain, other = value_and_gradients(PLAIN, seed), value_and_gradients(execution, seed)
    for wanted, found in zip(jax.tree.leaves(plain), jax.tree.leaves(other), strict=True):
        np.testing.assert_allclose(found, wanted, atol=1e-5 * np.abs(wanted).max())


def test_dropout_is_being_given_a_key():
    inputs, decoder_inputs = texts()
    quiet = apply(TINY, inputs, decoder_inputs)
    np.testing.assert_array_equal(apply(TINY, inputs, decoder_inputs), quiet)
    keys = [jax.random.key(seed, impl="rbg") for seed in (0, 0, 1)]
    one, same, other = (apply(TINY, inputs, decoder_inputs, key=key) for key in keys)
    np.testing.assert_array_equal(one, same)
    assert not np.allclose(one, quiet) and not np.allclose(one, other)
    never = dataclasses.replace(TINY, dropout=0.0)
    dry = apply(never, inputs, decoder_inputs, params=params_of(TINY), key=keys[0])
    np.testing.assert_allclose(dry, quiet, atol=1e-6)


@pytest.mark.parametrize("config", [TINY, GATED], ids=["1.0", "1.1"])
def test_bfloat16_stays_close(config):
    inputs, decoder_inputs = texts()
    execution = Execution(dtype="bfloat16")
    features = apply(config, inputs, decoder_inputs, execution=execution, method=T5.features)
    assert features.dtype == jnp.bfloat16
    coarse = apply(config, inputs, decoder_inputs, execution=execution)
    assert coarse.dtype == jnp.float32
    exact = apply(config, inputs, decoder_inputs)
    assert np.abs(coarse - exact).mean() < 0.02 * np.abs(exact).mean()

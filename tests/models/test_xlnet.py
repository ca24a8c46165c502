"""What of XLNet has no counterpart in transformers; parity is in tests/interop/test_xlnet.py."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lmjax.decoding.beam_search import Beam
from lmjax.decoding.generate import generate
from lmjax.models.layers import unboxed, unstacked
from lmjax.models.xlnet import (
    Layer,
    XLNet,
    XLNetConfig,
    extend,
    no_memory,
    relative_shift,
    sinusoids,
    start_decoding,
)

SMALL = XLNetConfig(vocab=31, layers=3, width=16, heads=2, feed_forward=24, memory=5)


def test_relative_shift():
    """Three queries after two states of memory: column j of row i is the distance 2 + i - j."""
    distances = jnp.tile(jnp.arange(5, -3, -1), (3, 1))
    golden = [[2, 1, 0, -1, -2], [3, 2, 1, 0, -1], [4, 3, 2, 1, 0]]
    assert relative_shift(distances, 5).tolist() == golden
    places = jnp.array([2, 0, 1])
    assert relative_shift(distances, 5, places).tolist() == [golden[i] for i in places]


def test_sinusoids():
    found = sinusoids(jnp.array([3, -2]), 4)
    for row, distance in zip(found, (3, -2), strict=True):
        angles = distance * np.array([1, 0.01])
        np.testing.assert_allclose(row, [*np.sin(angles), *np.cos(angles)], atol=1e-6)


def test_the_scanned_layers_are_those_layers_one_by_one():
    model = XLNet(SMALL)
    tokens = jax.random.randint(jax.random.key(1), (2, 7), 0, 31)
    order, places = jnp.tile(jnp.arange(7), (2, 1)), jnp.array([[1, 5], [0, 6]])
    params, _ = unboxed(model.init(jax.random.key(0), tokens)["params"])
    memory = jax.random.normal(jax.random.key(2), no_memory(SMALL, 2).shape)
    expected, kept = model.apply(
        {"params": params}, tokens, memory, order=order, places=places, method="features"
    )

    own = order[:, :2] * 0 + places  # the order of the places that guess
    bound = model.bind({"params": params})
    views = (
        bound.view((order, None, None), (order, None, None), None, 5, 7, None),
        bound.view((own, None, None), (order, None, None), places, 5, 7, None),
    )
    g = jnp.broadcast_to(params["mask_embedding"], (2, 2, 16))
    streams = (params["embedding"][tokens], g)
    encodings = sinusoids(jnp.arange(12, -7, -1), 16)[None]
    for i, layer in enumerate(unstacked(params["layers"], 3)):
        streams, state = Layer(SMALL, model.execution).apply(
            {"params": layer}, streams, memory[i], encodings, views
        )
        np.testing.assert_allclose(state, kept[i], atol=1e-6)
    np.testing.assert_allclose(streams[1], expected, atol=1e-5)


def test_no_gradient_flows_into_the_text_before():
    model = XLNet(SMALL)
    tokens = jnp.arange(7)[None]
    params, _ = unboxed(model.init(jax.random.key(0), tokens)["params"])

    def kept(params):
        return (model.apply({"params": params}, tokens, no_memory(SMALL, 1))[1] ** 2).sum()

    assert kept(params) > 0
    assert all((g == 0).all() for g in jax.tree.leaves(jax.jit(jax.grad(kept))(params)))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"width": 15, "heads": 3}, "width is 15"),
        ({"activation": "swish"}, "activation is 'swish'"),
        ({"memory": -1}, "memory is -1"),
        ({"reuse": 0}, "reuse 0"),
    ],
)
def test_bad_settings(change, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(SMALL, **change)


def test_training_flops_count_the_products():
    config = dataclasses.replace(SMALL, layers=1, memory=8)
    d, f, keys, rows = 16, 24, 24, 20
    kernels = rows * (2 * d**2 + 2 * d * f) + keys * 2 * d**2
    scores = rows * d * (2 * keys + keys + 16)
    per_row = kernels + scores + 4 * d * 31
    assert config.training_flops(2, 16, 4) == 6 * (2 * per_row + (keys + 16) * d**2)


# --- decoding


def in_the_order_of_the_text(model, params, tokens, memory=None):
    """Logits of each token's successor by one full pass: the query at place i + 1 reads up to i."""
    padded = jnp.pad(tokens, ((0, 0), (0, 1)))  # what stands last is read by nobody
    order = jnp.broadcast_to(jnp.arange(padded.shape[1]), padded.shape)
    logits, _ = model.apply({"params": params}, padded, memory, order=order, places=order[:, 1:])
    return logits


@pytest.mark.parametrize("remembered", [0, 5])
def test_cached_decoding_is_a_full_pass(remembered):
    model = XLNet(SMALL)
    tokens = jax.random.randint(jax.random.key(1), (3, 9), 0, 31)
    params, _ = unboxed(model.init(jax.random.key(0), tokens)["params"])
    params = jax.tree.map(lambda x: 8 * x, params)
    memory = None
    if remembered:
        memory = jax.random.normal(jax.random.key(2), no_memory(SMALL, 3).shape)
    expected = in_the_order_of_the_text(model, params, tokens, memory)
    state, found = start_decoding(model, params, 3, 12, memory), []
    for part in jnp.split(tokens, [4, 5, 6], axis=1):
        logits, state = extend(model, params, part, state)
        found.append(logits)
    np.testing.assert_allclose(jnp.concatenate(found, 1), expected, atol=2e-5)
    assert state.length.tolist() == [remembered + 9] * 3
    assert jnp.abs(expected).max() > 1


def test_gradients_flow_through_the_state():
    model = XLNet(SMALL)
    tokens = jnp.arange(6)[None]
    params, _ = unboxed(model.init(jax.random.key(0), tokens)["params"])
    _, state = extend(model, params, tokens, start_decoding(model, params, 1, 8))

    def loss(layers):
        return extend(model, params, tokens[:, :1], state._replace(layers=layers))[0].max()

    gradients = jax.jit(jax.grad(loss))(state.layers)
    assert all(jnp.abs(g[:, :, :6]).max() > 0 for g in jax.tree.leaves(gradients))
    assert all((g[:, :, 6:] == 0).all() for g in jax.tree.leaves(gradients))


def test_texts_of_several_lengths_are_continued():
    """Greedily, and by two beams: each as a full pass over its own text would have it."""
    model, lengths = XLNet(SMALL), [6, 3]
    tokens = jax.random.randint(jax.random.key(1), (2, 6), 0, 31)
    params, _ = unboxed(model.init(jax.random.key(0), tokens)["params"])
    params = jax.tree.map(lambda x: 8 * x, params)
    full = jax.jit(lambda tokens: in_the_order_of_the_text(model, params, tokens))
    found = generate(model, params, tokens, lengths=jnp.array(lengths), max_length=4, eos=None)
    for row, length in enumerate(lengths):
        text = tokens[row, :length].tolist()
        for _ in range(4):
            padded = jnp.array([text + [0] * (10 - len(text))])
            text.append(int(full(padded)[0, len(text) - 1].argmax()))
        assert found.tokens[row].tolist() == text[length:]

    beams = generate(model, params, tokens, max_length=2, strategy=Beam(31, alpha=0), eos=None)
    for row in range(2):
        first = jax.nn.log_softmax(full(tokens[row : row + 1])[0, -1])
        longer = jnp.concatenate([jnp.tile(tokens[row], (31, 1)), jnp.arange(31)[:, None]], 1)
        both = first[:, None] + jax.nn.log_softmax(full(longer)[:, -1])
        best = jnp.unravel_index(both.argmax(), both.shape)
        assert beams.tokens[row, 0].tolist() == [int(i) for i in best]

"""DALL-E's transformer, beside a reference that computes a key at a time."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lmjax.models import dalle
from lmjax.models.dalle import (
    DALLE,
    PRESETS,
    DALLEConfig,
    Layer,
    caption_tokens,
    extend,
    extender,
    layer_parameters,
    mask,
    start_decoding,
    stream_attention,
)
from lmjax.models.layers import Execution, unboxed, whole_attention
from lmjax.sharding.flops import product_flops

KINDS = ("row", "column", "conv")
TINY = DALLEConfig(
    text_vocab=11,
    text_length=5,
    image_vocab=7,
    grid=4,
    layers=6,
    width=16,
    heads=2,
    feed_forward=24,
    conv_extent=3,
)


def shapes(config):
    tokens = jnp.zeros((1, config.text_length), jnp.int32)
    init = functools.partial(DALLE(config).init, jax.random.key(0), tokens)
    return jax.eval_shape(lambda: unboxed(init()["params"])[0])


@functools.cache
def params_of(config):
    """Every array random: ones in the norms would hide mistakes."""
    rng = np.random.default_rng(0)
    return jax.tree.map(
        lambda x: jnp.asarray(0.4 * rng.normal(size=x.shape), x.dtype), shapes(config)
    )


def streams(config, rows=2):
    rng = np.random.default_rng(1)
    captions = rng.integers(0, config.text_vocab, (rows, config.text_length))
    lengths = rng.integers(1, config.text_length + 1, rows)
    text = caption_tokens(config, captions, lengths)
    image = rng.integers(0, config.image_vocab, (rows, config.image_length))
    return jnp.concatenate([text, image], axis=1)


@functools.cache
def compiled(config):
    def run(params, tokens):
        return DALLE(config).apply({"params": params}, tokens)

    return jax.jit(run)


# --- sizes


def count(params):
    return sum(x.size for x in jax.tree.leaves(params))


@pytest.mark.parametrize(
    ("preset", "layers", "everything"),
    [
        ("12b", 12_095_479_808, 12_293_824_256),
        ("coco", 75_657_216, 101_250_048),
        ("korean-coco", 75_657_216, 101_250_048),
        ("emoji", 927_840, 1_761_440),
    ],
)
def test_published_sizes(preset, layers, everything):
    params = shapes(PRESETS[preset])
    assert count(params) == everything
    stacks = {k: v for k, v in params.items() if k == "blocks" or k.startswith("last")}
    assert count(stacks) == layers


def test_blocks_of_four_layers_are_stacked_and_the_last_four_stand_alone():
    config, params = PRESETS["12b"], shapes(PRESETS["12b"])
    for i, kind in enumerate(config.kinds, start=1):  # appendix B.1
        assert kind == ("conv" if i == 64 else "column" if (i - 2) % 4 == 0 else "row")
    assert sorted(params["blocks"]) == [f"layers_{i}" for i in range(4)]
    assert {x.shape[0] for x in jax.tree.leaves(params["blocks"])} == {15}
    assert sum(name.startswith("last") for name in params) == 4


# --- which positions a position sees


def image_keys(kind, grid, extent, p):
    """The image keys of position p, one by one."""
    if kind == "row":
        keys = range(p - grid, p + 1)
    elif kind == "column":
        keys = range(p % grid, p + 1, grid)
    else:
        half = extent // 2
        kernel = [(y, x) for y in range(-half, 1) for x in range(-half, half + 1)]
        keys = [p + grid * y + x for y, x in kernel if (y, x) <= (0, 0)]
    return {key for key in keys if key >= 0}


def explicit_mask(kind, config):
    text, length = config.text_length, config.length
    seen = np.zeros((length, length), bool)
    for place in range(length):
        seen[place, : min(place + 1, text)] = True
        if place >= text:
            for key in image_keys(kind, config.grid, config.conv_extent, place - text):
                seen[place, text + key] = True
    return seen


@pytest.mark.parametrize(("grid", "extent"), [(1, 1), (2, 1), (4, 3), (7, 7)])
@pytest.mark.parametrize("kind", KINDS)
def test_masks(kind, grid, extent):
    config = dataclasses.replace(TINY, grid=grid, conv_extent=extent)
    np.testing.assert_array_equal(mask(kind, config), explicit_mask(kind, config))


@pytest.mark.parametrize(
    ("kind", "most", "everything"),
    [
        # 1,024 windows of 33, but for those that begin before the image.
        ("row", 33, 1_024 * 33 - 32 * 33 // 2),
        ("column", 32, 32 * 32 * 33 // 2),
        # Five rows of eleven, five to the left and itself, but for what lies before the image.
        ("conv", 61, 1_024 * 61 - sum(32 * r + x for r in range(1, 6) for x in range(-5, 6)) - 15),
    ],
)
def test_the_papers_masks_have_so_many_keys(kind, most, everything):
    image = mask(kind, PRESETS["12b"])[256:]
    assert image[:, :256].all()
    assert image[:, 256:].sum(1).max() == most and image[:, 256:].sum() == everything


# --- attention by blocks


def heads(config, rows=2):
    shape = (rows, config.length, config.heads, config.head_width)
    return jax.random.normal(jax.random.key(3), (3, *shape))


@pytest.mark.parametrize(("grid", "extent"), [(1, 1), (4, 3), (6, 5)])
@pytest.mark.parametrize("kind", KINDS)
def test_blocks_are_masked_attention(kind, grid, extent):
    config = dataclasses.replace(TINY, grid=grid, conv_extent=extent)

    @jax.jit
    def both(operands, cotangent):
        seen = mask(kind, config)
        by_blocks, pull = jax.vjp(lambda x: stream_attention(config, kind, *x), operands)
        masked, pull_masked = jax.vjp(lambda x: whole_attention(*x, seen), operands)
        return (by_blocks, pull(cotangent)), (masked, pull_masked(cotangent))

    operands = heads(config)
    by_blocks, masked = both(operands, jnp.cos(operands[0]))
    for ours, theirs in zip(jax.tree.leaves(by_blocks), jax.tree.leaves(masked), strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("kind", "share"), [("row", 0.24), ("column", 0.22), ("conv", 0.34)])
def test_attention_costs_what_its_blocks_do(kind, share):
    """Of the full product of 1,280 x 1,280, counted in the programs, forwards and backwards."""
    config = PRESETS["12b"]
    operand = jax.ShapeDtypeStruct((1, config.length, config.heads, config.head_width), jnp.float32)

    def flops(attention):
        gradient = jax.grad(lambda *qkv: attention(*qkv).sum(), (0, 1, 2))
        return product_flops(jax.make_jaxpr(gradient)(operand, operand, operand))

    by_blocks = flops(functools.partial(stream_attention, config, kind))
    full = flops(lambda *qkv: whole_attention(*qkv, mask(kind, config)))
    assert by_blocks / full == share == config.scores(kind) / config.length**2


@pytest.mark.parametrize("kind", KINDS)
def test_a_layer_sees_what_its_mask_says(kind):
    """By gradients: each position of a layer's output depends on just those positions."""
    layer = Layer(TINY, Execution(), kind)
    params = layer_parameters(TINY, params_of(TINY))[0]
    x, direction = jax.random.normal(jax.random.key(4), (2, 1, TINY.length, TINY.width))

    def output(x):
        return (layer.apply({"params": params}, x)[0] * direction).sum((0, 2))

    gradients = jax.jit(jax.jacobian(output))(x)
    np.testing.assert_array_equal((gradients != 0).any((1, 3)), mask(kind, TINY))


@pytest.mark.parametrize("attention", ["whole", "blocked"])
def test_attention_weights_are_dropped(attention):
    """Of text and image alike, the rest growing so that their sum stays what it was on average."""
    config = dataclasses.replace(TINY, dropout=0.5)
    q, k, _ = heads(config, rows=16)
    operands = (q, k, jnp.ones_like(q))  # so that what comes out is the sum of the weights

    def attended(operands, key):
        return stream_attention(config, "row", *operands, rate=0.5, key=key)

    execution = Execution(attention=attention)
    run = jax.jit(dalle.attend, static_argnums=(0, 3))
    sums = run(attended, operands, jax.random.key(0), execution)[..., 0]
    for part in jnp.split(sums, [config.text_length], axis=1):
        assert part.std() > 0.2 and abs(part.mean() - 1) < 4 * part.std() / part.size**0.5


# --- the model


def reference(config, params, tokens):
    """Logits in float64: a position and a head at a time, over just the keys that it sees."""
    p = jax.tree.map(lambda x: np.asarray(x, np.float64), params)
    text, grid, half = config.text_length, config.grid, config.image_vocab

    def norm(x, own):
        x = x - x.mean(-1, keepdims=True)
        x = x / np.sqrt((x**2).mean(-1, keepdims=True) + config.norm_epsilon)
        return x * own["scale"] + own["bias"]

    def affine(x, own, name):
        return x @ own[name] + own[f"{name}_bias"]

    def attend(q, k, v, seen):
        out = np.zeros_like(q)
        for head in np.split(np.arange(config.width), config.heads):
            for place in range(config.length):
                scores = k[seen[place]][:, head] @ q[place, head] / np.sqrt(len(head))
                weights = np.exp(scores - scores.max())
                out[place, head] = weights / weights.sum() @ v[seen[place]][:, head]
        return out

    def row(tokens):
        inputs = [config.image_vocab + config.text_vocab, *tokens[:-1]]
        image = [p["rows"][i // grid] + p["columns"][i % grid] for i in range(grid**2)]
        x = p["embedding"][inputs] + np.concatenate([p["positions"], image])
        for i in range(config.layers):
            if i // 4 < config.blocks:
                block = p["blocks"][f"layers_{i % 4}"]
                own = jax.tree.map(lambda x, i=i: x[i // 4], block)
            else:
                own = p[f"last_{i - 4 * config.blocks}"]
            last = i == config.layers - 1
            kind = "conv" if last else "column" if i % 4 == 1 else "row"
            y, a, f = norm(x, own["attention_norm"]), own["attention"], own["feed_forward"]
            qkv = (affine(y, a, name) for name in ("query", "key", "value"))
            x = x + affine(attend(*qkv, explicit_mask(kind, config)), a, "out")
            y = affine(norm(x, own["feed_forward_norm"]), f, "up")
            y = y / 2 * (1 + np.tanh(np.sqrt(2 / np.pi) * (y + 0.044715 * y**3)))
            x = x + affine(y, f, "down")
        logits = norm(x, p["final_norm"]) @ p["output"].T
        logits[:text, :half], logits[text:, half:] = -np.inf, -np.inf
        return logits

    return np.stack([row(each) for each in np.asarray(tokens)])


@pytest.mark.parametrize("layers", [3, 10])
def test_logits_are_those_of_the_reference(layers):
    """Three layers alone; two blocks and two layers."""
    config = dataclasses.replace(TINY, layers=layers)
    params, tokens = params_of(config), streams(config)
    with jax.default_matmul_precision("highest"):
        logits = compiled(config)(params, tokens)
    expected = reference(config, params, tokens)
    possible = np.isfinite(expected)
    np.testing.assert_allclose(logits[possible], expected[possible], atol=2e-4, rtol=0)
    assert (logits[~possible] == jnp.finfo(jnp.float32).min).all()


def test_the_scanned_layers_are_those_layers_one_by_one():
    """Forwards and backwards, with and without rematerialisation."""
    config = dataclasses.replace(TINY, layers=5)
    model, tokens = DALLE(config, Execution(remat="full")), streams(config)

    def scanned(params):
        return model.apply({"params": params}, tokens, method="features")

    def unrolled(params):
        bound = model.bind({"params": params})
        x = bound.embed_stream(tokens)
        for kind, own in zip(config.kinds, layer_parameters(config, params), strict=True):
            x, _ = Layer(config, model.execution, kind).apply({"params": own}, x)
        return bound.final_norm(x)

    def differentiated(params, features):
        value, pull = jax.vjp(features, params)
        return value, pull(jnp.cos(value))

    run = jax.jit(differentiated, static_argnums=1)
    both = (run(params_of(config), features) for features in (scanned, unrolled))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=2e-5), *both)


def test_nothing_depends_on_itself_or_on_what_follows():
    tokens, length = streams(TINY, rows=1), TINY.length
    before = compiled(TINY)(params_of(TINY), jnp.tile(tokens, (length, 1)))
    image = jnp.arange(length) >= TINY.text_length
    other = jnp.where(image, (tokens + 1) % TINY.image_vocab, TINY.image_vocab)
    changed = jnp.where(jnp.eye(length, dtype=bool), other, tokens)
    after = compiled(TINY)(params_of(TINY), changed)
    differs = (before != after).any(-1)  # [token changed, position]
    assert not jnp.tril(differs).any() and differs[:-1].any(1).all()


def test_captions_are_padded_by_position():
    tokens = caption_tokens(TINY, np.array([[3, 10, 4], [0, 9, 9]]), np.array([3, 1]))
    assert tokens.tolist() == [[10, 17, 11, 21, 22], [7, 19, 20, 21, 22]]
    assert (TINY.start, TINY.vocab) == (18, 23)
    full = caption_tokens(TINY, np.array([[3, 10, 4, 1, 2]]), np.array([5]))
    assert full.tolist() == [[10, 17, 11, 8, 9]]


def test_an_image_of_another_size_is_refused():
    tokens = jnp.zeros((1, 6), jnp.int32)
    with pytest.raises(ValueError, match="6 tokens are no stream of this DALL-E: expected 5"):
        jax.eval_shape(DALLE(TINY).init, jax.random.key(0), tokens)


def test_captions_that_are_too_long_are_refused():
    with pytest.raises(ValueError, match="captions of 6 tokens do not fit the 5"):
        caption_tokens(TINY, np.zeros((1, 6)), np.array([2]))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"heads": 3}, "does not divide into 3 heads"),
        ({"text_length": 0}, "text_length is 0, not a positive size"),
        ({"conv_extent": 2}, "conv_extent is 2, not an odd number"),
        ({"conv_extent": 5}, "conv_extent is 5"),
        ({"grid": 0}, "grid is 0"),
    ],
)
def test_bad_settings(change, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(TINY, **change)


# --- decoding


TEXTS, SAMPLES = 2, 3


def drawings(config):
    """Streams of which each caption has several pictures; and the logits of their images."""
    tokens = streams(config, rows=TEXTS * SAMPLES)
    text, image = jnp.split(tokens, [config.text_length], axis=1)
    tokens = jnp.concatenate([jnp.repeat(text[:TEXTS], SAMPLES, axis=0), image], axis=1)
    logits = compiled(config)(params_of(config), tokens)
    inputs = tokens[:, config.text_length - 1 : -1]
    return text[:TEXTS], inputs, logits[:, config.text_length :, : config.image_vocab]


@functools.cache
def decoder(config):
    """The state after the texts of `drawings`, and a compiled `extend`."""
    model, params = DALLE(config), params_of(config)
    start = jax.jit(start_decoding, static_argnums=(0, 3))
    run = jax.jit(extender(model, params))
    return start(model, params, drawings(config)[0], SAMPLES), run


@pytest.mark.parametrize("sizes", [[1] * 16, [3, 1, 6, 6]])
def test_extending_in_pieces_is_the_full_pass(sizes):
    """Of pictures that share the memory of their caption."""
    (_, inputs, expected), (state, run) = drawings(TINY), decoder(TINY)
    assert state.layers[0].memory.keys.shape == (TEXTS, 2, 5, 8)
    assert state.layers[0].past.keys.shape == (TEXTS * SAMPLES, 2, 16, 8)
    logits = []
    for piece in jnp.split(inputs, np.cumsum(sizes)[:-1], axis=1):
        new, state = run(piece, state)
        logits.append(new)
    assert (state.length == 16).all()
    np.testing.assert_allclose(jnp.concatenate(logits, axis=1), expected, atol=2e-5)


def test_rows_may_have_read_different_lengths():
    (_, inputs, expected), (state, run) = drawings(TINY), decoder(TINY)
    for start in (0, 6):
        _, state = run(inputs[:, start : start + 6], state)
    read = np.array([11, 6, 0, 3, 12, 8])
    positions = read[:, None] + np.arange(3)
    logits, state = run(
        jnp.take_along_axis(inputs, positions, 1), state._replace(length=jnp.asarray(read))
    )
    expected = jnp.take_along_axis(expected, positions[..., None], 1)
    np.testing.assert_allclose(logits, expected, atol=2e-5)
    assert state.length.tolist() == (read + 3).tolist()


def test_gradients_reach_the_state():
    """What is drawn next depends on every layer's memory of the text, and on its past."""
    config = dataclasses.replace(TINY, layers=3)
    model, params, tokens = DALLE(config), params_of(config), streams(config)
    text, image = jnp.split(tokens, [config.text_length], axis=1)
    start = jax.eval_shape(lambda: start_decoding(model, params, text))
    state = jax.tree.map(lambda x: jnp.full(x.shape, 4, x.dtype), start)

    def loss(layers):  # after a row of the image
        return extend(model, params, image[:, 3:4], state._replace(layers=layers))[0].std()

    gradients = jax.jit(jax.grad(loss))(state.layers)
    for layer in gradients:
        assert jnp.abs(layer.memory.values).max() > 0 and jnp.abs(layer.past.values).max() > 0

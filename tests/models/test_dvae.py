"""The discrete VAE against its reference, spelled out here in PyTorch after openai/DALL-E."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.special
import torch
from torch.nn import functional

from lmjax.models.dvae import (
    DVAE,
    PRESETS,
    DVAEConfig,
    LogitLaplace,
    codes_of,
    gumbel_softmax,
    kl_to_uniform,
    map_pixels,
    unfold,
    unmap_pixels,
    usage,
)
from lmjax.models.layers import Execution, fold, unboxed

# As published, but small: four groups of two blocks, seven pixels wide at first.
TINY = DVAEConfig(size=16, codes=11, width=8, code_width=6)
NORMALIZED = dataclasses.replace(TINY, groups=2, blocks=1, kernel=3, normalized=True)
FOLDED = dataclasses.replace(NORMALIZED, patch=4, least_log_scale=-2.0)
NEAREST = dataclasses.replace(FOLDED, nearest=True)
PLAIN = Execution()


def params_of(config):
    """With biases that are not zero."""
    pictures = jnp.zeros((1, config.size, config.size, 3))
    params, _ = unboxed(jax.eval_shape(DVAE(config).init, jax.random.key(0), pictures)["params"])
    rng = np.random.default_rng(0)

    def draw(x):
        return rng.normal(size=x.shape, scale=max(x.shape[-2:-1] or (4,)) ** -0.5).astype("f4")

    return jax.tree.map(draw, params)


def applied(config, method, params, *inputs, execution=PLAIN):
    def run(params, *inputs):
        return DVAE(config, execution).apply({"params": params}, *inputs, method=method)

    with jax.default_matmul_precision("highest"):
        return jax.jit(run)(params, *inputs)


def pictures_of(config, count=2):
    shape = (count, config.size, config.size, 3)
    return np.random.default_rng(1).uniform(size=shape).astype(np.float32)


def test_published_parameter_counts():
    config = PRESETS["openai"]
    pictures = jnp.zeros((1, 256, 256, 3))
    variables = jax.eval_shape(DVAE(config).init, jax.random.key(0), pictures)
    params, _ = unboxed(variables["params"])
    counts = {half: sum(x.size for x in jax.tree.leaves(own)) for half, own in params.items()}
    assert counts == {"encoder": 53_786_240, "decoder": 43_829_766}
    assert (config.stride, config.grid) == (8, 32)


# --- the reference


def their_conv(params, name, x):
    kernel = torch.from_numpy(params[name]).permute(3, 2, 0, 1)  # HWIO -> OIHW
    bias = torch.from_numpy(params[f"{name}_bias"])
    return functional.conv2d(x, kernel, bias, padding=kernel.shape[-1] // 2)


def their_norm(params, x):
    if "norm" not in params:
        return x
    scale, bias = (torch.from_numpy(params["norm"][name]) for name in ("scale", "bias"))
    return functional.layer_norm(x.movedim(1, 3), scale.shape, scale, bias, 1e-5).movedim(3, 1)


def their_block(params, x, gain):
    residual = their_norm(params, x)
    for i in range(1, 5):
        residual = their_conv(params, f"conv_{i}", functional.relu(residual))
    straight = their_conv(params, "identity", x) if "identity" in params else x
    return straight + gain * residual


def their_blocks(params, x, config, resample):
    gain = 1 if config.normalized else 1 / (config.groups * config.blocks) ** 2
    for group in range(1, config.groups + 1):
        x = resample(x) if group > 1 else x
        for block in range(1, config.blocks + 1):
            x = their_block(params[f"group_{group}_block_{block}"], x, gain)
    return their_conv(params, "output", functional.relu(their_norm(params, x)))


def their_encoder(params, x, config):
    x = their_conv(params, "input", x)
    return their_blocks(params, x, config, lambda x: functional.max_pool2d(x, 2))


def their_decoder(params, codes, config):
    book = {"codebook": params["codebook"][None, None], "codebook_bias": params["codebook_bias"]}
    x = their_conv(book, "codebook", codes)
    return their_blocks(
        params, x, config, lambda x: functional.interpolate(x, scale_factor=2, mode="nearest")
    )


def last(x):
    return x.permute(0, 2, 3, 1).numpy()


@pytest.mark.parametrize("config", [TINY, NORMALIZED], ids=["published", "normalized"])
def test_both_halves_are_the_reference(config):
    params, pictures = params_of(config), pictures_of(config)
    seen = 2 * pictures - 1 if config.normalized else 0.8 * pictures + 0.1
    seen = torch.from_numpy(seen).permute(0, 3, 1, 2)
    logits = their_encoder(params["encoder"], seen, config)
    found = applied(config, "encode", params, pictures)
    assert found.shape == (2, config.grid, config.grid, 11) and logits.std() > 0.1
    np.testing.assert_allclose(found, last(logits), atol=2e-5)

    hard = functional.one_hot(logits.argmax(1), 11).movedim(3, 1).float()
    for codes, theirs in (
        (last(functional.softmax(logits, 1)), functional.softmax(logits, 1)),
        (last(logits).argmax(-1), hard),
    ):
        expected = last(their_decoder(params["decoder"], theirs, config))
        decoded = applied(config, "decode", params, codes)
        np.testing.assert_allclose(decoded.location, expected[..., :3], atol=2e-5)
        np.testing.assert_allclose(decoded.log_scale, expected[..., 3:], atol=2e-5)
    assert expected.std() > 0.1
    mean = 1 / (1 + np.exp(-np.float64(expected[..., :3])))
    np.testing.assert_allclose(decoded.picture(), np.clip((mean - 0.1) / 0.8, 0, 1), atol=2e-5)


def test_what_is_folded_is_unfolded():
    x = pictures_of(TINY)
    folded = fold(x, 4)
    assert folded.shape == (2, 4, 4, 48)
    # Colour by colour, and within one row by row.
    np.testing.assert_array_equal(folded[1, 2, 3, 16:32], x[1, 8:12, 12:16, 1].ravel())
    np.testing.assert_array_equal(unfold(folded, 4), x)


@pytest.mark.parametrize("config", [FOLDED, NEAREST])
def test_small_ones_have_the_same_shapes(config):
    params, pictures = params_of(config), pictures_of(config)
    logits = applied(config, "encode", params, pictures)
    location, log_scale = applied(config, "decode", params, codes_of(logits))
    assert logits.shape == (2, 2, 2, 11)
    assert location.shape == log_scale.shape == pictures.shape
    assert log_scale.min() > -2 and log_scale.max() > -1
    soft = applied(config, "decode", params, jax.nn.one_hot(codes_of(logits), 11))
    np.testing.assert_allclose(soft.location, location, atol=1e-5)


def test_gradients_do_not_depend_on_what_is_computed_again():
    params, pictures = params_of(FOLDED), pictures_of(FOLDED)

    def gradient(execution):
        def loss(params):
            bound = DVAE(FOLDED, execution).bind({"params": params})
            decoded = bound.decode(jax.nn.softmax(bound.encode(pictures)))
            return decoded.log_density(map_pixels(pictures)).mean()

        return jax.jit(jax.grad(loss))(params)

    both = gradient(PLAIN), gradient(Execution(remat="matmuls"))
    assert np.abs(both[0]["encoder"]["input"]).max() > 1e-4
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), *both)


# --- the VQ-VAE


def test_the_nearest_code_and_its_straight_gradient():
    params, pictures = params_of(NEAREST), pictures_of(NEAREST)
    vectors = np.asarray(applied(NEAREST, "encoder_output", params, pictures))
    book = params["decoder"]["codebook"]
    distances = ((vectors[..., None, :] - book) ** 2).sum(-1)
    logits = applied(NEAREST, "encode", params, pictures)
    np.testing.assert_allclose(logits, -distances, atol=1e-5)
    decoded, nearest = applied(NEAREST, "decode_nearest", params, vectors)
    np.testing.assert_array_equal(nearest, book[distances.argmin(-1)])
    again = applied(NEAREST, "decode", params, distances.argmin(-1))
    np.testing.assert_allclose(decoded.location, again.location, atol=1e-5)

    def through(params, vectors):
        bound = DVAE(NEAREST).bind({"params": params})
        return bound.decode_nearest(vectors)[0].location.mean()

    def at_the_code(params, vectors):
        return DVAE(NEAREST).bind({"params": params}).decoder(vectors).location.mean()

    both = [jax.jit(jax.grad(f, (0, 1))) for f in (through, at_the_code)]
    (own, straight), (_, expected) = both[0](params, vectors), both[1](params, nearest)
    np.testing.assert_allclose(straight, expected, atol=1e-7)
    assert np.abs(straight).max() > 0
    assert not own["decoder"]["codebook"].any()  # the codebook has a loss of its own


# --- pixels, likelihood, codes


def test_pixels_are_mapped_and_back():
    x = np.linspace(0, 1, 11, dtype=np.float32)
    np.testing.assert_allclose(map_pixels(x), 0.1 + 0.8 * x, atol=1e-7)
    np.testing.assert_allclose(unmap_pixels(map_pixels(x)), x, atol=1e-6)
    np.testing.assert_array_equal(unmap_pixels(jnp.array([0.0, 1.0])), [0, 1])


@pytest.mark.parametrize(("location", "log_scale"), [(0.0, 0.0), (1.5, -1.0), (-2.0, 0.5)])
def test_the_density_integrates_to_one(location, log_scale):
    """Over a grid that is finer at both ends, where the density of wide distributions is."""
    logit = np.linspace(-14, 14, 40_001)
    x = 1 / (1 + np.exp(-logit))
    density = np.exp(LogitLaplace(location, log_scale).log_density(jnp.float32(x)))
    assert np.trapezoid(np.float64(density), x) == pytest.approx(1, abs=2e-3)
    b = np.exp(log_scale)
    formula = np.exp(-np.abs(logit - location) / b) / (2 * b * x * (1 - x))
    middle = slice(10_000, 30_000)
    np.testing.assert_allclose(density[middle], formula[middle], rtol=1e-3)


def test_kl_is_from_the_codes_to_the_uniform_distribution():
    logits = 3 * np.random.default_rng(0).normal(size=(2, 3, 3, 17))
    q = scipy.special.softmax(logits, -1)
    expected = (q * (np.log(q) - np.log(1 / 17))).sum(-1)
    np.testing.assert_allclose(kl_to_uniform(jnp.float32(logits)), expected, rtol=1e-5)
    other_way = (np.log(1 / 17) - np.log(q)).mean(-1)
    assert np.abs(other_way - expected).min() > 0.1
    assert kl_to_uniform(jnp.zeros((1, 5)))[0] == pytest.approx(0, abs=1e-6)
    certain = kl_to_uniform(jnp.array([100.0, 0, 0, 0, 0]))
    assert certain == pytest.approx(np.log(5), abs=1e-5)


def test_gumbel_softmax_draws_codes():
    """Its largest entry is distributed as the codes are; it is soft, and softer when hot."""
    logits = jnp.array([0.0, 1.0, 2.0])
    draws = gumbel_softmax(jnp.broadcast_to(logits, (20_000, 3)), 0.5, jax.random.key(0))
    np.testing.assert_allclose(draws.sum(-1), 1, atol=1e-5)
    found = np.bincount(draws.argmax(-1), minlength=3) / 20_000
    np.testing.assert_allclose(found, jax.nn.softmax(logits), atol=5 * (0.25 / 20_000) ** 0.5)
    hot = gumbel_softmax(jnp.broadcast_to(logits, (20_000, 3)), 4.0, jax.random.key(0))
    cold = gumbel_softmax(jnp.broadcast_to(logits, (20_000, 3)), 0.01, jax.random.key(0))
    assert hot.max(-1).mean() < 0.5 < draws.max(-1).mean() < 0.95 < cold.max(-1).mean()
    gradient = jax.grad(lambda x: gumbel_softmax(x, 0.5, jax.random.key(0))[0])(logits)
    assert np.abs(gradient).min() > 0


def test_usage():
    codes, perplexity = usage(jnp.array([[3, 3], [7, 7]]), TINY)
    assert (codes, perplexity) == (2, pytest.approx(2))
    codes, perplexity = usage(jnp.array([3, 3, 3, 7]), TINY)
    assert perplexity == pytest.approx(4 / 3**0.75)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"size": 20}, r"size is 20 pixels, .* the 8 x 8 that patch 1 and 4 groups make one code"),
        ({"patch": 4}, "size is 16 pixels, .* 32 x 32"),
        ({"width": 10}, "width is 10, which does not divide by 4"),
        ({"kernel": 4}, "kernel is 4, expected an odd size"),
        ({"codes": 0}, "codes is 0, not a positive size"),
    ],
)
def test_configs_that_cannot_be(change, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(TINY, **change)


def test_pictures_of_another_size():
    pictures = jnp.zeros((1, 24, 24, 3))
    with pytest.raises(ValueError, match=r"pictures are \[24, 24, 3\], .* \[16, 16, 3\]"):
        jax.eval_shape(DVAE(TINY).init, jax.random.key(0), pictures)

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lmjax.decoding import pictures as module
from lmjax.decoding.pictures import draw
from lmjax.decoding.sampling import Sampling, sample
from lmjax.models.dalle import DALLE, DALLEConfig, caption_tokens
from lmjax.models.layers import unboxed

MODEL = DALLE(
    DALLEConfig(
        text_vocab=11,
        text_length=6,
        image_vocab=12,
        grid=3,
        layers=1,
        width=16,
        heads=2,
        feed_forward=24,
        conv_extent=3,
    )
)
CAPTIONS = np.random.default_rng(0).integers(0, 11, (2, 6))
LENGTHS = np.array([6, 2])
KEY = jax.random.key(3)
WILD = Sampling(temperature=2, top_k=9, top_p=0.95)


def random_params(seed=0):
    """Every array random and large enough that codes vary."""
    text = jnp.zeros((1, 6), jnp.int32)
    shapes = jax.eval_shape(lambda: unboxed(MODEL.init(jax.random.key(0), text)["params"])[0])
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda x: jnp.asarray(0.6 * rng.normal(size=x.shape), x.dtype), shapes)


PARAMS = random_params()


def drawn(captions=CAPTIONS, lengths=LENGTHS, params=PARAMS, **settings):
    settings = {"samples": 2, "sampling": WILD, "key": KEY} | settings
    return draw(MODEL, params, captions, lengths=jnp.asarray(lengths), **settings)


def by_full_passes(samples, sampling, top):
    """Each code from a pass over the whole stream, with the same keys; and log-probabilities."""
    rows = len(CAPTIONS) * samples
    text = caption_tokens(MODEL.config, CAPTIONS, LENGTHS)
    tokens = np.zeros((rows, 15), int)  # what follows a code cannot reach it
    tokens[:, :6] = np.repeat(text, samples, axis=0)
    tokens[:, 6 : 6 + top.shape[1]] = np.repeat(top, samples, axis=0)
    forward = jax.jit(
        lambda tokens: MODEL.apply({"params": PARAMS}, tokens)[..., :12],
        compiler_options={"xla_backend_optimization_level": 0},
    )
    keys, log_probs = jax.vmap(jax.random.fold_in, (None, 0))(KEY, jnp.arange(rows)), np.zeros(rows)
    for i, place in enumerate(range(6 + top.shape[1], 15)):
        logits = forward(tokens)[:, place]
        own = jax.vmap(jax.random.fold_in, (0, None))(keys, i)
        tokens[:, place] = code = sample(logits, own, sampling)
        log_probs += np.asarray(jax.nn.log_softmax(logits))[np.arange(rows), code]
    return tokens[:, 6:].reshape(2, samples, 9), log_probs.reshape(2, samples)


@pytest.mark.parametrize(("samples", "sampling", "given"), [(2, WILD, 0), (3, Sampling(), 4)])
def test_pictures_are_those_of_full_passes(samples, sampling, given):
    top = np.random.default_rng(1).integers(0, 12, (2, given))
    found = drawn(samples=samples, sampling=sampling, top=top)
    codes, log_probs = by_full_passes(samples, sampling, top)
    np.testing.assert_array_equal(found.codes, codes)
    np.testing.assert_allclose(found.log_probs, log_probs, rtol=1e-5)
    assert (found.codes[:, :, :given] == top[:, None]).all()
    assert len(np.unique(codes[:, :, given:])) > 3


def test_other_captions_make_no_difference():
    found = drawn().codes
    others = CAPTIONS.copy()
    others[1] = 7
    np.testing.assert_array_equal(drawn(others).codes[0], found[0])
    np.testing.assert_array_equal(drawn(CAPTIONS[:1], LENGTHS[:1]).codes[0], found[0])
    assert (found[0, 0] != found[0, 1]).any()
    assert (drawn(key=jax.random.key(4)).codes != found).any()
    padded = np.where(np.arange(6) < LENGTHS[:, None], CAPTIONS, 9)
    np.testing.assert_array_equal(drawn(padded).codes, found)


def test_other_parameters_do_not_compile_again():
    first = drawn()
    programs = module._draw._cache_size()
    other = drawn(params=random_params(seed=5))
    assert module._draw._cache_size() == programs
    assert (first.codes != other.codes).any()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"samples": 0}, "samples is 0"),
        ({"key": None}, "needs a key"),
        ({"top": np.zeros((2, 9))}, "of fewer codes than the 9"),
        ({"top": np.zeros((1, 3))}, "one row for each of 2 captions"),
    ],
)
def test_bad_settings_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        drawn(**settings)

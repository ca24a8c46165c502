import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lmjax.decoding import generate as module
from lmjax.decoding.beam_search import Beam, beam_search
from lmjax.decoding.generate import continue_text, generate
from lmjax.decoding.sampling import GREEDY, Sampling
from lmjax.models import t5
from lmjax.models.layers import unboxed
from lmjax.models.t5 import T5, T5Config
from tests.decoding import toy

TINY = T5Config(vocab=50, layers=2, width=16, heads=2, head_width=6, feed_forward=24)
GATED = dataclasses.replace(TINY, gated=True, tied=False)
LENGTH = 24


def random_params(model, seed=0):
    """Every array random and large enough that a text's tokens vary."""
    one = jnp.ones((1, 1), jnp.int32)
    shapes = jax.eval_shape(lambda: unboxed(model.init(jax.random.key(0), one, one)["params"])[0])
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda x: jnp.asarray(0.6 * rng.normal(size=x.shape), x.dtype), shapes)


def ready(config):
    model, inputs = T5(config), np.random.default_rng(1).integers(2, 50, (3, 12))
    inputs[0, 9:], inputs[2, 4:] = 0, 0
    return model, random_params(model), jnp.asarray(inputs)


@pytest.fixture(scope="module")
def tiny():
    return ready(TINY)


@pytest.fixture(scope="module", params=[TINY, GATED], ids=["1.0", "1.1"])
def each(request):
    return ready(request.param)


def full_pass(model):
    return jax.jit(lambda params, *tokens: model.apply({"params": params}, *tokens))


def test_cached_greedy_is_greedy_by_full_passes(each):
    model, params, inputs = each
    forward, decoder_inputs = full_pass(model), np.zeros((3, LENGTH + 1), int)
    log_probs = np.zeros(3)
    for i in range(LENGTH):  # what follows position i cannot reach it, so the shape may stay
        logits = forward(params, inputs, decoder_inputs)[:, i]
        decoder_inputs[:, i + 1] = logits.argmax(-1)
        log_probs += np.asarray(jax.nn.log_softmax(logits).max(-1))
    expected = decoder_inputs[:, 1:]
    assert len(np.unique(expected)) > 5

    result = generate(model, params, inputs, max_length=LENGTH, eos=None)
    np.testing.assert_array_equal(result.tokens, expected)
    np.testing.assert_array_equal(result.lengths, [LENGTH] * 3)
    np.testing.assert_allclose(result.log_probs, log_probs, rtol=1e-5)

    eos = int(expected[1, 3])
    ended = generate(model, params, inputs, max_length=LENGTH, eos=eos)
    for row, length, text in zip(ended.tokens, ended.lengths, expected, strict=True):
        cut = list(text).index(eos) + 1 if eos in text else LENGTH
        assert length == cut
        np.testing.assert_array_equal(row, [*text[:cut], *[0] * (LENGTH - cut)])


def test_extend_in_chunks_is_the_full_pass(each):
    model, params, inputs = each
    tokens = jnp.asarray(np.random.default_rng(2).integers(0, 50, (3, 9)))
    expected = full_pass(model)(params, inputs, tokens)
    state = jax.jit(t5.start_decoding, static_argnums=(0, 3))(model, params, inputs, 9)
    extend = jax.jit(t5.extender(model, params))
    logits, start = [], 0
    for size in (5, 1, 1, 2):
        new, state = extend(tokens[:, start : start + size], state)
        logits.append(new)
        start += size
    np.testing.assert_allclose(jnp.concatenate(logits, 1), expected, rtol=1e-5, atol=1e-5)


def test_rows_may_have_read_different_lengths(tiny):
    """A ragged prefill: read all as if full, then set back each row's length."""
    model, params, inputs = tiny
    tokens = jnp.asarray(np.random.default_rng(2).integers(0, 50, (3, 9)))
    expected = full_pass(model)(params, inputs, tokens)
    extend = jax.jit(t5.extend, static_argnums=0)
    start = jax.jit(t5.start_decoding, static_argnums=(0, 3))(model, params, inputs, 9)
    _, state = extend(model, params, tokens[:, :5], start)
    read = np.array([5, 2, 4])
    state = state._replace(length=jnp.asarray(read))
    positions = read[:, None] + np.arange(3)
    logits, state = extend(model, params, jnp.take_along_axis(tokens, positions, 1), state)
    expected = jnp.take_along_axis(expected, positions[..., None], 1)
    np.testing.assert_allclose(logits, expected, rtol=1e-5, atol=1e-5)
    assert state.length.tolist() == [8, 5, 7]


def test_gradients_reach_the_state(tiny):
    """PPLM takes them: what is read next depends on the past and on the memory of the source."""
    model, params, inputs = tiny
    state = jax.jit(t5.start_decoding, static_argnums=(0, 3))(model, params, inputs, 4)

    def loss(layers):
        read = t5.extend(model, params, inputs[:, :2], state._replace(layers=layers))[1]
        return t5.extend(model, params, inputs[:, 2:3], read)[0].std()

    for layer in jax.jit(jax.grad(loss))(state.layers):
        assert jnp.abs(layer.memory.keys).max() > 0 and jnp.abs(layer.memory.values).max() > 0


def test_beams_share_the_memory_of_their_text(tiny):
    """Tokens and scores are those of a state in which nothing is shared."""
    model, params, inputs = tiny
    beam = Beam(size=3, best=3)
    result = generate(model, params, inputs, max_length=8, strategy=beam)

    @jax.jit
    def plain(inputs):
        state = t5.start_decoding(model, params, inputs, 8)
        extend, start = t5.extender(model, params), jnp.zeros((3, 1), jnp.int32)
        return beam_search(extend, state, start, max_length=8, beam=beam, eos=1)[0]

    expected = plain(jnp.repeat(inputs, 3, axis=0))
    np.testing.assert_array_equal(result.tokens, expected.tokens)
    np.testing.assert_allclose(result.scores, expected.scores, rtol=1e-5)


def test_the_loop_stops_when_every_row_has_ended(tiny):
    model, params, inputs = tiny
    free = generate(model, params, inputs, max_length=LENGTH, eos=None)
    eos = int(free.tokens[0, 4])

    @jax.jit
    def until_ended(inputs):
        state = t5.start_decoding(model, params, inputs, LENGTH)
        extend, start = t5.extender(model, params), jnp.zeros((1, 1), jnp.int32)
        return continue_text(extend, state, start, max_length=LENGTH, eos=eos)

    result, state = until_ended(inputs[:1])
    assert state.length[0] == result.lengths[0] <= 5


def test_a_prompt_is_read_before_the_first_token():
    tables = np.stack([toy.table(0), toy.table(1)])
    greedy = []
    for table in tables:
        text = [3, 2]
        while len(text) < 4:
            text.append(table[toy.number(text)].argmax())
        greedy.append(text[2:])
    # The model begins with 0, which is no part of the text.
    prompt = jnp.array([[0, 3, 2]] * 2)
    result, _ = continue_text(toy.extender(tables), toy.start(2), prompt, max_length=2, eos=None)
    np.testing.assert_array_equal(result.tokens, greedy)


def test_a_sample_depends_on_its_own_row_and_the_key(tiny):
    model, params, inputs = tiny
    sampling = Sampling(temperature=2, top_k=20, top_p=0.9)

    def draw(inputs, seed=0):
        key = jax.random.key(seed)
        return generate(model, params, inputs, max_length=8, strategy=sampling, key=key).tokens

    first = draw(inputs)
    np.testing.assert_array_equal(first, draw(inputs))
    assert (first != draw(inputs, seed=1)).any()
    others = inputs.at[1:].set(7)
    np.testing.assert_array_equal(first[0], draw(others)[0])
    np.testing.assert_array_equal(first[:2], draw(inputs[:2]))
    assert len(np.unique(draw(jnp.tile(inputs[:1], (3, 1))), axis=0)) == 3


def test_sampled_log_probabilities_are_the_models_own(tiny):
    model, params, inputs = tiny
    strategy = Sampling(temperature=3, top_k=10)
    key = jax.random.key(0)
    result = generate(model, params, inputs, max_length=8, strategy=strategy, key=key, eos=None)
    shifted = jnp.pad(result.tokens, ((0, 0), (1, 0)))[:, :-1]
    log_probs = jax.nn.log_softmax(full_pass(model)(params, inputs, shifted))
    expected = jnp.take_along_axis(log_probs, result.tokens[..., None], -1)[..., 0].sum(-1)
    np.testing.assert_allclose(result.log_probs, expected, rtol=1e-5)


@pytest.mark.parametrize("strategy", [Sampling(temperature=9), Beam()])
def test_padding_ids_are_never_chosen(tiny, strategy):
    key = jax.random.key(0)
    settings = dict(max_length=LENGTH, strategy=strategy, key=key, eos=None, vocab_size=10)
    assert generate(*tiny, **settings).tokens.max() == 9


def test_other_parameters_do_not_compile_again(tiny):
    model, params, inputs = tiny
    first = generate(model, params, inputs, max_length=5)
    programs = module._generate._cache_size()
    other = generate(T5(model.config), random_params(model, seed=5), inputs, max_length=5)
    assert module._generate._cache_size() == programs
    assert (first.tokens != other.tokens).any()


def test_bfloat16_decodes(tiny):
    model, params, inputs = tiny
    model = T5(model.config, dataclasses.replace(model.execution, dtype="bfloat16"))
    state = jax.eval_shape(lambda: t5.start_decoding(model, params, inputs, LENGTH))
    assert state.layers[0].past.keys.dtype == state.layers[0].memory.keys.dtype == jnp.bfloat16
    for strategy in (GREEDY, Beam()):
        result = generate(model, params, inputs, max_length=LENGTH, strategy=strategy)
        assert result[2].dtype == jnp.float32 and np.isfinite(result[2]).all()


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"max_length": 0}, "max_length"),
        ({"vocab_size": 51}, "vocab_size is 51; the model has 50"),
        ({"eos": 50}, "eos"),
        ({"strategy": Sampling()}, "key"),
    ],
)
def test_bad_settings_are_refused(tiny, settings, message):
    with pytest.raises(ValueError, match=message):
        generate(*tiny, **{"max_length": 5, **settings})

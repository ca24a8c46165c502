import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lmjax.decoding.beam_search import Beam, beam_search, reordered, repeated
from lmjax.decoding.generate import continue_text
from tests.decoding import toy
from tests.decoding.toy import EOS, LENGTH, VOCAB

TEXTS = 3


def tables(scale=1.0):
    return np.stack([toy.table(seed, scale) for seed in range(TEXTS)])


def search(tables, beam, eos=EOS, **settings):
    texts = len(tables)
    prompt, state = jnp.zeros((texts, 1), jnp.int32), toy.start(texts, beam.size)
    extend = toy.extender(tables)
    result, state = beam_search(
        extend, state, prompt, max_length=LENGTH, beam=beam, eos=eos, **settings
    )
    return jax.tree.map(np.asarray, result), state


def penalised(table, text, alpha):
    score = sum(toy.log_softmax(table[toy.number(text[:i])])[token] for i, token in enumerate(text))
    return score / ((5 + len(text)) / 6) ** alpha


def enumerated(table, alpha):
    """Every text that ends within LENGTH tokens, best first, then every one that is cut off."""
    others = [token for token in range(VOCAB) if token != EOS]
    ended = [(*text, EOS) for n in range(LENGTH) for text in itertools.product(others, repeat=n)]
    cut_off = list(itertools.product(others, repeat=LENGTH))
    ranked = [
        sorted(((penalised(table, text, alpha), text) for text in texts), reverse=True)
        for texts in (ended, cut_off)
    ]
    return ranked[0] + ranked[1]


def assert_result(result, row, expected):
    for rank, (score, text) in enumerate(expected):
        assert result.lengths[row, rank] == len(text)
        assert tuple(result.tokens[row, rank]) == text + (0,) * (LENGTH - len(text))
        np.testing.assert_allclose(result.scores[row, rank], score, rtol=1e-5)


@pytest.mark.parametrize("alpha", [0.0, 0.6, 1.0, 3.0])
def test_wide_beam_finds_what_enumeration_finds(alpha):
    """320 candidates in the last step, 5 of each of 64 prefixes, are all kept."""
    each = tables()
    result, _ = search(each, Beam(size=160, alpha=alpha, best=30))
    for row in range(TEXTS):
        assert_result(result, row, enumerated(each[row], alpha)[:30])


def test_texts_cut_off_follow_those_that_ended():
    """However unlikely: 1 + 4 + 16 + 64 texts end, so five of 90 are cut off."""
    each = tables()
    each[:, :, EOS] = -30
    result, _ = search(each, Beam(size=160, best=90))
    for row in range(TEXTS):
        assert_result(result, row, enumerated(each[row], 0.6)[:90])


def reference(table, size, alpha):
    """The algorithm with lists, one text, no early exit."""
    alive, finished = [(0.0, ())], []
    for _ in range(LENGTH):
        grown = [
            (score + log_prob, (*text, token))
            for score, text in alive
            for token, log_prob in enumerate(toy.log_softmax(table[toy.number(text)]))
        ]
        grown = sorted(grown, reverse=True)[: 2 * size]
        ended = [text for _, text in grown if text[-1] == EOS]
        finished += [(penalised(table, text, alpha), text) for text in ended]
        finished = sorted(finished, reverse=True)[:size]
        alive = [(score, text) for score, text in grown if text[-1] != EOS][:size]
    return finished + [(penalised(table, text, alpha), text) for _, text in alive]


@pytest.mark.parametrize("size", [1, 2, 3])
@pytest.mark.parametrize("scale", [0.3, 3.0])
@pytest.mark.parametrize("alpha", [0.0, 1.0])
def test_narrow_beam_is_that_of_lists(size, scale, alpha):
    each = tables(scale)
    result, _ = search(each, Beam(size=size, alpha=alpha, best=size))
    for row in range(TEXTS):
        assert_result(result, row, reference(each[row], size, alpha)[:size])


@pytest.mark.parametrize("eos", [None, EOS])
def test_one_beam_is_greedy(eos):
    """But for a text that follows the greedy one and ends earlier, if it is more probable."""
    each = tables()
    extend, prompt = toy.extender(each), jnp.zeros((TEXTS, 1), jnp.int32)
    greedy, _ = continue_text(extend, toy.start(TEXTS), prompt, max_length=LENGTH, eos=eos)
    result, _ = search(each, Beam(size=1, alpha=0), eos)
    for row in range(TEXTS):
        same = result.lengths[row, 0] if eos is None else result.lengths[row, 0] - 1
        assert same == LENGTH or eos is not None
        np.testing.assert_array_equal(result.tokens[row, 0, :same], greedy.tokens[row, :same])
        if eos is None or greedy.lengths[row] == result.lengths[row, 0]:
            np.testing.assert_allclose(result.scores[row, 0], greedy.log_probs[row], rtol=1e-5)
        else:
            assert greedy.lengths[row] == LENGTH or result.scores[row, 0] > greedy.log_probs[row]


def test_search_stops_when_nothing_better_can_come():
    each = tables()
    each[:, toy.number(()), EOS] = 30  # nearly certain to end at once
    result, state = search(each, Beam(size=2))
    assert (result.lengths == 1).all()
    # One step read only the beginning: prefix number 0.
    assert (state["prefix"] == 0).all()


def test_padding_ids_are_never_chosen_and_rows_are_independent():
    each = tables()
    each[:, :, VOCAB - 1] = 50
    result, _ = search(each, Beam(size=3, best=3), vocab_size=VOCAB - 1)
    assert result.tokens.max() == VOCAB - 2
    alone, _ = search(each[1:2], Beam(size=3, best=3), vocab_size=VOCAB - 1)
    jax.tree.map(lambda a, b: np.testing.assert_array_equal(a[0], b[1]), alone, result)


def test_states_are_repeated_and_reordered():
    state = repeated({"rows": jnp.array([10, 20])}, 3)
    assert state["rows"].tolist() == [10, 10, 10, 20, 20, 20]
    state = {"rows": jnp.arange(6), "shared": jnp.array([7, 8])}
    moved = reordered(state, jnp.array([[2, 2, 0], [0, 1, 1]]))
    assert moved["rows"].tolist() == [2, 2, 0, 3, 4, 4]
    assert moved["shared"].tolist() == [7, 8]


@pytest.mark.parametrize("settings", [{"size": 0}, {"best": 5}, {"best": 0}, {"alpha": -1}])
def test_bad_settings_are_refused(settings):
    with pytest.raises(ValueError, match="best|alpha"):
        Beam(**settings)

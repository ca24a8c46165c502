import collections

import numpy as np
import pytest

from lmjax.objectives.bpe_dropout import bpe_dropout

A, B, C, AB, ABC, AA = range(6)
MERGES = {(A, B): (0, AB), (AB, C): (1, ABC), (A, A): (2, AA)}


def encode(*words, dropout=0.0, seed=0):
    return bpe_dropout(words, MERGES, dropout, np.random.default_rng(seed)).tolist()


def test_merges_apply_by_rank_and_from_the_left():
    assert encode([A, B, C]) == [ABC]
    assert encode([A, A, B]) == [A, AB]  # not [AA, B], whose merge ranks lower
    assert encode([A, A, A]) == [AA, A]
    assert encode([A, B, A, B, C]) == [AB, ABC]
    assert encode([A], [B], [C, C]) == [A, B, C, C]  # never across words
    assert encode() == encode([]) == []
    assert bpe_dropout([], MERGES, 0, np.random.default_rng()).dtype == np.int32


@pytest.mark.parametrize("dropout", [0.1, 0.5])
def test_how_often_merges_are_left_out(dropout):
    """A round without (A, B) ends: nothing else may merge in A B. A B C has a second round."""
    draws = 20_000
    found = collections.Counter(
        tuple(bpe_dropout([[A, B, C]], MERGES, dropout, rng))
        for rng in map(np.random.default_rng, range(draws))
    )
    expected = {
        (A, B, C): dropout,
        (AB, C): (1 - dropout) * dropout,
        (ABC,): (1 - dropout) ** 2,
    }
    assert set(found) == set(expected)
    for cut, share in expected.items():
        error = np.sqrt(share * (1 - share) / draws)
        assert abs(found[cut] / draws - share) < 5 * error, cut


def test_only_the_generator_decides():
    word = [A, B, C] * 5
    assert encode(word, dropout=0.3, seed=1) == encode(word, dropout=0.3, seed=1)
    assert len({tuple(encode(word, dropout=0.6, seed=seed)) for seed in range(10)}) > 1
    assert encode(word, dropout=1.0) == word

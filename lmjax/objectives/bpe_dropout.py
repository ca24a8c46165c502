"""Byte-pair encoding that leaves out merges at random, so that a word is cut in many ways.

    dropout 0     avocado
    dropout 0.1   av ocado | avocado | a voc ado | ...

Paper: Provilkov et al. 2020, "BPE-Dropout: Simple and Effective Subword Regularization", section 3,
algorithm 1. Reference: rsennrich/subword-nmt, apply_bpe.py. As there, each place where a merge is
possible is left out by itself, anew in every round.
"""

from collections.abc import Mapping, Sequence

import numpy as np

Merges = Mapping[tuple[int, int], tuple[int, int]]
"""Of two neighbouring ids, the merge's rank, the lowest first, and the id that they become."""


def bpe_dropout(
    words: Sequence[Sequence[int]], merges: Merges, dropout: float, rng: np.random.Generator
) -> np.ndarray:
    """int32 ids of words that are merged one by one.

    Args:
        words: ids of their smallest pieces.
        merges: the tokenizer's table.
        dropout: the probability of leaving a possible merge out; 0 is plain BPE.
        rng: the only source of randomness.
    """
    return np.array([id for word in words for id in _merged(word, merges, dropout, rng)], np.int32)


def _merged(
    word: Sequence[int], merges: Merges, dropout: float, rng: np.random.Generator
) -> list[int]:
    word = list(word)
    while len(word) > 1:
        kept = (rng.random(len(word) - 1) >= dropout).tolist()
        possible = [
            (*merges[pair], place)
            for place, pair in enumerate(zip(word, word[1:], strict=False))
            if kept[place] and pair in merges
        ]
        if not possible:
            break
        rank, id, _ = min(possible)
        places = {place for other, _, place in possible if other == rank}
        merged, place = [], 0
        while place < len(word):
            found = place in places
            merged.append(id if found else word[place])
            place += 2 if found else 1
        word = merged
    return word

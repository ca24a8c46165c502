"""BERT's pretraining: guess hidden words of two stretches of text, and whether they are neighbours.

    pair      the man went to the store | he bought a gallon of milk        (from the same place)
    inputs    [CLS] the man went to [MASK] store [SEP] he bought a gallon [MASK] milk [SEP]
    targets   the  of                       (at targets_positions 5 and 12)
    pairs     0                             (pairs_positions 8: where the second begins)

Paper: Devlin et al. 2019, section 3.1 and appendix A.1. Reference: google-research/bert,
create_pretraining_data.py. As there, a random word may be any id of the vocabulary.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import ClassVar, NamedTuple

import numpy as np


class Pair(NamedTuple):
    """Two stretches of text, as `lmjax.data.sentence_pairs.SentencePairs` chooses them."""

    first: np.ndarray
    second: np.ndarray
    elsewhere: bool
    """The second does not follow the first, it is from another document."""


def masked_pair(
    pair: Pair,
    rng: np.random.Generator,
    *,
    settings: "MaskedPairs",
    cls: int,
    sep: int,
    mask: int,
    vocab_size: int,
    word_starts: np.ndarray,
) -> dict[str, np.ndarray]:
    """int32 `inputs`, `targets`, `targets_positions` (where in the inputs, ascending), `pairs`
    (1 if the second part is from elsewhere) and `pairs_positions` (where it begins).

    Args:
        word_starts: bool `[ids]`, for whole words.
    """
    first, second = truncate(pair.first, pair.second, settings.window, rng)
    truth = np.concatenate([[cls], first, [sep], second, [sep]]).astype(np.int32)
    second_begins = len(first) + 2
    candidates = np.ones(len(truth), bool)
    candidates[[0, second_begins - 1, -1]] = False
    count = min(settings.predictions, max(1, round(len(truth) * settings.rate)))
    if settings.whole_words:
        places = choose_words(candidates, word_starts[truth], count, rng)
    else:
        places = rng.permutation(np.flatnonzero(candidates))[:count]
    places = np.sort(places)
    inputs = truth.copy()
    fate = rng.random(len(places))
    inputs[places[fate < 0.8]] = mask
    changed = places[fate >= 0.9]
    inputs[changed] = rng.integers(vocab_size, size=len(changed))
    return {
        "inputs": inputs,
        "targets": truth[places],
        "targets_positions": places.astype(np.int32),
        "pairs": np.array([pair.elsewhere], np.int32),
        "pairs_positions": np.array([second_begins], np.int32),
    }


def truncate(
    first: np.ndarray, second: np.ndarray, length: int, rng: np.random.Generator
) -> tuple[np.ndarray, np.ndarray]:
    """Takes tokens from the longer of the two (the second, if they are equal), one at a time, from
    its front or its back at random, until both have `length` together."""
    cut = []
    surplus_of_each = surpluses(len(first), len(second), length)
    for part, surplus in zip((first, second), surplus_of_each, strict=True):
        front = int(rng.binomial(surplus, 0.5)) if surplus else 0
        cut.append(part[front : len(part) - (surplus - front)])
    return cut[0], cut[1]


def surpluses(first: int, second: int, length: int) -> tuple[int, int]:
    """How many tokens each of two parts loses until both have `length` together, if always the
    longer one loses one (the second, if they are equal)."""
    excess = max(0, first + second - length)
    # The longer one shrinks to the other's length, then they take turns.
    alone = min(excess, abs(first - second))
    from_first = (alone if first > second else 0) + (excess - alone) // 2
    return from_first, excess - from_first


def choose_words(
    candidates: np.ndarray, word_starts: np.ndarray, count: int, rng: np.random.Generator
) -> np.ndarray:
    """Places of whole words, at random, `count` at most: a word that is too long is passed over.

    Args:
        candidates: bool `[length]`: what may be chosen.
        word_starts: bool `[length]`: where words start; what is no candidate ends one too.
    """
    at = np.flatnonzero(candidates)
    begins = word_starts[at] | ~candidates[at - 1]
    words = np.split(at, np.flatnonzero(begins)[1:])
    chosen: list[np.ndarray] = []
    room = count
    for index in rng.permutation(len(words)):
        if len(words[index]) <= room:
            chosen.append(words[index])
            room -= len(words[index])
        if room == 0:
            break
    return np.concatenate([at[:0], *chosen])


@dataclasses.dataclass(frozen=True)
class MaskedPairs:
    """Guess hidden words of two stretches of text, and whether the second follows the first."""

    length: int = 128
    """Tokens of a row, [CLS] and both [SEP] included."""
    predictions: int = 20
    """Words to guess of a row, at most."""
    rate: float = 0.15
    """Share of the tokens to guess; of these 80 % are hidden and 10 % replaced."""
    whole_words: bool = False
    """Hide all pieces of a word or none."""
    short: float = 0.1
    """Share of the readings of a document that make rows of a shorter, random length."""
    copies: int = 10
    """Readings of each document. Each makes other pairs, and hides other words of them; these stay
    the same in every epoch."""
    lines: bool = False
    """Each line of the text is a sentence; otherwise sentences end at full stops."""

    corpus: ClassVar = "pairs"

    def __post_init__(self):
        if self.length < 5:
            raise ValueError(f"sentence pairs need length >= 5, got {self.length}")
        if not 0 < self.rate < 1 or not 0 <= self.short <= 1:
            raise ValueError(
                f"rate is {self.rate} and short {self.short}: choose shares between 0 and 1"
            )
        if self.predictions < 1 or self.copies < 1:
            raise ValueError(
                f"predictions is {self.predictions} and copies {self.copies}: both must be 1 or"
                " more"
            )

    @property
    def window(self) -> int:
        """Tokens of text that make one example."""
        return self.length - 3

    @property
    def lengths(self) -> dict[str, int]:
        inputs, targets = self.sizes(self.window)
        return {"inputs": inputs, "targets": targets, "pairs": 1}

    def sizes(self, window: int) -> tuple[int, int]:
        """The most inputs and targets that `window` tokens give."""
        return window + 3, self.predictions

    def bind(self, tokenizer) -> Callable:
        """The objective (pair, rng) -> example for a tokenizer.

        Raises:
            ValueError: the tokenizer lacks [CLS] or [MASK], or tokens like them.
        """
        if tokenizer.bos_id is None or tokenizer.mask_id is None:
            raise ValueError(
                "sentence pairs need tokens that start a text and that hide words, and the"
                " tokenizer lacks them: take one of BERT's kind (--data.subwords wordpiece)"
            )
        return functools.partial(
            masked_pair,
            settings=self,
            cls=tokenizer.bos_id,
            sep=tokenizer.eos_id,
            mask=tokenizer.mask_id,
            vocab_size=tokenizer.vocab_size,
            word_starts=tokenizer.starts_word(),
        )

"""XLNet's permutation language modelling: guess some words of a text, in a random order, each from
the words that are not to be guessed and those guessed before.

    inputs         a  b  c  d    e  f  SEP  g  SEP  CLS     (reused | first SEP second SEP CLS)
    order         -1  2 -1  0    4  9    7  4   10    5     (a token reads those up to its own)
    token_types    0  0  0  0    0  0    0  1    1    2
    targets        b  d  f                                  (at targets_positions 1, 3 and 5)
    lane           0                                        (forward; lane_positions: words before)

Paper: Yang et al. 2019, "XLNet", sections 2.2 to 2.5 and appendix A.3. Reference: zihangdai/xlnet,
data_utils.py (`_sample_mask`, `_split_a_and_b`, `_create_data`, `_local_perm`). As released, a span
of n words there ends after n tokens, for the test of a word's beginning looks at the span's first
token each time. Departure: `order` says what the reference's `perm_mask` does, one number for each
token.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import ClassVar, NamedTuple, Protocol

import numpy as np

from lmjax.objectives.masked_pairs import surpluses

SPANS = np.arange(1, 6)
"""Lengths of spans, in tokens; one is as likely as it is short."""
_CHANCES = np.cumsum(1 / SPANS) / np.sum(1 / SPANS)


def permutation_lm(
    reused: np.ndarray,
    first: np.ndarray,
    second: np.ndarray,
    rng: np.random.Generator,
    *,
    sep: int,
    cls: int,
    word_starts: np.ndarray,
    targets: int,
    context: int = 6,
    backward: bool = False,
) -> dict[str, np.ndarray]:
    """int32 `inputs`, `order`, `token_types`, `targets` and `targets_positions` (ascending).

    There are `targets` of them or a few less, those that fell on SEP and CLS; of the two halves,
    the reused part has the odd one.

    Args:
        reused: tokens that the next row of this lane begins after.
        first, second: what follows, and what follows that or comes from elsewhere.
        word_starts: bool `[ids]`.
        targets: tokens to choose.
        context: tokens that stay for each one that is chosen, in the mean and while spans last.
        backward: the tokens are given from right to left.
    """
    half = np.concatenate([first, [sep], second, [sep], [cls]])
    inputs = np.concatenate([reused, half]).astype(np.int32)
    orders, chosen = [], []
    begins = 0
    for part, count in ((reused, targets - targets // 2), (half, targets // 2)):
        ids = np.asarray(part)
        if len(ids) < count:
            raise ValueError(
                f"{count} words to guess do not fit into {len(ids)} tokens: choose fewer targets or"
                " longer rows"
            )
        starts = word_starts[ids]
        masked = choose_spans(starts[::-1] if backward else starts, count, context, rng)
        masked = masked[::-1] if backward else masked
        functional = (ids == sep) | (ids == cls)
        orders.append(begins + factorization_order(masked | functional, rng))
        begins += len(ids) + 1
        chosen.append(masked & ~functional)
    places = np.flatnonzero(np.concatenate(chosen))
    lengths = (len(reused) + len(first) + 1, len(second) + 1, 1)
    return {
        "inputs": inputs,
        "order": np.concatenate(orders).astype(np.int32),
        "token_types": np.repeat(np.arange(3, dtype=np.int32), lengths),
        "targets": inputs[places],
        "targets_positions": places.astype(np.int32),
    }


def choose_spans(
    starts: np.ndarray, count: int, context: int, rng: np.random.Generator
) -> np.ndarray:
    """bool `[length]`: `count` tokens to guess, in spans that begin where words do.

    From left to right, a span of n tokens lies at random in `context` x n of them, moved on to the
    next word; where the text ends before there are enough, single tokens are added anywhere.

    Args:
        starts: bool `[length]`: where words start.
    """
    length = len(starts)
    at_or_after = np.append(np.flatnonzero(starts), length)
    masked = np.zeros(length, bool)
    place, missing = 0, count
    while place < length and missing:
        n = min(int(SPANS[np.searchsorted(_CHANCES, rng.random())]), missing)
        before = int(rng.integers(context * n))
        begin = int(at_or_after[np.searchsorted(at_or_after, min(place + before, length))])
        end = begin + n
        if end >= length:
            break
        masked[begin:end] = True
        missing -= n
        place = end + context * n - before
    masked[rng.permutation(np.flatnonzero(~masked))[:missing]] = True
    return masked


def factorization_order(hidden: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """`[length]`: -1 for tokens that all others read; for those that are `hidden` from others until
    their turn comes, a number of their own, below `length`."""
    return np.where(hidden, rng.permutation(len(hidden)), -1)


class Lane(Protocol):
    """What this objective needs of a text that is read in one direction: see `data.lanes.Lane`."""

    backward: bool

    def __len__(self) -> int: ...

    def read(self, start: int, stop: int) -> np.ndarray: ...

    def boundaries(self, start: int, stop: int) -> np.ndarray: ...

    def boundary_from(self, place: int) -> int: ...

    def boundary_up_to(self, place: int) -> int: ...


class LaneRow(NamedTuple):
    """A row begins at `start` of its lane."""

    lane: Lane
    start: int


def two_parts(
    lane: Lane, start: int, length: int, rng: np.random.Generator
) -> tuple[np.ndarray, np.ndarray]:
    """`length` words in two parts: some sentences from `start` on, and those that follow, or in
    half of all cases (always, where one sentence fills all) others of the lane.

    Where both are longer together, the longer one loses words at its end, one at a time.
    """
    cuts = lane.boundaries(start, start + length)
    end = lane.boundary_from(start + length)
    if len(cuts) and rng.random() < 0.5:
        middle = int(cuts[rng.integers(len(cuts))])
        second = middle, end
    else:
        middle = int(cuts[rng.integers(len(cuts))]) if len(cuts) else end
        count = max(1, length - (middle - start))
        place = int(rng.integers(len(lane) - count))
        second = lane.boundary_up_to(place), lane.boundary_from(place + count)
    surplus = surpluses(middle - start, second[1] - second[0], length)
    return lane.read(start, middle - surplus[0]), lane.read(second[0], second[1] - surplus[1])


def permuted_row(
    row: LaneRow,
    rng: np.random.Generator,
    *,
    settings: "PermutationLM",
    sep: int,
    cls: int,
    word_starts: np.ndarray,
) -> dict[str, np.ndarray]:
    """`permutation_lm` of the row's words, with the names that a batch has: `inputs_order` and
    `inputs_token_types`, and `lane` (1 if it is read backward) with `lane_positions` (the words of
    it that the rows before have read)."""
    lane, start = row
    middle = start + settings.reuse
    first, second = two_parts(lane, middle, settings.window - settings.reuse, rng)
    example = permutation_lm(
        lane.read(start, middle),
        first,
        second,
        rng,
        sep=sep,
        cls=cls,
        word_starts=word_starts,
        targets=settings.targets,
        context=settings.context,
        backward=lane.backward,
    )
    return {
        "inputs": example["inputs"],
        "inputs_order": example["order"],
        "inputs_token_types": example["token_types"],
        "targets": example["targets"],
        "targets_positions": example["targets_positions"],
        "lane": np.array([lane.backward], np.int32),
        "lane_positions": np.array([start], np.int32),
    }


@dataclasses.dataclass(frozen=True)
class PermutationLM:
    """Guess some words of a text in a random order, each from the words not to be guessed, those
    guessed before, and a memory of the text before."""

    length: int = 512
    """Tokens of a row, both SEP and CLS included."""
    reuse: int = 256
    """Of a row, the tokens at its beginning: the next row of the lane begins after them, and they
    go into memory."""
    targets: int = 85
    """Words to guess of a row, half of them among the reused."""
    context: int = 6
    """Tokens that stay for each one to be guessed, in the mean (K in the paper, where a share 1/K
    is guessed)."""
    backward: bool = True
    """Every second lane is read from its end to its beginning."""
    lines: bool = False
    """Each line of the text is a sentence; otherwise sentences end at full stops."""

    corpus: ClassVar = "lanes"

    def __post_init__(self):
        rest = self.length - self.reuse
        if self.reuse < 1 or rest < 5:
            raise ValueError(
                f"length is {self.length} and reuse {self.reuse}: choose a reuse of 1 or more and a"
                " length that leaves 5 tokens beside it, for two words, SEP twice and CLS"
            )
        if self.context < 1 or self.targets < 1:
            raise ValueError(
                f"context is {self.context} and targets {self.targets}: both must be 1 or more"
            )
        if self.targets - self.targets // 2 > self.reuse or self.targets // 2 > rest:
            raise ValueError(
                f"{self.targets} targets do not fit into halves of {self.reuse} and {rest} tokens:"
                " choose fewer targets or a longer row"
            )

    @property
    def window(self) -> int:
        """Tokens of text that make one example."""
        return self.length - 3

    @property
    def lengths(self) -> dict[str, int]:
        inputs, targets = self.sizes(self.window)
        of_inputs = {"inputs": inputs, "inputs_order": inputs, "inputs_token_types": inputs}
        return {**of_inputs, "targets": targets, "lane": 1}

    def sizes(self, window: int) -> tuple[int, int]:
        """The inputs, and the most targets, that `window` tokens give."""
        return window + 3, self.targets

    def bind(self, tokenizer) -> Callable:
        """The objective (lane row, rng) -> example for a tokenizer.

        Raises:
            ValueError: the tokenizer lacks SEP or CLS.
        """
        if tokenizer.sep_id is None or tokenizer.cls_id is None:
            raise ValueError(
                "permuted texts need tokens that part them and stand for them, and the tokenizer"
                " lacks <sep> or <cls>: take one of XLNet's kind (--data.subwords xlnet_unigram)"
            )
        return functools.partial(
            permuted_row,
            settings=self,
            sep=tokenizer.sep_id,
            cls=tokenizer.cls_id,
            word_starts=tokenizer.starts_word(),
        )

"""XLNet's permutation language modelling: guess some words of a text, in a random order, each from
the words that are not to be guessed and those guessed before.

    inputs         a  b  c  d    e  f  SEP  g  SEP  CLS     (reused | first SEP second SEP CLS)
    order         -1  2 -1  0    4  9    7  4   10    5     (a token reads those up to its own)
    token_types    0  0  0  0    0  0    0  1    1    2
    targets        b  d  f                                  (at targets_positions 1, 3 and 5)

Paper: Yang et al. 2019, "XLNet", sections 2.2 to 2.5 and appendix A.3. Reference: zihangdai/xlnet,
data_utils.py (`_sample_mask`, `_create_data`, `_local_perm`). As released, a span of n words there
ends after n tokens, for the test of a word's beginning looks at the span's first token each time.
Departure: `order` says what the reference's `perm_mask` does, one number for each token.
"""

import numpy as np

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

"""RoBERTa's masked language modelling: guess some of a text's words from all others.

    tokens    Thank you for inviting me to your party last week
    inputs    <s> Thank you <mask> inviting me to your party last week </s>
    targets   for                                  (at targets_positions 3)

Paper: Liu et al. 2019, "RoBERTa", sections 4.1 and 4.2 (dynamic masking, no next sentence).
Reference: fairseq, data/mask_tokens_dataset.py (`MaskTokensDataset`). As there, any token may be
chosen, those at the ends among them, and how many is rounded at random to a mean of `rate`.
"""

import dataclasses
import functools
import math
from collections.abc import Callable

import numpy as np

from lmjax.objectives.objective import Corpus


def masked_lm(
    tokens: np.ndarray,
    rng: np.random.Generator,
    *,
    bos: int,
    eos: int,
    mask: int,
    words: np.ndarray,
    rate: float = 0.15,
    keep: float = 0.1,
    replace: float = 0.1,
) -> dict[str, np.ndarray]:
    """Hide some of `tokens`, between a `bos` and an `eos`.

    Args:
        tokens: `[window]` integers.
        rng: the only source of randomness.
        mask: the id that hides a token.
        words: ids to replace tokens with; RoBERTa takes all but the special ones.
        rate: the share of tokens to guess; of these `keep` stay as they are and `replace` become
            one of `words`, in the mean.

    Returns:
        int32 `inputs` `[window + 2]`, and `targets` and `targets_positions` (where in the inputs,
        ascending), as many as `masked_lm_lengths` says or one fewer.
    """
    truth = np.empty(len(tokens) + 2, np.int32)
    truth[0], truth[1:-1], truth[-1] = bos, tokens, eos
    count = int(rate * len(truth) + rng.random())
    places = np.sort(rng.permutation(len(truth))[:count])
    inputs = truth.copy()
    fate = rng.random(count)
    inputs[places[fate >= keep]] = mask
    changed = places[(fate >= keep) & (fate < keep + replace)]
    inputs[changed] = words[rng.integers(len(words), size=len(changed))]
    return {
        "inputs": inputs,
        "targets": truth[places],
        "targets_positions": places.astype(np.int32),
    }


def masked_lm_lengths(window: int, rate: float = 0.15) -> tuple[int, int]:
    """The length of the inputs, and the most targets, that `window` tokens give."""
    return window + 2, min(math.floor(rate * (window + 2)) + 1, window + 2)


@dataclasses.dataclass(frozen=True)
class MaskedLM:
    """Hide words, guess them from what stands before and after; others in every epoch."""

    length: int = 512
    """Tokens of a row, start and end included."""
    rate: float = 0.15
    """Share of the tokens to guess."""
    keep: float = 0.1
    """Share of these that the model sees as they are."""
    replace: float = 0.1
    """Share of these that the model sees as some other word."""
    full_sentences: bool = True
    """Rows end with the last sentence that fits (the paper's FULL-SENTENCES), not after a fixed
    number of tokens. It needs the whole text, tokenized."""
    lines: bool = False
    """Each line of the text is a sentence; otherwise they are told by punctuation."""

    def __post_init__(self):
        if self.length < 3:
            raise ValueError(f"masked language modelling needs length >= 3, got {self.length}")
        if not 0 < self.rate < 1:
            raise ValueError(f"the rate of masked words must lie between 0 and 1, got {self.rate}")
        if not (0 <= self.keep and 0 <= self.replace and self.keep + self.replace <= 1):
            raise ValueError(
                f"of the words to guess {self.keep} are kept and {self.replace} replaced: choose"
                " shares of 0 or more, at most 1 together"
            )

    @property
    def corpus(self) -> Corpus:
        return "sentences" if self.full_sentences else "ended"

    @property
    def window(self) -> int:
        """The most tokens of text that make one example."""
        return self.length - 2

    @property
    def lengths(self) -> dict[str, int]:
        inputs, targets = self.sizes(self.window)
        return {"inputs": inputs, "targets": targets}

    def sizes(self, window: int) -> tuple[int, int]:
        """The length of the inputs, and the most targets, that `window` tokens give."""
        return masked_lm_lengths(window, self.rate)

    def bind(self, tokenizer) -> Callable:
        """The objective (tokens, rng) -> example for a tokenizer.

        Raises:
            ValueError: the tokenizer has no token that starts a text, or none that hides a word.
        """
        ids = {"a start": tokenizer.bos_id, "an end": tokenizer.eos_id, "a mask": tokenizer.mask_id}
        if missing := [what for what, id in ids.items() if id is None]:
            raise ValueError(
                f"masked language modelling needs tokens that the tokenizer lacks, {missing}: take"
                " one of RoBERTa's or BERT's kind (--data.subwords byte_bpe or wordpiece)"
            )
        return functools.partial(
            masked_lm,
            bos=tokenizer.bos_id,
            eos=tokenizer.eos_id,
            mask=tokenizer.mask_id,
            words=np.setdiff1d(np.arange(tokenizer.vocab_size), tokenizer.special_ids),
            rate=self.rate,
            keep=self.keep,
            replace=self.replace,
        )

"""The text-to-text objectives as settings, for an experiment to choose among.

Each knows how many tokens of text make one example, how long its inputs and targets can become,
and, once a tokenizer's ids are bound, the pure function that makes it.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import ClassVar

import numpy as np

from lmjax.objectives.prefix_lm import prefix_lm, prefix_lm_lengths
from lmjax.objectives.span_corruption import (
    iid_denoising,
    iid_denoising_lengths,
    span_corruption,
    span_corruption_lengths,
    span_corruption_window,
)


@dataclasses.dataclass(frozen=True)
class SpanCorruption:
    """Hide random spans behind sentinels, ask for the spans (T5's own, sections 3.1.4, 3.3.4)."""

    inputs_length: int = 512
    """Tokens of the corrupted text, end of text included; 512 reads 568 and asks for 114."""
    noise_density: float = 0.15
    """Share of the tokens to hide."""
    mean_span: float = 3.0
    """Mean length of a hidden span, in tokens."""

    corpus: ClassVar = "joined"

    def __post_init__(self):
        _ = self.window

    @property
    def window(self) -> int:
        """Tokens of text that make one example."""
        return span_corruption_window(self.inputs_length, self.noise_density, self.mean_span)

    @property
    def lengths(self) -> dict[str, int]:
        """Of a row of inputs and of targets."""
        return {"inputs": self.inputs_length, "targets": self.sizes(self.window)[1]}

    def sizes(self, window: int) -> tuple[int, int]:
        """The lengths of inputs and targets that `window` tokens give."""
        return span_corruption_lengths(window, self.noise_density, self.mean_span)

    def bind(self, tokenizer) -> Callable:
        """The objective (tokens, rng) -> example for a tokenizer.

        Raises:
            ValueError: the tokenizer has fewer sentinels than one example needs.
        """
        bound = functools.partial(
            span_corruption,
            sentinels=tokenizer.sentinels,
            noise_density=self.noise_density,
            mean_span=self.mean_span,
            eos=tokenizer.eos_id,
        )
        bound(np.zeros(self.window, np.int32), np.random.default_rng(0))
        return bound


@dataclasses.dataclass(frozen=True)
class IidDenoising:
    """Hide each token by itself, ask for the hidden runs (the paper's baseline, 3.1.4)."""

    inputs_length: int = 512
    """Tokens of text that make one example, end of text included."""
    noise_density: float = 0.15
    """Probability of hiding a token."""

    corpus: ClassVar = "joined"

    def __post_init__(self):
        if self.inputs_length < 2 or not 0 < self.noise_density < 1:
            raise ValueError(
                f"i.i.d. denoising needs inputs_length >= 2 and 0 < noise_density < 1, not {self}"
            )

    @property
    def window(self) -> int:
        return self.inputs_length - 1

    @property
    def lengths(self) -> dict[str, int]:
        inputs, targets = self.sizes(self.window)
        return {"inputs": inputs, "targets": targets}

    def sizes(self, window: int) -> tuple[int, int]:
        """Upper bounds: the lengths are random."""
        return iid_denoising_lengths(window)

    def bind(self, tokenizer) -> Callable:
        """The objective (tokens, rng) -> example for a tokenizer with two sentinels or more."""
        bound = functools.partial(
            iid_denoising,
            sentinels=tokenizer.sentinels,
            noise_density=self.noise_density,
            eos=tokenizer.eos_id,
        )
        bound(np.zeros(self.window, np.int32), np.random.default_rng(0))
        return bound


@dataclasses.dataclass(frozen=True)
class PrefixLM:
    """See the start of a text, predict the rest (section 3.3.1)."""

    inputs_length: int = 512
    """Tokens of text that make one example."""

    corpus: ClassVar = "joined"

    def __post_init__(self):
        if self.inputs_length < 2:
            raise ValueError(f"prefix LM needs inputs_length >= 2, got {self.inputs_length}")

    @property
    def window(self) -> int:
        return self.inputs_length

    @property
    def lengths(self) -> dict[str, int]:
        inputs, targets = self.sizes(self.window)
        return {"inputs": inputs, "targets": targets}

    def sizes(self, window: int) -> tuple[int, int]:
        """Upper bounds: the lengths are random."""
        return prefix_lm_lengths(window)

    def bind(self, tokenizer) -> Callable:
        """The objective (tokens, rng) -> example; it uses no sentinels."""
        return functools.partial(prefix_lm, eos=tokenizer.eos_id)


Denoising = SpanCorruption | IidDenoising | PrefixLM

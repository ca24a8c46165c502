"""Causal language modelling: predict each token from those before it.

Paper: Radford et al. 2019, section 2.1. Documents are joined, each ended by EOS, and cut into
windows; inputs are a window without its last token, targets the same without its first.
"""

import dataclasses
from collections.abc import Callable
from typing import ClassVar

import numpy as np


@dataclasses.dataclass(frozen=True)
class CausalLM:
    """Continue the text: every token is predicted from those before it."""

    length: int = 1_024
    """Tokens of a row."""

    corpus: ClassVar = "ended"

    def __post_init__(self):
        if self.length < 1:
            raise ValueError(f"a causal language model needs length >= 1, got {self.length}")

    @property
    def window(self) -> int:
        """Tokens of text that make one example."""
        return self.length + 1

    @property
    def lengths(self) -> dict[str, int]:
        return {"inputs": self.length, "targets": self.length}

    def sizes(self, window: int) -> tuple[int, int]:
        """The lengths of inputs and targets that `window` tokens give."""
        return window - 1, window - 1

    def bind(self, tokenizer) -> Callable:
        """The objective (tokens, rng) -> example; it needs nothing of the tokenizer."""
        del tokenizer
        return causal_lm


def causal_lm(tokens: np.ndarray, rng: np.random.Generator) -> dict[str, np.ndarray]:
    """int32 `inputs` and `targets`, both one shorter than `tokens`; nothing is random."""
    del rng
    tokens = np.asarray(tokens, np.int32)
    return {"inputs": tokens[:-1], "targets": tokens[1:]}

"""What the data pipeline needs to know of an objective that makes its examples from tokens."""

from collections.abc import Callable
from typing import Any, Literal, Protocol

Corpus = Literal["joined", "ended", "sentences", "pairs", "lanes"]
"""Documents as they are; with an EOS after each document; with one after each sentence, to fill
rows with whole ones, to choose pairs from, or to be read in parallel lanes from one end to the
other."""


class Objective(Protocol):
    """An objective's settings: a frozen dataclass, for an experiment to choose."""

    corpus: Corpus
    """How the documents it reads lie in the corpus."""

    @property
    def window(self) -> int:
        """Tokens of text that make one example."""
        ...

    @property
    def lengths(self) -> dict[str, int]:
        """Of a row of each array that the examples have; see `data.batches.assemble`."""
        ...

    def sizes(self, window: int) -> tuple[int, int]:
        """The lengths of inputs and targets that `window` tokens give, or upper bounds."""
        ...

    def bind(self, tokenizer: Any) -> Callable:
        """The objective (tokens, rng) -> example for a tokenizer.

        Raises:
            ValueError: the tokenizer lacks a token that the examples need.
        """
        ...

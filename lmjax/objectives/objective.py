"""What the data pipeline needs to know of an objective that makes its examples from tokens."""

from collections.abc import Callable
from typing import Any, Protocol


class Objective(Protocol):
    """An objective's settings: a frozen dataclass, for an experiment to choose."""

    ends_documents: bool
    """Whether documents are joined with an EOS after each."""

    @property
    def window(self) -> int:
        """Tokens of text that make one example."""
        ...

    @property
    def lengths(self) -> dict[str, int]:
        """Of a row of each array that the examples have."""
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

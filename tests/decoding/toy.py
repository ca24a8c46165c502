"""A language model that is a table: logits of each prefix over five tokens, 0 beginning it."""

import jax.numpy as jnp
import numpy as np

VOCAB, LENGTH, EOS = 5, 4, 1


def table(seed: int, scale: float = 1.0) -> np.ndarray:
    """Random logits of every prefix of up to LENGTH tokens, its number in base VOCAB + 1."""
    size = (VOCAB + 1) ** LENGTH
    return scale * np.random.default_rng(seed).normal(size=(size, VOCAB)).astype(np.float32)


def number(prefix) -> int:
    """The row of the table; tokens count from 1 in it, so that prefixes of zeros differ."""
    value = 0
    for token in prefix:
        value = value * (VOCAB + 1) + int(token) + 1
    return value


def log_softmax(logits):
    logits = logits.astype(np.float64)
    return logits - np.log(np.exp(logits).sum())


def start(texts: int, beams: int = 1):
    """A state: `prefix` of each row, -1 before the beginning; `text` is shared by its beams."""
    return {"prefix": jnp.full(texts * beams, -1), "text": jnp.arange(texts)}


def extender(tables: np.ndarray):
    """`extend` of a batch in which text b has the table `tables[b]`."""
    tables = jnp.asarray(tables)

    def extend(tokens, state):
        prefix, logits = state["prefix"], []
        text = jnp.repeat(state["text"], tokens.shape[0] // state["text"].shape[0])
        for column in tokens.T:
            prefix = jnp.where(prefix < 0, 0, prefix * (VOCAB + 1) + column + 1)
            logits.append(tables[text, prefix])
        return jnp.stack(logits, 1), {**state, "prefix": prefix}

    return extend

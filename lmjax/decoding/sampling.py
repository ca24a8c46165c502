"""How the next token is drawn from logits. B batch, V vocabulary.

Papers: Fan et al. 2018, "Hierarchical Neural Story Generation" (top-k); Holtzman et al. 2020, "The
Curious Case of Neural Text Degeneration" (top-p, the nucleus).
"""

import dataclasses
import math

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Key


@dataclasses.dataclass(frozen=True)
class Sampling:
    """First the temperature, then top-k, then top-p of what is left; the defaults draw from the
    model's own distribution. Raises ValueError for values out of range."""

    temperature: float = 1.0
    """Divides the logits; 0 is greedy."""
    top_k: int | None = None
    """Draw among this many likeliest tokens; None is all."""
    top_p: float = 1.0
    """Draw among the fewest tokens that together have at least this probability; 1 is all."""

    def __post_init__(self):
        if not 0 <= self.temperature < math.inf:
            raise ValueError(f"temperature is {self.temperature}; give 0 (greedy) or more")
        if self.top_k is not None and self.top_k < 1:
            raise ValueError(f"top_k is {self.top_k}; give at least 1 token, or None for all")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p is {self.top_p}; give a probability above 0, up to 1 for all")


GREEDY = Sampling(temperature=0)


def sample(
    logits: Float[Array, "B V"], keys: Key[Array, " B"] | None, sampling: Sampling
) -> Int[Array, " B"]:
    """One token of each row, drawn with that row's key; greedy needs no keys.

    Of tokens with equal logits greedy takes the first, top-k the first ones and top-p all.
    """
    if sampling.temperature == 0:
        return first_highest(logits)
    logits = logits / sampling.temperature
    tokens = None
    if sampling.top_k is not None and sampling.top_k < logits.shape[-1]:
        logits, tokens = jax.lax.top_k(logits, sampling.top_k)
    if sampling.top_p < 1:
        logits = jnp.where(nucleus(logits, sampling.top_p), logits, -jnp.inf)
    drawn = jax.vmap(jax.random.categorical)(keys, logits).astype(jnp.int32)
    return drawn if tokens is None else jnp.take_along_axis(tokens, drawn[:, None], axis=-1)[:, 0]


def first_highest(logits: Float[Array, "B V"]) -> Int[Array, " B"]:
    """`jnp.argmax`, which on a CPU takes several times as long as the two plain reductions here."""
    highest = logits == logits.max(-1, keepdims=True)
    return jnp.where(highest, jnp.arange(logits.shape[-1]), logits.shape[-1] - 1).min(-1)


def nucleus(logits: Float[Array, "B V"], mass: float) -> Bool[Array, "B V"]:
    """The fewest likeliest tokens whose probabilities sum to at least `mass`.

    Bisects the least logit kept, which takes 1 ms where sorting 8 x 32,128 logits on a CPU takes
    45. Less than exp(-100) of the likeliest token's probability is nothing in float32, so the
    answer lies within 100 of the highest logit; 32 halvings end below float32's resolution.
    """
    probabilities = jax.nn.softmax(logits)
    highest = logits.max(-1, keepdims=True)

    def halve(_, bounds):
        low, high = bounds
        middle = (low + high) / 2
        enough = jnp.where(logits >= middle, probabilities, 0).sum(-1, keepdims=True) >= mass
        return jnp.where(enough, middle, low), jnp.where(enough, high, middle)

    low, _ = jax.lax.fori_loop(0, 32, halve, (highest - 100, highest))
    return logits >= low


def log_probability(logits: Float[Array, "B V"], tokens: Int[Array, " B"]) -> Float[Array, " B"]:
    """Of each row's token, under the logits as they are."""
    chosen = jnp.take_along_axis(logits, tokens[:, None], axis=-1)[:, 0]
    return chosen - jax.nn.logsumexp(logits, axis=-1)

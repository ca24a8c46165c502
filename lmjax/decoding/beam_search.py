"""Beam search over any model's `extend`, as T5 was evaluated.

Papers: Wu et al. 2016, "Google's Neural Machine Translation System", section 7 (length penalty);
Raffel et al. 2020, section 3.1.3 (4 beams, alpha 0.6). Reference files: mesh_tensorflow
transformer/beam_search.py, tensor2tensor utils/beam_search.py.
Axes: B batch, K beams, L max_length, V vocabulary.

Each step takes the 2K likeliest continuations of the K alive beams: at most K of them end, so that
K stay alive, and those that end compete with the K best finished so far. (transformers lets only
the first K of the 2K end, so one beam there is greedy; here a runner-up may end the text.) The
search of a row is over once the likeliest alive beam, at the most favourable length, cannot beat
the `best` finished ones. Texts cut off at L are only returned where fewer have finished.
"""

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int


@dataclasses.dataclass(frozen=True)
class Beam:
    """The settings of T5. Raises ValueError for values out of range."""

    size: int = 4
    """Alive beams (K)."""
    alpha: float = 0.6
    """Exponent of the length penalty: 0 ranks by probability, more prefers longer texts."""
    best: int = 1
    """Texts returned of each row."""

    def __post_init__(self):
        if not 1 <= self.best <= self.size:
            raise ValueError(
                f"beam search of size {self.size} cannot return the best {self.best}; "
                "choose 1 <= best <= size"
            )
        if not self.alpha >= 0:
            raise ValueError(f"alpha is {self.alpha}; give a length penalty of 0 or more")

    def score(self, log_probs: Float[Array, "*rows"], length) -> Float[Array, "*rows"]:
        """Equation 14 of Wu et al. without coverage; the length counts the end of the text."""
        return log_probs / ((5 + length) / 6) ** self.alpha


class Hypotheses(NamedTuple):
    tokens: Int[Array, "B best L"]
    """Likeliest first; 0 after the end."""
    lengths: Int[Array, "B best"]
    """Tokens of each, with the one that ends it."""
    scores: Float[Array, "B best"]
    """Log-probability over length penalty."""


class Search(NamedTuple):
    """What the loop carries; a finished score of -inf is a place not taken yet."""

    step: Int[Array, ""]
    alive: Int[Array, "B K L"]
    alive_log_probs: Float[Array, "B K"]
    finished: Int[Array, "B K L"]
    finished_scores: Float[Array, "B K"]
    last: Int[Array, "B K"]
    state: Any


def beam_search(
    extend: Callable,
    state,
    prompt: Int[Array, "B T"],
    *,
    max_length: int,
    beam: Beam = Beam(),
    eos: int | None,
    vocab_size: int | None = None,
) -> tuple[Hypotheses, Any]:
    """The best continuations of `prompt`, up to `max_length` tokens, and the state they leave.

    `extend(tokens [B*K, T], state) -> (logits [B*K, T, V], state)`. Every array of `state` has a
    leading axis of B*K rows, the beams of a text being neighbours (`repeated` makes them), or of B
    rows that the beams of a text share. Ids from `vocab_size` on are padding and never chosen.
    """
    batch, size = prompt.shape[0], beam.size
    prompt = jnp.repeat(prompt, size, axis=0)
    if prompt.shape[1] > 1:
        _, state = extend(prompt[:, :-1], state)

    def step(s: Search) -> Search:
        logits, state = extend(s.last.reshape(-1, 1), s.state)
        logits = logits[:, -1, :vocab_size]
        # The 2K of each beam hold the 2K of all, and cost one pass over the vocabulary.
        top, tokens = jax.lax.top_k(logits, min(2 * size, logits.shape[-1]))
        top = top - jax.nn.logsumexp(logits, axis=-1, keepdims=True)
        choices = top.shape[-1]
        log_probs = s.alive_log_probs[..., None] + top.reshape(batch, size, choices)
        log_probs, index = jax.lax.top_k(log_probs.reshape(batch, -1), 2 * size)
        origin, tokens = index // choices, take(tokens.reshape(batch, -1), index)
        texts = take(s.alive, origin).at[:, :, s.step].set(tokens)
        ended = jnp.zeros_like(tokens, bool) if eos is None else tokens == eos

        scores = jnp.where(ended, beam.score(log_probs, s.step + 1), -jnp.inf)
        scores = jnp.concatenate([s.finished_scores, scores], axis=1)
        finished_scores, index = jax.lax.top_k(scores, size)
        finished = take(jnp.concatenate([s.finished, texts], axis=1), index)

        alive_log_probs, index = jax.lax.top_k(jnp.where(ended, -jnp.inf, log_probs), size)
        return Search(
            s.step + 1,
            take(texts, index),
            alive_log_probs,
            finished,
            finished_scores,
            take(tokens, index),
            reordered(state, take(origin, index)),
        )

    def undecided(s: Search):
        hope = beam.score(s.alive_log_probs[:, 0], max_length)
        return (s.step < max_length) & (hope > s.finished_scores[:, beam.best - 1]).any()

    none = jnp.full((batch, size), -jnp.inf)
    empty = jnp.zeros((batch, size, max_length), jnp.int32)
    # All beams begin equal: the first alone counts, or they would stay equal.
    only_first = none.at[:, 0].set(0)
    last = prompt[:, -1].reshape(batch, size)
    start = Search(jnp.zeros((), jnp.int32), empty, only_first, empty, none, last, state)
    s = jax.lax.while_loop(undecided, step, start)

    rank, count = jnp.arange(beam.best), (s.finished_scores > -jnp.inf).sum(1, keepdims=True)
    index = jnp.where(rank < count, rank, size + rank - count)
    tokens = take(jnp.concatenate([s.finished, s.alive], axis=1), index)
    cut_off = beam.score(s.alive_log_probs, max_length)
    scores = take(jnp.concatenate([s.finished_scores, cut_off], axis=1), index)
    lengths = jnp.full(scores.shape, max_length)
    if eos is not None:
        ends = tokens == eos
        lengths = jnp.where(ends.any(-1), ends.argmax(-1) + 1, max_length)
    return Hypotheses(tokens, lengths, scores), s.state


def take(values: Array, index: Int[Array, "B J"]) -> Array:
    """Of each row of `values` [B, I, ...] the entries `index`: [B, J, ...]."""
    return jax.vmap(lambda row, chosen: row[chosen])(values, index)


def repeated(state, beams: int):
    """The state of B texts for `beams` neighbouring rows each, as `beam_search` wants it."""
    return jax.tree.map(lambda x: jnp.repeat(x, beams, axis=0), state)


def reordered(state, origin: Int[Array, "B K"]):
    """The state in which beam k of each text continues its former beam `origin[:, k]`.

    Arrays with fewer than B*K leading rows are shared by the beams of a text and stay.
    """
    batch, beams = origin.shape
    if beams == 1:
        return state
    rows = (jnp.arange(batch)[:, None] * beams + origin).reshape(-1)
    return jax.tree.map(lambda x: x[rows] if x.shape[0] == rows.size else x, state)

"""Cloze questions, which language models of every kind can answer: which of ten words was hidden?

    passage      Return the sum of the array elements over the given axis
    place        7                                     (elements: hidden from whoever answers)
    candidates   values  module  elements  is  ...     (answer 2)

A model gives every candidate the log-probability that it assigns by itself: masked models that of
the word in the place of a mask; XLNet that of the word, guessed last; GPT-2 that of the whole text
with it; BART that of the whole text, written after reading it with a mask; T5 that of the word,
written after reading the text with a sentinel. Candidates are drawn by their frequency, so its
logarithm is taken off again: whoever knows nothing but frequencies is left to chance. Metrics are
the share of questions whose answer scores highest (a tenth by chance), and the cross-entropy among
the ten in nats (log 10 by chance).
Axes: B batch, C candidates, T passage length, D width, V vocabulary.
"""

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from lmjax.data.token_store import TokenizedDocuments
from lmjax.data.tokenizers import Tokenizer
from lmjax.models.layers import all_logits, shift_right
from lmjax.tasks.task import Batch, Params, Task, reads

CANDIDATES = 10
"""The hidden word and nine others."""


class SpecialTokens(NamedTuple):
    """What stands around a passage and in its gap; None where a model needs no such token."""

    bos: int | None
    eos: int
    mask: int | None
    sentinel: int | None
    """<extra_id_0>."""

    @classmethod
    def of(cls, tokenizer: Tokenizer) -> "SpecialTokens":
        sentinel = int(tokenizer.sentinels[0]) if len(tokenizer.sentinels) else None
        return cls(tokenizer.bos_id, tokenizer.eos_id, tokenizer.mask_id, sentinel)


Reader = Callable[[nn.Module, Params, Batch, SpecialTokens], Float[Array, "B C"]]
"""(model, params, questions, tokens) -> log-probabilities of the candidates."""


@dataclasses.dataclass(frozen=True)
class Cloze:
    """A task whose held-out batches are cloze questions (of `ask`), whatever it is trained with."""

    task: Task
    reader: Reader
    tokens: SpecialTokens

    @property
    def model(self) -> nn.Module:
        return self.task.model

    @property
    def reads(self) -> tuple[str, ...]:
        return reads(self.task)

    def init(self, rng):
        return self.task.init(rng)

    def normalizers(self, batch):
        if "candidates" in batch:
            return {"questions": batch["weights"].sum()}
        return self.task.normalizers(batch)

    def loss(self, params, extra, batch, normalizers, rngs, step):
        return self.task.loss(params, extra, batch, normalizers, rngs, step)

    def evaluate(self, params, extra, batch, normalizers):
        """`loss` here is the cross-entropy among the candidates; `extra` takes no part."""
        scores = self.reader(self.model, params, batch, self.tokens) - batch["log_frequency"]
        answer = batch["answer"][:, None]
        nats = -jnp.take_along_axis(jax.nn.log_softmax(scores), answer, 1)[:, 0]
        right = (scores.argmax(1) == batch["answer"]).astype(jnp.float32)
        total = normalizers["questions"]
        metrics = {"loss": nats, "accuracy": right}
        return {k: (v * batch["weights"]).sum() / total for k, v in metrics.items()}, extra

    def labels(self, params):
        return self.task.labels(params)

    def flops(self, batch_shapes):
        return self.task.flops(batch_shapes)


# --- questions


def ask(
    documents: TokenizedDocuments,
    frequencies: Int[np.ndarray, " V"],
    tokenizer: Tokenizer,
    *,
    questions: int,
    length: int,
    batch: int,
    seed: int = 0,
) -> list[dict[str, np.ndarray]]:
    """Questions about passages of `length` tokens, each within a document, in batches; fewer than
    `questions` if the documents have fewer passages. The last batch is filled up with questions
    whose `weights` are 0.

    What is hidden is a token that begins a word, but neither a special one nor white space alone.
    The other candidates are drawn from all such tokens by their frequency.

    Args:
        documents: held-out text, without tokens that end documents.
        frequencies: how often each id occurs in the text trained on; at least once, it is assumed.

    Raises:
        ValueError: no passage is long enough, or there are fewer than ten words to choose from.
    """
    rng = np.random.default_rng(seed)
    words = tokenizer.starts_word()
    words[tokenizer.special_ids] = False
    words &= np.array([bool(tokenizer.decode([id]).strip()) for id in range(len(words))])
    chances = np.where(words, np.maximum(frequencies, 1), 0)
    if np.count_nonzero(chances) <= CANDIDATES:
        raise ValueError(
            f"the tokenizer has {words.sum()} tokens that begin words, of which ten candidates"
            " cannot be chosen: take a larger vocabulary"
        )
    starts = np.concatenate(
        [
            np.arange(begin, end - length + 1, length)
            for begin, end in zip(documents.offsets[:-1], documents.offsets[1:], strict=True)
        ]
    )
    found = []
    for start in rng.permutation(starts):
        passage = documents.tokens[start : start + length]
        if len(hideable := np.flatnonzero(words[passage])):
            found.append(_question(passage, int(rng.choice(hideable)), chances, rng))
        if len(found) == questions:
            break
    if not found:
        raise ValueError(
            f"no held-out document has {length} tokens: choose shorter passages, or give longer"
            " texts"
        )
    found += [found[0] | {"weights": np.float32(0)}] * (-len(found) % batch)
    return [
        {name: np.stack([one[name] for one in found[i : i + batch]]) for name in found[0]}
        for i in range(0, len(found), batch)
    ]


def _question(
    passage: np.ndarray, place: int, frequencies: np.ndarray, rng: np.random.Generator
) -> dict[str, Any]:
    truth = passage[place]
    chances = np.where(np.arange(len(frequencies)) == truth, 0, frequencies)
    others = rng.choice(len(chances), CANDIDATES - 1, replace=False, p=chances / chances.sum())
    answer = int(rng.integers(CANDIDATES))
    candidates = np.insert(others, answer, truth)
    return {
        "passage": np.asarray(passage, np.int32),
        "place": np.int32(place),
        "candidates": candidates.astype(np.int32),
        "log_frequency": np.log(frequencies[candidates]).astype(np.float32),
        "answer": np.int32(answer),
        "weights": np.float32(1),
    }


# --- answers


def masked(model, params, batch, tokens):
    """BERT and RoBERTa: the word in the place of the mask."""
    passage = filled(batch, jnp.full_like(batch["place"], tokens.mask))
    encoded = model.apply({"params": params}, framed(passage, tokens), method="encode")
    at = batch["place"][:, None] + 1
    features = model.apply({"params": params}, encoded, at, method="guess")
    return _guesses(model, params, features, batch, biased=True)


def permuted(model, params, batch, tokens):
    """XLNet: the word that comes last in the order, after nothing that is remembered."""
    del tokens
    passage, at = batch["passage"], batch["place"][:, None]
    features, _ = model.apply(
        {"params": params},
        passage,
        order=jnp.where(jnp.arange(passage.shape[1]) == at, 0, -1),
        places=at,
        method="features",
    )
    return _guesses(model, params, features, batch, biased=True)


def causal(model, params, batch, tokens):
    """GPT-2: the text with the word, as it begins after the end of another one."""

    def score(words):
        text = filled(batch, words)
        inputs = jnp.pad(text[:, :-1], ((0, 0), (1, 0)), constant_values=tokens.eos)
        features = model.apply({"params": params}, inputs, method="features")
        return _log_likelihood(model, params, features, text)

    return _of_each_candidate(score, batch)


def restored(model, params, batch, tokens):
    """BART: the text with the word, written after reading it with a mask."""
    gap = filled(batch, jnp.full_like(batch["place"], tokens.mask))
    inputs, start = framed(gap, tokens), model.config.start

    def score(words):
        return _written(model, params, inputs, framed(filled(batch, words), tokens), start)

    return _of_each_candidate(score, batch)


def gap_filled(model, params, batch, tokens):
    """T5: the word that it writes behind the sentinel in the place of the hidden one. What would
    follow does not count: in training a gap with text after it is followed by the next one's
    sentinel, never by the end, whereas here nothing else is hidden."""
    gap = filled(batch, jnp.full_like(batch["place"], tokens.sentinel))
    inputs = jnp.pad(gap, ((0, 0), (0, 1)), constant_values=tokens.eos)
    before = jnp.tile(jnp.array([0, tokens.sentinel]), (len(gap), 1))
    features = model.apply({"params": params}, inputs, before, method="features")
    return _guesses(model, params, features[:, 1:], batch)


def filled(batch: Batch, words: Int[Array, " B"]) -> Int[Array, "B T"]:
    """The passages with these words in the place of the hidden ones."""
    passage = batch["passage"]
    here = jnp.arange(passage.shape[1]) == batch["place"][:, None]
    return jnp.where(here, words[:, None], passage)


def framed(text: Int[Array, "B T"], tokens: SpecialTokens) -> Int[Array, "B T+2"]:
    return jnp.pad(text, ((0, 0), (1, 1)), constant_values=((0, 0), (tokens.bos, tokens.eos)))


def _guesses(
    model, params, features: Float[Array, "B 1 D"], batch, biased: bool = False
) -> Float[Array, "B C"]:
    matrix = model.apply({"params": params}, method="output_matrix")
    logits = all_logits(features, matrix)[:, 0]
    if biased:
        logits += model.apply({"params": params}, method="vocabulary_bias")
    return jnp.take_along_axis(jax.nn.log_softmax(logits), batch["candidates"], 1)


def _of_each_candidate(score: Callable, batch: Batch) -> Float[Array, "B C"]:
    """What does not depend on the candidate, such as an encoder, is computed once."""
    return jax.vmap(score, in_axes=1, out_axes=1)(batch["candidates"])


def _written(model, params, inputs, targets, start: int) -> Float[Array, " B"]:
    before = shift_right(targets, jnp.arange(targets.shape[1]), start)
    features = model.apply({"params": params}, inputs, before, method="features")
    return _log_likelihood(model, params, features, targets)


def _log_likelihood(model, params, features: Float[Array, "B T D"], targets) -> Float[Array, " B"]:
    matrix = model.apply({"params": params}, method="output_matrix")
    logits = all_logits(features, matrix)
    right = jnp.take_along_axis(logits, targets[..., None], 2)[..., 0]
    return (right - jax.nn.logsumexp(logits, axis=-1)).sum(1)


READERS: dict[str, Reader] = {
    "bert": masked,
    "roberta": masked,
    "xlnet": permuted,
    "gpt2": causal,
    "bart": restored,
    "t5": gap_filled,
}
"""By a run's `model_type`."""

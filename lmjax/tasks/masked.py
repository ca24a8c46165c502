"""Masked language modelling: read `inputs`, guess what stood in some of their places (RoBERTa) and,
where a batch has pairs of sentences, whether the second follows the first (BERT)."""

import dataclasses
from typing import ClassVar

import flax.linen as nn
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, Int

from lmjax.models.layers import unboxed
from lmjax.tasks.losses import token_loss
from lmjax.tasks.task import Batch, Initial, Scalars, decay_labels


@dataclasses.dataclass(frozen=True)
class Masked:
    """The task of an encoder with `encode`, `guess`, `output_matrix` and `vocabulary_bias` and, for
    batches with `pairs`, `judge`.

    The loss is per guessed word over the whole global batch, and per pair, and their sum. Only the
    guessed words' logits are computed.
    """

    reads: ClassVar[tuple[str, ...]] = ("inputs",)

    model: nn.Module

    def init(self, rng):
        params, axes = unboxed(self.model.init(rng, jnp.zeros((1, 1), jnp.int32))["params"])
        return Initial(params, axes)

    def normalizers(self, batch):
        tokens = {"tokens": batch["loss_weights"].sum()}
        if "pairs" not in batch:
            return tokens
        return tokens | {"pairs": pair_weights(batch).sum()}

    def loss(self, params, extra, batch, normalizers, rngs, step):
        del step
        variables = {"params": params}
        encoded = self.model.apply(
            variables,
            batch["inputs"],
            token_types(batch) if "pairs" in batch else None,
            batch["inputs_positions"],
            batch["inputs_segment_ids"],
            method="encode",
            rngs=rngs,
        )
        features = self.model.apply(variables, encoded, places(batch), method="guess")
        matrix = self.model.apply(variables, method="output_matrix")
        bias = self.model.apply(variables, method="vocabulary_bias")
        total, metrics = token_loss(features, matrix, batch, normalizers, bias=bias)
        if "pairs" in batch:
            verdicts = self.model.apply(variables, encoded, method="judge")
            own, more = pair_loss(verdicts, batch, normalizers)
            total, metrics = total + own, metrics | more
        return total, (metrics, extra)

    def evaluate(self, params, extra, batch, normalizers):
        """`loss` here is the negative log-likelihood per guessed word, in nats."""
        _, (metrics, _) = self.loss(params, extra, batch, normalizers, {}, 0)
        shown = ("accuracy", "pair_nll", "pair_accuracy")
        return {"loss": metrics["nll"]} | {k: metrics[k] for k in shown if k in metrics}, extra

    def labels(self, params):
        return decay_labels(params)

    def flops(self, batch_shapes):
        return self.model.config.training_flops(*batch_shapes["inputs"], batch_shapes["targets"][1])


def places(batch: Batch) -> Int[Array, "B P"]:
    """Where in its row each target stood: `targets_positions` count from its text's beginning."""
    segments, inputs_segments = batch["targets_segment_ids"], batch["inputs_segment_ids"]
    starts = jnp.argmax(inputs_segments[:, None, :] == segments[:, :, None], axis=-1)
    return jnp.where(segments > 0, starts + batch["targets_positions"], 0)


def token_types(batch: Batch) -> Int[Array, "B T"]:
    """0 in the first part of a pair, 1 in the second."""
    second = batch["inputs_positions"] >= batch["pairs_positions"]
    return (second & (batch["inputs_segment_ids"] > 0)).astype(jnp.int32)


def pair_weights(batch: Batch) -> Float[Array, " B"]:
    """1 for rows that are pairs, 0 for those that fill up a batch."""
    return (batch["pairs_segment_ids"][:, 0] > 0).astype(jnp.float32)


def pair_loss(
    verdicts: Float[Array, "B 2"], batch: Batch, normalizers: Scalars
) -> tuple[Float[Array, ""], Scalars]:
    """The cross-entropy of verdicts on a batch's `pairs`, 1 for what does not follow; metrics."""
    truth, weights = batch["pairs"][:, 0], pair_weights(batch)
    nll = optax.softmax_cross_entropy_with_integer_labels(verdicts, truth)
    right = (verdicts.argmax(-1) == truth).astype(jnp.float32)
    total, accuracy = ((x * weights).sum() / normalizers["pairs"] for x in (nll, right))
    return total, {"pair_nll": total, "pair_accuracy": accuracy}

"""Masked language modelling: read `inputs`, guess what stood in some of their places (RoBERTa)."""

import dataclasses

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Int

from lmjax.models.layers import unboxed
from lmjax.tasks.losses import token_loss
from lmjax.tasks.task import Batch, decay_labels


@dataclasses.dataclass(frozen=True)
class Masked:
    """The task of an encoder with `encode`, `guess`, `output_matrix` and `vocabulary_bias`.

    The loss is per guessed word over the whole global batch. Only these words' logits are computed.
    """

    model: nn.Module

    def init(self, rng):
        params, axes = unboxed(self.model.init(rng, jnp.zeros((1, 1), jnp.int32))["params"])
        return params, axes, {}

    def normalizers(self, batch):
        return {"tokens": batch["loss_weights"].sum()}

    def loss(self, params, extra, batch, normalizers, rngs, step):
        del step
        variables = {"params": params}
        encoded = self.model.apply(
            variables,
            batch["inputs"],
            None,
            batch["inputs_positions"],
            batch["inputs_segment_ids"],
            method="encode",
            rngs=rngs,
        )
        features = self.model.apply(variables, encoded, places(batch), method="guess")
        matrix = self.model.apply(variables, method="output_matrix")
        bias = self.model.apply(variables, method="vocabulary_bias")
        total, metrics = token_loss(features, matrix, batch, normalizers, bias=bias)
        return total, (metrics, extra)

    def evaluate(self, params, extra, batch, normalizers):
        """`loss` here is the negative log-likelihood per guessed word, in nats."""
        _, (metrics, _) = self.loss(params, extra, batch, normalizers, {}, 0)
        return {"loss": metrics["nll"], "accuracy": metrics["accuracy"]}

    def labels(self, params):
        return decay_labels(params)

    def flops(self, batch_shapes):
        return self.model.config.training_flops(*batch_shapes["inputs"], batch_shapes["targets"][1])


def places(batch: Batch) -> Int[Array, "B P"]:
    """Where in its row each target stood: `targets_positions` count from its text's beginning."""
    segments, inputs_segments = batch["targets_segment_ids"], batch["inputs_segment_ids"]
    starts = jnp.argmax(inputs_segments[:, None, :] == segments[:, :, None], axis=-1)
    return jnp.where(segments > 0, starts + batch["targets_positions"], 0)

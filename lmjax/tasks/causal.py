"""Causal language modelling: read `inputs`, predict each one's successor (GPT-2)."""

import dataclasses
from typing import ClassVar

import flax.linen as nn
import jax.numpy as jnp

from lmjax.models.layers import unboxed
from lmjax.tasks.losses import check_regularisers, token_loss
from lmjax.tasks.task import Initial, decay_labels


@dataclasses.dataclass(frozen=True)
class Causal:
    """The task of a decoder with `features` and `output_matrix`; see `tasks.task.Task`.

    The loss is per predicted token over the whole global batch.
    """

    reads: ClassVar[tuple[str, ...]] = ("inputs",)

    model: nn.Module
    z_loss: float = 0.0
    """Weight of logsumexp(logits)^2."""

    def __post_init__(self):
        check_regularisers(self.z_loss, 0.0)

    def init(self, rng):
        token = jnp.zeros((1, 1), jnp.int32)
        params, axes = unboxed(self.model.init(rng, token)["params"])
        return Initial(params, axes)

    def normalizers(self, batch):
        return {"tokens": batch["loss_weights"].sum()}

    def loss(self, params, extra, batch, normalizers, rngs, step):
        del step
        variables = {"params": params}
        features = self.model.apply(
            variables,
            batch["inputs"],
            batch["inputs_positions"],
            batch["inputs_segment_ids"],
            method="features",
            rngs=rngs,
        )
        matrix = self.model.apply(variables, method="output_matrix")
        total, metrics = token_loss(features, matrix, batch, normalizers, self.z_loss, 0.0)
        return total, (metrics, extra)

    def evaluate(self, params, extra, batch, normalizers):
        """`loss` here is the negative log-likelihood per token, in nats."""
        _, (metrics, _) = self.loss(params, extra, batch, normalizers, {}, 0)
        return {"loss": metrics["nll"], "accuracy": metrics["accuracy"]}, extra

    def labels(self, params):
        return decay_labels(params)

    def flops(self, batch_shapes):
        return self.model.config.training_flops(*batch_shapes["inputs"])

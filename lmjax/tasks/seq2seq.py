"""Sequence to sequence: read `inputs`, predict `targets` token by token (T5, BART, Meena)."""

import dataclasses
from typing import ClassVar

import flax.linen as nn
import jax.numpy as jnp

from lmjax.models.layers import shift_right, unboxed
from lmjax.tasks.losses import check_regularisers, token_loss
from lmjax.tasks.task import Initial, decay_labels


@dataclasses.dataclass(frozen=True)
class Seq2Seq:
    """The task of an encoder-decoder with `features` and `output_matrix`; see `tasks.task.Task`.

    The loss is per target token over the whole global batch, so that packed and padded batches
    weigh every token alike.
    """

    reads: ClassVar[tuple[str, ...]] = ("inputs", "targets")

    model: nn.Module
    z_loss: float = 0.0
    """Weight of logsumexp(logits)^2; T5 pretrains with 1e-4."""
    label_smoothing: float = 0.0
    """Probability that the smoothed target spreads over the other entries of the vocabulary."""
    start: int = 0
    """The id that the decoder reads first."""

    def __post_init__(self):
        check_regularisers(self.z_loss, self.label_smoothing)

    def init(self, rng):
        token = jnp.zeros((1, 1), jnp.int32)
        params, axes = unboxed(self.model.init(rng, token, token)["params"])
        return Initial(params, axes)

    def normalizers(self, batch):
        return {"tokens": batch["loss_weights"].sum()}

    def loss(self, params, extra, batch, normalizers, rngs, step):
        del step
        variables = {"params": params}
        features = self.model.apply(
            variables,
            batch["inputs"],
            shift_right(batch["targets"], batch["targets_positions"], self.start),
            batch["inputs_segment_ids"],
            batch["targets_segment_ids"],
            method="features",
            rngs=rngs,
        )
        matrix = self.model.apply(variables, method="output_matrix")
        total, metrics = token_loss(
            features, matrix, batch, normalizers, self.z_loss, self.label_smoothing
        )
        return total, (metrics, extra)

    def evaluate(self, params, extra, batch, normalizers):
        """`loss` here is the negative log-likelihood per token, in nats, without regularisers."""
        _, (metrics, _) = self.loss(params, extra, batch, normalizers, {}, 0)
        return {"loss": metrics["nll"], "accuracy": metrics["accuracy"]}, extra

    def labels(self, params):
        return decay_labels(params)

    def flops(self, batch_shapes):
        (rows, inputs), (_, targets) = batch_shapes["inputs"], batch_shapes["targets"]
        return self.model.config.training_flops(rows, inputs, targets)

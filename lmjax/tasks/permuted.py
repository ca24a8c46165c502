"""Permutation language modelling: guess words in a random order, with a memory of the text before
(XLNet)."""

import dataclasses
from typing import ClassVar

import jax.numpy as jnp
from jaxtyping import Array, Float

from lmjax.models.layers import unboxed
from lmjax.models.xlnet import XLNet, no_memory
from lmjax.tasks.losses import token_loss
from lmjax.tasks.masked import places
from lmjax.tasks.task import Batch, Initial, decay_labels


@dataclasses.dataclass(frozen=True)
class Permuted:
    """The task of an XLNet; see `tasks.task.Task`. The loss is per guessed word.

    `extra` holds the memory, float32 whatever the model computes with, so that a run may go on in
    another type.
    """

    reads: ClassVar[tuple[str, ...]] = ("inputs",)

    model: XLNet
    rows: int
    """Of the global batch, each of which has a memory of its own."""

    def init(self, rng):
        params, axes = unboxed(self.model.init(rng, jnp.zeros((1, 1), jnp.int32))["params"])
        if self.model.config.memory == 0:
            return Initial(params, axes)
        memory = no_memory(self.model.config, self.rows)
        memory_axes = ("layers", "batch", None, "activation_embed")
        return Initial(params, axes, {"memory": memory}, {"memory": memory_axes})

    def normalizers(self, batch):
        return {"tokens": batch["loss_weights"].sum()}

    def loss(self, params, extra, batch, normalizers, rngs, step):
        del step
        variables = {"params": params}
        features, memory = self.model.apply(
            variables,
            batch["inputs"],
            what_went_before(extra["memory"], batch) if extra else None,
            order=batch["inputs_order"],
            places=places(batch),
            token_types=batch["inputs_token_types"],
            backward=batch["lane"][:, 0] > 0,
            method="features",
            rngs=rngs,
        )
        matrix = self.model.apply(variables, method="output_matrix")
        bias = self.model.apply(variables, method="vocabulary_bias")
        total, metrics = token_loss(features, matrix, batch, normalizers, bias=bias)
        return total, (metrics, {name: memory.astype(jnp.float32) for name in extra})

    def evaluate(self, params, extra, batch, normalizers):
        """`loss` here is the negative log-likelihood per guessed word, in nats. Batches follow each
        other; where a lane begins, nothing is remembered."""
        _, (metrics, extra) = self.loss(params, extra, batch, normalizers, {}, 0)
        return {"loss": metrics["nll"], "accuracy": metrics["accuracy"]}, extra

    def labels(self, params):
        """The biases of queries decay, as the reference's `include_in_weight_decay` has it."""
        return decay_labels(params, ("content_bias", "distance_bias", "segment_bias"))

    def flops(self, batch_shapes):
        return self.model.config.training_flops(*batch_shapes["inputs"], batch_shapes["targets"][1])


def what_went_before(memory: Float[Array, "L B M D"], batch: Batch) -> Float[Array, "L B M D"]:
    """The memory, but nothing for rows that begin their lanes."""
    begins = batch["lane_positions"][:, 0] == 0
    return jnp.where(begins[:, None, None], 0, memory)

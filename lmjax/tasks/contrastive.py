"""Contrastive learning: of a batch's pictures and texts, which belong together (CLIP)."""

import dataclasses
from typing import ClassVar

import jax.numpy as jnp
import optax
from jaxtyping import Array, Bool, Float

from lmjax.models.clip import CLIP
from lmjax.models.layers import unboxed
from lmjax.tasks.task import Initial, as_floats, decay_labels


@dataclasses.dataclass(frozen=True)
class Contrastive:
    """The task of a CLIP; see `tasks.task.Task`.

    Batches have `pictures` [B, R, R, 3], from 0 to 1 or uint8, their `captions` [B, T] with an end
    token each, and `loss_weights` [B], which are 0 for rows that only fill up a batch: nobody is
    compared with those. Radford et al. 2021, figure 3: the mean of two cross-entropies, of each
    picture's text among all texts and of each text's picture among all pictures of the global
    batch.
    """

    couples_rows: ClassVar[bool] = True

    model: CLIP

    def init(self, rng):
        size = self.model.config.size
        picture, token = jnp.zeros((1, size, size, 3)), jnp.zeros((1, 1), jnp.int32)
        params, axes = unboxed(self.model.init(rng, picture, token)["params"])
        return Initial(params, axes)

    def normalizers(self, batch):
        return {"pairs": batch["loss_weights"].sum()}

    def loss(self, params, extra, batch, normalizers, rngs, step):
        del rngs, step
        pictures = as_floats(batch["pictures"])
        logits = self.model.apply({"params": params}, pictures, batch["captions"])
        weights = batch["loss_weights"]

        def mean(each: Float[Array, " B"]) -> Float[Array, ""]:
            return (each * weights).sum() / normalizers["pairs"]

        text_nll, text_found = found(logits, weights > 0)
        picture_nll, picture_found = found(logits.T, weights > 0)
        metrics = {
            "nll": mean(text_nll + picture_nll) / 2,
            "text_accuracy": mean(text_found),
            "picture_accuracy": mean(picture_found),
        }
        return metrics["nll"], (metrics, extra)

    def evaluate(self, params, extra, batch, normalizers):
        """Each picture and text among those of its own batch; `loss` is the training loss."""
        _, (metrics, _) = self.loss(params, extra, batch, normalizers, {}, 0)
        return {"loss": metrics.pop("nll"), **metrics}, extra

    def labels(self, params):
        return decay_labels(params)

    def flops(self, batch_shapes):
        pictures, texts = batch_shapes["pictures"], batch_shapes["captions"]
        return self.model.config.training_flops(pictures[0], *texts)


def found(
    logits: Float[Array, "B B"], real: Bool[Array, " B"]
) -> tuple[Float[Array, " B"], Bool[Array, " B"]]:
    """Of each row's own column, the diagonal's, among the real ones: its negative log-likelihood,
    and whether no other has a higher logit."""
    # A row that fills up keeps its own column, so that it has a finite loss to be weighed with 0.
    own = jnp.arange(len(logits))
    candidates = real | (own == own[:, None])
    logits = jnp.where(candidates, logits, jnp.finfo(logits.dtype).min)
    nll = optax.softmax_cross_entropy_with_integer_labels(logits, own)
    return nll, logits.argmax(-1) == own

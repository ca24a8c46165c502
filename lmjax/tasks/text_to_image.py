"""Text to image: predict a caption token by token, then the codes of its picture (DALL-E).

A batch has `captions` [B, T] in the tokenizer's ids, `captions_lengths` [B], `image_tokens`
[B, grid x grid] in raster order, and `loss_weights` [B], 0 for rows that fill up a batch.
"""

import dataclasses
from typing import ClassVar

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int, PRNGKeyArray

from lmjax.models.dalle import BRANCHES, DALLE, caption_tokens, finite_branches, unscaled
from lmjax.models.layers import unboxed
from lmjax.tasks.gradient_scaling import SCALES, GradientScaling
from lmjax.tasks.losses import cross_entropy
from lmjax.tasks.task import Batch, Initial, decay_labels


@dataclasses.dataclass(frozen=True)
class TextToImage:
    """The task of a model of streams of text and image; see `tasks.task.Task`.

    The loss is the mean over all text positions, padding too, and the mean over all image
    positions, weighed as in section 2.2 of Ramesh et al. 2021. Text is predicted among text rows of
    the output matrix, image among image rows.
    """

    reads: ClassVar[tuple[str, ...]] = ("captions", "image_tokens")

    model: DALLE
    text_weight: float = 1 / 8
    """Of the text in the loss; the image has the rest."""
    corruption: float = 0.0
    """Share of the image's codes in whose place training lets the model read random ones. Not in
    the paper: a small set of pictures is soon known by heart, and then the codes before one say
    what comes next; so that the caption is read too, they must not be trusted."""
    scaling: GradientScaling | None = None
    """For float16: see there. The gradients of the loss must then be unscaled."""

    def __post_init__(self):
        if self.scaling is not None and self.model.execution.dtype == "bfloat16":
            raise ValueError(
                "gradients are scaled for float16, and the model computes in bfloat16, whose range"
                " is that of float32: leave the scaling out, or choose float16"
            )
        if not 0 <= self.corruption < 1:
            raise ValueError(f"corruption is {self.corruption}, not a share from 0 to below 1")
        if not 0 <= self.text_weight <= 1:
            raise ValueError(f"text_weight is {self.text_weight}, not a share from 0 to 1")

    def init(self, rng):
        text = jnp.zeros((1, self.model.config.text_length), jnp.int32)
        params, axes = unboxed(self.model.init(rng, text)["params"])
        if self.scaling is None:
            return Initial(params, axes)
        extra = self.scaling.init(self.model.config.layers, len(BRANCHES))
        return Initial(params, axes, extra, dict.fromkeys(extra, (None, None)))

    def normalizers(self, batch):
        c, rows = self.model.config, batch["loss_weights"].sum()
        return {"text": rows * c.text_length, "image": rows * c.image_length}

    def loss(self, params, extra, batch, normalizers, rngs, step):
        del step
        c, variables, tokens = self.model.config, {"params": params}, self.tokens(batch)
        read = self.corrupted(tokens, rngs["dropout"]) if self.corruption and rngs else tokens
        scales = extra.get(SCALES)
        features = self.model.apply(variables, read, scales, method="features", rngs=rngs)
        matrix = self.model.apply(variables, method="output_matrix")
        text_features, image_features = jnp.split(features, [c.text_length], axis=1)
        text, image = jnp.split(tokens, [c.text_length], axis=1)
        image_rows, text_rows = jnp.split(matrix, [c.image_vocab])
        parts = {
            "text": (self.text_weight, text_features, text_rows, text - c.image_vocab),
            "image": (1 - self.text_weight, image_features, image_rows, image),
        }
        total, metrics = jnp.zeros(()), {}
        for name, (share, own_features, rows, targets) in parts.items():
            weights = jnp.broadcast_to(batch["loss_weights"][:, None], targets.shape)
            own, sums = cross_entropy(own_features, rows, targets, weights)
            total += share * own / normalizers[name]
            metrics[f"{name}_nll"] = sums["nll"] / normalizers[name]
            metrics[f"{name}_accuracy"] = sums["correct"] / normalizers[name]
        return total, (metrics, extra)

    def tokens(self, batch: Batch) -> Int[Array, "B S"]:
        """The streams of a batch."""
        text = caption_tokens(self.model.config, batch["captions"], batch["captions_lengths"])
        return jnp.concatenate([text, batch["image_tokens"]], axis=1)

    def corrupted(self, tokens: Int[Array, "B S"], key: PRNGKeyArray) -> Int[Array, "B S"]:
        c, (place_key, code_key) = self.model.config, jax.random.split(key)
        replaced = jax.random.bernoulli(place_key, self.corruption, tokens.shape)
        replaced &= jnp.arange(c.length) >= c.text_length
        codes = jax.random.randint(code_key, tokens.shape, 0, c.image_vocab)
        return jnp.where(replaced, codes, tokens)

    def evaluate(self, params, extra, batch, normalizers):
        """`loss` here is that of training, without dropout."""
        loss, (metrics, _) = self.loss(params, extra, batch, normalizers, {}, 0)
        return {"loss": loss} | metrics, extra

    def unscale(self, gradients, extra):
        """See `tasks.gradient_scaling.ScalesGradients`."""
        if self.scaling is None:
            return gradients
        return unscaled(self.model.config, gradients, extra[SCALES])

    def rescale(self, gradients, extra):
        """The same."""
        if self.scaling is None:
            return {}
        return self.scaling.after(extra, finite_branches(self.model.config, gradients))

    def labels(self, params):
        return decay_labels(params)

    def flops(self, batch_shapes):
        return self.model.config.training_flops(batch_shapes["image_tokens"][0])

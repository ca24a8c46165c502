"""Autoencoding pictures through discrete codes: the losses of DALL-E's discrete VAE and of the
VQ-VAE."""

import abc
import dataclasses
import math

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from lmjax.models.dvae import DVAE, LogitLaplace, gumbel_softmax, kl_to_uniform, map_pixels
from lmjax.models.layers import unboxed
from lmjax.tasks.task import Batch, Initial, Scalars, as_floats, decay_labels, traced_flops


@dataclasses.dataclass(frozen=True)
class HalfCosine:
    """From `start` to `end` along half a cosine, and then constant: a function of the step."""

    start: float
    end: float
    horizon: int
    """The step at which the end is reached."""

    def __post_init__(self):
        if not (0 <= self.start < math.inf and 0 <= self.end < math.inf and self.horizon >= 1):
            raise ValueError(f"expected start >= 0, end >= 0 and horizon >= 1, not {self}")

    def __call__(self, step: Int[Array, ""] | int) -> Float[Array, ""]:
        progress = jnp.clip(jnp.asarray(step, jnp.float32) / self.horizon, 0, 1)
        return self.end + (self.start - self.end) * (1 + jnp.cos(jnp.pi * progress)) / 2


@dataclasses.dataclass(frozen=True)
class Autoencoding(abc.ABC):
    """What the two tasks have in common; see `tasks.task.Task`.

    Batches have `pictures` [B, R, R, 3], from 0 to 1 or uint8, and `loss_weights` [B], which are 0
    for rows that only fill up a batch. Losses are per picture, and per colour of each pixel.
    """

    model: DVAE

    def init(self, rng):
        size = self.model.config.size
        params, axes = unboxed(self.model.init(rng, jnp.zeros((1, size, size, 3)))["params"])
        return Initial(params, axes)

    def normalizers(self, batch):
        return {"pictures": batch["loss_weights"].sum()}

    @abc.abstractmethod
    def loss(self, params, extra, batch, normalizers, rngs, step): ...

    def evaluate(self, params, extra, batch, normalizers):
        """`loss` here is the negative log-likelihood given each place's likeliest code.

        `psnr` is the mean over pictures, in decibels, and `mse` that of squared errors.
        """
        pictures = as_floats(batch["pictures"])
        decoded = self.model.apply({"params": params}, pictures)
        mse = ((decoded.picture() - pictures) ** 2).mean((1, 2, 3))
        each = {"loss": nll(decoded, pictures), "mse": mse, "psnr": decibels(mse)}
        return means(each, batch, normalizers), extra

    def labels(self, params):
        return decay_labels(params)

    def flops(self, batch_shapes):
        shapes = {
            "pictures": batch_shapes["pictures"],
            "loss_weights": batch_shapes["loss_weights"],
        }
        return traced_flops(
            self, {k: jax.ShapeDtypeStruct(v, "float32") for k, v in shapes.items()}
        )


@dataclasses.dataclass(frozen=True)
class GumbelSoftmax(Autoencoding):
    """The discrete VAE's: Ramesh et al. 2021, sections 2.1 and A.2, with their schedules.

    Soft codes are drawn, forwards and backwards, at a temperature that falls; the KL divergence is
    that of the codes' distribution at temperature 1 from the uniform one.

    `balance` departs from the paper, for runs that are short: without it a few codes are soon
    preferred everywhere and the others, never drawn, learn nothing. It adds the KL divergence of
    the codes' use over recent batches from the uniform distribution. That use is a moving average,
    kept in `extra`, so the term is a sum over pictures: of how much too often each of their codes
    is used. (Micro-batches move the average one after the other, and so are not exactly one batch.)
    """

    beta: HalfCosine = HalfCosine(0, 6.6, 5_000)
    """Weight of the KL divergence."""
    temperature: HalfCosine = HalfCosine(1, 1 / 16, 150_000)
    balance: HalfCosine | None = None
    """Weight of the divergence of the codes' use; None in the paper."""

    def __post_init__(self):
        if min(self.temperature.start, self.temperature.end) <= 0:
            raise ValueError(f"temperature is {self.temperature}, expected more than 0 throughout")
        if self.model.config.nearest:
            raise ValueError("DVAEConfig.nearest makes a VQ-VAE, which tasks.dvae.Nearest trains")

    def init(self, rng):
        initial, codes = super().init(rng), self.model.config.codes
        if self.balance is None:
            return initial
        use = {"use": jnp.full(codes, 1 / codes)}
        return initial._replace(extra=use, extra_axes={"use": (None,)})

    def loss(self, params, extra, batch, normalizers, rngs, step):
        variables, pictures = {"params": params}, as_floats(batch["pictures"])
        logits = self.model.apply(variables, pictures, method="encode")
        key = jax.random.fold_in(rngs["dropout"], 0)
        codes = gumbel_softmax(logits, self.temperature(step), key)
        decoded = self.model.apply(variables, codes, method="decode")
        kl = kl_to_uniform(logits).sum((1, 2)) / colours(pictures)
        each = {"nll": nll(decoded, pictures), "kl": kl}
        if self.balance is not None:
            use = nn.softmax(logits).sum((1, 2))  # times the places of a grid
            extra = {"use": moved(extra["use"], use, batch, normalizers)}
            excess = jnp.log(self.model.config.codes * extra["use"] + 1e-3)
            each["use_kl"] = (use * excess).sum(-1) / colours(pictures)
        metrics = means(each, batch, normalizers)
        total = metrics["nll"] + self.beta(step) * metrics["kl"]
        if self.balance is not None:
            total += self.balance(step) * metrics["use_kl"]
        return total, (metrics, extra)


@dataclasses.dataclass(frozen=True)
class Nearest(Autoencoding):
    """The VQ-VAE's: van den Oord et al. 2017, section 3.2, equation 3."""

    commitment: float = 0.25
    """Weight of what keeps the encoder's vectors near the codes'."""

    def __post_init__(self):
        if not 0 <= self.commitment < math.inf:
            raise ValueError(f"commitment is {self.commitment}, expected 0 or more")
        if not self.model.config.nearest:
            raise ValueError("tasks.dvae.Nearest trains a VQ-VAE: set DVAEConfig.nearest")

    def loss(self, params, extra, batch, normalizers, rngs, step):
        del rngs, step
        variables, pictures = {"params": params}, as_floats(batch["pictures"])
        vectors = self.model.apply(variables, pictures, method="encoder_output")
        decoded, nearest = self.model.apply(variables, vectors, method="decode_nearest")
        stop = jax.lax.stop_gradient
        each = {
            "nll": nll(decoded, pictures),
            "codebook": ((nearest - stop(vectors)) ** 2).mean((1, 2, 3)),
            "commitment": ((vectors - stop(nearest)) ** 2).mean((1, 2, 3)),
        }
        metrics = means(each, batch, normalizers)
        total = metrics["nll"] + metrics["codebook"] + self.commitment * metrics["commitment"]
        return total, (metrics, extra)


def colours(pictures: Float[Array, "B R R 3"]) -> int:
    """Numbers in one picture."""
    return math.prod(pictures.shape[1:])


def nll(decoded: LogitLaplace, pictures: Float[Array, "B R R 3"]) -> Float[Array, " B"]:
    """Negative log-likelihood of each picture, in nats per colour of each pixel."""
    return -decoded.log_density(map_pixels(pictures)).mean((1, 2, 3))


def decibels(mse: Float[Array, " B"]) -> Float[Array, " B"]:
    """Peak signal-to-noise ratio. What 8 bits cannot show counts as equal."""
    return -10 * jnp.log10(jnp.maximum(mse, 0.5**2 / 255**2))


def means(each: dict[str, Float[Array, " B"]], batch: Batch, normalizers: Scalars) -> Scalars:
    """Over the whole batch's pictures, from some rows of it."""
    weights = batch["loss_weights"]
    return {name: (x * weights).sum() / normalizers["pictures"] for name, x in each.items()}


def moved(
    average: Float[Array, " V"], use: Float[Array, "B V"], batch: Batch, normalizers: Scalars
) -> Float[Array, " V"]:
    """The moving average of the codes' use after these rows, a constant to the gradient.

    A whole batch moves it a tenth of the way.
    """
    frequencies = jax.lax.stop_gradient(use / use.sum(-1, keepdims=True))
    weights = batch["loss_weights"] / normalizers["pictures"]
    return average + 0.1 * (weights[:, None] * (frequencies - average)).sum(0)

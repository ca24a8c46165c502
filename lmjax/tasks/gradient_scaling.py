"""Scales that keep the gradients of residual branches within float16.

Paper: Ramesh et al. 2021, "Zero-Shot Text-to-Image Generation", section 2.4 and appendix D. One
scale for a whole model, as is usual for float16, does not do for deep ones: the gradients of its
first and last layers are too far apart.
"""

import dataclasses
import math
from typing import Protocol, runtime_checkable

import jax.numpy as jnp
from jaxtyping import Array, Bool

from lmjax.tasks.task import Params

SCALES, RESTS = "gradient_scales", "gradient_scales_rest"
"""The names of what a task carries: the scales, and for how many steps each was not shrunk."""


@dataclasses.dataclass(frozen=True)
class GradientScaling:
    """How scales follow the gradients: up a little after each step, and down when one of their
    branch's gradients is not finite, but not again for a while."""

    replicas: int = 1
    """M: over so many devices the batch is divided, in the paper. The larger the batch, the smaller
    are the gradients of a row."""
    start: float = 2.0**13
    lowest: float = 2.0**7
    highest: float = 2.0**24
    """These three are multiplied by `replicas`."""
    growth: float = 2 ** (1 / 1_000)
    shrinkage: float = 2**-0.5
    patience: int = 125
    """Steps between two shrinkages of a scale."""

    def __post_init__(self):
        if self.replicas < 1:
            raise ValueError(f"gradients are scaled for {self.replicas} replicas, not 1 or more")

    @property
    def longest_fall(self) -> int:
        """Steps in which a scale comes down from the first one to the lowest."""
        return round(math.log(self.lowest / self.start, self.shrinkage)) * self.patience

    def init(self, *shape: int) -> dict[str, Array]:
        """What is carried, at first."""
        return {
            SCALES: jnp.full(shape, self.start * self.replicas, jnp.float32),
            RESTS: jnp.full(shape, self.patience, jnp.int32),
        }

    def after(self, scales: dict[str, Array], finite: Bool[Array, "*branches"]) -> dict[str, Array]:
        """Both after a step in which the gradients of these branches were finite."""
        now, rest = scales[SCALES], scales[RESTS]
        shrunk = ~finite & (rest >= self.patience)
        factor = jnp.where(finite, self.growth, jnp.where(shrunk, self.shrinkage, 1.0))
        bounds = self.lowest * self.replicas, self.highest * self.replicas
        return {
            SCALES: jnp.clip(now * factor, *bounds),
            RESTS: jnp.where(shrunk, 0, jnp.minimum(rest, self.patience) + 1),
        }


@runtime_checkable
class ScalesGradients(Protocol):
    """A task whose loss gives gradients that are scaled by what is in `extra`."""

    def unscale(self, gradients: Params, extra: dict[str, Array]) -> Params:
        """The gradients themselves, of some of the rows."""
        ...

    def rescale(self, gradients: Params, extra: dict[str, Array]) -> dict[str, Array]:
        """The scales in `extra` after a step with these gradients of all rows; also where it is
        passed over because they are not finite."""
        ...

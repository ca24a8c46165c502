"""Learning rates as functions of the step.

Each schedule is a frozen dataclass: `schedule(step)` is the float32 learning rate of update number
`step`, counted from 0, for a Python int or a traced int32. A schedule keeps its own horizon: how
long it decays is part of what a run is, how many steps are run today is not.
"""

import dataclasses
import math

import jax.numpy as jnp
from jaxtyping import Array, Float, Int


@dataclasses.dataclass(frozen=True)
class InverseSquareRoot:
    """scale / sqrt(max(step, warmup)): constant at first, then ever slower decay.

    T5's pretraining (Raffel et al. 2020, section 3.1.2): 0.01 for 10,000 steps, 0.001 at step
    1,000,000. It needs no horizon, so a run can go on for longer than was planned.
    """

    scale: float = 1.0
    """Multiplies the whole curve; 1 is T5's."""
    warmup: int = 10_000
    """Steps at the constant scale / sqrt(warmup) before the decay begins."""

    def __post_init__(self):
        _check_rate("scale", self.scale)
        if self.warmup < 1:
            raise ValueError(f"warmup is {self.warmup}, expected at least 1 step")

    def __call__(self, step: Int[Array, ""] | int) -> Float[Array, ""]:
        return self.scale / jnp.sqrt(jnp.maximum(_float(step), self.warmup))


@dataclasses.dataclass(frozen=True)
class Linear:
    """Rises from 0 to `peak` over `warmup` steps, then falls on a straight line to `end`."""

    peak: float
    """The highest learning rate, reached at step `warmup`."""
    horizon: int
    """The step at which `end` is reached; the rate stays there afterwards."""
    warmup: int = 0
    """Steps of linear rise; the update at step 0 then has learning rate 0."""
    end: float = 0.0
    """The learning rate at the horizon."""
    from_start: bool = False
    """The line falls from `peak` at step 0, and the warm-up only cuts off its beginning, as in the
    reference code of BERT."""

    def __post_init__(self):
        _check_rate("peak", self.peak)
        _check_warmup(self.warmup, self.horizon)
        if not 0 <= self.end <= self.peak:
            raise ValueError(f"end is {self.end}, expected 0 <= end <= peak, which is {self.peak}")

    def __call__(self, step: Int[Array, ""] | int) -> Float[Array, ""]:
        progress = _progress(step, 0 if self.from_start else self.warmup, self.horizon)
        decayed = self.peak + (self.end - self.peak) * progress
        return _warmed(step, self.warmup, self.peak, decayed)


@dataclasses.dataclass(frozen=True)
class Cosine:
    """Rises from 0 to `peak` over `warmup` steps, then falls along half a cosine."""

    peak: float
    """The highest learning rate, reached at step `warmup`."""
    horizon: int
    """The step at which the decay ends; the rate stays at peak x final_fraction afterwards."""
    warmup: int = 0
    """Steps of linear rise; the update at step 0 then has learning rate 0."""
    final_fraction: float = 0.1
    """The learning rate at the horizon, as a fraction of the peak."""

    def __post_init__(self):
        _check_rate("peak", self.peak)
        _check_warmup(self.warmup, self.horizon)
        if not 0 <= self.final_fraction <= 1:
            raise ValueError(f"final_fraction is {self.final_fraction}, expected 0 to 1")

    def __call__(self, step: Int[Array, ""] | int) -> Float[Array, ""]:
        cosine = (1 + jnp.cos(jnp.pi * _progress(step, self.warmup, self.horizon))) / 2
        decayed = self.peak * (self.final_fraction + (1 - self.final_fraction) * cosine)
        return _warmed(step, self.warmup, self.peak, decayed)


@dataclasses.dataclass(frozen=True)
class Constant:
    """One learning rate throughout, after an optional linear rise. T5 is fine-tuned with 0.001."""

    rate: float
    """The learning rate."""
    warmup: int = 0
    """Steps of linear rise; the update at step 0 then has learning rate 0."""

    def __post_init__(self):
        _check_rate("rate", self.rate)
        if self.warmup < 0:
            raise ValueError(f"warmup is {self.warmup}, expected 0 or more steps")

    def __call__(self, step: Int[Array, ""] | int) -> Float[Array, ""]:
        return _warmed(step, self.warmup, self.rate, jnp.float32(self.rate))


Schedule = InverseSquareRoot | Linear | Cosine | Constant


def _float(step) -> Float[Array, ""]:
    return jnp.asarray(step, jnp.float32)


def _progress(step, warmup: int, horizon: int) -> Float[Array, ""]:
    """0 until the end of the warm-up, 1 from the horizon on."""
    return jnp.clip((_float(step) - warmup) / (horizon - warmup), 0, 1)


def _warmed(step, warmup: int, peak: float, decayed) -> Float[Array, ""]:
    return jnp.where(_float(step) < warmup, peak * _float(step) / max(warmup, 1), decayed)


def _check_rate(name: str, rate: float):
    if not 0 < rate < math.inf:
        raise ValueError(f"{name} is {rate}, expected a positive finite number")


def _check_warmup(warmup: int, horizon: int):
    if not 0 <= warmup < horizon:
        raise ValueError(
            f"warmup is {warmup} steps and horizon {horizon}, expected 0 <= warmup < horizon"
        )

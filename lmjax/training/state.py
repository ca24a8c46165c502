"""Everything a run carries from step to step."""

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int, PRNGKeyArray

from lmjax.tasks.task import Initial, Params, Task
from lmjax.training.compression import CompressedSums, Compression
from lmjax.training.optimizers import Optimizer


@dataclasses.dataclass(frozen=True)
class Averaging:
    """An exponential moving average of the parameters, which evaluation then uses."""

    decay: float = 0.999
    """What part of the average is kept each time that it moves."""
    interval: int = 1
    """Updates of the parameters from one time to the next; steps that are skipped are none."""

    def __post_init__(self):
        if not 0 <= self.decay < 1 or self.interval < 1:
            raise ValueError(f"averaging needs 0 <= decay < 1 and interval >= 1, not {self}")

    def update(self, average: Params, params: Params, updates: Int[Array, ""]) -> Params:
        """The average after so many `updates` of the parameters."""
        kept = jnp.where(updates % self.interval == 0, self.decay, 1.0)
        return jax.tree.map(
            lambda a, p: (kept * a + (1 - kept) * p).astype(a.dtype), average, params
        )


class TrainState(NamedTuple):
    """`step` counts the steps taken; `rng` never changes: keys are folded from it and the step."""

    step: Int[Array, ""]
    params: Params
    extra: Any
    opt_state: Any
    ema: Params | None
    rng: PRNGKeyArray
    compression: Compression | None = None

    @property
    def evaluated(self) -> Params:
        """The parameters that evaluation and users get: the average where one is kept."""
        return self.params if self.ema is None else self.ema


def abstract_init(task: Task) -> Initial:
    """What a task begins with: shapes and logical axes, without computing anything."""
    found = {}

    def init():
        initial = task.init(jax.random.key(0))
        found.update(axes=initial.axes, extra_axes=initial.extra_axes)
        return initial.params, initial.extra

    params, extra = jax.eval_shape(init)
    return Initial(params, found["axes"], extra, found["extra_axes"])


def abstract_parameters(task: Task) -> tuple[Params, Any]:
    """Shapes and logical axes of a task's parameters, without computing them."""
    initial = abstract_init(task)
    return initial.params, initial.axes


def init_state(
    task: Task,
    optimizer: Optimizer,
    averaged: bool,
    seed: int,
    params: Params | None = None,
    compression: CompressedSums | None = None,
) -> TrainState:
    """The state at step 0, with parameters drawn from `seed` unless `params` are given."""
    init_key, rng = jax.random.split(jax.random.key(seed))
    initial = task.init(init_key)
    params = initial.params if params is None else params
    ema = jax.tree.map(jnp.copy, params) if averaged else None
    carried = None if compression is None else compression.init()
    return TrainState(
        jnp.int32(0), params, initial.extra, optimizer.init(params), ema, rng, carried
    )


def state_axes(
    state: TrainState,
    entries: Any,
    extra_entries: Any,
    optimizer: Optimizer,
    compression: Compression | None = None,
) -> TrainState:
    """From one entry per axis of each parameter, extra array and what compression carries, those of
    an abstract state."""
    return TrainState(
        step=(),
        params=entries,
        extra=extra_entries,
        opt_state=optimizer.state_axes(state.params, entries),
        ema=None if state.ema is None else entries,
        rng=(),
        compression=compression,
    )

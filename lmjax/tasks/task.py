"""What training needs to know of a model and its objective, and nothing more."""

from collections.abc import Collection, Mapping
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, PRNGKeyArray, UInt8

from lmjax.sharding.flops import product_flops

Params = dict[str, Any]  # a nested dict of arrays
Batch = Mapping[str, Array]  # arrays whose first axis is the batch
Scalars = dict[str, Float[Array, ""]]


class Initial(NamedTuple):
    """What a task begins with."""

    params: Params
    axes: Any
    """Shaped as `params`, with a tuple of logical axis names in the place of each array; it must
    not depend on values."""
    extra: dict[str, Array] = {}
    """Arrays by name that are carried from step to step without being trained."""
    extra_axes: dict[str, tuple[str | None, ...]] = {}
    """As `axes`. Along an axis named "batch" each row of the batch has an entry of its own, which
    goes where the row goes; an array without one is the whole batch's."""


class Task(Protocol):
    """A model and an objective as pure functions; `lmjax.training.fit` calls them under jit.

    A loss is a sum over examples divided by a normalizer known before the backward pass, so that
    the losses (and gradients) of micro-batches, devices and hosts add up to those of the whole
    batch exactly. A task whose loss compares the rows of a batch with each other says so by an
    attribute `couples_rows` that is True: it is then always computed from the whole batch.

    An attribute `reads` names the arrays of a batch whose tokens go through the model; without one
    there are none. Speed is counted by them, and not by what is only predicted: of a decoder alone
    `inputs`, though `targets` are as many.
    """

    def init(self, rng: PRNGKeyArray) -> Initial:
        """Parameters drawn from `rng`, and what goes with them."""
        ...

    def normalizers(self, batch: Batch) -> Scalars:
        """The sum of weights of each term of the loss, over all rows of `batch`."""
        ...

    def loss(
        self,
        params: Params,
        extra: Any,
        batch: Batch,
        normalizers: Scalars,
        rngs: dict[str, PRNGKeyArray],
        step: Int[Array, ""],
    ) -> tuple[Float[Array, ""], tuple[Scalars, Any]]:
        """Returns (loss, (metrics, extra)) of some rows of the batch that has `normalizers`.

        The loss and each metric is a sum over the rows divided by a normalizer. `rngs` has a
        `dropout` key; `step` counts the steps taken before this one.
        """
        ...

    def evaluate(
        self, params: Params, extra: Any, batch: Batch, normalizers: Scalars
    ) -> tuple[Scalars, Any]:
        """(metrics without dropout, extra): sums divided by `normalizers`, `loss` among them, and
        what the next held-out batch is given. The first one is given that of training."""
        ...

    def labels(self, params: Params) -> Any:
        """A tree as `params` with one word for each array, by which the optimizer treats it."""
        ...

    def flops(self, batch_shapes: dict[str, tuple[int, ...]]) -> float:
        """FLOPs of the products in one step, forward and backward, without rematerialisation."""
        ...


def reads(task: Task) -> tuple[str, ...]:
    """The arrays whose tokens go through the task's model; see `Task`."""
    return getattr(task, "reads", ())


class Workload(NamedTuple):
    """What an experiment trains, without its data: enough to plan a run."""

    task: Task
    optimizer: Any
    batch: Mapping[str, Any]
    """The shapes of the global batch's arrays."""


def decay_labels(params: Params, decayed: Collection[str] = ()) -> Any:
    """Norm scales and biases, vectors within their layer, are "no_decay", all others "decay", and
    so are those of the names `decayed`."""

    def label(path, param) -> str:
        name = jax.tree_util.keystr(path[-1:], simple=True)
        exempt = name in ("scale", "bias") or name.endswith("_bias")
        return "no_decay" if exempt and name not in decayed else "decay"

    return jax.tree.map_with_path(label, params)


def as_floats(
    pictures: Float[Array, "B R R 3"] | UInt8[Array, "B R R 3"],
) -> Float[Array, "B R R 3"]:
    """Pictures of a batch, from 0 to 1."""
    return pictures / 255 if pictures.dtype == jnp.uint8 else pictures


def traced_flops(task: Task, batch: Mapping[str, jax.ShapeDtypeStruct]) -> float:
    """`Task.flops` by tracing the loss, for models whose products make no short formula: forwards,
    and twice backwards."""

    def loss(params, extra, batch, key):
        normalizers = task.normalizers(batch)
        return task.loss(params, extra, batch, normalizers, {"dropout": key}, 0)[0]

    key = jax.random.key(0)
    params, extra = jax.eval_shape(lambda: (task.init(key).params, task.init(key).extra))
    return 3 * product_flops(jax.make_jaxpr(loss)(params, extra, batch, key))

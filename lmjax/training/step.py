"""One step of training as a pure function, and its compilation for a layout of devices."""

import functools
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax
from jax.sharding import PartitionSpec
from jaxtyping import Array, Float, PRNGKeyArray

from lmjax.models.layers import constrain
from lmjax.sharding.hardware import device_memory
from lmjax.sharding.mesh import Layout, check_batch_size, lay_out
from lmjax.sharding.multihost import gather
from lmjax.sharding.partition import Axes
from lmjax.sharding.strategies import PMAP, STRATEGIES, MeshOptions, Need, StrategyName, choose
from lmjax.tasks.gradient_scaling import RESTS, SCALES, ScalesGradients
from lmjax.tasks.task import Batch, Params, Scalars, Task
from lmjax.training.compression import COMPRESSED_AXIS, CompressedSums, Compression, PowerSGD
from lmjax.training.optimizers import Adafactor, AdamW, Optimizer
from lmjax.training.schedules import Schedule
from lmjax.training.state import (
    Averaging,
    TrainState,
    abstract_init,
    abstract_parameters,
    init_state,
    state_axes,
)

REPLICAS = "replicas"  # the name that pmap gives its axis


class Outcome(NamedTuple):
    """What the host learns of a step: metrics, and the squared norm of each gradient."""

    metrics: Scalars
    squares: Float[Array, " parameters"]


def train_step(
    state: TrainState,
    batch: Batch,
    *,
    task: Task,
    optimizer: Optimizer,
    schedule: Schedule,
    microbatches: int,
    averaging: Averaging | None,
    extra_axes: dict[str, Axes],
    replicas: str | None = None,
    compression: CompressedSums | None = None,
) -> tuple[TrainState, Outcome]:
    """One step of training; of the rows that this replica has where `replicas` names their axis.

    If the loss or a gradient is not finite, the state stays as it was but for the step counter and
    the scales of gradients, where a task has such.
    The optimizer does not count such a step, so its learning rate, which is the one in the metrics,
    then lags behind the step counter.
    """
    key = jax.random.fold_in(state.rng, state.step)
    total, extra = _same, state.extra
    if replicas is not None:
        key = jax.random.fold_in(key, jax.lax.axis_index(replicas))
        total = functools.partial(jax.lax.psum, axis_name=replicas)
        extra = own_rows(extra, extra_axes, replicas)
    normalizers = total(task.normalizers(batch))
    loss, metrics, extra, gradients = accumulate(
        task, state._replace(extra=extra), batch, key, microbatches, extra_axes, normalizers
    )
    loss, metrics = total((loss, metrics))
    if replicas is not None:
        extra = all_rows(extra, extra_axes, replicas)
    scaled = isinstance(task, ScalesGradients)
    if scaled:
        gradients = task.unscale(gradients, state.extra)
    if compression is None:
        gradients, carried = total(gradients), None
    else:
        gradients, carried = compression.total(gradients, state.compression, total)
    scales = task.rescale(gradients, state.extra) if scaled else {}
    squares = jnp.stack(
        [jnp.sum(jnp.square(g.astype(jnp.float32))) for g in jax.tree.leaves(gradients)]
    )
    finite = jnp.isfinite(loss) & jnp.isfinite(squares).all()

    metrics = {
        **metrics,
        "loss": loss,
        "grad_norm": jnp.sqrt(squares.sum()),
        "learning_rate": schedule(state.opt_state[0]),  # all begin with the updates done
    }

    def update(state: TrainState) -> TrainState:
        changes, opt_state = optimizer.update(gradients, state.opt_state, state.params)
        params = optax.apply_updates(state.params, changes)
        ema = None
        if averaging is not None:
            ema = averaging.update(state.ema, params, updates=opt_state[0])
        return TrainState(
            state.step + 1, params, extra | scales, opt_state, ema, state.rng, carried
        )

    def pass_over(state: TrainState) -> TrainState:
        return state._replace(step=state.step + 1, extra=state.extra | scales)

    # A choice array by array, between new and old, would keep both in memory.
    state = jax.lax.cond(finite, update, pass_over, state)
    return state, Outcome(metrics, squares)


def _same(x):
    return x


def accumulate(
    task: Task,
    state: TrainState,
    batch: Batch,
    key: PRNGKeyArray,
    microbatches: int,
    extra_axes: dict[str, Axes],
    normalizers: Scalars,
) -> tuple[Float[Array, ""], Scalars, Any, Params]:
    """(loss, metrics, extra, gradients) of a batch, computed in `microbatches` pieces.

    All are divided by the normalizers of the whole batch, so those of the pieces simply add up, as
    do those of replicas with other rows. `extra` is passed on from piece to piece; of arrays with
    entries for the rows, each piece has its own.
    """

    def loss(params, extra, piece, key):
        return task.loss(params, extra, piece, normalizers, {"dropout": key}, state.step)

    gradient = jax.value_and_grad(loss, has_aux=True)
    if microbatches == 1:
        (value, (metrics, extra)), gradients = gradient(state.params, state.extra, batch, key)
        return value, metrics, extra, gradients

    def add(carry, inputs):
        common, before = carry
        piece, key, own = inputs
        (value, (metrics, extra)), gradients = gradient(state.params, common | own, piece, key)
        common, own = ({name: extra[name] for name in part} for part in (common, own))
        return (common, jax.tree.map(jnp.add, before, gradients)), (value, metrics, own)

    of_rows = {name: axes for name, axes in extra_axes.items() if "batch" in axes}
    own = {name: split(state.extra[name], microbatches, axes) for name, axes in of_rows.items()}
    common = {name: x for name, x in state.extra.items() if name not in of_rows}
    pieces = {
        name: split(x, microbatches, ("batch",) + (None,) * (x.ndim - 1))
        for name, x in batch.items()
    }
    zeros = jax.tree.map(jnp.zeros_like, state.params)
    inputs = pieces, jax.random.split(key, microbatches), own
    (common, gradients), (*sums, own) = jax.lax.scan(add, (common, zeros), inputs)
    value, metrics = jax.tree.map(lambda x: x.sum(0), sums)
    own = {name: joined(x, of_rows[name]) for name, x in own.items()}
    return value, metrics, common | own, gradients


def split(x: Array, pieces: int, axes: Axes) -> Array:
    """Along "batch": [..., B, ...] -> [pieces, ..., B / pieces, ...], each device keeping the rows
    it has."""
    at = axes.index("batch")
    x = x.reshape(*x.shape[:at], x.shape[at] // pieces, pieces, *x.shape[at + 1 :])
    return constrain(jnp.moveaxis(x, at + 1, 0), None, *axes)


def joined(pieces: Array, axes: Axes) -> Array:
    """The inverse of `split`."""
    at = axes.index("batch")
    x = jnp.moveaxis(pieces, 0, at + 1)
    return constrain(x.reshape(*x.shape[:at], -1, *x.shape[at + 2 :]), *axes)


def own_rows(extra: dict[str, Array], axes: dict[str, Axes], replicas: str) -> dict[str, Array]:
    """The entries of this replica's rows, and what is the whole batch's."""

    def own(x, at):
        count = x.shape[at] // jax.lax.axis_size(replicas)
        first = jax.lax.axis_index(replicas) * count
        return jax.lax.dynamic_slice_in_dim(x, first, count, at)

    return {
        name: own(x, axes[name].index("batch")) if "batch" in axes[name] else x
        for name, x in extra.items()
    }


def all_rows(extra: dict[str, Array], axes: dict[str, Axes], replicas: str) -> dict[str, Array]:
    """The inverse of `own_rows`."""

    def gather(x, at):
        return jax.lax.all_gather(x, replicas, axis=at, tiled=True)

    return {
        name: gather(x, axes[name].index("batch")) if "batch" in axes[name] else x
        for name, x in extra.items()
    }


# --- before the first step


def arrange(
    task: Task,
    optimizer: Adafactor | AdamW,
    batch_size: int,
    *,
    microbatches: int = 1,
    strategy: StrategyName = "auto",
    options: MeshOptions = MeshOptions(),  # noqa: B008 (it is frozen)
    devices: Sequence[jax.Device] | None = None,
) -> Layout:
    """How a task and its batch lie on `devices` (all, by default).

    Raises:
        ValueError: a mesh that these devices do not form, `options` that the strategy ignores, or
            a batch that does not divide.
    """
    devices = jax.devices() if devices is None else devices
    params, axes = abstract_parameters(task)
    if strategy == "auto":
        transformation = optimizer.transformation(axes, task.labels(params))
        need = Need(
            # Parameters, as many gradients, and what the optimizer keeps.
            state=2 * _bytes(params) + _bytes(jax.eval_shape(transformation.init, params)),
            memory=_least_memory(devices),
            rows=batch_size,
        )
        chosen, reason = choose(need, len(devices), options.slices)
    else:
        chosen, reason = STRATEGIES[strategy], "as asked"
    layout = lay_out(chosen, options, params, axes, devices, reason)
    check_batch_size(batch_size, layout.batch_parts, microbatches)
    return layout


def _least_memory(devices: Sequence[jax.Device]) -> float | None:
    """Bytes of the device with the least, by what each process can say of one of its own."""
    own = next((d for d in devices if d.process_index == jax.process_index()), devices[0])
    found = gather("device memory", device_memory(own))
    return None if None in found else min(found)


def _bytes(shapes: Any) -> int:
    return sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(shapes))


class Prepared(NamedTuple):
    """A step that waits for its shapes, and what it starts from."""

    step: Callable[[TrainState, Batch], tuple[TrainState, Outcome]]
    build: Callable[[Params | None], TrainState]
    """Builds the first state, from parameters if they are given."""
    target: TrainState
    """That state's shapes and shardings."""
    sums: CompressedSums | None
    """How gradients are compressed, if they are."""


def prepare(
    task: Task,
    optimizer: Adafactor | AdamW,
    layout: Layout,
    *,
    seed: int = 0,
    microbatches: int = 1,
    averaging: Averaging | None = None,
    compression: PowerSGD | None = None,
) -> Prepared:
    """The step of this task and optimizer, and its state, as `layout` divides it.

    Raises:
        ValueError: strategy pmap or compression for what it cannot do, or a part of a batch at a
            time for a task that needs all of it.
    """
    check_whole_batch(task, layout, microbatches)
    params, axes, _, extra_axes = abstract_init(task)
    transformation = optimizer.transformation(axes, task.labels(params))
    sums = compressed_sums(task, layout, compression)
    build = functools.partial(
        init_state, task, transformation, averaging is not None, seed, compression=sums
    )
    shapes = jax.eval_shape(build)
    if layout.strategy is PMAP:
        refuse_for_pmap(extra_axes)
        extra = {name: (None,) * x.ndim for name, x in shapes.extra.items()}
    else:
        extra = {
            name: layout.activation(extra_axes[name], x.shape) for name, x in shapes.extra.items()
        }
    own = layout.parameters(params, axes)
    entries = state_axes(shapes, own, extra, transformation, sums and sums.entries())
    target = jax.tree.map(
        lambda x, parts: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=layout.sharding(parts)),
        shapes,
        entries,
    )
    step = functools.partial(
        train_step,
        task=task,
        optimizer=transformation,
        schedule=optimizer.schedule,
        microbatches=microbatches,
        averaging=averaging,
        extra_axes=extra_axes,
        replicas=REPLICAS if layout.strategy is PMAP else None,
    )
    if sums is not None:
        step = by_replicas(
            functools.partial(step, replicas=COMPRESSED_AXIS, compression=sums), layout
        )
    return Prepared(step, build, target, sums)


def by_replicas(step: Callable, layout: Layout) -> Callable:
    """A step that each replica along `COMPRESSED_AXIS` does with its own rows and its own errors;
    the other axes of the mesh divide what a replica has as always."""
    whole, divided = PartitionSpec(), PartitionSpec(COMPRESSED_AXIS)
    same = dict.fromkeys(TrainState._fields, whole)
    specs = TrainState(**{**same, "compression": Compression(errors=divided, bases=whole)})
    rules = tuple(
        (axis, mesh_axis) for axis, mesh_axis in layout.rules if mesh_axis != COMPRESSED_AXIS
    )

    def replica(state, batch):
        with nn.logical_axis_rules(rules):
            return step(state, batch)

    return jax.shard_map(
        replica,
        mesh=layout.mesh,
        in_specs=(specs, divided),
        out_specs=(specs, whole),
        axis_names={COMPRESSED_AXIS},
        check_vma=False,
    )


def compressed_sums(
    task: Task, layout: Layout, compression: PowerSGD | None
) -> CompressedSums | None:
    """How gradients are compressed, if they are.

    Raises:
        ValueError: they cannot be, or there is nothing to compress.
    """
    if compression is None:
        return None
    name = type(task).__name__
    if getattr(task, "couples_rows", False):
        raise ValueError(
            f"the loss of {name} compares all rows of a batch with each other, but compression sums"
            " what each replica has made of its own: leave it out"
        )
    if layout.strategy is PMAP:
        raise ValueError("strategy pmap does not compress gradients: choose dp or fsdp")
    if layout.mesh.shape[COMPRESSED_AXIS] == 1:
        raise ValueError(
            f"gradients are compressed between the replicas along mesh.{COMPRESSED_AXIS}, but the"
            f" mesh {dict(layout.mesh.shape)} has only one: leave compression out, or choose a"
            " smaller mesh.fsdp or mesh.model, or give it more devices"
        )
    params, axes, _, extra_axes = abstract_init(task)
    carried = [x for x in extra_axes if x not in (SCALES, RESTS)]  # these are the same everywhere
    if carried:
        raise ValueError(
            f"gradients of {name} are not compressed, because it carries arrays along from step to"
            f" step: {', '.join(carried)}"
        )
    return compression.sums(params, axes, layout)


def refuse_for_pmap(extra_axes: dict[str, Axes]) -> None:
    """Raises ValueError for what replicas by themselves cannot do."""
    if jax.process_count() > 1 or any("batch" not in axes for axes in extra_axes.values()):
        raise ValueError(
            "strategy pmap is for one process, and for tasks that carry no arrays along but those"
            " of their rows: choose dp, which divides the same things"
        )


def check_whole_batch(task: Task, layout: Layout, microbatches: int) -> None:
    """Raises ValueError if a task that compares a batch's rows would get only some of them."""
    if not getattr(task, "couples_rows", False):
        return
    name = type(task).__name__
    if microbatches > 1:
        raise ValueError(
            f"the loss of {name} compares all rows of a batch with each other, so it is not the sum"
            f" of {microbatches} micro-batches' losses: leave fit.microbatches at 1, and choose a"
            " smaller batch, execution.remat full or strategy fsdp to need less memory"
        )
    if layout.strategy is PMAP and layout.mesh.size > 1:
        raise ValueError(
            f"the loss of {name} compares all rows of a batch with each other, but under strategy"
            " pmap each device sees only its own: choose dp, which divides the same things"
        )


def lower_step(prepared: Prepared, batch: Batch, layout: Layout) -> jax.stages.Lowered:
    """The step for these shapes, which reuses the old state's memory; call it under `activate`."""
    if layout.strategy is PMAP:
        jitted = jax.pmap(
            prepared.step,
            axis_name=REPLICAS,
            in_axes=(None, 0),
            out_axes=None,
            donate_argnums=0,
            devices=list(layout.mesh.devices.flat),
        )
        return jitted.lower(prepared.target, batch)
    jitted = jax.jit(
        prepared.step, donate_argnums=0, out_shardings=(shardings(prepared.target), None)
    )
    return jitted.lower(prepared.target, batch)


def compile_step(
    prepared: Prepared, batch: Batch, layout: Layout
) -> tuple[jax.stages.Compiled, float]:
    """The compiled step and the seconds it took."""
    began = time.perf_counter()
    return lower_step(prepared, batch, layout).compile(), time.perf_counter() - began


def shardings(target: Any) -> Any:
    return jax.tree.map(lambda x: x.sharding, target)

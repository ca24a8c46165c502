"""Which device holds which part of an array.

Arrays name their axes (`embed`, `heads`, `batch`, ...); a strategy says along which axes of the
mesh each of them is divided. Parameters and activations use separate names, so that one table
serves both.
"""

import contextlib
import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any

import flax.linen as nn
import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

Axes = tuple[str | None, ...]


@dataclasses.dataclass(frozen=True)
class Strategy:
    """Mesh axes, and for each logical axis the mesh axes that divide it, outermost first.

    A logical axis without a rule is not divided.
    """

    name: str
    mesh_axes: tuple[str, ...]
    rules: tuple[tuple[str, tuple[str, ...]], ...]

    def spec(self, axes: Axes) -> PartitionSpec:
        """How an array with these logical axes is divided.

        Raises:
            ValueError: two axes of the array would be divided along one axis of the mesh.
        """
        rules = dict(self.rules)
        parts = [rules.get(axis, ()) for axis in axes]
        used = [mesh_axis for part in parts for mesh_axis in part]
        if len(set(used)) < len(used):
            raise ValueError(
                f"strategy {self.name!r} divides two axes of an array with axes {axes} along one"
                f" axis of the mesh ({parts}): give them different rules"
            )
        return PartitionSpec(*(part or None for part in parts))


DATA_PARALLEL = Strategy("dp", ("data",), (("batch", ("data",)),))


def make_mesh(
    strategy: Strategy,
    shape: tuple[int, ...] | None = None,
    devices: Sequence[jax.Device] | None = None,
) -> Mesh:
    """A mesh over `devices` (all, by default); without a `shape` its first axis has them all."""
    devices = jax.devices() if devices is None else devices
    shape = shape or (len(devices),) + (1,) * (len(strategy.mesh_axes) - 1)
    # Logical rules leave the propagation of shardings to the compiler: Auto, not the new default.
    types = (AxisType.Auto,) * len(shape)
    return jax.make_mesh(shape, strategy.mesh_axes, axis_types=types, devices=devices)


@contextlib.contextmanager
def activate(mesh: Mesh, strategy: Strategy):
    """Gives models' constraints on named activation axes their meaning while they are traced."""
    rules = [(logical, mesh_axes or None) for logical, mesh_axes in strategy.rules]
    with jax.set_mesh(mesh), nn.logical_axis_rules(rules):
        yield


def shardings(mesh: Mesh, strategy: Strategy, tree: Any, axes: Any) -> Any:
    """A sharding for each array of `tree`; `axes` has a tuple of names in each array's place."""
    return jax.tree.map(lambda _, names: NamedSharding(mesh, strategy.spec(names)), tree, axes)


def batch_sharding(mesh: Mesh, strategy: Strategy) -> NamedSharding:
    """How every array of a batch is divided: by rows."""
    return NamedSharding(mesh, strategy.spec(("batch",)))


def put_batch(rows: Mapping[str, np.ndarray], sharding: NamedSharding) -> dict[str, jax.Array]:
    """The global batch on its devices, from this host's rows of it."""
    return {
        name: jax.make_array_from_process_local_data(sharding, array)
        for name, array in rows.items()
    }


def check_batch_size(
    batch_size: int, mesh: Mesh, strategy: Strategy, microbatches: int = 1
) -> None:
    """Raises ValueError unless each micro-batch gives each device equally many rows."""
    parts = math.prod(mesh.shape[axis] for axis in dict(strategy.rules).get("batch", ()))
    unit = parts * microbatches
    if batch_size % unit or batch_size < 1:
        below, above = batch_size // unit * unit, (batch_size // unit + 1) * unit
        nearest = f"{below} or {above}" if below > 0 else f"{above}"
        raise ValueError(
            f"a batch of {batch_size} rows does not divide into {microbatches} micro-batch(es) over"
            f" {parts} device(s): the nearest batch sizes that do are {nearest}"
        )

"""A strategy laid out on devices: which of them holds which part of an array."""

import contextlib
import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any

import flax.linen as nn
import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from lmjax.sharding.partition import Axes, Rules, divided_by, fallbacks
from lmjax.sharding.strategies import (
    LARGE,
    MESH_AXES,
    PMAP,
    SMALL,
    MeshOptions,
    Strategy,
    layer_size,
    mesh_shape,
)


@dataclasses.dataclass(frozen=True)
class Layout:
    """A strategy on a mesh."""

    strategy: Strategy
    mesh: Mesh
    rules: Rules
    """The strategy's, with those that the mesh options add."""
    reason: str
    """Why it is this strategy."""

    @property
    def batch_parts(self) -> int:
        """Into how many parts the rows of a batch are divided."""
        return math.prod(self.mesh.shape[m] for axis, m in self.rules if axis == "batch")

    @property
    def batch(self) -> NamedSharding:
        """How every array of a batch is divided: by rows."""
        return self.sharding([tuple(m for axis, m in self.rules if axis == "batch")])

    @property
    def share(self) -> tuple[int, int]:
        """(which, of how many): the part of every batch that this process reads.

        Processes whose devices hold the same rows, as those that divide products, read the same.
        """
        rows = self.batch.devices_indices_map((self.batch_parts,))
        held: dict[int, set[int]] = {}
        for device, (index,) in rows.items():
            part = range(self.batch_parts)[index]
            held.setdefault(device.process_index, set()).update(part)
        shares = sorted({tuple(sorted(parts)) for parts in held.values()})
        if len({i for part in shares for i in part}) < sum(map(len, shares)):
            raise ValueError(
                "some processes of this mesh hold a part of others' rows: choose mesh.model and"
                " mesh.fsdp so that each holds all of them or none"
            )
        return shares.index(tuple(sorted(held[jax.process_index()]))), len(shares)

    def sharding(self, parts: Sequence[str | tuple[str, ...] | None]) -> NamedSharding:
        """That of an array with these axes of the mesh along its own."""
        return NamedSharding(self.mesh, PartitionSpec(*parts))

    def parameter(self, axes: Axes, shape: Sequence[int]) -> tuple[tuple[str, ...] | None, ...]:
        """The axes of the mesh that divide each axis of a parameter."""
        if layer_size(axes, shape) < SMALL:
            return (None,) * len(axes)
        return self.activation(axes, shape)

    def activation(self, axes: Axes, shape: Sequence[int]) -> tuple[tuple[str, ...] | None, ...]:
        """The same for an activation, however small it is."""
        parts = divided_by(axes, shape, self.rules, self.mesh.shape)
        return tuple(part or None for part in parts)

    def parameters(self, params: Any, axes: Any) -> Any:
        """`parameter` of a whole tree of them: shapes and axes -> tuples."""
        return jax.tree.map(lambda x, own: self.parameter(tuple(own), x.shape), params, axes)

    def summary(self, params: Any, axes: Any) -> list[str]:
        """Lines: the mesh, and each parameter not divided as the strategy would have it.

        Raises:
            ValueError: a parameter of more than `LARGE` numbers a layer cannot be divided at all.
        """
        shape = " x ".join(f"{name} {self.mesh.shape[name]}" for name in MESH_AXES)
        lines = [
            f"Strategy {self.strategy.name}, {self.reason}. {self.strategy.about}.",
            f"mesh: {shape}",
        ]
        jax.tree.map_with_path(
            lambda path, x, own: lines.extend(self._missed(path, tuple(own), x.shape)), params, axes
        )
        return lines

    def _missed(self, path: tuple, axes: Axes, shape: Sequence[int]) -> list[str]:
        if layer_size(axes, shape) < SMALL:
            return []
        whole = not any(self.parameter(axes, shape))
        lines = []
        for missed in fallbacks(axes, shape, self.rules, self.mesh.shape):
            name = jax.tree_util.keystr(path, simple=True, separator="/")
            text = (
                f"{name} {tuple(shape)}: its axis {missed.axis} ({missed.length}) does not divide"
                f" by mesh.{missed.mesh_axis} ({missed.devices})"
            )
            if whole and layer_size(axes, shape) >= LARGE:
                raise ValueError(
                    f"{text}, and no other does, which leaves {4 * math.prod(shape) / 1e9:.1f} GB"
                    f" on every device: choose mesh.{missed.mesh_axis}"
                    f" {math.gcd(missed.length, missed.devices)}"
                )
            lines.append(f"{text}; {missed.instead or 'nothing'} is divided in its place")
        return lines


def lay_out(
    strategy: Strategy,
    options: MeshOptions,
    params: Any,
    axes: Any,
    devices: Sequence[jax.Device],
    reason: str = "as asked",
) -> Layout:
    """The layout on `devices` of a model with these parameters' shapes and axes.

    Raises:
        ValueError: see `strategies.mesh_shape`.
    """
    shape = mesh_shape(strategy, options, len(devices), params, axes)
    grid = device_grid(tuple(shape[name] for name in MESH_AXES), options.slices, devices)
    # Rules leave the propagation of shardings to the compiler: Auto, not the new default.
    mesh = Mesh(grid, MESH_AXES, axis_types=(AxisType.Auto,) * len(MESH_AXES))
    # The rules of the strategy come first: heads and hidden units take the axis `model` before
    # length does.
    return Layout(strategy, mesh, (*strategy.rules, *options.rules()), reason)


def device_grid(shape: tuple[int, ...], slices: int, devices: Sequence[jax.Device]) -> np.ndarray:
    """Devices as an array of this shape, neighbours in it close to each other in the network.

    The first axis goes through the slices one after the other.
    """

    def key(device):
        return getattr(device, "slice_index", 0) or 0, device.process_index, device.id

    ordered = sorted(devices, key=key)
    size = len(ordered) // slices
    own = (shape[0] // slices, *shape[1:])
    grids = []
    for i in range(slices):
        part = ordered[i * size : (i + 1) * size]
        if len({key(device)[0] for device in part}) > 1:
            count = len({key(device)[0] for device in ordered})
            raise ValueError(f"the devices form {count} slices, but mesh.slices is {slices}")
        grids.append(mesh_utils.create_device_mesh(own, part, allow_split_physical_axes=True))
    return np.concatenate(grids)


@contextlib.contextmanager
def activate(layout: Layout):
    """Gives models' constraints on named activation axes their meaning while they are traced.

    Under pmap they have none: each device runs the model by itself.
    """
    if layout.strategy is PMAP:
        yield
        return
    with jax.set_mesh(layout.mesh), nn.logical_axis_rules(layout.rules):
        yield


def put_batch(rows: Mapping[str, np.ndarray], sharding: NamedSharding) -> dict[str, jax.Array]:
    """The global batch on its devices, from this host's rows of it."""
    return {
        name: jax.make_array_from_process_local_data(sharding, array)
        for name, array in rows.items()
    }


def check_batch_size(batch_size: int, parts: int, microbatches: int = 1) -> None:
    """Raises ValueError unless each micro-batch gives each of `parts` devices equally many rows."""
    unit = parts * microbatches
    if batch_size % unit or batch_size < 1:
        below, above = batch_size // unit * unit, (batch_size // unit + 1) * unit
        nearest = f"{below} or {above}" if below > 0 else f"{above}"
        raise ValueError(
            f"a batch of {batch_size} rows does not divide into {microbatches} micro-batch(es) over"
            f" {parts} device(s): the nearest batch sizes that do are {nearest}"
        )

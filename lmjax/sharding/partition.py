"""Which axes of an array are divided along which axes of a mesh.

Arrays name their axes (`embed`, `heads`, `batch`, ...). Rules are pairs (axis of an array, axis of
the mesh), the preferred ones first: the first rule whose array axis divides gets the mesh axis, and
a mesh axis divides one axis of an array at most. So what follows a rule is its fallback. An axis
that several mesh axes divide has the first of them outermost.
"""

import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from jax.sharding import PartitionSpec

Axes = tuple[str | None, ...]
Rules = Sequence[tuple[str, str]]


class Fallback(NamedTuple):
    """A rule that did not apply, because the array's axis does not divide."""

    axis: str
    length: int
    mesh_axis: str
    devices: int
    instead: str | None
    """The axis divided in its place, if one is."""


def as_spec(parts: Sequence[tuple[str, ...]]) -> PartitionSpec:
    """What `divided_by` gives, as JAX takes it."""
    return PartitionSpec(*(part or None for part in parts))


def divided_by(
    axes: Axes, shape: Sequence[int], rules: Rules, mesh_shape: Mapping[str, int]
) -> tuple[tuple[str, ...], ...]:
    """The axes of the mesh that divide each axis of an array."""
    return _apply(axes, shape, rules, mesh_shape)[0]


def fallbacks(
    axes: Axes, shape: Sequence[int], rules: Rules, mesh_shape: Mapping[str, int]
) -> list[Fallback]:
    """The preferred divisions that an array's shape did not allow."""
    return _apply(axes, shape, rules, mesh_shape)[1]


def _apply(axes, shape, rules, mesh_shape) -> tuple[tuple[tuple[str, ...], ...], list[Fallback]]:
    parts: list[tuple[str, ...]] = [()] * len(axes)
    missed: dict[str, tuple[str, int]] = {}  # mesh axis -> the first array axis it does not divide
    taken: dict[str, str] = {}  # mesh axis -> the array axis it divides
    for axis, mesh_axis in rules:
        devices = mesh_shape.get(mesh_axis, 1)
        if axis not in axes or devices == 1 or mesh_axis in taken:
            continue
        place = axes.index(axis)
        divided = math.prod(mesh_shape[name] for name in parts[place])
        if shape[place] % (divided * devices):
            missed.setdefault(mesh_axis, (axis, shape[place]))
            continue
        parts[place] += (mesh_axis,)
        taken[mesh_axis] = axis
    return tuple(parts), [
        Fallback(axis, length, mesh_axis, mesh_shape[mesh_axis], taken.get(mesh_axis))
        for mesh_axis, (axis, length) in missed.items()
    ]

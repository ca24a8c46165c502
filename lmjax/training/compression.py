"""PowerSGD: sums gradients over devices by matrices of low rank, and sends that much less.

Paper: Vogels et al. 2019, "PowerSGD: Practical Low-Rank Gradient Compression for Distributed
Optimization", algorithms 1 and 2; as Ramesh et al. 2021 use it, sections 2.5 and E.1: parameters
are divided among the devices of a machine, and each device compresses the sums, between machines,
of the parts that it holds.
Departures from the latter: the right factors go on from those of the last step, as in Vogels et
al., rather than staying what they were at first; before a basis is made orthogonal nothing is added
to it; of a step that is not finite, no part keeps its gradient for the next one.
"""

import dataclasses
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec
from jaxtyping import Array, Float

from lmjax.sharding.mesh import Layout
from lmjax.sharding.partition import Axes
from lmjax.tasks.task import Params

COMPRESSED_AXIS = "data"
"""The axis of the mesh over which sums are compressed; over the others gradients are summed as they
are."""
TABLES = {"vocab", "positions", "types", "relative_buckets"}
"""Axes along which a parameter has a row for each of so many things: embeddings and the like."""


class Compression(NamedTuple):
    """What compression carries from step to step, by the name of the parameter."""

    errors: dict[str, Float[Array, "replicas *layers rows columns"]]
    """What each replica's gradients have lost so far, which the next ones bring again."""
    bases: dict[str, Float[Array, "parts *layers columns rank"]]
    """The last step's right factors of each part, from which the power iteration goes on."""


class Part(NamedTuple):
    """What each device holds of a matrix, or of a stack of them."""

    whole: tuple[int, ...]
    """The shape of all."""
    shape: tuple[int, ...]
    """Its own."""
    entries: tuple[tuple[str, ...] | None, ...]
    """The axes of the mesh that divide each axis of the whole."""
    rank: int
    """Of the two matrices that replace its gradient."""

    @property
    def count(self) -> int:
        """Of such parts."""
        return math.prod(self.whole) // self.size

    @property
    def mesh_axes(self) -> tuple[str, ...]:
        """All that divide the whole."""
        return tuple(name for names in self.entries for name in names or ())

    @property
    def size(self) -> int:
        """Numbers in its gradient."""
        return math.prod(self.shape)

    @property
    def factors(self) -> int:
        """Numbers in the two matrices, or in all pairs of a stack."""
        *layers, rows, columns = self.shape
        return math.prod(layers) * self.rank * (rows + columns)


@dataclasses.dataclass(frozen=True)
class PowerSGD:
    """Compresses the gradients of all matrices that it makes smaller, but those of tables."""

    rank: int
    """Of the matrices that replace a whole gradient; the more, the closer. Where a device holds one
    of eight parts, it replaces that by matrices of an eighth of the rank, rounded up."""

    def __post_init__(self):
        if self.rank < 1:
            raise ValueError(f"gradients are compressed to rank {self.rank}, not 1 or more")

    def sums(self, params: Params, axes: Any, layout: Layout) -> "CompressedSums":
        """How the gradients of these parameters, or shapes of them, are summed.

        Raises:
            ValueError: there are none to compress.
        """
        parts, others = {}, []

        def note(path, param, own):
            part = self.part(tuple(own), param.shape, layout)
            if part.rank and part.factors < part.size:
                parts[_name(path)] = part
            else:
                others.append(part.size)

        jax.tree.map_with_path(note, params, axes)
        if not parts:
            raise ValueError(
                f"no gradient of this model gets smaller by matrices of rank {self.rank}: choose a"
                " lower one, or leave compression out (only matrices are compressed, no tables and"
                " no convolutions)"
            )
        return CompressedSums(parts, sum(others), layout.mesh.shape[COMPRESSED_AXIS])

    def part(self, axes: Axes, shape: tuple[int, ...], layout: Layout) -> Part:
        """What a device holds of a parameter; its rank is 0 where it is no matrix, or a table."""
        entries = layout.parameter(axes, shape)
        own = layout.sharding(entries).shard_shape(shape)
        matrix = len(axes) - (axes[:1] == ("layers",)) == 2 and not TABLES & set(axes)
        ways = math.prod(shape[-2:]) // math.prod(own[-2:])
        return Part(shape, own, entries, rank=-(-self.rank // ways) if matrix else 0)


@dataclasses.dataclass(frozen=True)
class CompressedSums:
    """How gradients are summed over the replicas along `COMPRESSED_AXIS`, made by `PowerSGD`."""

    parts: dict[str, Part]
    """Of the parameters whose gradients are compressed, by name."""
    others: int
    """Numbers that a device holds of all others, whose gradients are summed as they are."""
    replicas: int
    """Devices along `COMPRESSED_AXIS`."""

    @property
    def summary(self) -> str:
        """In words, how much less a device sends."""
        whole = self.others + sum(part.size for part in self.parts.values())
        sent = self.others + sum(part.factors for part in self.parts.values())
        ranks = ", ".join(map(str, sorted({part.rank for part in self.parts.values()})))
        return (
            f"PowerSGD of rank {ranks} on each device: it sums {sent:,} numbers along"
            f" {COMPRESSED_AXIS} in place of {whole:,}, {1 - sent / whole:.0%} fewer"
        )

    def init(self) -> Compression:
        """Nothing lost, and bases that point anywhere, the same for all replicas."""
        keys = jax.random.split(jax.random.key(0), len(self.parts))
        errors, bases = {}, {}
        for (name, part), key in zip(self.parts.items(), keys, strict=True):
            errors[name] = jnp.zeros((self.replicas, *part.whole), jnp.float32)
            *layers, _, columns = part.shape
            bases[name] = jax.random.normal(key, (part.count, *layers, columns, part.rank))
        return Compression(errors, bases)

    def entries(self) -> Compression:
        """How both are divided: errors among the replicas and as the parameters, bases by parts."""
        parts = self.parts.items()
        return Compression(
            {name: (COMPRESSED_AXIS, *part.entries) for name, part in parts},
            {name: (part.mesh_axes, *(None,) * len(part.shape)) for name, part in parts},
        )

    def total(
        self, gradients: Params, compression: Compression, psum: Callable[[Any], Any]
    ) -> tuple[Params, Compression]:
        """About the sum of the replicas' gradients, and what is carried on.

        Called where `COMPRESSED_AXIS` is manual, as in a shard_map, and the axes of the mesh that
        divide the parts are left to the compiler.

        Args:
            compression: with this replica's errors alone.
            psum: sums a tree over the replicas.
        """

        def of_parts(matrices, compression):
            found = {
                name: of_part(matrices[name], *(carried[name] for carried in compression))
                for name in self.parts
            }
            total, *carried = ({name: x[i] for name, x in found.items()} for i in range(3))
            return total, Compression(*carried)

        def of_part(gradient, error, basis):
            matrix = gradient + error[0]
            left, _ = jnp.linalg.qr(psum(matrix @ basis[0]))
            right = psum(matrix.mT @ left)
            found = left @ right.mT
            return found, (matrix - found / self.replicas)[None], right[None]

        divided = {axis for part in self.parts.values() for axis in part.mesh_axes}
        if divided:
            parts = self.parts.items()
            specs = (
                {name: PartitionSpec(*part.entries) for name, part in parts},
                Compression(
                    {name: PartitionSpec(None, *part.entries) for name, part in parts},
                    {name: PartitionSpec(part.mesh_axes) for name, part in parts},
                ),
            )
            # Whole matrices are summed in each group of devices by itself. That gives the same, as
            # JAX trusts of all that lies whole on several devices.
            of_parts = jax.shard_map(
                of_parts, in_specs=specs, out_specs=specs, axis_names=divided, check_vma=False
            )
        leaves, tree = jax.tree.flatten_with_path(gradients)
        named = {_name(path): gradient for path, gradient in leaves}
        found, carried = of_parts({name: named[name] for name in self.parts}, compression)
        found |= psum({name: x for name, x in named.items() if name not in self.parts})
        return jax.tree.unflatten(tree, [found[name] for name in named]), carried


def _name(path: tuple) -> str:
    return jax.tree_util.keystr(path, simple=True, separator="/")

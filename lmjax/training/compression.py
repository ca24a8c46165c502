"""PowerSGD: sums gradients over devices by matrices of low rank, and sends that much less.

Paper: Vogels et al. 2019, "PowerSGD: Practical Low-Rank Gradient Compression for Distributed
Optimization", algorithms 1 and 2; as Ramesh et al. 2021 use it, sections 2.5 and E.1 (parameters
divided among the devices of a machine, compressed sums between machines).
"""

import dataclasses
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

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
    bases: dict[str, Float[Array, "*layers columns rank"]]
    """The last step's right factors, from which the power iteration goes on."""


@dataclasses.dataclass(frozen=True)
class PowerSGD:
    """Compresses the gradients of all matrices that it makes smaller, but those of tables."""

    rank: int
    """Of the matrices that replace a gradient; the more, the closer."""

    def __post_init__(self):
        if self.rank < 1:
            raise ValueError(f"gradients are compressed to rank {self.rank}, not 1 or more")

    def compresses(self, axes: Axes, shape: tuple[int, ...]) -> bool:
        """Whether the gradient of a parameter is compressed; of a stack, layer by layer."""
        own = shape[1:] if axes[:1] == ("layers",) else shape
        if len(own) != 2 or TABLES & set(axes):
            return False
        return self.rank * sum(own) < math.prod(own)

    def matrices(self, params: Params, axes: Any) -> dict[str, Any]:
        """Those parameters, or shapes of them, whose gradients are compressed, by name.

        Raises:
            ValueError: there are none.
        """
        found = {}

        def note(path, param, own):
            if self.compresses(tuple(own), param.shape):
                found[_name(path)] = param

        jax.tree.map_with_path(note, params, axes)
        if not found:
            raise ValueError(
                f"no gradient of this model gets smaller by matrices of rank {self.rank}: choose a"
                " lower one, or leave compression out (only matrices are compressed, no tables and"
                " no convolutions)"
            )
        return found

    def summary(self, params: Params, axes: Any) -> str:
        """In words, how much less is sent. The factors are not divided over other axes, as
        parameters may be; dividing those takes from what is saved."""
        matrices = self.matrices(params, axes).values()
        whole = sum(x.size for x in jax.tree.leaves(params))
        factors = sum(self.rank * x.size // x.shape[i] for x in matrices for i in (-1, -2))
        sent = whole - sum(x.size for x in matrices) + factors
        return (
            f"PowerSGD of rank {self.rank:,}: sums {sent:,} numbers along {COMPRESSED_AXIS} in"
            f" place of {whole:,}, {1 - sent / whole:.0%} fewer where devices hold whole parameters"
        )

    def init(self, params: Params, axes: Any, replicas: int) -> Compression:
        """Nothing lost, and bases that point anywhere, the same on all devices."""
        matrices = self.matrices(params, axes)
        keys = jax.random.split(jax.random.key(0), len(matrices))
        return Compression(
            {name: jnp.zeros((replicas, *x.shape), jnp.float32) for name, x in matrices.items()},
            {
                name: jax.random.normal(key, (*x.shape[:-2], x.shape[-1], self.rank))
                for (name, x), key in zip(matrices.items(), keys, strict=True)
            },
        )

    def entries(self, params: Params, axes: Any, entries: Any) -> Compression:
        """How both are divided, given how the parameters are: errors among the replicas and as the
        parameters, bases not at all."""
        names = self.matrices(params, axes)
        given = {}
        jax.tree.map_with_path(
            lambda path, _, own: given.update({_name(path): tuple(own)}), params, entries
        )
        return Compression(
            {name: (COMPRESSED_AXIS, *given[name]) for name in names},
            {name: (None,) * len(given[name]) for name in names},
        )

    def total(
        self,
        gradients: Params,
        compression: Compression,
        psum: Callable[[Any], Any],
        replicas: int,
    ) -> tuple[Params, Compression]:
        """About the sum of the replicas' gradients, and what is carried on.

        Args:
            compression: with this replica's errors alone.
            psum: sums a tree over the replicas.
        """
        compressed = {}

        def summed(path, gradient):
            name = _name(path)
            if name not in compression.errors:
                return psum(gradient)
            matrix = gradient + compression.errors[name][0]
            left = psum(matrix @ compression.bases[name])
            left, _ = jnp.linalg.qr(left)
            right = psum(matrix.mT @ left)
            found = left @ right.mT
            compressed[name] = (matrix - found / replicas)[None], right
            return found

        gradients = jax.tree.map_with_path(summed, gradients)
        errors, bases = ({name: pair[i] for name, pair in compressed.items()} for i in (0, 1))
        return gradients, Compression(errors, bases)


def _name(path: tuple) -> str:
    return jax.tree_util.keystr(path, simple=True, separator="/")

"""The cross-entropy in many chunks on eight fake devices; a process of its own, for they must be
asked for before JAX starts."""

import functools
import json
import os

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec

from lmjax.sharding.hlo import collectives, parse_hlo
from lmjax.sharding.mesh import activate, lay_out
from lmjax.sharding.strategies import STRATEGIES, MeshOptions
from lmjax.tasks.losses import cross_entropy

B, T, D = 16, 24, 128
FEW_ROWS, MANY_ROWS = 256, 1_024  # fewer and more than there are tokens
CHUNKS = 12
LAYOUTS = {
    "dp": MeshOptions(),
    "fsdp": MeshOptions(),
    "fsdp, replicated": MeshOptions(fsdp=4, slices=2),
    "tp": MeshOptions(model=4),
    "fsdp_tp": MeshOptions(fsdp=2, model=2),
    "fsdp, summed by hand": MeshOptions(fsdp=2),
}


def arrays(rows: int) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    found = {
        "features": rng.normal(size=(B, T, D)) / 8,
        "matrix": rng.normal(size=(rows, D)) / 8,
        "bias": rng.normal(size=rows),
        "weights": rng.uniform(size=(B, T)) * (rng.uniform(size=(B, T)) < 0.8),
    }
    return {name: x.astype(np.float32) for name, x in found.items()} | {
        "targets": rng.integers(0, rows, (B, T), np.int32)
    }


def in_chunks(arrays: dict[str, jax.Array], devices: int):
    """The loss, and its gradients with respect to the features, the matrix and the bias."""
    chunk = 4 * B * T * len(arrays["matrix"]) // CHUNKS // devices

    def loss(features, matrix, bias):
        rest = arrays["targets"], arrays["weights"]
        return cross_entropy(features, matrix, *rest, bias=bias, z_loss=1e-2, chunk_bytes=chunk)[0]

    names = ("features", "matrix", "bias")
    return jax.value_and_grad(loss, argnums=(0, 1, 2))(*(arrays[name] for name in names))


def summed_by_hand(step, layout):
    """The step with the axis `data` taken from the compiler, as compression of gradients does."""
    rules = tuple((axis, mesh_axis) for axis, mesh_axis in layout.rules if mesh_axis != "data")

    def own(arrays):
        with nn.logical_axis_rules(rules):
            loss, (features, *others) = step(arrays)
        loss, others = jax.lax.psum((loss, others), "data")
        return loss, (features, *others)

    whole, divided = PartitionSpec(), PartitionSpec("data")
    of_rows = dict.fromkeys(("features", "targets", "weights"), divided)
    return jax.shard_map(
        own,
        mesh=layout.mesh,
        in_specs=({**of_rows, "matrix": whole, "bias": whole},),
        out_specs=(whole, (divided, whole, whole)),
        axis_names={"data"},
        check_vma=False,
    )


def compare(rows: int, name: str) -> dict:
    """How far a layout's loss and gradients are from one device's, and the bytes sent for them."""
    given, axes = arrays(rows), ("vocab", "embed")
    expected = jax.jit(in_chunks, static_argnames="devices")(given, devices=1)
    shapes = {"matrix": jax.ShapeDtypeStruct((rows, D), jnp.float32)}
    strategy = STRATEGIES[name.partition(",")[0]]
    layout = lay_out(strategy, LAYOUTS[name], shapes, {"matrix": axes}, jax.devices())
    whole = layout.sharding(())
    divided = layout.sharding(layout.parameter(axes, (rows, D)))
    places = dict.fromkeys(given, layout.batch) | {"matrix": divided, "bias": whole}
    with activate(layout):
        placed = {name: jax.device_put(x, places[name]) for name, x in given.items()}
        step = functools.partial(in_chunks, devices=8)
        if name == "fsdp, summed by hand":
            step = summed_by_hand(step, layout)
        step = jax.jit(step, out_shardings=(whole, (layout.batch, divided, whole)))
        step = step.lower(placed).compile()
        found = jax.device_get(step(placed))
    errors = jax.tree.map(lambda a, b: float(abs(a - b).max() / abs(b).max()), found, expected)
    sent = collectives(parse_hlo(step.as_text()), layout.mesh)
    return {"errors": jax.tree.leaves(errors), "sent": sum(one.bytes * one.count for one in sent)}


def main() -> None:
    os.environ["XLA_FLAGS"] = "--xla_force_host_platform_device_count=8"  # read at the first use
    jax.config.update("jax_platforms", "cpu")
    sizes = (FEW_ROWS, MANY_ROWS)
    print(json.dumps({rows: {name: compare(rows, name) for name in LAYOUTS} for rows in sizes}))


if __name__ == "__main__":
    main()

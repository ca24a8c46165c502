"""The cross-entropy in many chunks on eight fake devices; a process of its own, for they must be
asked for before JAX starts."""

import json
import os

import jax
import jax.numpy as jnp
import numpy as np

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
}


def arrays(rows: int) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    features, matrix = rng.normal(size=(B, T, D)) / 8, rng.normal(size=(rows, D)) / 8
    bias, weights = (
        rng.normal(size=rows),
        rng.uniform(size=(B, T)) * (rng.uniform(size=(B, T)) < 0.8),
    )
    found = {"features": features, "matrix": matrix, "bias": bias, "weights": weights}
    return {name: x.astype(np.float32) for name, x in found.items()} | {
        "targets": rng.integers(0, rows, (B, T), np.int32)
    }


def gradients(features, matrix, bias, targets, weights, devices: int):
    def loss(features, matrix, bias):
        chunk = 4 * B * T * len(matrix) // CHUNKS // devices
        return cross_entropy(
            features, matrix, targets, weights, bias=bias, z_loss=1e-2, chunk_bytes=chunk
        )[0]

    return jax.value_and_grad(loss, argnums=(0, 1, 2))(features, matrix, bias)


def compare(rows: int, name: str) -> dict:
    """How far a layout's loss and gradients are from one device's, and the bytes sent for them."""
    given, axes = arrays(rows), ("vocab", "embed")
    expected = jax.jit(gradients, static_argnames="devices")(**given, devices=1)
    shapes = {"matrix": jax.ShapeDtypeStruct((rows, D), jnp.float32)}
    strategy = STRATEGIES[name.partition(",")[0]]
    layout = lay_out(strategy, LAYOUTS[name], shapes, {"matrix": axes}, jax.devices())
    whole = layout.sharding(())
    divided = layout.sharding(layout.parameter(axes, (rows, D)))
    places = dict.fromkeys(given, layout.batch) | {"matrix": divided, "bias": whole}
    with activate(layout):
        placed = {name: jax.device_put(x, places[name]) for name, x in given.items()}
        step = jax.jit(
            lambda arrays: gradients(**arrays, devices=8),
            out_shardings=(whole, (layout.batch, divided, whole)),
        )
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

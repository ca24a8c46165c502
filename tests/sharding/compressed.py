"""Gradients summed by PowerSGD on eight fake devices; a process of its own, for they must be asked
for before JAX starts."""

import dataclasses
import functools
import json
import os

import jax
import numpy as np
from jax.sharding import PartitionSpec

from lmjax.models.dalle import DALLE
from lmjax.models.layers import Execution
from lmjax.sharding.hlo import collectives, parse_hlo
from lmjax.sharding.mesh import activate, lay_out, put_batch
from lmjax.sharding.strategies import FSDP_TP, MeshOptions
from lmjax.tasks.gradient_scaling import GradientScaling
from lmjax.tasks.text_to_image import TextToImage
from lmjax.training.compression import COMPRESSED_AXIS, CompressedSums, Compression, Part, PowerSGD
from lmjax.training.reporting import bytes_per_device
from lmjax.training.step import arrange, lower_step, prepare, shardings
from tests.sharding.on_devices import DALLE_SIZES, MODELS, ROWS, STEPS

TASK = TextToImage(DALLE(dataclasses.replace(DALLE_SIZES, layers=1), Execution()))
RANK, REPLICAS = 2, 2
SHAPES = {"matrix": (10, 12), "stack": (3, 8, 9), "vector": (5,), "table": (20, 8)}
AXES = {
    "matrix": ("embed", "mlp"),
    "stack": ("layers", "embed", "heads"),
    "vector": ("embed",),
    "table": ("vocab", "embed"),
}
WHOLE = {
    "matrix": Part((10, 12), (10, 12), (None, None), RANK),
    "stack": Part((3, 8, 9), (3, 8, 9), (None, None, None), RANK),
}
# Among four devices, and among two.
DIVIDED = {
    "matrix": Part((10, 12), (5, 6), (("fsdp",), ("model",)), 1),
    "stack": Part((3, 8, 9), (3, 4, 9), (None, ("fsdp",), None), 1),
}


def gradients(step: int) -> dict[str, np.ndarray]:
    """Each replica's; name -> [replicas, ...]."""
    rng = np.random.default_rng(step)
    return {name: rng.normal(size=(REPLICAS, *shape)) for name, shape in SHAPES.items()}


def totals(parts) -> dict:
    """What some steps' gradients are summed to, and the last errors."""
    sums = CompressedSums(parts, 0, REPLICAS)
    layout = lay_out(FSDP_TP, MeshOptions(fsdp=2, model=2), {}, {}, jax.devices())
    carried = jax.device_put(
        sums.init(),
        jax.tree.map(layout.sharding, sums.entries(), is_leaf=lambda x: type(x) is tuple),
    )
    whole, divided = PartitionSpec(), PartitionSpec(COMPRESSED_AXIS)
    specs = Compression(divided, whole)

    @jax.jit
    @functools.partial(
        jax.shard_map,
        mesh=layout.mesh,
        in_specs=(divided, specs),
        out_specs=(whole, specs),
        axis_names={COMPRESSED_AXIS},
        check_vma=False,
    )
    def total(own, carried):
        own = {name: x[0] for name, x in own.items()}
        return sums.total(own, carried, functools.partial(jax.lax.psum, axis_name=COMPRESSED_AXIS))

    bases, found = carried.bases, []
    for step in range(3):
        summed, carried = total(gradients(step), carried)
        found.append(summed)
    return as_lists({"bases": bases, "totals": found, "errors": carried.errors})


def train(task, optimizer, rows, strategy, options, compression, microbatches=1) -> dict:
    layout = arrange(task, optimizer, ROWS, strategy=strategy, options=options)
    with activate(layout):
        prepared = prepare(
            task,
            optimizer,
            layout,
            seed=1,
            microbatches=microbatches,
            compression=compression,
        )
        state = jax.jit(prepared.build, out_shardings=shardings(prepared.target))(None)
        batch = put_batch(rows, layout.batch)
        step = lower_step(prepared, batch, layout).compile()
        losses = []
        for _ in range(STEPS):
            state, outcome = step(state, batch)
            losses.append(float(outcome.metrics["loss"]))
    sent = {}
    for one in collectives(parse_hlo(step.as_text()), layout.mesh):
        axes = "+".join(one.axes)
        sent[axes] = sent.get(axes, 0) + one.bytes * one.count
    return {
        "losses": losses,
        "sent": sent,
        "extra": as_lists(state.extra),
        "error bytes": bytes_per_device(state.compression and state.compression.errors),
    }


def not_finite(task, optimizer, rows) -> dict:
    """What compression carries before and after a step whose loss is not finite."""
    layout = arrange(task, optimizer, ROWS, strategy="dp")
    weights = rows["loss_weights"].copy()
    weights[0] = np.inf
    with activate(layout):
        prepared = prepare(task, optimizer, layout, seed=1, compression=PowerSGD(RANK))
        state = jax.jit(prepared.build, out_shardings=shardings(prepared.target))(None)
        batch = put_batch(rows, layout.batch)
        step = lower_step(prepared, batch, layout).compile()
        state, _ = step(state, batch)
        before = as_lists(state.compression.errors)
        state, outcome = step(state, put_batch({**rows, "loss_weights": weights}, layout.batch))
        assert not np.isfinite(outcome.metrics["loss"])
        return {"before": before, "after": as_lists(state.compression.errors)}


def as_lists(tree):
    return jax.tree.map(lambda x: np.asarray(x).tolist(), tree)


def main() -> None:
    os.environ["XLA_FLAGS"] = "--xla_force_host_platform_device_count=8"  # read at the first use
    jax.config.update("jax_platforms", "cpu")
    _, optimizer, rows = MODELS["dalle"]
    scaled = dataclasses.replace(TASK, scaling=GradientScaling())
    divided, sgd = MeshOptions(fsdp=2), PowerSGD(RANK)
    results = {
        "totals": {"whole": totals(WHOLE), "divided": totals(DIVIDED)},
        "as they are": train(TASK, optimizer, rows, "dp", MeshOptions(), None),
        "dp": train(TASK, optimizer, rows, "dp", MeshOptions(), sgd),
        "pieces": train(TASK, optimizer, rows, "dp", MeshOptions(), sgd, microbatches=2),
        "not finite": not_finite(TASK, optimizer, rows),
        "fsdp": train(scaled, optimizer, rows, "fsdp", divided, sgd),
        "fsdp as it is": train(scaled, optimizer, rows, "fsdp", divided, None),
    }
    print(json.dumps(results))


if __name__ == "__main__":
    main()

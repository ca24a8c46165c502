"""What a training step needs and how long it would take, on devices that are not here.

The real step is compiled ahead of time. Memory is what the compiler says; floating-point operations
are counted in the jaxpr, bytes over the network and to memory in the compiled program. From these
and the makers' figures follows a roofline: matrix units reach `MATRIX_EFFICIENCY` of their peak,
memory and links all of theirs, and collectives either hide behind computation or do not.
"""

import dataclasses
import re
import time
from collections.abc import Mapping, Sequence
from typing import Any

import jax

from lmjax.sharding.flops import product_flops
from lmjax.sharding.hlo import collectives, hbm_bytes, loops, parse_hlo
from lmjax.sharding.mesh import Layout, activate
from lmjax.sharding.topology import Topology, axis_bandwidths
from lmjax.training.reporting import bytes_per_device
from lmjax.training.step import Prepared, lower_step

MATRIX_EFFICIENCY = 0.9
SECONDS_PER_DAY = 86_400
SLICES = "slices"  # in place of a mesh axis: the network between slices


@dataclasses.dataclass(frozen=True)
class Report:
    """One plan. Bytes are of one device, seconds of one step."""

    topology: str
    devices: int
    strategy: str
    mesh: dict[str, int]
    compiled_for: str
    """The devices the program was compiled for: where they are others, this is an estimate."""
    parameters: int
    """Of the whole model."""
    tokens: int
    """Read and predicted in one step."""
    compile_seconds: float
    fits: bool
    bytes_per_device: float
    """All that the step needs at once."""
    memory: float | None
    """That a device has."""
    parameter_bytes: float
    optimizer_bytes: float
    temporary_bytes: float | None
    """Gradients and activations; None if the program does not fit."""
    model_flops_per_step: float
    """Forward and backward products, by formula."""
    hardware_flops_per_step: float
    """All products, those computed again among them, counted in the program."""
    collective_bytes: dict[str, dict[str, float]]
    """Kind of collective -> axes of the mesh ("data+fsdp"; "slices": the network between slices) ->
    bytes that a device sends."""
    compute_seconds: float | None
    memory_seconds: float | None
    collective_seconds: float | None
    collective_seconds_by_axis: dict[str, float]
    bound: str | None
    """compute, memory or collectives: what takes longest."""
    step_seconds: float | None
    """With collectives hidden behind computation as far as that goes."""
    step_seconds_exposed: float | None
    """With computation waiting for every collective."""
    utilization: float | None
    """Model FLOP/s of what the devices could do at their peak, with collectives hidden."""
    utilization_exposed: float | None
    tokens_per_second: float | None
    schedule_steps: int
    schedule_days: float | None
    schedule_device_hours: float | None
    notes: tuple[str, ...] = ()


def plan_step(
    prepared: Prepared,
    batch: Mapping[str, jax.ShapeDtypeStruct],
    layout: Layout,
    topology: Topology,
    *,
    model_flops: float,
    steps: int,
    notes: Sequence[str] = (),
) -> Report:
    """Compiles a step for a topology and says what it needs.

    Args:
        batch: shapes of the global batch.
        model_flops: of one step, by formula.
        steps: of the whole schedule.
        notes: what else the report should say.
    """
    batch = {
        name: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=layout.batch)
        for name, x in batch.items()
    }
    target, devices = prepared.target, layout.mesh.size
    with activate(layout):
        hardware_flops = product_flops(jax.make_jaxpr(prepared.step)(target, batch))
    began = time.perf_counter()
    compiled = None
    memory = topology.hardware and topology.hardware.memory
    try:
        with activate(layout):
            compiled = lower_step(prepared, batch, layout).compile()
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        temporaries = _temporaries(str(error))
    seconds = time.perf_counter() - began
    sizes = jax.tree.leaves(target.params)
    report = {
        "topology": topology.name,
        "devices": devices,
        "strategy": layout.strategy.name,
        "mesh": dict(layout.mesh.shape),
        "compiled_for": topology.compiled_for,
        "parameters": sum(x.size for x in sizes),
        "tokens": sum(x.size for name, x in batch.items() if name in ("inputs", "targets")),
        "compile_seconds": seconds,
        "memory": memory,
        "parameter_bytes": bytes_per_device(target.params),
        "optimizer_bytes": bytes_per_device(target.opt_state),
        "model_flops_per_step": model_flops,
        "hardware_flops_per_step": hardware_flops,
        "schedule_steps": steps,
        "notes": tuple(notes),
    }
    unknown = {field.name: None for field in dataclasses.fields(Report) if field.name not in report}
    if compiled is None:
        none = {"collective_bytes": {}, "collective_seconds_by_axis": {}}
        needed = report["parameter_bytes"] + report["optimizer_bytes"] + temporaries
        return Report(**{**unknown, **report, **none, "fits": False, "bytes_per_device": needed})
    sizes = compiled.memory_analysis()
    total = (
        sizes.argument_size_in_bytes
        + sizes.output_size_in_bytes
        - sizes.alias_size_in_bytes
        + sizes.temp_size_in_bytes
    )
    program = parse_hlo(compiled.as_text())
    by_kind: dict[str, dict[str, float]] = {}
    sent: dict[str, float] = {}
    for one in collectives(program, layout.mesh):
        along = SLICES if one.across_slices else "+".join(one.axes)
        kind = by_kind.setdefault(one.kind, {})
        kind[along] = kind.get(along, 0.0) + one.bytes * one.count
        sent[along] = sent.get(along, 0.0) + one.bytes * one.count
    if unknown_loops := [loop.name for loop in loops(program) if loop.trips is None]:
        report["notes"] += (
            f"loops whose length the program does not tell, counted once: {unknown_loops}",
        )
    report |= {
        "fits": memory is None or total <= memory,
        "bytes_per_device": total,
        "temporary_bytes": sizes.temp_size_in_bytes,
        "collective_bytes": by_kind,
        "collective_seconds_by_axis": {},
    }
    if topology.hardware is not None:
        rates = {**axis_bandwidths(layout.mesh, topology), SLICES: topology.hardware.network}
        report |= roofline(
            topology.hardware,
            devices,
            hardware_flops=hardware_flops,
            model_flops=model_flops,
            memory_bytes=hbm_bytes(program),
            sent=sent,
            rates=rates,
            tokens=report["tokens"],
            steps=steps,
        )
    return Report(**{**unknown, **report})


def roofline(
    hardware: Any,
    devices: int,
    *,
    hardware_flops: float,
    model_flops: float,
    memory_bytes: float,
    sent: Mapping[str, float],
    rates: Mapping[str, float],
    tokens: int,
    steps: int,
) -> dict[str, Any]:
    """The times of a step, and what follows from them.

    Args:
        memory_bytes: read and written by one device; `sent`: by one device, along each axis or
            several ("data+fsdp", which go at the slowest one's rate).
    """
    compute = hardware_flops / devices / (MATRIX_EFFICIENCY * hardware.flops)
    memory = memory_bytes / hardware.memory_bandwidth
    slowest = min(rates.values(), default=hardware.memory_bandwidth)
    by_axis = {
        axes: count / min(rates.get(axis, slowest) for axis in axes.split("+"))
        for axes, count in sent.items()
    }
    collective = sum(by_axis.values())
    times = {"compute": compute, "memory": memory, "collectives": collective}
    hidden = max(times.values())
    exposed = max(compute, memory) + collective
    ideal = model_flops / devices / hardware.flops
    return {
        "compute_seconds": compute,
        "memory_seconds": memory,
        "collective_seconds": collective,
        "collective_seconds_by_axis": by_axis,
        "bound": max(times, key=times.get),
        "step_seconds": hidden,
        "step_seconds_exposed": exposed,
        "utilization": ideal / hidden,
        "utilization_exposed": ideal / exposed,
        "tokens_per_second": tokens / hidden,
        "schedule_days": steps * hidden / SECONDS_PER_DAY,
        "schedule_device_hours": steps * hidden * devices / 3_600,
    }


def _temporaries(message: str) -> float:
    """Bytes of HLO temporaries that a TPU's compiler found no room for."""
    found = re.search(
        r"temporaries \((\d[\d.]*)([KMGT])\) exceeds|Used (\d[\d.]*)([KMGT]) of", message
    )
    if not found:
        return 0.0
    number, unit = (group for group in found.groups() if group)
    return float(number) * 1024 ** (1 + "KMGT".index(unit))

"""What a training step needs and how long it would take, on devices that are not here.

The real step is compiled ahead of time. Memory is what the compiler says; floating-point operations
are counted in the jaxpr, bytes over the network and to memory in the compiled program. From these
and the makers' figures follows a roofline: matrix units reach `MATRIX_EFFICIENCY` of their peak,
memory and links all of theirs, and collectives either hide behind computation or do not.
"""

import dataclasses
import re
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
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
    """One plan. Bytes are of one device, seconds of one step; None stands for what is not known: of
    a program that does not fit, or of devices of which the makers say nothing."""

    topology: str
    devices: int
    compiled_for: str
    """The devices the program was compiled for: where they are others, this is an estimate."""
    strategy: str
    mesh: dict[str, int]
    parameters: int
    """Of the whole model."""
    tokens: int
    """That the model reads in one step."""
    schedule_steps: int
    model_flops_per_step: float
    """Forward and backward products, by formula."""
    hardware_flops_per_step: float
    """All products, those computed again among them, counted in the program."""
    memory: float | None
    """That a device has."""
    parameter_bytes: float
    optimizer_bytes: float
    state_bytes: float
    """Parameters, optimizer state, gradients and what their compression keeps: without them no
    rematerialisation helps."""
    bytes_per_device: float
    """All that the step needs at once; at least so much, if it does not fit."""
    fits: bool
    compile_seconds: float
    notes: tuple[str, ...] = ()
    temporary_bytes: float | None = None
    """Gradients and activations."""
    collective_bytes: dict[str, dict[str, float]] | None = None
    """Kind of collective -> axes of the mesh ("data+fsdp"; "slices": the network between slices) ->
    bytes that a device sends."""
    compute_seconds: float | None = None
    memory_seconds: float | None = None
    collective_seconds: float | None = None
    collective_seconds_by_axis: dict[str, float] | None = None
    bound: str | None = None
    """compute, memory or collectives: what takes longest."""
    step_seconds: float | None = None
    """With collectives hidden behind computation as far as that goes."""
    step_seconds_exposed: float | None = None
    """With computation waiting for every collective."""
    utilization: float | None = None
    """Model FLOP/s of what the devices could do at their peak, with collectives hidden."""
    utilization_exposed: float | None = None
    tokens_per_second: float | None = None
    schedule_days: float | None = None
    schedule_device_hours: float | None = None


def plan_step(
    prepared: Prepared,
    batch: Mapping[str, jax.ShapeDtypeStruct],
    layout: Layout,
    topology: Topology,
    *,
    reads: Sequence[str],
    model_flops: float,
    steps: int,
    notes: Sequence[str] = (),
) -> Report:
    """Compiles a step for a topology and says what it needs.

    Args:
        batch: shapes of the global batch.
        reads: arrays of the batch whose tokens go through the model.
        model_flops: of one step, by formula.
        steps: of the whole schedule.
        notes: what else the report should say.
    """
    batch = {
        name: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=layout.batch)
        for name, x in batch.items()
    }
    target = prepared.target
    parameters, optimizer = bytes_per_device(target.params), bytes_per_device(target.opt_state)
    state = 2 * parameters + optimizer + bytes_per_device(target.compression)
    with activate(layout):
        hardware_flops = product_flops(jax.make_jaxpr(prepared.step)(target, batch))
    memory = topology.hardware and topology.hardware.memory
    report = Report(
        topology=topology.name,
        devices=layout.mesh.size,
        compiled_for=topology.compiled_for,
        strategy=layout.strategy.name,
        mesh=dict(layout.mesh.shape),
        parameters=sum(x.size for x in jax.tree.leaves(target.params)),
        tokens=sum(batch[name].size for name in reads),
        schedule_steps=steps,
        model_flops_per_step=model_flops,
        hardware_flops_per_step=hardware_flops,
        memory=memory,
        parameter_bytes=parameters,
        optimizer_bytes=optimizer,
        state_bytes=state,
        bytes_per_device=state,
        fits=False,
        compile_seconds=0.0,
        notes=tuple(notes),
    )
    if memory is not None and report.state_bytes > memory:
        return report
    began = time.perf_counter()
    try:
        with activate(layout):
            lowered = lower_step(prepared, batch, layout)
            compiled = lowered.compile()
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        needed = max(report.state_bytes, parameters + optimizer + _temporaries(str(error)))
        report = dataclasses.replace(
            report, bytes_per_device=needed, compile_seconds=time.perf_counter() - began
        )
        if topology.compiled_for == topology.name or memory is None or needed > memory:
            return report
        # A GPU that has more memory than the TPU whose program it borrows.
        unknown = f"{topology.compiled_for} has less memory than that, so no times are known"
        return dataclasses.replace(report, fits=True, notes=(*report.notes, unknown))
    report = dataclasses.replace(report, compile_seconds=time.perf_counter() - began)
    text = _text(lowered, compiled)
    return dataclasses.replace(report, **_of_program(compiled, text, layout, topology, report))


def _text(lowered: jax.stages.Lowered, compiled: jax.stages.Compiled) -> str:
    """The compiled program. Some that use a TPU's SparseCores jaxlib cannot read back: they are
    compiled once more, for the compiler to write them down itself."""
    try:
        return compiled.as_text()
    except jax.errors.JaxRuntimeError:
        with tempfile.TemporaryDirectory() as directory:
            lowered.compile({"xla_dump_to": directory, "xla_dump_hlo_as_text": True})
            (written,) = Path(directory).glob("*.after_optimizations.txt")
            return written.read_text()


def _of_program(
    compiled: jax.stages.Compiled, text: str, layout: Layout, topology: Topology, report: Report
) -> dict[str, Any]:
    """What the compiled program adds to a report."""
    sizes = compiled.memory_analysis()
    total = (
        sizes.argument_size_in_bytes
        + sizes.output_size_in_bytes
        - sizes.alias_size_in_bytes
        + sizes.temp_size_in_bytes
    )
    program = parse_hlo(text)
    kinds: dict[str, dict[str, float]] = {}
    sent: dict[str, float] = {}
    for one in collectives(program, layout.mesh):
        along = SLICES if one.across_slices else "+".join(one.axes)
        kind = kinds.setdefault(one.kind, {})
        kind[along] = kind.get(along, 0.0) + one.bytes * one.count
        sent[along] = sent.get(along, 0.0) + one.bytes * one.count
    notes = report.notes
    if unknown := [loop.name for loop in loops(program) if loop.trips is None]:
        notes += (f"loops whose length the program does not tell, counted once: {unknown}",)
    found = {
        "fits": report.memory is None or total <= report.memory,
        "bytes_per_device": total,
        "temporary_bytes": sizes.temp_size_in_bytes,
        "collective_bytes": kinds,
        "notes": notes,
    }
    if topology.hardware is None:
        return found
    return found | roofline(
        topology.hardware,
        report.devices,
        hardware_flops=report.hardware_flops_per_step,
        model_flops=report.model_flops_per_step,
        memory_bytes=hbm_bytes(program),
        sent=sent,
        rates={**axis_bandwidths(layout.mesh, topology), SLICES: topology.hardware.network},
        tokens=report.tokens,
        steps=report.schedule_steps,
    )


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

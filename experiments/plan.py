"""Whether a run fits, how fast it can go and how to divide it, before any of it is paid for.

    python -m experiments.plan t5_pretrain --preset 11b --topology v3:32x32
    python -m experiments.plan t5_pretrain --preset 11b --topology v5e:2x4 --batch 8
        --strategy fsdp --execution.remat full
    python -m experiments.plan t5_pretrain --preset v1_1-xxl --topology v5p:8x8x8 --sweep
    python -m experiments.plan t5_pretrain --topology cpu:8 --strategy tp
    python -m experiments.plan t5_pretrain --presets 11b mt5-xxl --topology v3:32x32 v5p:8x8x8
        --sweep --markdown plans.md

Compiles the experiment's real training step for devices that need not be here: any TPU slice that
libtpu knows (pip install libtpu; chips along each dimension), CPUs, or GPUs (h100:64), for which
the program of a TPU slice with as many devices stands in and the report is an estimate. All of the
experiment's own options apply: see `python -m experiments.t5_pretrain --help`. `--mesh.slices 2`
plans for two such slices joined by the data centre's network.

Times are a roofline from the makers' figures (lmjax/sharding/hardware.py): matrix units at 0.9 of
their peak, memory and links at all of theirs; collectives hidden behind computation, and exposed.
A real run lands between the two at best.
"""

import argparse
import dataclasses
import functools
import importlib
import json
import math
import os
from pathlib import Path

TENSOR_WAYS = (2, 4, 8, 16)


def arguments() -> tuple[argparse.Namespace, list[str]]:
    """The planner's own options, and what is left for the experiment."""
    parser = argparse.ArgumentParser(
        prog="python -m experiments.plan",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument(
        "experiment", help="a module of experiments: t5_pretrain; or as --experiment t5_pretrain"
    )
    parser.add_argument(
        "--topology", required=True, nargs="+", metavar="NAME", help="v3:32x32, v5e:2x4, cpu:8, ..."
    )
    parser.add_argument(
        "--sweep",
        action="store_true",
        help="compare strategies, meshes and rematerialisation, and rank them",
    )
    parser.add_argument(
        "--presets", nargs="+", metavar="NAME", help="plan several of the experiment's presets"
    )
    parser.add_argument(
        "--markdown", type=Path, metavar="FILE", help="with --sweep: write a table of the best"
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the reports here too")
    named = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    named.add_argument("--experiment")
    found, words = named.parse_known_args()
    return parser.parse_known_args([found.experiment, *words] if found.experiment else words)


def main() -> None:
    own, rest = arguments()
    from lmjax.sharding.topology import environment

    for name in own.topology:
        os.environ.update(environment(name))
    plan(own, rest)


def plan(own: argparse.Namespace, rest: list[str]) -> None:
    import jax
    from rich.console import Console
    from rich.progress import Progress

    from lmjax import command_line
    from lmjax.sharding.topology import find_topology

    experiment = find_experiment(own.experiment)
    console, reports, best = Console(), [], []
    for preset in own.presets or [None]:
        arguments = rest if preset is None else ["--preset", preset, *rest]
        settings = command_line.parse(
            experiment.PRESETS, experiment.DEFAULT, __doc__, experiment.CHOICES, arguments
        )
        for name in own.topology:
            topology = find_topology(name, settings.mesh.slices)
            if not own.sweep:
                report = planned(settings, topology)
                reports.append({"preset": preset, **dataclasses.asdict(report)})
                show(report, console)
                continue
            with Progress(console=console, transient=True) as progress:
                found = sweep(settings, topology, progress)
            jax.clear_caches()  # or programs of hundreds of plans pile up
            if not found:
                raise ValueError(f"no plan is possible on {name}: all were refused, as said above")
            rank(found, console)
            reports += [
                {"preset": preset, "plan": words, **dataclasses.asdict(report)}
                for words, report in found
            ]
            best.append((preset or "", *found[0]))
            write(own, reports, best)  # as far as it has come
    write(own, reports, best)


def write(
    own: argparse.Namespace, reports: list[dict], best: list[tuple[str, str, object]]
) -> None:
    if own.json is not None:
        text = json.dumps(reports if len(reports) > 1 else reports[0], indent=2)
        own.json.write_text(text + "\n")
    if own.markdown is not None and best:
        own.markdown.write_text(markdown(best))


def find_experiment(name: str):
    """The module of an experiment that can be planned."""
    folder = Path(__file__).parent
    known = [
        path.stem for path in sorted(folder.glob("*.py")) if "\nPRESETS = " in path.read_text()
    ]
    if name not in known:
        raise ValueError(f"experiment {name} cannot be planned: those that can are {known}")
    return importlib.import_module(f"experiments.{name}")


def planned(settings, topology):
    """The report of one plan."""
    from lmjax.sharding.planning import plan_step
    from lmjax.tasks.task import reads
    from lmjax.training.state import abstract_parameters
    from lmjax.training.step import arrange, prepare

    task, optimizer, batch = settings.workload(topology.devices)
    layout = arrange(
        task,
        optimizer,
        settings.batch,
        microbatches=settings.fit.microbatches,
        strategy=settings.strategy,
        options=settings.mesh,
        devices=topology.devices,
    )
    prepared = prepare(
        task,
        optimizer,
        layout,
        microbatches=settings.fit.microbatches,
        compression=settings.compression,
    )
    notes = layout.summary(*abstract_parameters(task))
    if prepared.sums is not None:
        notes.append(prepared.sums.summary)
    return plan_step(
        prepared,
        batch,
        layout,
        topology,
        reads=reads(task),
        model_flops=task.flops({name: x.shape for name, x in batch.items()}),
        steps=settings.steps,
        notes=notes,
    )


def sweep(settings, topology, progress) -> list[tuple[str, object]]:
    """(what was tried, its report), the best first and what does not fit last."""
    from lmjax.sharding.strategies import MeshOptions

    slices, each = settings.mesh.slices, len(topology.devices) // settings.mesh.slices
    meshes = [("dp", MeshOptions(slices=slices)), ("fsdp", MeshOptions(slices=slices))]
    for ways in TENSOR_WAYS:
        if each % ways == 0:
            meshes.append(("fsdp_tp", MeshOptions(model=ways, slices=slices)))
    found = []
    task = progress.add_task(f"plans for {topology.name}", total=len(meshes) + 1)
    for strategy, mesh in meshes:
        tried = attempts(settings, topology, strategy, mesh, progress.console)
        progress.advance(task)
        found = ranked(found + tried)
        if found and settled(found[0][1]):
            return found
        # Once nothing but fsdp is left to shrink, dividing products ever further only costs more.
        whole = tried and tried[0][1].mesh["data"] == slices
        if mesh.model and whole and found[0][1].fits and found[0] not in tried:
            break
    if found and found[0][1].fits:
        report = found[0][1]
        model = report.mesh["model"]
        mesh = MeshOptions(model=model if model > 1 else None, slices=slices)
        if recomputed(report) > 0.2:
            # Only full rematerialisation fits: pieces may leave room for the outputs of products.
            pieces = 2 * settings.fit.microbatches
            found += fitting(
                settings, topology, report.strategy, mesh, progress.console, "matmuls", pieces
            )
        elif mesh.model:
            # Devices wait for each other: activations divided too may help.
            for activations in ("width", "length"):
                divided = dataclasses.replace(mesh, activations=activations)
                found += attempts(settings, topology, report.strategy, divided, progress.console)
    progress.advance(task)
    return ranked(found)


def settled(report) -> bool:
    """Whether no other division of the model can gain much: the devices hardly wait for each other
    and compute hardly anything twice."""
    return (
        report.fits
        and report.step_seconds is not None
        and report.collective_seconds <= 0.05 * report.step_seconds
        and recomputed(report) <= 0.1
    )


def recomputed(report) -> float:
    """Products computed again, as a share of the model's."""
    return report.hardware_flops_per_step / report.model_flops_per_step - 1


def ranked(found: list[tuple[str, object]]) -> list[tuple[str, object]]:
    """By the middle between collectives hidden and exposed; what does not fit by its memory."""

    def badness(one):
        report = one[1]
        if not report.fits or report.step_seconds is None:
            return not report.fits, report.bytes_per_device
        return False, report.step_seconds + report.step_seconds_exposed

    return sorted(found, key=badness)


def attempts(settings, topology, strategy, mesh, console) -> list[tuple[str, object]]:
    """Plans for one mesh, of less and less memory until one fits.

    The first keeps the outputs of products, which is most often the fastest: to store scores too
    may cost more than to compute them again. Where memory abounds, that is tried beside it.
    """
    plan = functools.partial(attempt, settings, topology, strategy, mesh, console)
    found = plan("matmuls", settings.fit.microbatches)
    if not found:
        return found
    report = found[0][1]
    if report.memory is None or report.state_bytes >= report.memory:
        return found
    if report.fits:
        if recomputed(report) < 0.03 or 3 * report.bytes_per_device > report.memory:
            return found
        return found + plan("none", settings.fit.microbatches)
    if strategy == "dp" and 2 * report.state_bytes > report.memory:
        return found  # copies leave so little room that fsdp is the better by far
    pieces = settings.fit.microbatches
    return found + fitting(settings, topology, strategy, mesh, console, "full", pieces)


def fitting(settings, topology, strategy, mesh, console, remat, pieces) -> list[tuple[str, object]]:
    """Plans of one kind of rematerialisation in more and more micro-batches until one fits."""
    found = []
    while tried := attempt(settings, topology, strategy, mesh, console, remat, pieces):
        found += tried
        report = tried[0][1]
        if report.fits:
            break
        room = report.memory - report.state_bytes
        excess = (report.bytes_per_device - report.state_bytes) / room
        pieces *= 2 ** max(1, math.ceil(math.log2(max(excess, 1))))
    return found


def attempt(settings, topology, strategy, mesh, console, remat, pieces) -> list[tuple[str, object]]:
    """One plan, in words and as a report; none where the batch does not divide so."""
    words = f"{strategy}, {mesh_words(mesh)}remat {remat}"
    words += f", {pieces} micro-batches" if pieces > 1 else ""
    tried = dataclasses.replace(
        settings,
        strategy=strategy,
        mesh=mesh,
        execution=dataclasses.replace(settings.execution, remat=remat),
        fit=dataclasses.replace(settings.fit, microbatches=pieces),
    )
    try:
        return [(words, planned(tried, topology))]
    except ValueError as error:
        console.print(f"{words}: {error}", highlight=False)
        return []


def mesh_words(mesh) -> str:
    words = f"model {mesh.model}, " if mesh.model else ""
    return words + ("" if mesh.activations == "whole" else f"activations by {mesh.activations}, ")


# --- what is shown


def show(report, console) -> None:
    from rich.table import Table

    for note in report.notes:
        console.print(note, highlight=False, soft_wrap=True)
    table = Table(title=f"{report.devices} x {report.topology}", show_header=False)
    table.add_column()
    table.add_column(justify="right")
    for name, value in lines(report):
        table.add_row(name, value)
    console.print(table)
    if report.compiled_for != report.topology:
        console.print(
            f"An estimate: what was compiled is the program for {report.compiled_for}, which has as"
            " many devices."
        )


def lines(report) -> list[tuple[str, str]]:
    from lmjax.training.reporting import size

    def percent(x):
        return f"{x:.1%}"

    def pair(hidden, exposed, words):
        return f"{words(hidden)} / {words(exposed)}"

    rows = [
        ("parameters", f"{report.parameters:,}"),
        ("compiled in", f"{report.compile_seconds:.0f} s"),
        ("memory per device", size(report.bytes_per_device)),
        ("  of", size(report.memory) if report.memory else "shared memory"),
        ("  parameters", size(report.parameter_bytes)),
        ("  optimizer", size(report.optimizer_bytes)),
    ]
    if report.temporary_bytes is not None:
        rows.append(("  gradients and activations", size(report.temporary_bytes)))
    rows += [
        ("fits", "yes" if report.fits else "NO"),
        ("FLOPs per step, model's", f"{report.model_flops_per_step:.3g}"),
        ("FLOPs per step, computed", f"{report.hardware_flops_per_step:.3g}"),
    ]
    for kind, axes in (report.collective_bytes or {}).items():
        for axis, count in axes.items():
            rows.append((f"sent per device and step: {kind}, {axis}", size(count)))
    if report.step_seconds is None:
        return rows
    rows += [
        ("computation", seconds(report.compute_seconds)),
        ("memory", seconds(report.memory_seconds)),
        ("collectives", seconds(report.collective_seconds)),
    ]
    for axes, value in report.collective_seconds_by_axis.items():
        rows.append((f"  along {axes}", seconds(value)))
    hidden, exposed = report.step_seconds, report.step_seconds_exposed
    rows += [
        ("what binds", report.bound),
        ("collectives hidden / exposed", ""),
        ("  step", pair(hidden, exposed, seconds)),
        (
            "  model FLOP/s utilisation",
            pair(report.utilization, report.utilization_exposed, percent),
        ),
        ("  tokens/s", pair(report.tokens / hidden, report.tokens / exposed, "{:,.0f}".format)),
        (
            f"  days for {report.schedule_steps:,} steps",
            pair(report.schedule_days, report.schedule_days * exposed / hidden, "{:,.1f}".format),
        ),
        ("  device-hours, hidden", f"{report.schedule_device_hours:,.0f}"),
    ]
    return rows


def seconds(value: float) -> str:
    return f"{value:.3g} s" if value >= 1 else f"{value * 1e3:.3g} ms"


def rank(found: list[tuple[str, object]], console) -> None:
    from rich.table import Table

    from lmjax.training.reporting import size

    if not found:
        return
    first = found[0][1]
    table = Table(title=f"{first.devices} x {first.topology}, collectives hidden / exposed")
    for column in ("plan", "mesh", "memory", "step", "utilisation", "what binds"):
        table.add_column(column, justify="left" if column in ("plan", "what binds") else "right")
    for name, report in found:
        mesh = " x ".join(str(n) for n in report.mesh.values())
        row = [name, mesh, size(report.bytes_per_device)]
        if not report.fits:
            row += ["does not fit", "", ""]
        elif report.step_seconds is not None:
            row += [
                f"{seconds(report.step_seconds)} / {seconds(report.step_seconds_exposed)}",
                f"{report.utilization:.1%} / {report.utilization_exposed:.1%}",
                report.bound,
            ]
        table.add_row(*row)
    console.print(table)


def markdown(best: list[tuple[str, str, object]]) -> str:
    """The best plan of each sweep, as a table for a README."""
    from lmjax.training.reporting import size

    columns = ("preset", "devices", "best plan", "memory", "step", "utilisation", "days")
    rows = ["| " + " | ".join(columns) + " |", "|---|---|---|" + "---:|" * (len(columns) - 3)]
    for preset, name, report in best:
        where = f"{report.devices} x {report.topology}"
        memory = f"{size(report.bytes_per_device)} of {size(report.memory)}"
        if not report.fits or report.step_seconds is None:
            plan = name if report.fits else "does not fit"
            rows.append(f"| {preset} | {where} | {plan} | {memory} | | | |")
            continue
        hidden, exposed = report.step_seconds, report.step_seconds_exposed
        rows.append(
            f"| {preset} | {where} | {name} | {memory} | {seconds(hidden)} / {seconds(exposed)}"
            f" | {report.utilization:.0%} / {report.utilization_exposed:.0%}"
            f" | {report.schedule_days:.3g} / {report.schedule_days * exposed / hidden:.3g} |"
        )
    return "\n".join(rows) + "\n"


if __name__ == "__main__":
    from lmjax import command_line

    command_line.run(main)

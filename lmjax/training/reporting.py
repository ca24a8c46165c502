"""What a person sees of a run: progress, metrics.jsonl, TensorBoard events, a picture of the loss.

metrics.jsonl is the record; the picture is drawn from it. Only the first process writes.
"""

import contextlib
import io
import json
import math
import os
import shutil
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from PIL.Image import Image
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

from lmjax.training.checkpoints import CheckpointError, leaf_name, write_atomically
from lmjax.training.state import TrainState

METRICS = "metrics.jsonl"
CURVE = "loss.png"
EVENTS = "tensorboard"
_PLAIN_SECONDS = 5.0  # between lines where no live bar can be shown


class Reporter:
    """Follows a run from `first_step` to `steps`; a context manager.

    Entering drops the records of steps after `first_step`, which a run that was cut off may have
    left and which this one will repeat.

    Args:
        flops: of one training step (`Task.flops`), for the utilisation `mfu`.
        peak: FLOP/s that all devices could do, or None where no figure is known.
    """

    def __init__(
        self,
        workdir: str | os.PathLike,
        first_step: int,
        steps: int,
        flops: float = 0.0,
        peak: float | None = None,
    ):
        self.workdir, self.first_step, self.steps = Path(workdir), first_step, steps
        self.flops, self.peak = flops, peak
        self.speed = Stopwatch()
        self._writes = jax.process_index() == 0
        self._console = Console(quiet=not self._writes, highlight=False, soft_wrap=True)
        self._bar, self._plain_at = None, -math.inf

    def __enter__(self) -> "Reporter":
        if self._writes:
            kept = self.first_step
            if not kept:  # a run without a checkpoint begins anew, with its evaluation at step 0
                kept = -1
                shutil.rmtree(self.workdir / EVENTS, ignore_errors=True)
            truncate(self.workdir / METRICS, kept)
            self._events = Events(self.workdir / EVENTS, kept)
            self._file = open(self.workdir / METRICS, "a")
        return self

    def __exit__(self, *_) -> None:
        self._stop_bar()
        if self._writes:
            with contextlib.suppress(OSError):  # a full disk, which the run itself has met
                self._file.close()
                self._events.close()

    def say(self, text: str) -> None:
        """Prints lines (above the progress bar)."""
        self._console.print(text, markup=False)

    def begin(self) -> None:
        """Starts the clock, and the bar where there is a terminal to show it."""
        if self._console.is_terminal and self._writes:
            columns = "{task.completed}/{task.total}", "{task.fields[status]}"
            self._bar = Progress(
                TextColumn(columns[0]), BarColumn(), TextColumn(columns[1]), TimeRemainingColumn(),
                console=self._console, refresh_per_second=2, speed_estimate_period=300,
            )  # fmt: skip
            self._task = self._bar.add_task(
                "train", total=self.steps, completed=self.first_step, status=""
            )
            self._bar.start()
        self.speed.start()

    def stepped(self, step: int, tokens: int) -> None:
        """Counts a step that the devices have finished."""
        self.speed.count(tokens)
        if self._bar:
            self._bar.update(self._task, completed=step)

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """Records a training step, with the speed since the last one recorded."""
        seconds, tokens_per_second = self.speed.lap()
        line = dict(metrics)
        if seconds:
            line["step_seconds"] = seconds
            if tokens_per_second:
                line["tokens_per_second"] = tokens_per_second
            if self.flops and self.peak:
                line["mfu"] = self.flops / seconds / self.peak
        self._record(step, line)
        self._show(step, line)

    def log_evaluation(self, step: int, metrics: Mapping[str, float], averaged: bool) -> None:
        """Records metrics on held-out data as `eval_...`, and draws the curve so far."""
        self._record(step, {f"eval_{name}": value for name, value in metrics.items()})
        weights = " with averaged parameters" if averaged else ""
        self.say(f"step {step}: held-out data{weights}: {_words(metrics)}")
        if 0 < step < self.steps:
            self.draw()

    def log_pictures(self, step: int, pictures: Mapping[str, Image]) -> None:
        """Shows pictures of what the model can do by now in TensorBoard, under their names."""
        if self._writes:
            with self._failures_said_plainly():
                for name, picture in pictures.items():
                    self._events.add_picture(name, picture, step)

    def draw(self) -> None:
        """Writes the picture of the training and held-out loss."""
        if self._writes:
            draw_curve(self.workdir / METRICS, self.workdir / CURVE)

    def _record(self, step: int, metrics: Mapping[str, float]) -> None:
        if not self._writes:
            return
        # Not-a-number is no JSON: such a value is recorded as null.
        values = {k: v if math.isfinite(v) else None for k, v in metrics.items()}
        with self._failures_said_plainly():
            self._file.write(json.dumps({"step": step, **values}) + "\n")
            self._file.flush()
            for name, value in values.items():
                group = "evaluation" if name.startswith("eval_") else "training"
                if value is not None:
                    self._events.add(f"{group}/{name.removeprefix('eval_')}", value, step)
            self._events.flush()

    @contextlib.contextmanager
    def _failures_said_plainly(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise CheckpointError(
                f"{METRICS} and {EVENTS} in {self.workdir} could not be written"
                f" ({error.strerror}): make room and run the same command again"
            ) from error

    def _show(self, step: int, line: Mapping[str, float]) -> None:
        status = _words({k: line[k] for k in ("loss", "tokens_per_second", "mfu") if k in line})
        if self._bar:
            self._bar.update(self._task, status=status)
            return
        due = time.monotonic() - self._plain_at >= _PLAIN_SECONDS
        if due or step == self.steps:
            self._plain_at = time.monotonic()
            left = (self.steps - step) * line.get("step_seconds", 0)
            self.say(
                f"step {step}/{self.steps}: {status}" + (f", {_clock(left)} left" * bool(left))
            )

    def _stop_bar(self) -> None:
        if self._bar:
            self._bar.stop()
            self._bar = None


class Stopwatch:
    """Seconds and tokens per step, while it runs: evaluation and saving stop it."""

    def __init__(self):
        self._seconds, self._steps, self._tokens, self._since = 0.0, 0, 0, None

    def start(self) -> None:
        self._since = time.perf_counter()

    @contextlib.contextmanager
    def stopped(self):
        self._seconds += time.perf_counter() - self._since
        self._since = None
        yield
        self.start()

    def count(self, tokens: int) -> None:
        self._steps += 1
        self._tokens += tokens

    def lap(self) -> tuple[float, float]:
        """(seconds per step, tokens per second) since the last lap; zeros if there was no step."""
        now = time.perf_counter()
        seconds, steps, tokens = self._seconds, self._steps, self._tokens
        if self._since is not None:
            seconds += now - self._since
            self._since = now
        self._seconds, self._steps, self._tokens = 0.0, 0, 0
        return (seconds / steps, tokens / seconds) if steps and seconds else (0.0, 0.0)


class Events:
    """Scalars and pictures for TensorBoard; older files' of steps after `first_step` are hidden.

    It writes at once: tensorboardX's own SummaryWriter does so in a thread, whose end on a full
    disk would leave the run waiting for ever.
    """

    def __init__(self, directory: Path, first_step: int):
        # tensorboardX imports PyTorch wherever it is installed: seconds, for nothing.
        hide = "torch" not in sys.modules
        if hide:
            sys.modules["torch"] = None
        try:
            from tensorboardX.event_file_writer import EventsWriter
            from tensorboardX.proto import event_pb2, summary_pb2
        finally:
            if hide:
                del sys.modules["torch"]
        directory.mkdir(exist_ok=True)
        self._event, self._summary = event_pb2.Event, summary_pb2.Summary
        # The seconds in its name may be those of another file.
        self._file = EventsWriter(str(directory / "events"), f".{first_step}.{time.time_ns()}")
        self._flushed = time.monotonic()
        start = event_pb2.SessionLog(status=event_pb2.SessionLog.START)
        self._file.write_event(self._event(step=first_step + 1, session_log=start))

    def add(self, name: str, value: float, step: int) -> None:
        scalar = self._summary(value=[self._summary.Value(tag=name, simple_value=value)])
        self._file.write_event(self._event(wall_time=time.time(), step=step, summary=scalar))

    def add_picture(self, name: str, picture: Image, step: int) -> None:
        png = io.BytesIO()
        picture.save(png, "png")
        image = self._summary.Image(
            width=picture.width,
            height=picture.height,
            colorspace=3,
            encoded_image_string=png.getvalue(),
        )
        summary = self._summary(value=[self._summary.Value(tag=name, image=image)])
        self._file.write_event(self._event(wall_time=time.time(), step=step, summary=summary))

    def flush(self, seconds: float = 10.0) -> None:
        """Writes out what was added, unless that was done less than so many seconds ago."""
        if time.monotonic() - self._flushed >= seconds:
            self._file.flush()
            self._flushed = time.monotonic()

    def close(self) -> None:
        self._file.close()


def count_tokens(rows: Mapping[str, np.ndarray], reads: Sequence[str]) -> int:
    """Tokens of these arrays that are not padding, by their segment ids or their lengths, if they
    have such."""

    def count(name: str) -> int:
        if f"{name}_segment_ids" in rows:
            return np.count_nonzero(rows[f"{name}_segment_ids"])
        if f"{name}_lengths" in rows:
            return int(rows[f"{name}_lengths"].sum())
        return rows[name].size

    return sum(map(count, reads))


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The lines of a metrics.jsonl; a last line that a killed run left half-written is dropped."""
    if not path.exists():
        return []
    records = []
    for line in path.read_text().splitlines():
        try:
            records.append(json.loads(line))
        except json.JSONDecodeError:
            continue
    return records


def truncate(path: Path, step: int) -> None:
    """Drops records of steps after `step`, all at once or not at all."""
    kept = [json.dumps(record) + "\n" for record in read_metrics(path) if record["step"] <= step]
    write_atomically(path, "".join(kept).encode())


def draw_curve(metrics: Path, picture: Path) -> None:
    """Draws training and held-out loss over the steps as a PNG."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg  # slow to import
    from matplotlib.figure import Figure

    records = read_metrics(metrics)
    figure = Figure(figsize=(8, 5), dpi=120)
    FigureCanvasAgg(figure)
    axes = figure.add_subplot(xlabel="step", ylabel="loss")
    for key, label, style in (("loss", "training", "-"), ("eval_loss", "held out", "o-")):
        points = [(r["step"], r[key]) for r in records if r.get(key) is not None]
        if points:
            axes.plot(*zip(*points, strict=True), style, label=label, markersize=4, linewidth=1.2)
    if axes.lines:
        axes.legend()
    axes.grid(alpha=0.3)
    png = io.BytesIO()
    figure.savefig(png, format="png")
    write_atomically(picture, png.getvalue())


def parameter_summary(params: Any) -> str:
    """One line for each top-level module, with its share of the parameters, and the total."""
    modules: dict[str, int] = {}
    for path, leaf in jax.tree_util.tree_leaves_with_path(params):
        name = leaf_name(path[:1])
        modules[name] = modules.get(name, 0) + math.prod(leaf.shape)
    total = sum(modules.values())
    width = max(map(len, ("parameters", *modules)))
    lines = [
        f"  {name:<{width}} {count:>15,} {count / total:>6.1%}" for name, count in modules.items()
    ]
    return "\n".join([f"  {'parameters':<{width}} {total:>15,}", *lines])


def memory_summary(target: TrainState) -> str:
    """What the state and the gradients take on each device, told before any of it is there."""
    parts = {
        "parameters": bytes_per_device(target.params),
        "gradients": bytes_per_device(target.params),
        "optimizer": bytes_per_device(target.opt_state),
    }
    if target.ema is not None:
        parts["average"] = bytes_per_device(target.ema)
    if target.compression is not None:
        parts["compression"] = bytes_per_device(target.compression)
    device = jax.local_devices()[0]
    limit = (device.memory_stats() or {}).get("bytes_limit")
    of = f" of {size(limit)}" if limit else ""
    sizes = ", ".join(f"{name} {size(count)}" for name, count in parts.items())
    return f"  {jax.device_count()} x {device.device_kind}; on each{of}: {sizes}"


def compilation_summary(compiled: jax.stages.Compiled, seconds: float) -> str:
    """How long compiling took, and what the compiled step takes on each device."""
    line = f"  compiled in {seconds:.1f} s"
    analysis = compiled.memory_analysis()  # None where a backend has no such figures
    if analysis is not None:
        line += f"; beside the state a step takes {size(analysis.temp_size_in_bytes)}"
        line += " (gradients are part of it)"
    return line


def bytes_per_device(target: Any) -> int:
    """Bytes that one device holds of a tree of `jax.ShapeDtypeStruct` with shardings."""
    return sum(
        math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize
        for leaf in jax.tree.leaves(target)
    )


def size(count: float) -> str:
    """1_500_000 -> "1.5 MB"."""
    thousands = min(int(math.log10(max(count, 1)) // 3), 4)
    return f"{count / 1000**thousands:.3g} {('B', 'kB', 'MB', 'GB', 'TB')[thousands]}"


def _words(metrics: Mapping[str, float]) -> str:
    forms = {"mfu": "MFU {:.1%}", "tokens_per_second": "{:,.0f} tokens/s"}
    return ", ".join(
        forms.get(name, name.replace("{", "{{") + " {:.4g}").format(value)
        for name, value in metrics.items()
    )


def _clock(seconds: float) -> str:
    hours, rest = divmod(round(seconds), 3600)
    minutes, seconds = divmod(rest, 60)
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"

"""Training: one pure step, and the loop around it.

The loop never waits for the device it has just given work: the metrics of a step are read while
the next one runs. Evaluation and saving are the only points where the two meet.
"""

import contextlib
import dataclasses
import functools
import math
import os
import re
import signal
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from types import MappingProxyType
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from PIL.Image import Image

from lmjax.data.batches import Batches, joined_positions
from lmjax.sharding.hardware import peak_flops
from lmjax.sharding.mesh import Layout, activate, check_batch_size, put_batch
from lmjax.sharding.multihost import StopTogether, agree, first_process_first, gather
from lmjax.sharding.strategies import PMAP
from lmjax.tasks.task import Batch, Params, Scalars, Task, reads
from lmjax.training.checkpoints import (
    CheckpointError,
    Checkpoints,
    as_json,
    changed_fields,
    check_shared,
    check_space,
    claim_workdir,
    differences,
    leaf_name,
    lock_workdir,
)
from lmjax.training.compression import PowerSGD
from lmjax.training.optimizers import Adafactor, AdamW
from lmjax.training.reporting import (
    Reporter,
    compilation_summary,
    count_tokens,
    memory_summary,
    parameter_summary,
    size,
)
from lmjax.training.state import Averaging, TrainState, abstract_parameters
from lmjax.training.step import Outcome, arrange, compile_step, prepare, shardings


@dataclasses.dataclass(frozen=True)
class FitOptions:
    """How a run is carried out; all of it may change when the run is resumed."""

    log_every: int = 10
    """Steps between lines in metrics.jsonl. The last step is always logged."""
    eval_every: int = 100
    """Steps between evaluations on held-out data. The last step is always evaluated."""
    checkpoint_every: int = 100
    """Steps between checkpoints. The last step is always saved, and so is the current one on
    Ctrl-C or SIGTERM."""
    keep: int = 2
    """How many of the newest checkpoints are kept, beside the one with the best held-out loss."""
    microbatches: int = 1
    """Pieces in which a batch is computed, one after the other, to need less memory. The gradient
    is the same but for rounding and other draws of dropout."""
    nonfinite: Literal["stop", "skip"] = "stop"
    """What to do when a loss or gradient is infinite or not a number. The parameters never change
    in such a step. stop: end with a report. skip: count it and go on with the next batch."""
    max_skips: int = 20
    """With nonfinite=skip: stop after this many such steps in a row."""

    def __post_init__(self):
        for name, value in dataclasses.asdict(self).items():
            if name != "nonfinite" and value < 1:
                raise ValueError(f"{name} is {value}, and must be at least 1")
        if self.nonfinite not in ("stop", "skip"):
            raise ValueError(f"nonfinite is {self.nonfinite!r}, not 'stop' or 'skip'")


Watch = Callable[[Params], Mapping[str, Image]]
"""Makes pictures, by their names, of what parameters can do by now."""


class Fitted(NamedTuple):
    """The state at the end, and whether a signal ended the run before its last step."""

    state: TrainState
    interrupted: bool


class NonFinite(FloatingPointError):
    """A loss or gradient became infinite or not a number; the message is the report."""


class OutOfMemory(ValueError):
    """A device has too little memory for this run; the message says what to change."""


def fit(
    task: Task,
    optimizer: Adafactor | AdamW,
    data: Batches,
    *,
    steps: int,
    workdir: str | os.PathLike,
    seed: int,
    experiment: str,
    identity: Mapping[str, Any],
    runtime: FitOptions = FitOptions(),  # noqa: B008 (it is frozen)
    evaluation: Sequence[Mapping[str, np.ndarray]] = (),
    watch: Watch | None = None,
    averaging: Averaging | None = None,
    compression: PowerSGD | None = None,
    init: Callable[[], Params] | None = None,
    layout: Layout | None = None,
    files: Mapping[str, bytes] = MappingProxyType({}),
) -> Fitted:
    """Trains until `steps` steps are done, from the last checkpoint in `workdir` if it has one.

    The first SIGINT or SIGTERM ends the run after the step at hand, with a checkpoint; the second
    ends it at once.

    Args:
        seed: of the parameters and of dropout (the data has its own).
        experiment: the experiment's name, for config.json.
        identity: what must be the same when the run is resumed; dataclasses and JSON. It is kept
            in config.json, together with `averaging` and `compression`.
        evaluation: held-out batches, each this host's rows; metrics are exact over all of them.
        watch: pictures to follow the run by, of the parameters that were just evaluated; not called
            before the first step and after the last, nor again after it ran out of memory.
        averaging: keep a moving average of the parameters, and evaluate that.
        compression: of the gradients that are summed over the mesh's `data` axis. Strategy and
            mesh then have to stay when the run is resumed.
        init: gives the parameters to start from; called only where there is no checkpoint.
        layout: how the model and its batch are divided over the devices, by default as
            `step.arrange` would have it. It may change when the run is resumed.
        files: what else it takes to use the checkpoints, such as a tokenizer: name -> content,
            written beside config.json.

    Raises:
        ValueError: a batch that does not divide over the devices, parameters from `init` of
            another shape, or data that ends too early.
        CheckpointError: a workdir or checkpoint of another run, or in use by another process, or
            damaged, or no space left.
        NonFinite: see `FitOptions.nonfinite`.
        OutOfMemory: a device has too little of it.
    """
    if layout is None:
        layout = arrange(task, optimizer, data.batch_size, microbatches=runtime.microbatches)
    check_batch_size(data.batch_size, layout.batch_parts, runtime.microbatches)
    for batch in evaluation:
        rows = len(next(iter(batch.values()))) * layout.share[1]
        check_batch_size(rows, layout.batch_parts)
    how = {"strategy": layout.strategy.name, "mesh": dict(layout.mesh.shape)}
    settings = {"steps": steps, **how, "fit": runtime}
    shapes = [{name: rows.shape for name, rows in batch.items()} for batch in evaluation]
    identity = {**identity, "averaging": averaging, "compression": None}
    if compression is not None:
        # Each replica keeps errors of its own, and of each part.
        identity["compression"] = {"rank": compression.rank, **how}

    with contextlib.ExitStack() as stack:
        stack.enter_context(memory_errors_said_plainly(data.batch_size, runtime.microbatches))
        run = {"experiment": experiment, **identity, **settings, "evaluation": shapes}
        agree("run", as_json(run), changed_fields)
        with first_process_first("workdir"):
            stack.enter_context(lock_workdir(workdir))
            claim_workdir(workdir, experiment, identity, settings, files)
        check_shared(workdir)
        stack.enter_context(activate(layout))
        interruption = stack.enter_context(Interruption())
        checkpoints = stack.enter_context(Checkpoints(workdir, runtime.keep))

        prepared = prepare(
            task,
            optimizer,
            layout,
            seed=seed,
            microbatches=runtime.microbatches,
            averaging=averaging,
            compression=compression,
        )
        target = prepared.target
        latest = checkpoints.latest_step
        agree("last checkpoint", {"step": latest}, changed_fields)
        first = latest or 0
        if first >= steps:
            _print(f"{workdir} is at step {first} already: nothing is left to do up to {steps}")
            return Fitted(checkpoints.restore(target, first), interrupted=False)
        _print(parameter_summary(target.params))
        if layout.mesh.size > 1:
            _print("\n  ".join(layout.summary(*abstract_parameters(task))))
        if prepared.sums is not None:
            _print(f"  {prepared.sums.summary}")
        _print(memory_summary(target))

        # The large arrays come last: whatever can be wrong is found before.
        if latest is None:
            check_space(checkpoints.directory, target)
            given = None if init is None else given_parameters(init, target)
            info = {"position": None, "skipped": 0}
        else:
            info = checkpoints.inspect(target, latest)
        feed = stack.enter_context(Feed(data, info["position"], layout, reads(task)))
        batch = feed.next()
        compiled, seconds = compile_step(prepared, batch, layout)
        _print(compilation_summary(compiled, seconds))
        if latest is None:
            state = jax.jit(prepared.build, out_shardings=shardings(target))(given)
            del given  # the state has copies
        else:
            state = checkpoints.restore(target, latest)

        flops = task.flops(feed.shapes)
        peak = peak_flops(layout.mesh.devices.flat[0])
        reporter = Reporter(workdir, first, steps, flops, peak and peak * layout.mesh.size)
        stack.enter_context(reporter)
        reporter.say(f"  {first} of {steps} steps are done")
        kept = shardings(target.extra)
        evaluator = Evaluator(task, evaluation, layout.batch, kept) if evaluation else None
        guard = Guard(runtime, checkpoints, target.params, info["skipped"])
        loop = Loop(compiled, feed, evaluator, watch, checkpoints, reporter, guard, runtime)
        state = loop.run(state, batch, first, steps, interruption)
    last = int(state.step)
    if last < steps:
        _print(f"Stopped at step {last} of {steps}, which is saved: the same command continues it.")
    return Fitted(state, interrupted=last < steps)


def _print(text: str) -> None:
    if jax.process_index() == 0:
        print(text, flush=True)


# --- before the first step


def given_parameters(init: Callable[[], Params], target: TrainState) -> Params:
    """The parameters that `init` gives, on their devices; ValueError if they do not fit."""
    params = init()
    if text := differences(params, target.params):
        raise ValueError(f"the parameters to start from are of another model: {text}")
    # `device_put` would first compare the processes' arrays with each other, on their devices.
    return jax.tree.map(
        lambda x, t: jax.make_array_from_callback(x.shape, t.sharding, lambda part: x[part]),
        params,
        target.params,
    )


@contextlib.contextmanager
def memory_errors_said_plainly(batch_size: int, microbatches: int) -> Iterator[None]:
    """Turns XLA's RESOURCE_EXHAUSTED, wherever in the block it is raised, into OutOfMemory."""
    try:
        yield
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        raise OutOfMemory(
            f"a device ran out of memory{_asked_for(str(error))} with a batch of {batch_size} rows"
            f" in {microbatches} micro-batch(es) over {jax.device_count()} device(s): choose a"
            " smaller batch, more fit.microbatches (the gradient stays the same), execution.remat"
            " full, strategy fsdp on several devices, or a smaller model"
        ) from error


def _asked_for(message: str) -> str:
    """XLA says "allocating 512 bytes", "allocate 2.00GiB" or (TPU) "Used 20.5G of 15.7G hbm"."""
    found = re.search(r"(?:allocat\w+|Used) (\d[\d.]*) ?([bKMGT])", message)
    if not found:
        return ""
    return f", asked for {size(float(found[1]) * 1024 ** 'bKMGT'.index(found[2]))},"


# --- the loop


class Feed:
    """Batches on their way to the devices, and the position in the data after the last of them."""

    def __init__(
        self, data: Batches, position: dict | None, layout: Layout, reads: tuple[str, ...]
    ):
        self.position, self.tokens, self.shapes = position, 0, {}
        self._layout, self._reads, self._stream = layout, reads, data.start(position)

    def __enter__(self) -> "Feed":
        return self

    def __exit__(self, *_) -> None:
        if hasattr(self._stream, "close"):  # a generator: ends its threads and processes
            self._stream.close()

    def next(self) -> dict[str, jax.Array]:
        try:
            rows, position = next(self._stream)
        except StopIteration:
            raise ValueError(
                "the training data ended before the last step: give it more data or fewer steps"
            ) from None
        batch = put_batch(rows, self._layout.batch)
        self.shapes = {name: array.shape for name, array in batch.items()}
        if self._layout.strategy is PMAP:
            batch = jax.tree.map(self._replicas, batch)
        self.position = position
        self.tokens = count_tokens(rows, self._reads) * self._layout.share[1]
        return batch

    def _replicas(self, x: jax.Array) -> jax.Array:
        """[B, ...] -> [devices, B / devices, ...], each device keeping its rows."""
        return x.reshape(self._layout.mesh.size, -1, *x.shape[1:])


class Evaluator:
    """Metrics over held-out batches in their order, weighted as if they were one batch."""

    def __init__(
        self,
        task: Task,
        batches: Sequence[Mapping[str, np.ndarray]],
        sharding: jax.sharding.Sharding,
        extra_shardings: Any,
    ):
        self._batches, self._sharding = batches, sharding
        self._evaluate = jax.jit(task.evaluate, out_shardings=(None, extra_shardings))
        normalize = jax.jit(task.normalizers)
        self._normalizers = _total(normalize(put_batch(batch, sharding)) for batch in batches)

    def __call__(self, state: TrainState) -> dict[str, float]:
        results, extra = [], state.extra
        for batch in self._batches:
            rows = put_batch(batch, self._sharding)
            metrics, extra = self._evaluate(state.evaluated, extra, rows, self._normalizers)
            results.append(metrics)
        return _floats(_total(results))


def _total(trees: Iterable[Any]) -> Any:
    return functools.reduce(lambda a, b: jax.tree.map(jnp.add, a, b), trees)


def _floats(metrics: Scalars) -> dict[str, float]:
    """Metrics as numbers, the loss first: JAX sorts dicts by name."""
    return {name: float(metrics[name]) for name in sorted(metrics, key=lambda k: (k != "loss", k))}


class Guard:
    """Watches for losses and gradients that are not finite, and ends the run when told to."""

    def __init__(self, runtime: FitOptions, checkpoints: Checkpoints, params: Params, skipped: int):
        self.skipped, self._in_a_row = skipped, 0
        self._runtime, self._checkpoints = runtime, checkpoints
        paths = jax.tree_util.tree_leaves_with_path(params)
        self._names = [leaf_name(path) for path, _ in paths]

    def check(self, step: int, outcome: Outcome) -> None:
        """Raises NonFinite if this step was not finite and may not (or no longer) be skipped."""
        if math.isfinite(outcome.metrics["loss"]) and np.isfinite(outcome.squares).all():
            self._in_a_row = 0
            return
        self.skipped += 1
        self._in_a_row += 1
        if self._runtime.nonfinite == "skip" and self._in_a_row < self._runtime.max_skips:
            return
        raise NonFinite(self._report(step, outcome))

    def _report(self, step: int, outcome: Outcome) -> str:
        metrics = [f"{k} is {v}" for k, v in outcome.metrics.items() if not math.isfinite(v)]
        names = [
            name
            for name, square in zip(self._names, outcome.squares, strict=True)
            if not np.isfinite(square)
        ]
        more = f" and {len(names) - 5} more" if len(names) > 5 else ""
        with contextlib.suppress(CheckpointError):  # a failed write is not why the run ends
            self._checkpoints.wait()
        last = self._checkpoints.latest_step
        if self._runtime.nonfinite == "stop":
            advice = "nonfinite=skip leaves such batches out"
        else:
            advice = f"that makes {self._in_a_row} steps in a row (max_skips)"
        return (
            f"step {step} is not finite: {', '.join(metrics)}; gradients that are not finite:"
            f" {', '.join(names[:5]) or 'none'}{more} ({len(names)} of {len(self._names)})."
            f" The parameters were not changed by it. Last good checkpoint:"
            f" {'none yet' if last is None else f'step {last}'}."
            f" The same command continues from there; {advice}; a lower learning rate, a longer"
            " warm-up or gradient clipping needs a new workdir."
        )


@dataclasses.dataclass
class Loop:
    """Steps, and what happens between them."""

    step: jax.stages.Compiled
    feed: Feed
    evaluate: Evaluator | None
    watch: Watch | None
    checkpoints: Checkpoints
    reporter: Reporter
    guard: Guard
    runtime: FitOptions

    def run(
        self,
        state: TrainState,
        batch: Batch,
        first: int,
        steps: int,
        interruption: "Interruption",
    ) -> TrainState:
        """Trains from step `first` to step `steps`, or until interrupted; saves the last state."""
        if first == 0:
            self._evaluate(state, 0)
        self.reporter.begin()
        stop_together = StopTogether()
        late = None  # the last step given to the devices, whose outcome has not been read
        for number in range(first + 1, steps + 1):
            state, outcome = self.step(state, batch)
            if late:
                self._observe(*late)
            late = number, self.feed.tokens, outcome

            stop = stop_together(number, interruption.requested)
            last = number == steps or stop
            evaluate = number == steps or number % self.runtime.eval_every == 0
            save = last or number % self.runtime.checkpoint_every == 0
            if evaluate or save:
                self._observe(*late, log=last)  # so that nothing that is saved is unchecked
                late = None
                with self.reporter.speed.stopped():
                    metrics = self._evaluate(state, number) if evaluate else None
                    if save:
                        self._save(state, number, metrics)
                    if evaluate and not last:
                        self._watch(state, number)
            if last:
                break
            try:
                batch = self.feed.next()
            except Exception:
                # A terminal sends Ctrl-C to processes that prepare data too, which may die of it.
                # If a run has several, each would save a step of its own.
                if not interruption.requested or jax.process_count() > 1:
                    raise
                if late:
                    self._observe(*late, log=True)
                if not save:
                    self._save(state, number)
                break
        self.checkpoints.wait()
        self.reporter.draw()
        return state

    def _observe(self, step: int, tokens: int, outcome: Outcome, log: bool = False) -> None:
        """Waits for a step, logs it when its turn has come, and checks that it was finite."""
        outcome = jax.device_get(outcome)
        self.reporter.stepped(step, tokens)
        try:
            self.guard.check(step, outcome)
        except NonFinite:
            log = True
            raise
        finally:
            if log or step % self.runtime.log_every == 0:
                metrics = {**_floats(outcome.metrics), "skipped": self.guard.skipped}
                self.reporter.log(step, metrics)

    def _save(self, state: TrainState, step: int, metrics: dict[str, float] | None = None) -> None:
        position = joined_positions(gather("position", self.feed.position))
        info = {"position": position, "skipped": self.guard.skipped}
        self.checkpoints.save(step, state, info, metrics)

    def _evaluate(self, state: TrainState, step: int) -> dict[str, float] | None:
        if self.evaluate is None:
            return None
        metrics = self.evaluate(state)
        self.reporter.log_evaluation(step, metrics, averaged=state.ema is not None)
        return {f"eval_{name}": value for name, value in metrics.items()}

    def _watch(self, state: TrainState, step: int) -> None:
        if self.watch is None:
            return
        try:
            pictures = self.watch(state.evaluated)
        except jax.errors.JaxRuntimeError as error:  # out of memory, most likely
            self.reporter.say(f"step {step}: no pictures from now on: {str(error).splitlines()[0]}")
            self.watch = None
        else:
            self.reporter.log_pictures(step, pictures)


class Interruption:
    """While entered, the first SIGINT or SIGTERM only sets `requested`; a second one acts as ever.

    Signals reach the main thread only; elsewhere this does nothing.
    """

    def __init__(self):
        self.requested = False
        self._handlers: dict[int, Any] = {}

    def __enter__(self) -> "Interruption":
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                self._handlers[number] = signal.signal(number, self._request)
        return self

    def __exit__(self, *_) -> None:
        self._restore()

    def _request(self, number: int, _) -> None:
        self.requested = True
        self._restore()
        name = signal.Signals(number).name
        # Not print: the signal may have come in the middle of one.
        os.write(2, f"\n{name}: finishing this step and saving; again to stop at once\n".encode())

    def _restore(self) -> None:
        while self._handlers:
            number, handler = self._handlers.popitem()
            signal.signal(number, signal.SIG_DFL if handler is None else handler)

"""A run's directory: what the run is (config.json) and how far it came (checkpoints/).

Every file is written under a temporary name and renamed, so a killed run leaves nothing half-made.
A checkpoint holds four items: `params`, `ema` (where an average is kept), `training` (the rest of
the state) and `info` (JSON: position in the data, metrics, ...). Parameters can be read alone.
`info` has a checksum of each other item, for the format itself would not notice a flipped bit.
"""

import contextlib
import dataclasses
import errno
import fcntl
import json
import logging
import math
import os
import re
import shutil
import sys
import uuid
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from orbax.checkpoint.checkpoint_managers import AnyPreservationPolicy, BestN, LatestN

from lmjax.data.cache import atomic_write
from lmjax.sharding.multihost import barrier, gather
from lmjax.tasks.task import Params
from lmjax.training.state import TrainState

CONFIG = "config.json"
CHECKPOINTS = "checkpoints"


class CheckpointError(ValueError):
    """A checkpoint or a run's directory cannot be used as asked; the message says what to do."""


def write_atomically(path: Path, content: bytes) -> None:
    """Replaces a file by `content`, or leaves it as it was and raises CheckpointError."""
    try:
        atomic_write(path, content)
    except OSError as error:
        raise _said_plainly(error, f"{path} could not be written") from error


# --- what the run is


def as_json(value: Any) -> Any:
    """Plain JSON of a configuration; a dataclass becomes its fields and, as `type`, its name."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        fields = {f.name: as_json(getattr(value, f.name)) for f in dataclasses.fields(value)}
        return {"type": type(value).__name__, **fields}
    if isinstance(value, Mapping):
        return {str(key): as_json(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [as_json(item) for item in value]
    if isinstance(value, np.generic):
        return value.item()
    return value if value is None or isinstance(value, bool | int | float | str) else str(value)


@contextlib.contextmanager
def lock_workdir(workdir: str | os.PathLike) -> Iterator[None]:
    """Keeps other runs out of `workdir`, which is made if need be; ends with this process.

    Only the first process of a run holds the lock (the kernel's: flock on `.lock`).

    Raises:
        CheckpointError: another process is training there, or it is no directory for a run.
    """
    workdir = Path(workdir)
    _check_usable(workdir)
    if jax.process_index() != 0:
        yield
        return
    workdir.mkdir(parents=True, exist_ok=True)
    with open(workdir / ".lock", "w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise CheckpointError(
                f"another process is training in {workdir}: wait for it, end it, or choose another"
                " workdir"
            ) from None
        except OSError:  # a file system without locks, as Lustre often is: not a reason to refuse
            pass
        yield


def claim_workdir(
    workdir: str | os.PathLike,
    experiment: str,
    identity: Any,
    runtime: Any,
    files: Mapping[str, bytes] = MappingProxyType({}),
) -> None:
    """Makes `workdir` the directory of this run, or finds that it already is, and writes `files`.

    A run that ended before its first checkpoint has left nothing to continue: its directory is
    taken over whatever its identity. Of other runs, a field that the identity in config.json does
    not have is no difference, for older versions of the code did not have it; a note is printed.

    Raises:
        CheckpointError: the directory holds a run with another identity (each field that differs
            is named), or files that are no run's.
    """
    workdir = Path(workdir)
    config = {"experiment": experiment, "identity": as_json(identity), "runtime": as_json(runtime)}
    _check_usable(workdir)
    found = read_config(workdir) if (workdir / CONFIG).exists() else None
    notes = []
    if found and _finished_steps(workdir / CHECKPOINTS):
        changes, notes = _compare(
            {"experiment": found["experiment"], **found["identity"]},
            {"experiment": experiment, **config["identity"]},
        )
        if changes:
            raise CheckpointError(
                f"{workdir} holds a run that began with other settings ({', '.join(changes)}):"
                " restore them to continue it, or give a new run another workdir"
            )
    if jax.process_index() == 0:
        if notes:
            print(
                f"note: {workdir / CONFIG} is of a version without {', '.join(notes)}: the run"
                " goes on with these values"
            )
        workdir.mkdir(parents=True, exist_ok=True)
        write_atomically(workdir / CONFIG, json.dumps(config, indent=2).encode())
        for name, content in files.items():
            write_atomically(workdir / name, content)


def check_shared(workdir: str | os.PathLike) -> None:
    """Raises CheckpointError, in every process, unless all of them see the same workdir."""
    if jax.process_count() == 1:
        return
    path = Path(workdir) / ".seen"
    token = gather("token", uuid.uuid4().hex)[0]
    if jax.process_index() == 0:
        write_atomically(path, token.encode())
    barrier("the token is written")
    seen = gather("seen", path.exists() and path.read_text() == token)
    if jax.process_index() == 0:
        path.unlink()
    if not all(seen):
        raise CheckpointError(
            f"process {seen.index(False)} does not see what process 0 writes in {workdir}: give a"
            " --workdir on storage that all hosts share"
        )


def _check_usable(workdir: Path) -> None:
    """Raises CheckpointError for a file, and for a directory with files that are no run's."""
    if workdir.exists() and not workdir.is_dir():
        raise CheckpointError(f"{workdir} is a file: choose a directory for the run's workdir")
    if (workdir / CONFIG).exists() or not workdir.exists():
        return
    if any(not p.name.startswith(".") for p in workdir.iterdir()):
        raise CheckpointError(
            f"{workdir} has files in it but no {CONFIG}, so it is not the workdir of a run: choose"
            " another directory or empty this one"
        )


def read_config(workdir: str | os.PathLike) -> dict[str, Any]:
    """A run's config.json: {"experiment", "identity", "runtime"}.

    Raises:
        CheckpointError: the directory is not a run's, or the file is damaged.
    """
    path = Path(workdir) / CONFIG
    try:
        config = json.loads(path.read_text())
        return {key: config[key] for key in ("experiment", "identity", "runtime")}
    except (FileNotFoundError, NotADirectoryError):
        raise CheckpointError(
            f"{workdir} is not the workdir of a run (it has no {CONFIG}): name a directory that"
            " training wrote"
        ) from None
    except (json.JSONDecodeError, UnicodeDecodeError, KeyError, TypeError) as error:
        raise CheckpointError(
            f"{path} is damaged ({error!r}): the checkpoints beside it are not affected; restore"
            " this file or begin a new run from one of them"
        ) from error


def changed_fields(old: Any, new: Any) -> list[str]:
    """["batch 128 -> 64", ...]: the fields that differ between two JSON values."""
    differing, absent = _compare(old, new)
    return differing + absent


def _compare(old: Any, new: Any, name: str = "") -> tuple[list[str], list[str]]:
    """(["batch 128 -> 64", ...], ["model.heads = 2", ...]): what differs, and what `old` lacks."""
    if not (isinstance(old, dict) and isinstance(new, dict)):
        same = json.dumps(old) == json.dumps(new)
        return ([] if same else [f"{name} {json.dumps(old)} -> {json.dumps(new)}"]), []
    changes, notes = [], []
    for key in {**old, **new}:
        inner = f"{name}.{key}" if name else key
        if key not in old:
            notes.append(f"{inner} = {json.dumps(new[key])}")
        elif key not in new:
            changes.append(f"{inner} {json.dumps(old[key])} -> absent")
        else:
            more, others = _compare(old[key], new[key], inner)
            changes += more
            notes += others
    return changes, notes


# --- how far it came


class Checkpoints:
    """The checkpoints of a run: written in the background, the newest `keep` and the best kept.

    The best has the lowest `eval_loss` among those saved with metrics. A context manager, which
    closes them without hiding why the block ended.
    """

    def __init__(self, workdir: str | os.PathLike, keep: int = 2):
        self.directory = Path(workdir).absolute() / CHECKPOINTS
        best = BestN(
            get_metric_fn=_badness, reverse=True, n=1, keep_checkpoints_without_metrics=False
        )
        self._manager = _manager(
            self.directory,
            preservation_policy=AnyPreservationPolicy([LatestN(keep), best]),
            cleanup_tmp_directories=True,
        )

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(self, kind: type[BaseException] | None, *_) -> None:
        try:
            self.close()
        except CheckpointError as error:
            if kind is None:
                raise
            print(f"warning: {error}", file=sys.stderr)

    @property
    def latest_step(self) -> int | None:
        """The newest step that is wholly written, or None."""
        return max(_finished_steps(self.directory), default=None)

    def save(
        self,
        step: int,
        state: TrainState,
        info: dict[str, Any],
        metrics: dict[str, float] | None = None,
    ) -> None:
        """Copies the state and returns; it is written in the background (see `wait`).

        Raises:
            CheckpointError: this or an earlier checkpoint could not be written, as when no space
                is left. Those already written stay as they are.
        """
        check_space(self.directory, state)
        items = _items(state)
        info = {**info, _CHECKSUMS: {item: _checksum(tree) for item, tree in items.items()}}
        saved = {item: ocp.args.StandardSave(tree) for item, tree in items.items()}
        args = ocp.args.Composite(info=ocp.args.JsonSave(info), **saved)
        try:
            self._manager.save(step, args=args, metrics=metrics)
        except Exception as error:
            raise self._unwritten(error) from error

    def wait(self) -> None:
        """Returns once everything saved is on disk; raises CheckpointError if it cannot be."""
        try:
            self._manager.wait_until_finished()
        except Exception as error:
            raise self._unwritten(error) from error

    def inspect(self, target: TrainState, step: int) -> dict[str, Any]:
        """Reads the `info` of a step, and checks the shapes of its state, but not its arrays.

        Raises:
            CheckpointError: the checkpoint is of another model, or damaged.
        """
        info = self._read(_inspect, target, step)
        info.pop(_CHECKSUMS, None)
        return info

    def restore(self, target: TrainState, step: int) -> TrainState:
        """Reads the state of a step, laid out as the abstract `target` says.

        Raises:
            CheckpointError: the checkpoint is of another model, or damaged.
        """
        return self._read(_restore, target, step)

    def close(self) -> None:
        """Ends the background work; what is still being written is finished first.

        Raises:
            CheckpointError: it could not be written.
        """
        try:
            self._manager.close()
        except Exception as error:
            raise self._unwritten(error) from error

    def _read(self, read: Callable, target: TrainState, step: int) -> Any:
        try:
            return read(self._manager, target, step)
        except _Different as error:
            raise CheckpointError(
                f"the checkpoint of step {step} in {self.directory} is of another model: {error};"
                " continue it with the settings and code that made it, or choose another workdir"
            ) from None
        except _MEMORY_ERRORS:
            raise
        except Exception as error:
            raise self._damaged(target, step, error) from error

    def _damaged(self, target: TrainState, step: int, cause: Exception) -> CheckpointError:
        """Says which checkpoint is damaged and which older one is not, having read it."""
        advice = "no older checkpoint can be read either, so begin again in a new workdir"
        for older in sorted((s for s in self._manager.all_steps() if s < step), reverse=True):
            try:
                _restore(self._manager, target, older)
            except Exception:  # damaged as well
                continue
            advice = (
                f"the last good one is step {older}; remove {self.directory / str(step)} to"
                " continue from there"
            )
            break
        return CheckpointError(
            f"the checkpoint of step {step} in {self.directory} is damaged ({_first_line(cause)}):"
            f" {advice}"
        )

    def _unwritten(self, error: Exception) -> CheckpointError:
        last = self.latest_step
        kept = "none was written before" if last is None else f"that of step {last} is unharmed"
        return _said_plainly(
            error, f"a checkpoint could not be written to {self.directory}; {kept}"
        )


def latest_step(workdir: str | os.PathLike) -> int:
    """The last step that a run saved.

    Raises:
        CheckpointError: the directory is not a run's, or nothing has been saved yet.
    """
    read_config(workdir)
    return _last(Path(workdir))


def restore_params(
    workdir: str | os.PathLike, target: Params | None = None, step: int | None = None
) -> Params:
    """A run's parameters alone (their average where the run kept one), to use or to start from.

    Args:
        target: a tree of `jax.ShapeDtypeStruct` with the shardings wanted; by default everything
            is read as it was saved, onto the first device.
        step: which checkpoint; by default the last.

    Raises:
        CheckpointError: not a run, no such checkpoint, one of another model, or a damaged one.
    """
    read_config(workdir)
    step = _last(Path(workdir)) if step is None else step
    directory = Path(workdir).absolute() / CHECKPOINTS
    if step not in (steps := _finished_steps(directory)):
        raise CheckpointError(f"{workdir} has no checkpoint of step {step}, only of {steps}")
    # Every process reads by itself, whenever it likes: it may want another run's parameters.
    alone = ocp.options.MultiprocessingOptions(
        primary_host=jax.process_index(),
        active_processes={jax.process_index()},
        barrier_sync_key_prefix=f"process-{jax.process_index()}",
    )
    options = {"read_only": True, "save_interval_steps": 0, "create": False}
    with _manager(directory, alone, **options) as manager:
        try:
            item = "ema" if (directory / str(step) / "ema").exists() else "params"
            saved = manager.item_metadata(step)[item].tree
            if target is None:
                here = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
                target = jax.tree.map(
                    lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=here), saved
                )
            _check_same(saved, target)
            args = {item: ocp.args.StandardRestore(target), "info": ocp.args.JsonRestore()}
            found = manager.restore(step, args=ocp.args.Composite(**args))
            _check_unharmed(found.info, item, found[item])
            return found[item]
        except _Different as error:
            raise CheckpointError(
                f"the checkpoint of step {step} in {workdir} is of another model: {error}; use the"
                f" model that its {CONFIG} describes"
            ) from None
        except _MEMORY_ERRORS:
            raise
        except Exception as error:
            others = [other for other in steps if other != step]
            advice = f"choose another step ({others})" if others else "it is the only one"
            raise CheckpointError(
                f"the checkpoint of step {step} in {workdir} is damaged ({_first_line(error)}):"
                f" {advice}"
            ) from error


def check_space(directory: Path, state: Any) -> None:
    """Raises CheckpointError if the disk has no room for one more checkpoint of `state`."""
    needed = sum(_bytes(leaf) for leaf in jax.tree.leaves(state))
    existing = next(p for p in (directory, *directory.parents) if p.exists())
    free = shutil.disk_usage(existing).free
    if free < needed:
        raise CheckpointError(
            f"no space for a checkpoint in {directory}: it takes {needed / 1e6:,.0f} MB and"
            f" {free / 1e6:,.0f} MB are free; make room (or keep fewer checkpoints) and run again"
        )


class _Different(Exception):
    """The saved tree is not the one asked for."""


_MEMORY_ERRORS = (MemoryError, jax.errors.JaxRuntimeError)  # the device's fault, not the file's


_TOGETHER = ocp.options.MultiprocessingOptions()


def _manager(
    directory: Path,
    processes: ocp.options.MultiprocessingOptions = _TOGETHER,
    **options: Any,
) -> ocp.CheckpointManager:
    logging.getLogger("absl").addFilter(_not_an_error_of_orbax)
    # Named up front, so that the shapes in a checkpoint can be read before its arrays.
    items = ("params", "training", *_OPTIONAL)
    arrays = {
        item: ocp.StandardCheckpointHandler(multiprocessing_options=processes) for item in items
    }
    return ocp.CheckpointManager(
        directory,
        options=ocp.CheckpointManagerOptions(multiprocessing_options=processes, **options),
        item_handlers={**arrays, "info": ocp.JsonCheckpointHandler()},
    )


def _not_an_error_of_orbax(record: logging.LogRecord) -> bool:
    """Drops what Orbax logs about exceptions it also raises, which we report, and about reading."""
    silent = record.levelno >= logging.ERROR or "is read only" in str(record.msg)
    return not (silent and "orbax" in record.pathname)


def _inspect(manager: ocp.CheckpointManager, target: TrainState, step: int) -> dict[str, Any]:
    # The smallest item first: it says what the others should be.
    info = manager.restore(step, args=ocp.args.Composite(info=ocp.args.JsonRestore())).info
    saved = manager.item_metadata(step)
    for item, tree in _items(target).items():
        _check_same(saved[item].tree, tree)
    return info


def _restore(manager: ocp.CheckpointManager, target: TrainState, step: int) -> TrainState:
    info = _inspect(manager, target, step)
    args = {item: ocp.args.StandardRestore(tree) for item, tree in _items(target).items()}
    items = manager.restore(step, args=ocp.args.Composite(**args))
    for item in args:
        _check_unharmed(info, item, items[item])
    parts = {"params": items.params} | {name: items.get(name) for name in _OPTIONAL}
    return TrainState(**items.training, **parts)


_OPTIONAL = ("ema", "compression")  # parts of a state that may be None


def _items(state: TrainState) -> dict[str, Any]:
    """The parts of a state that are kept as items of their own."""
    parts = state._asdict()
    optional = {name: parts.pop(name) for name in _OPTIONAL}
    items = {"params": parts.pop("params"), "training": parts}
    return items | {name: tree for name, tree in optional.items() if tree is not None}


_CHECKSUMS = "checksums"  # in a checkpoint's `info`


def _check_unharmed(info: dict[str, Any], item: str, tree: Any) -> None:
    """Raises ValueError if the arrays of an item are not those that were saved."""
    saved = info.get(_CHECKSUMS, {}).get(item)  # older versions of the code wrote none
    if saved is not None and saved != _checksum(tree):
        raise ValueError(f"the numbers in {item} are not those that were saved")


def _checksum(tree: Any) -> int:
    """The sum of all arrays' words modulo 2**32, in whatever way they are divided over devices."""
    host, device = [], []
    for leaf in jax.tree.leaves(tree):
        (host if isinstance(leaf, np.ndarray) else device).append(leaf)
    total = sum(int(_words(leaf).sum(dtype=np.uint64)) for leaf in host)
    if device:
        total += int(np.asarray(_sum_of_words(device).addressable_data(0)))
    return total % 2**32


def _words(array: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(array).view(_word(array.dtype))


@jax.jit
def _sum_of_words(arrays: list[jax.Array]) -> jax.Array:
    total = jnp.uint32(0)
    for array in arrays:
        if jnp.issubdtype(array.dtype, jax.dtypes.prng_key):
            array = jax.random.key_data(array)
        words = jax.lax.bitcast_convert_type(array, _word(array.dtype))
        total += words.astype(jnp.uint32).sum(dtype=jnp.uint32)
    return total


def _word(dtype: np.dtype) -> np.dtype:
    """Unsigned numbers of at most 32 bits that the bits of this type are, one or more."""
    return np.dtype(f"uint{8 * min(dtype.itemsize, 4)}")


def differences(given: Any, wanted: Any) -> str:
    """The first arrays of two trees that differ in name or shape, in words; "" if none do."""
    given, wanted = _shapes(given), _shapes(wanted)
    found = [
        f"{name} is {_shape(given.get(name))} there and {_shape(wanted.get(name))} here"
        for name in sorted({**given, **wanted})
        if given.get(name) != wanted.get(name)
    ]
    return ", ".join(found[:3]) + (f" (and {len(found) - 3} more)" if len(found) > 3 else "")


def _check_same(saved: Any, wanted: Any) -> None:
    if text := differences(saved, wanted):
        raise _Different(text)


def _shapes(tree: Any) -> dict[str, tuple[int, ...]]:
    return {
        leaf_name(path): tuple(leaf.shape)
        for path, leaf in jax.tree_util.tree_leaves_with_path(tree)
        if leaf_name(path) != "rng"  # a key has another shape on disk
    }


def _shape(shape: tuple[int, ...] | None) -> str:
    return "absent" if shape is None else str(list(shape))


def leaf_name(path: tuple) -> str:
    """ "encoder.layers.query" for the path of a leaf in a tree of dicts, tuples and NamedTuples."""
    return ".".join(
        str(getattr(key, "key", getattr(key, "name", getattr(key, "idx", key)))) for key in path
    )


def _bytes(leaf: Any) -> int:
    return math.prod(leaf.shape) * getattr(leaf.dtype, "itemsize", 8)


def _badness(metrics: Mapping[str, float]) -> float:
    loss = metrics["eval_loss"]
    return math.inf if loss is None or math.isnan(loss) else loss


def _finished_steps(directory: Path) -> list[int]:
    """Steps whose directories have been renamed to their final name, that is, are whole."""
    return sorted(int(p.name) for p in directory.glob("*") if p.name.isdigit())


def _last(workdir: Path) -> int:
    steps = _finished_steps(workdir / CHECKPOINTS)
    if not steps:
        raise CheckpointError(
            f"the run in {workdir} has saved no checkpoint yet: let it reach its first, or name"
            " another workdir"
        )
    return steps[-1]


def _said_plainly(error: Exception, what: str) -> CheckpointError:
    full = getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT)
    if full or "no space left" in str(error).lower() or "quota exceeded" in str(error).lower():
        return CheckpointError(f"no space is left: {what}; make room and run again")
    return CheckpointError(f"{what} ({_first_line(error)})")


def _first_line(error: Exception) -> str:
    text = str(error).strip().splitlines()[0] if str(error).strip() else repr(error)
    return re.split(r" \[tensorstore_spec|\. See full TensorStore", text)[0][:300]

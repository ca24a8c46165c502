"""Several processes as one run: how they start, wait for each other and agree.

Each process runs the same command and has devices of its own. They talk through the key-value store
of JAX's coordination service, which the first of them keeps; arrays travel between the devices.
"""

import contextlib
import dataclasses
import glob
import importlib.util
import itertools
import json
import os
import re
import socket
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
from jax.sharding import NamedSharding, PartitionSpec

LOCAL_SIZE, LOCAL_RANK = "OMPI_COMM_WORLD_LOCAL_SIZE", "OMPI_COMM_WORLD_LOCAL_RANK"
_uses = itertools.count()  # makes every key of a run new; processes count alike


@dataclasses.dataclass(frozen=True)
class Distributed:
    """How the processes of a run find each other. TPU pods, SLURM and Open MPI are recognised; give
    these only where nothing else says it."""

    coordinator: str | None = None
    """HOST:PORT of the first process, the same for all of them."""
    processes: int | None = None
    """How many there are."""
    process: int | None = None
    """Which of them this is, from 0."""
    timeout: int = 300
    """Seconds to wait for a process before giving up."""

    def __post_init__(self):
        given = [name for name in ("coordinator", "processes", "process") if self._has(name)]
        if given and len(given) < 3:
            raise ValueError(
                f"of the processes only {' and '.join(given)} is given: it takes"
                " --distributed.coordinator HOST:PORT --distributed.processes N"
                " --distributed.process I together"
            )
        if given and not 0 <= self.process < self.processes:
            raise ValueError(
                f"--distributed.process is {self.process}, not between 0 and"
                f" {self.processes - 1} (--distributed.processes {self.processes})"
            )
        if given and not re.fullmatch(r".+:\d+", self.coordinator):
            raise ValueError(
                f"--distributed.coordinator is {self.coordinator!r}, not HOST:PORT as in"
                " 10.0.0.1:8476"
            )
        if self.timeout < 1:
            raise ValueError(f"--distributed.timeout is {self.timeout}, and must be at least 1")

    def _has(self, name: str) -> bool:
        return getattr(self, name) is not None


class HostMissing(OSError):
    """A process did not come in time; the message names it."""


def start(options: Distributed) -> str:
    """Joins the processes of this run, if it has several; to be called before a device is used.

    Returns what happened, in words.

    Raises:
        HostMissing: a process, or the coordinator, did not come within the timeout.
    """
    if jax.distributed.is_initialized():
        return _joined()
    where = {}  # jax.distributed knows many places itself
    if options.coordinator is None:
        options = launched_by_open_mpi(options, os.environ)
        if options.coordinator is not None and int(os.environ.get(LOCAL_SIZE, 1)) > 1:
            where["local_device_ids"] = [int(os.environ[LOCAL_RANK])]  # as SLURM's tasks have them
    if options.coordinator is not None:
        if options.processes == 1:
            return ""
        roll_call(options)
        where |= {
            "coordinator_address": options.coordinator,
            "num_processes": options.processes,
            "process_id": options.process,
        }
    elif not (tasks_in_environment() or has_tpus()):
        return ""
    # It would take SIGTERM for itself, which would then end nothing before the first step.
    jax.config.update("jax_enable_preemption_service", False)
    try:
        jax.distributed.initialize(
            **where,
            initialization_timeout=options.timeout,
            # All is saved by then; if one is missing, it will not come.
            shutdown_timeout_seconds=15,
        )
    except ValueError:  # TPUs that JAX knows no cluster of, as in Colab
        if where or tasks_in_environment():
            raise
        return ""
    return _joined()


def _joined() -> str:
    return (
        f"process {jax.process_index()} of {jax.process_count()} on {socket.gethostname()}, with"
        f" {jax.local_device_count()} of {jax.device_count()} devices"
    )


def launched_by_open_mpi(options: Distributed, variables: Mapping[str, str]) -> Distributed:
    """The options as Open MPI 5 and later tell them by environment variables, if they do.

    JAX knows earlier ones by itself. The name of a job is that of the host of mpirun, where process
    0 is expected, and mpirun's number, from which a port is made that another job will not have.
    """
    job = re.fullmatch(r"prterun-(.+)-(\d+)@\d+", variables.get("PMIX_NAMESPACE", ""))
    if job is None or "OMPI_COMM_WORLD_RANK" not in variables:
        return options
    host, number = job.groups()
    return dataclasses.replace(
        options,
        coordinator=f"{host}:{61_440 + int(number) % 4_096}",
        processes=int(variables["OMPI_COMM_WORLD_SIZE"]),
        process=int(variables["OMPI_COMM_WORLD_RANK"]),
    )


def tasks_in_environment() -> bool:
    """Whether this is one of several tasks of SLURM or Open MPI."""
    return any(
        rank in os.environ and int(os.environ.get(count, 1)) > 1
        for count, rank in (
            ("SLURM_NTASKS", "SLURM_PROCID"),  # salloc sets the first too; only srun's tasks both
            ("OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_RANK"),
        )
    )


def has_tpus() -> bool:
    """Whether this host has TPUs that JAX would use. It may then be one of many, which only its
    metadata server knows; JAX asks it, and nothing else is asked anything."""
    if os.environ.get("JAX_PLATFORMS", "tpu").split(",")[0] != "tpu":
        return False
    chips = glob.glob("/dev/accel*") + glob.glob("/dev/vfio/[0-9]*")
    return bool(chips) and importlib.util.find_spec("libtpu") is not None


# --- before jax.distributed, whose own waiting ends the process without saying who is missing


def roll_call(options: Distributed) -> None:
    """The first process waits for the others at the coordinator's address, and they for it."""
    host, _, port = options.coordinator.rpartition(":")
    if options.process:
        _report(host, int(port), options)
    else:
        _receive(int(port), options)


def _receive(port: int, options: Distributed) -> None:
    deadline = time.monotonic() + options.timeout
    arrived: dict[int, socket.socket] = {}
    with contextlib.ExitStack() as stack:
        server = stack.enter_context(socket.create_server(("", port)))
        while len(arrived) < options.processes - 1:
            server.settimeout(max(0.01, deadline - time.monotonic()))
            try:
                connection = stack.enter_context(server.accept()[0])
                connection.settimeout(5)
                index, processes = json.loads(connection.recv(100))
            except TimeoutError:
                if time.monotonic() < deadline:
                    continue
                missing = sorted(set(range(1, options.processes)) - set(arrived))
                raise HostMissing(
                    f"of {options.processes} processes, {_listed(missing)} did not come to"
                    f" {options.coordinator} within {options.timeout} s: start the same command"
                    " there with --distributed.process of its own, or see why it cannot reach this"
                    " host"
                ) from None
            except (OSError, ValueError):  # not one of ours
                continue
            if processes != options.processes or index in arrived:
                connection.sendall(b"no")
                continue
            arrived[index] = connection
        for connection in arrived.values():
            connection.sendall(b"go")


def _report(host: str, port: int, options: Distributed) -> None:
    deadline = time.monotonic() + options.timeout
    while (left := deadline - time.monotonic()) > 0:
        with contextlib.suppress(ConnectionError, TimeoutError, socket.gaierror):
            with socket.create_connection((host, port), timeout=left) as connection:
                connection.sendall(json.dumps([options.process, options.processes]).encode())
                connection.settimeout(max(0.01, deadline - time.monotonic()))
                answer = connection.recv(2)
            if answer == b"go":
                return
            if answer == b"no":
                raise ValueError(
                    f"the coordinator at {options.coordinator} waits for another number of"
                    f" processes than {options.processes}, or has a process {options.process}"
                    " already: give all of them the same --distributed.processes and each its own"
                    " --distributed.process"
                )
        time.sleep(0.05)
    raise HostMissing(
        f"no coordinator answered at {options.coordinator} within {options.timeout} s, or it still"
        " waits for other processes: start process 0 there, and see that this host can reach it"
    )


def _listed(indices: list[int]) -> str:
    text = ", ".join(map(str, indices[:8])) + (" and more" if len(indices) > 8 else "")
    return f"process{'es' if len(indices) > 1 else ''} {text}"


# --- while it runs; every process must make these calls in the same order


def _client():
    # The store has no public name; Orbax takes it from here too.
    from jax._src import distributed

    return distributed.global_state.client


def barrier(name: str, timeout: int = 300) -> None:
    """Waits for all processes.

    Raises:
        HostMissing: some did not come within `timeout` seconds.
    """
    if jax.process_count() == 1:
        return
    try:
        _client().wait_at_barrier(f"lmjax/{name}/{next(_uses)}", timeout * 1_000)
    except jax.errors.JaxRuntimeError as error:
        names = re.search(r"timed out task names:\n(.*)", str(error), re.DOTALL)
        missing = sorted(
            {int(i) for i in re.findall(r"\d+", names[1].split("\n\n")[0])} if names else []
        )
        raise HostMissing(
            f"{_listed(missing) if missing else 'a process'} did not come to {name!r} within"
            f" {timeout} s: its log says why, and the same command continues the run"
        ) from error


def gather(name: str, value: Any, timeout: int = 300) -> list[Any]:
    """The JSON value of each process, in their order.

    Raises:
        HostMissing: some did not come within `timeout` seconds.
    """
    if jax.process_count() == 1:
        return [value]
    prefix = f"lmjax/{name}/{next(_uses)}"
    client = _client()
    client.key_value_set(f"{prefix}/{jax.process_index()}", json.dumps(value))
    barrier(name, timeout)
    found = dict(client.key_value_dir_get(prefix))
    values = {int(key.rpartition("/")[2]): json.loads(text) for key, text in found.items()}
    barrier(name, timeout)  # before anyone removes what others still read
    client.key_value_delete(f"{prefix}/{jax.process_index()}")
    return [values[index] for index in range(jax.process_count())]


def agree(name: str, value: Any, compare: Callable[[Any, Any], list[str]], timeout: int = 300):
    """Returns if every process has the same JSON value.

    Raises:
        ValueError: some do not; `compare(first's, other's)` says what differs.
    """
    values = gather(name, value, timeout)
    for index, other in enumerate(values):
        if other != values[0]:
            changes = ", ".join(compare(values[0], other)[:5])
            raise ValueError(
                f"process {index} has another {name} than process 0 ({changes}): start all of them"
                " with the same command on the same data"
            )


@contextlib.contextmanager
def first_process_first(name: str, timeout: int = 300) -> Iterator[None]:
    """The block runs in the first process, and then in the others; if it fails there, everywhere.

    Raises:
        ValueError: in the other processes, with the sentence that the first one failed with.
    """
    if jax.process_index() == 0:
        error = None
        try:
            yield
        except BaseException as raised:
            error = str(raised) or type(raised).__name__
            raise
        finally:
            gather(name, error, timeout)
    else:
        error = gather(name, None, timeout)[0]
        if error is not None:
            raise ValueError(f"process 0 failed: {error}")
        yield


def on_first_process(tree: Any) -> Any:
    """Arrays of all processes' devices, each whole on one device of the first process, and None in
    the others; of a single process as they are."""
    if jax.process_count() == 1:
        return tree

    def whole(x: jax.Array) -> jax.Array | None:
        everywhere = NamedSharding(x.sharding.mesh, PartitionSpec())
        x = jax.jit(lambda x: x, out_shardings=everywhere)(x)
        return x.addressable_data(0) if jax.process_index() == 0 else None

    return jax.tree.map(whole, tree)


class StopTogether:
    """Lets a request to stop, made in any process, end all of them after the same step."""

    # Processes are never more than a step apart: each waits for the outcome of the last step but
    # one, which takes them all. So a step this far ahead has begun nowhere.
    AHEAD = 3

    def __init__(self):
        self._key = f"lmjax/stop/{next(_uses)}"
        self._asked, self._at = False, None

    def __call__(self, step: int, requested: bool) -> bool:
        """Whether to stop after `step`, given whether this process was asked to."""
        if jax.process_count() == 1:
            return requested
        client = _client()
        if requested and not self._asked:
            self._asked = True
            client.key_value_set(f"{self._key}/asked", "1", allow_overwrite=True)
        if self._at is None and jax.process_index() == 0 and self._read("asked"):
            client.key_value_set(f"{self._key}/at", str(step + self.AHEAD))
        if self._at is None and (at := self._read("at")):
            self._at = int(at)
        return self._at is not None and step >= self._at

    def _read(self, name: str) -> str | None:
        try:
            return _client().key_value_try_get(f"{self._key}/{name}")
        except jax.errors.JaxRuntimeError as error:
            if "NOT_FOUND" not in str(error):
                raise
            return None

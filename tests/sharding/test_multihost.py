"""Real processes over loopback."""

import json
import socket
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest

from lmjax.sharding import multihost
from lmjax.sharding.multihost import (
    Distributed,
    launched_by_open_mpi,
    tasks_in_environment,
)
from tests.sharding.test_elastic import ROOT, environment, losses, run

TASKS = ("SLURM_NTASKS", "SLURM_PROCID", "OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_RANK")


def free_port():
    with socket.create_server(("127.0.0.1", 0)) as server:
        return server.getsockname()[1]


def processes(workdir, steps, strategy, count, devices, mesh="{}", fates=None, timeout=60):
    """Runs `count` processes to their end: [(status, what it printed, its errors)]."""
    coordinator = f"127.0.0.1:{free_port()}"
    running = []
    for index, fate in enumerate(fates or [""] * count):
        if fate == "absent":
            continue
        where = {"coordinator": coordinator, "processes": count, "process": index}
        arguments = [str(workdir), str(steps), strategy, mesh]
        arguments += [json.dumps({**where, "timeout": timeout}), fate]
        command = [sys.executable, "-m", "tests.sharding.run", *arguments]
        running.append(
            subprocess.Popen(
                command, cwd=ROOT, env=environment(devices), text=True,
                stdout=subprocess.PIPE, stderr=subprocess.PIPE,
            )
        )  # fmt: skip
    outputs = [process.communicate() for process in running]
    return [(p.returncode, *output) for p, output in zip(running, outputs, strict=True)]


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    workdir = tmp_path_factory.mktemp("undisturbed")
    run(workdir, 6, 1, "dp")
    return losses(workdir)


def test_processes_train_as_one_does(tmp_path, undisturbed):
    """Two with two devices, of one model; then four; then one goes on alone."""
    results = processes(tmp_path, 2, "fsdp_tp", 2, 2, '{"fsdp": 2, "model": 2}')
    assert [status for status, _, _ in results] == [0, 0], results
    assert "process 1 of 2" in results[1][1] and "with 2 of 4 devices" in results[1][1]
    assert "mesh: data 1 x fsdp 2 x model 2" in results[0][1]
    assert "mesh" not in results[1][1]  # one writer
    results = processes(tmp_path, 4, "fsdp", 4, 1)
    assert [status for status, _, _ in results] == [0] * 4, results
    run(tmp_path, 6, 1, "dp")
    np.testing.assert_allclose(losses(tmp_path), undisturbed, rtol=2e-5)


def test_processes_may_share_rows(tmp_path, undisturbed):
    """Products divided over processes: both read the same rows."""
    results = processes(tmp_path, 3, "tp", 2, 1, '{"model": 2}')
    assert [status for status, _, _ in results] == [0, 0], results
    np.testing.assert_allclose(losses(tmp_path), undisturbed[:3], rtol=2e-5)


def test_a_signal_to_one_stops_all_at_the_same_step(tmp_path, undisturbed):
    results = processes(tmp_path, 500, "dp", 2, 1, fates=["", "stop"])
    assert [status for status, _, _ in results] == [0, 0], results
    done = losses(tmp_path)
    assert 3 <= len(done) < 20
    assert f"Stopped at step {len(done)} of 500" in results[0][1]
    np.testing.assert_allclose(done[:6], undisturbed[: len(done)], rtol=2e-5)


def test_processes_that_disagree_refuse_to_start(tmp_path):
    results = processes(tmp_path, 2, "dp", 2, 1, fates=["", "other"])
    for status, _, errors in results:
        assert status == 1
        assert "process 1 has another run than process 0 (model.width 128 -> 256)" in errors
    assert not (tmp_path / "config.json").exists()


def test_a_workdir_that_is_not_shared_is_refused(tmp_path):
    results = processes(tmp_path / "w", 2, "dp", 2, 1, fates=["", "elsewhere"])
    for status, _, errors in results:
        assert status == 1
        assert "process 1 does not see what process 0 writes in" in errors
    assert not (tmp_path / "w" / "checkpoints").exists()


def test_a_process_that_does_not_come_is_named(tmp_path):
    results = processes(tmp_path, 2, "dp", 3, 1, fates=["", "", "absent"], timeout=8)
    assert [status for status, _, _ in results] == [1, 1]
    assert "of 3 processes, process 2 did not come to 127.0.0.1" in results[0][2]
    assert "no coordinator answered" in results[1][2] and "still waits" in results[1][2]


WAITS = """
import sys
from lmjax import command_line
from lmjax.sharding.multihost import Distributed, barrier, gather, start
coordinator, index = sys.argv[1], int(sys.argv[2])
start(Distributed(coordinator, 2, index, 60))
assert gather("names", f"host {index}") == ["host 0", "host 1"]
barrier("everyone is here")
if index:
    sys.stdin.read()  # until the test ends
else:
    command_line.run(lambda: barrier("the second meeting", timeout=2))
"""


def test_a_process_that_is_late_for_a_barrier_is_named():
    coordinator = f"127.0.0.1:{free_port()}"
    first, second = (
        subprocess.Popen(
            [sys.executable, "-c", WAITS, coordinator, str(index)], cwd=ROOT, text=True,
            env=environment(1), stdin=subprocess.PIPE, stderr=subprocess.PIPE,
        )
        for index in range(2)
    )  # fmt: skip
    _, errors = first.communicate()
    second.kill()
    second.communicate()
    assert first.returncode != 0
    assert "process 1 did not come to 'the second meeting' within 2 s" in errors


def test_tasks_of_slurm_find_each_other(tmp_path, undisturbed):
    job = {"SLURM_JOB_ID": str(free_port()), "SLURM_STEP_NODELIST": "localhost"}
    running = [
        subprocess.Popen(
            [sys.executable, "-m", "tests.sharding.run", str(tmp_path), "2", "fsdp"], cwd=ROOT,
            env={
                **environment(1), **job, "SLURM_NTASKS": "2", "SLURM_PROCID": str(index),
                "SLURM_LOCALID": str(index),
            },
        )
        for index in range(2)
    ]  # fmt: skip
    assert [process.wait() for process in running] == [0, 0]
    np.testing.assert_allclose(losses(tmp_path), undisturbed[:2], rtol=2e-5)


def test_processes_of_open_mpi_find_each_other(tmp_path, undisturbed):
    command = [Path(sys.executable).with_name("mpirun"), "--allow-run-as-root", "--oversubscribe"]
    command += ["-n", "2", sys.executable, "-m", "tests.sharding.run", tmp_path, "2", "fsdp"]
    done = subprocess.run(
        command, cwd=ROOT, env=environment(1), capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert "process 1 of 2" in done.stdout
    np.testing.assert_allclose(losses(tmp_path), undisturbed[:2], rtol=2e-5)


def test_a_job_of_open_mpi_names_its_coordinator():
    rank = {"OMPI_COMM_WORLD_SIZE": "4", "OMPI_COMM_WORLD_RANK": "3"}
    found = launched_by_open_mpi(
        Distributed(timeout=9), {"PMIX_NAMESPACE": "prterun-node-17-8193@1", **rank}
    )
    assert found == Distributed("node-17:61441", processes=4, process=3, timeout=9)
    for variables in ({}, rank, {"PMIX_NAMESPACE": "prterun-a-1@1"}):
        assert launched_by_open_mpi(Distributed(), variables) == Distributed()


def test_tpus_without_a_cluster_are_one_process(monkeypatch):
    def refuse(**_):
        raise ValueError("coordinator_address should be defined.")  # as jax.distributed does

    for name in TASKS:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(multihost, "has_tpus", lambda: True)
    monkeypatch.setattr(jax.distributed, "initialize", refuse)
    assert multihost.start(Distributed()) == ""
    monkeypatch.setenv("SLURM_NTASKS", "2")
    monkeypatch.setenv("SLURM_PROCID", "1")
    try:
        with pytest.raises(ValueError, match="should be defined"):
            multihost.start(Distributed())
    finally:
        jax.config.update("jax_enable_preemption_service", True)


def test_nobody_answers(tmp_path):
    ((status, _, errors),) = processes(tmp_path, 2, "dp", 2, 1, fates=["absent", ""], timeout=2)
    assert status == 1
    assert "no coordinator answered at 127.0.0.1" in errors and "within 2 s" in errors


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"processes": 2}, "only processes is given: it takes --distributed.coordinator"),
        ({"coordinator": "a:1", "processes": 2, "process": 2}, "is 2, not between 0 and 1"),
        ({"coordinator": "a", "processes": 2, "process": 1}, "'a', not HOST:PORT"),
        ({"timeout": 0}, "must be at least 1"),
    ],
)
def test_options_that_cannot_be(options, message):
    with pytest.raises(ValueError, match=message):
        Distributed(**options)


@pytest.mark.parametrize(
    ("variables", "several"),
    [
        ({}, False),
        ({"SLURM_NTASKS": "4"}, False),  # salloc, not srun
        ({"SLURM_NTASKS": "1", "SLURM_PROCID": "0"}, False),
        ({"SLURM_NTASKS": "4", "SLURM_PROCID": "2"}, True),
        ({"OMPI_COMM_WORLD_SIZE": "2", "OMPI_COMM_WORLD_RANK": "0"}, True),
    ],
)
def test_tasks_of_a_cluster_are_recognised(variables, several, monkeypatch):
    for name in TASKS:
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert tasks_in_environment() is several

"""A checkpoint outlives the mesh that wrote it."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from lmjax.training.reporting import METRICS, read_metrics

ROOT = Path(__file__).parents[2]


def environment(devices):
    return {
        **os.environ,
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": f"--xla_force_host_platform_device_count={devices}",
    }


def run(workdir, steps, devices, strategy, mesh="{}", fate="", fails=False):
    settings = [str(workdir), str(steps), strategy, mesh, "{}", fate]
    done = subprocess.run(
        [sys.executable, "-m", "tests.sharding.run", *settings],
        cwd=ROOT,
        env=environment(devices),
        capture_output=True,
        text=True,
    )
    assert (done.returncode != 0) == fails, done.stderr[-2000:]
    return done.stderr if fails else done.stdout


def losses(workdir):
    records = read_metrics(Path(workdir) / METRICS)
    return [record["loss"] for record in records if "loss" in record]


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    """The losses of eight steps on one device."""
    workdir = tmp_path_factory.mktemp("undisturbed")
    run(workdir, 8, 1, "dp")
    return losses(workdir)


def test_a_run_goes_on_with_other_devices_and_strategies(tmp_path, undisturbed):
    printed = run(tmp_path, 2, 8, "fsdp_tp", '{"fsdp": 4, "model": 2}')
    assert "mesh: data 1 x fsdp 4 x model 2" in printed
    printed = run(tmp_path, 4, 4, "fsdp")
    assert "mesh: data 1 x fsdp 4 x model 1" in printed
    run(tmp_path, 6, 1, "auto")
    run(tmp_path, 8, 2, "pmap")
    np.testing.assert_allclose(losses(tmp_path), undisturbed, rtol=2e-5)
    assert len(set(undisturbed)) == 8  # it does learn from step to step


def test_a_compressed_run_goes_on_with_the_same_mesh_alone(tmp_path):
    settings = {"devices": 4, "strategy": "fsdp", "mesh": '{"fsdp": 2}', "fate": "compressed"}
    run(tmp_path / "whole", 4, **settings)
    run(tmp_path / "parts", 2, **settings)
    run(tmp_path / "parts", 4, **settings)
    assert losses(tmp_path / "parts") == losses(tmp_path / "whole")
    other = {**settings, "devices": 8, "mesh": '{"fsdp": 4}'}  # as many replicas
    failed = run(tmp_path / "parts", 6, **other, fails=True)
    assert "compression.mesh.fsdp 2 -> 4" in failed and "Traceback" not in failed

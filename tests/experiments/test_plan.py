"""Plans from the command line, each in a process of its own (they choose their devices)."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SLICE = ["--topology", "v5e:2x2", "--strategy", "fsdp_tp", "--mesh.model", "2"]


def plan(*arguments, check=True):
    ours = ("XLA_FLAGS", "JAX_PLATFORMS", "JAX_DISABLE_MOST_OPTIMIZATIONS")
    environment = {name: value for name, value in os.environ.items() if name not in ours}
    command = [sys.executable, "-m", "experiments.plan", *map(str, arguments)]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    if check:
        assert done.returncode == 0, done.stderr[-2000:]
    return done


def report(path, *arguments):
    printed = plan(*arguments, "--json", path).stdout
    return json.loads(path.read_text()), printed


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    return report(tmp_path_factory.mktemp("plan") / "plan.json", "t5_pretrain", *SLICE)


def test_a_plan_says_what_a_run_needs(small):
    found, printed = small
    assert found["devices"] == 4 and found["mesh"] == {"data": 1, "fsdp": 2, "model": 2}
    assert found["fits"] and found["parameters"] == 1_443_840
    assert found["parameter_bytes"] * 4 == pytest.approx(4 * found["parameters"], rel=0.01)
    assert 1.0 <= found["hardware_flops_per_step"] / found["model_flops_per_step"] < 1.1
    for axis in ("fsdp", "model"):
        assert any(axis in axes for axes in found["collective_bytes"].values()), axis
    assert found["step_seconds"] <= found["step_seconds_exposed"]
    assert 0 < found["utilization_exposed"] <= found["utilization"] < 0.9
    for words in ("Strategy fsdp_tp", "fits", "what binds", "days for 400 steps"):
        assert words in printed


def test_gpus_borrow_a_program(tmp_path, small):
    found, printed = report(
        tmp_path / "gpu.json",
        *("--topology", "h100:4", "--experiment", "t5_pretrain"),
        *SLICE[2:],
    )
    assert found["topology"] == "h100:4" and found["compiled_for"] == "v5p:2x2x1"
    assert found["model_flops_per_step"] == small[0]["model_flops_per_step"]
    assert "An estimate" in printed


def test_plans_are_ranked(tmp_path):
    found, printed = report(
        tmp_path / "sweep.json", "gpt2_pretrain", "--topology", "v5e:1x2", "--sweep",
        "--batch", "8", "--model.layers", "2",
        "--markdown", tmp_path / "best.md",
    )  # fmt: skip
    assert {"dp", "fsdp", "fsdp_tp"} == {one["strategy"] for one in found}
    middles = [one["step_seconds"] + one["step_seconds_exposed"] for one in found]
    assert middles == sorted(middles)
    *_, best = (tmp_path / "best.md").read_text().splitlines()
    assert best.startswith(f"|  | 2 x v5e:1x2 | {found[0]['plan']} | ")
    assert "collectives hidden / exposed" in printed


def test_devices_send_at_most_what_they_would_under_t5xs_rules(tmp_path, small):
    """Those divide activations by width, and parameters over all that the model axis leaves."""
    theirs, _ = report(
        tmp_path / "t5x.json", "t5_pretrain", *SLICE, "--mesh.fsdp", "2",
        "--mesh.activations", "width",
    )  # fmt: skip
    sent = [
        sum(sum(axes.values()) for axes in found["collective_bytes"].values())
        for found in (small[0], theirs)
    ]
    assert 0 < sent[0] < sent[1]


def test_a_decoder_is_planned_by_the_same_command(tmp_path):
    found, _ = report(tmp_path / "gpt2.json", "gpt2_pretrain", *SLICE)
    assert found["fits"] and found["mesh"] == {"data": 1, "fsdp": 2, "model": 2}
    assert 1.0 <= found["hardware_flops_per_step"] / found["model_flops_per_step"] < 1.1


def test_the_largest_model_on_a_pod_of_2048_cores(tmp_path):
    found, _ = report(
        tmp_path / "11b.json", "t5_pretrain", "--preset", "11b", "--model.dropout", "0",
        "--topology", "v3:32x32", "--strategy", "fsdp_tp", "--mesh.model", "8",
        "--execution.remat", "full",
    )  # fmt: skip
    assert found["devices"] == 2_048 and found["parameters"] == 11_307_321_344
    assert found["fits"] and found["bytes_per_device"] < 1.2e9


def test_compressed_gradients_are_planned(tmp_path):
    """PowerSGD sums matrices of `rows + columns` by the rank in place of a layer's kernels."""
    tiny = """dalle_train --model.text-vocab 64 --model.text-length 8 --model.image-vocab 32
    --model.grid 4 --model.layers 1 --model.width 64 --model.heads 4 --model.feed-forward 256
    --model.conv-extent 3 --data.vocab-size 64 --batch 4 --topology cpu:4 --strategy dp""".split()
    whole, _ = report(tmp_path / "whole.json", *tiny)
    small, printed = report(tmp_path / "small.json", *tiny, "--compress", "2")
    sent, less = (
        sum(axes["data"] for axes in found["collective_bytes"].values()) for found in (whole, small)
    )
    ring = 2 * 3 / 4 * 4  # bytes that each of four devices sends of a float32
    saved = 4 * (64 * 64 - 2 * (64 + 64)) + 2 * (64 * 256 - 2 * (64 + 256))
    assert sent == pytest.approx(ring * whole["parameters"], rel=0.01)
    assert less == pytest.approx(ring * (whole["parameters"] - saved), rel=0.01)
    numbers = (
        f"PowerSGD of rank 2 on each device: it sums {whole['parameters'] - saved:,} numbers along"
    )
    assert numbers in " ".join(printed.split())


@pytest.mark.full
def test_the_dalle_of_the_paper_on_a_pod(tmp_path):
    """As it is, and with the paper's compression, over parts of parameters that are divided."""
    pytest.importorskip("libtpu")
    paper = "--experiment dalle_train --preset paper --topology v4:8x8x16".split()
    found, _ = report(tmp_path / "12b.json", *paper)
    assert found["parameters"] == 12_293_824_256
    assert found["devices"] == 1_024 and found["fits"]
    compressed = "--strategy fsdp --mesh.fsdp 16 --compress 896".split()
    found, printed = report(tmp_path / "compressed.json", *paper, *compressed)
    assert found["fits"] and "86% fewer" in printed
    assert sum(axes.get("data", 0) for axes in found["collective_bytes"].values()) < 1e9


def test_what_does_not_fit_says_so(tmp_path):
    found, printed = report(
        tmp_path / "3b.json", "t5_pretrain", "--preset", "3b", "--batch", "4",
        "--topology", "v5e:2x2", "--strategy", "dp", "--execution.remat", "full",
    )  # fmt: skip
    assert not found["fits"] and found["step_seconds"] is None
    assert found["bytes_per_device"] > found["memory"]
    assert "NO" in printed


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["t5_pretrain", "--topology", "v9:4x4"], "topology v9:4x4 is not known"),
        (["t5_train", "--topology", "v5e:2x2"], "t5_train cannot be planned.*t5_pretrain"),
        (["t5_pretrain", "--topology", "v5e:2x2", "--mesh.model", "3"], "mesh.model is 3, but"),
        (
            ["t5_pretrain", "--topology", "v5e:2x2", "--strategy", "tp", "--mesh.model", "3"],
            r"model 3 x fsdp 1 does not divide the 4 devices.*\[1, 2, 4\]",
        ),
        (
            ["t5_pretrain", "--topology", "v5e:2x2", "--batch", "6", "--strategy", "dp"],
            "a batch of 6 rows does not divide",
        ),
    ],
)
def test_plans_that_cannot_be(arguments, message):
    done = plan(*arguments, check=False)
    assert done.returncode == 1
    assert re.search(message, done.stderr), done.stderr[-800:]

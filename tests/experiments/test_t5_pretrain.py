import json
import subprocess
import sys
import time

import pytest

import lmjax
from experiments import t5_generate
from lmjax.interop.t5 import save_pretrained
from lmjax.models.gpt2 import GPT2, GPT2Config
from tests.experiments.conftest import ROOT, SMALL, environment

PRETRAIN = "experiments.t5_pretrain"


def metrics(workdir):
    lines = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    return {line["step"]: line for line in lines if "loss" in line}


def held_out(workdir):
    lines = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    return [line["eval_loss"] for line in lines if "eval_loss" in line]


@pytest.fixture
def arguments(corpus):
    return [*SMALL, "--fit.log-every", 1, "--data.files", corpus / "*.txt"]


def test_learns_from_the_users_text_and_shows_what(run, arguments, tmp_path):
    done = run(PRETRAIN, *arguments, "--steps", 60, "--workdir", tmp_path / "w")
    losses = held_out(tmp_path / "w")
    assert losses[-1] < losses[0] - 1.5
    assert "truth" in done.stdout and "<extra_id_0>" in done.stdout
    assert (tmp_path / "w/loss.png").read_bytes().startswith(b"\x89PNG")
    assert (tmp_path / "w/tokenizer.model").is_file()
    assert max(metrics(tmp_path / "w")) == 60

    text = "the function <extra_id_0> an array <extra_id_1>"
    done = run(
        "experiments.t5_generate", "--checkpoint", tmp_path / "w", text, "배열의 <extra_id_0>"
    )
    assert len(done.stdout.splitlines()) >= 2
    sampled = ["--temperature", 1.0, "--samples", 2, "--complete", "the function returns"]
    done = run("experiments.t5_generate", "--checkpoint", tmp_path / "w", *sampled)
    assert len(done.stdout.splitlines()) >= 2


def test_resumes_bit_for_bit(run, arguments, tmp_path):
    run(PRETRAIN, *arguments, "--steps", 20, "--workdir", tmp_path / "a")
    run(PRETRAIN, *arguments, "--steps", 30, "--workdir", tmp_path / "a")
    run(PRETRAIN, *arguments, "--steps", 30, "--workdir", tmp_path / "b")
    resumed, whole = metrics(tmp_path / "a"), metrics(tmp_path / "b")
    for step in range(1, 31):
        assert resumed[step]["loss"] == whole[step]["loss"], step


def test_a_killed_run_resumes_bit_for_bit(run, arguments, cache, tmp_path):
    arguments = [*arguments, "--fit.checkpoint-every", 10, "--fit.eval-every", 15]
    arguments += ["--model.dropout", 0.1, "--data.pack", "--objective.noise-density", 0.3]
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    run(PRETRAIN, *arguments, "--steps", 80, "--workdir", whole)

    command = [sys.executable, "-m", PRETRAIN, *map(str, arguments), "--steps", "100000"]
    with subprocess.Popen(
        [*command, "--workdir", str(killed)],
        cwd=ROOT,
        env=environment(cache),
        stdout=subprocess.PIPE,
        text=True,
    ) as process:
        assert any(line.startswith("step 15: held-out") for line in process.stdout)
        process.kill()
    last = max(metrics(killed))
    assert last < 80
    run(PRETRAIN, *arguments, "--steps", last + 1, "--workdir", killed)
    resumed, expected = metrics(killed), metrics(whole)
    for step in range(1, last + 2):
        assert resumed[step]["loss"] == expected[step]["loss"], step


@pytest.mark.parametrize("objective", ["prefix_lm", "iid_denoising"])
def test_the_other_objectives_and_optimizers_train(run, corpus, tmp_path, objective):
    settings = [flag for flag in SMALL if not flag.startswith("--objective")]
    settings = ["--objective", objective, "--objective.inputs-length", 64, *SMALL]
    settings += ["--optimizer", "adamw", "--optimizer.schedule", "cosine", "--data.stream"]
    settings += ["--optimizer.schedule.warmup", 5, "--data.shards", 2]
    settings += ["--data.files", corpus / "*.txt", "--steps", 40, "--workdir", tmp_path / "w"]
    run(PRETRAIN, *settings)
    losses = held_out(tmp_path / "w")
    assert losses[-1] < losses[0] - 0.5


def test_init_starts_from_a_run_and_from_an_exported_directory(run, refused, arguments, tmp_path):
    run(PRETRAIN, *arguments, "--steps", 40, "--workdir", tmp_path / "first")
    before = held_out(tmp_path / "first")
    model, params, tokenizer = lmjax.load(tmp_path / "first")
    save_pretrained(tmp_path / "exported", model.config, params, tokenizer)
    for start in ("first", "exported"):
        again = [*arguments, "--init", tmp_path / start, "--steps", 2, "--seed", 1]
        run(PRETRAIN, *again, "--workdir", tmp_path / f"from-{start}")
        assert held_out(tmp_path / f"from-{start}")[0] == pytest.approx(before[-1], abs=1e-4)

    text = "the function <extra_id_0> an array <extra_id_1>"
    written = [
        run("experiments.t5_generate", "--checkpoint", tmp_path / start, "--beams", 2, text).stdout
        for start in ("first", "exported")
    ]
    assert written[0] == written[1] != ""

    other = [*arguments, "--init", tmp_path / "first", "--model.heads", 2]
    assert "heads 4 -> 2" in refused(PRETRAIN, *other, "--workdir", tmp_path / "other")


def test_help_teaches(run):
    text = run(PRETRAIN, "--help").stdout
    for word in ("11b", "v1_1-xxl", "mt5-base", "--steps", "--data.files", "--fit.nonfinite"):
        assert word in text


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--preset", "bsae"], ["bsae", "base"]),
        (["--stpes", "3"], ["--stpes", "--steps"]),
        (["--optimizer", "adam"], ["adam", "adamw"]),
        (["--data.files", "nothing-here-*.txt"], ["nothing-here-*.txt"]),
        (["--data.tokenizer", "absent.model"], ["absent.model"]),
        (["--fit.microbatches", "3"], ["8", "3"]),
        (["--model.vocab", "128"], ["128", "rows"]),
        (["--objective.inputs-length", "100000"], ["sentinels"]),
        (["--init", "no/such-directory"], ["no/such-directory"]),
        (["--seed", "-1"], ["--seed"]),
    ],
)
def test_bad_settings_end_in_one_sentence(refused, arguments, tmp_path, flags, words):
    said = refused(PRETRAIN, *arguments, "--workdir", tmp_path / "w", *flags)
    for word in words:
        assert word in said
    assert not (tmp_path / "w").exists()


def test_text_shorter_than_one_example(run, tmp_path):
    (tmp_path / "short.txt").write_text("one short line\n\nand another one\n")
    flags = ["--data.files", tmp_path / "short.txt", "--workdir", tmp_path / "w"]
    done = run(PRETRAIN, *flags, check=False)
    assert done.returncode != 0 and "one example takes" in done.stderr
    assert "Traceback" not in done.stderr


def test_another_runs_workdir_is_refused(run, refused, arguments, tmp_path):
    run(PRETRAIN, *arguments, "--steps", 1, "--workdir", tmp_path / "w")
    again = [*arguments, "--steps", 2, "--workdir", tmp_path / "w", "--batch", 16, "--seed", 3]
    said = refused(PRETRAIN, *again)
    assert "batch 8 -> 16" in said and "seed 0 -> 3" in said


@pytest.mark.full
def test_the_default_run(run, tmp_path):
    """The README's first command; `pytest -m full`."""
    began = time.monotonic()
    done = run(PRETRAIN, "--workdir", tmp_path / "w")
    print(done.stdout, f"{time.monotonic() - began:.0f} s")
    losses = held_out(tmp_path / "w")
    assert losses[-1] < losses[0] - 3


def test_only_a_t5_fills_gaps(monkeypatch):
    model = GPT2(GPT2Config())
    monkeypatch.setattr(lmjax, "load", lambda *_, **__: (model, {}, None))
    monkeypatch.setattr("sys.argv", ["t5_generate", "--checkpoint", "runs/gpt2", "a text"])
    with pytest.raises(ValueError, match="runs/gpt2 holds a GPT2, and only a T5 fills gaps"):
        t5_generate.main()

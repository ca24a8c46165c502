"""What XLNet has of its own; what all pretraining on text shares is in test_t5_pretrain.py."""

import json
import time

import pytest

import lmjax
from lmjax.interop.xlnet import save_pretrained
from tests.experiments.test_t5_pretrain import held_out

PRETRAIN = "experiments.xlnet_pretrain"
SMALL = """--model.vocab 400 --model.layers 2 --model.width 64 --model.heads 4
--model.feed-forward 128 --model.memory 24 --model.reuse 16 --objective.length 48
--objective.reuse 16 --objective.targets 8 --batch 8 --data.vocab-size 300 --eval-batches 3
--fit.eval-every 20""".split()


@pytest.fixture
def arguments(corpus):
    return [*SMALL, "--data.files", corpus / "*.txt"]


def test_learns_resumes_shows_what_and_goes_on_elsewhere(run, arguments, tmp_path):
    """The memory is in the checkpoint: the losses after it are those of a run without a stop."""
    done = run(PRETRAIN, *arguments, "--steps", 50, "--workdir", tmp_path / "w")
    losses = held_out(tmp_path / "w")
    assert losses[-1] < losses[0] - 1
    assert done.stdout.count("held-out text") >= 2
    assert "nats with its memory" in done.stdout

    run(PRETRAIN, *arguments, "--steps", 20, "--workdir", tmp_path / "stopped")
    run(PRETRAIN, *arguments, "--steps", 50, "--workdir", tmp_path / "stopped")
    assert logged(tmp_path / "stopped")[20:50] == logged(tmp_path / "w")[20:50]

    model, params, tokenizer = lmjax.load(tmp_path / "w")
    save_pretrained(tmp_path / "exported", model.config, params, tokenizer)
    again = [*arguments, "--init", tmp_path / "exported", "--steps", 2, "--seed", 1]
    run(PRETRAIN, *again, "--workdir", tmp_path / "on")
    assert held_out(tmp_path / "on")[0] == pytest.approx(losses[-1], abs=1e-4)


def logged(workdir):
    lines = map(json.loads, (workdir / "metrics.jsonl").read_text().splitlines())
    return [line["loss"] for line in lines if "loss" in line]


def test_without_a_memory_and_in_one_direction(run, arguments, tmp_path):
    flags = ["--model.memory", 0, "--objective.no-backward", "--batch", 7, "--steps", 40]
    done = run(PRETRAIN, *arguments, *flags, "--workdir", tmp_path / "w")
    losses = held_out(tmp_path / "w")
    assert losses[-1] < losses[0] - 0.5
    assert "memory of" not in done.stdout


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--batch", "7"], ["--batch is 7", "even"]),
        (["--model.reuse", "17"], ["--model.reuse is 17 and --objective.reuse 16"]),
        (["--objective.targets", "40"], ["40 targets do not fit"]),
        (["--objective.length", "20000"], ["do not fill 4 lanes", "--objective.length"]),
        (["--data.subwords", "unigram"], ["--data.subwords xlnet_unigram"]),
        (["--data.pack"], ["lanes", "drop"]),
        (["--model.memory", "100000"], ["--model.memory is 100,000", "lanes has only"]),
    ],
)
def test_bad_settings_end_in_one_sentence(refused, arguments, tmp_path, flags, words):
    said = refused(PRETRAIN, *arguments, "--workdir", tmp_path / "w", *flags)
    for word in words:
        assert word in said
    assert not (tmp_path / "w").exists()


@pytest.mark.full
def test_the_default_run(run, tmp_path):
    began = time.monotonic()
    done = run(PRETRAIN, "--workdir", tmp_path / "w")
    print(done.stdout, f"{time.monotonic() - began:.0f} s")
    losses = held_out(tmp_path / "w")
    assert losses[-1] < losses[0] - 3

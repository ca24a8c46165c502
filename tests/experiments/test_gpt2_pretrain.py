"""What GPT-2 has of its own; what all pretraining on text shares is in test_t5_pretrain.py."""

import time

import pytest

import lmjax
from lmjax.interop.gpt2 import save_pretrained
from tests.experiments.test_t5_pretrain import held_out, metrics

PRETRAIN = "experiments.gpt2_pretrain"
SMALL = """--model.vocab 400 --model.positions 64 --model.layers 2 --model.width 64 --model.heads 4
--model.feed-forward 128 --objective.length 64 --batch 8 --data.vocab-size 400 --eval-batches 2
--fit.eval-every 10""".split()


@pytest.fixture
def arguments(corpus):
    return [*SMALL, "--data.files", corpus / "*.txt"]


def test_learns_shows_what_and_goes_on_elsewhere(run, arguments, tmp_path):
    done = run(PRETRAIN, *arguments, "--steps", 40, "--workdir", tmp_path / "w")
    losses = held_out(tmp_path / "w")
    assert losses[-1] < losses[0] - 1
    assert done.stdout.count("model") >= 3 and "truth" in done.stdout

    model, params, tokenizer = lmjax.load(tmp_path / "w")
    save_pretrained(tmp_path / "exported", model.config, params, tokenizer)
    again = [*arguments, "--init", tmp_path / "exported", "--steps", 2, "--seed", 1]
    run(PRETRAIN, *again, "--workdir", tmp_path / "on")
    assert held_out(tmp_path / "on")[0] == pytest.approx(losses[-1], abs=1e-4)


def test_resumes_bit_for_bit(run, arguments, tmp_path):
    arguments = [*arguments, "--model.dropout", 0.1, "--fit.log-every", 1]
    run(PRETRAIN, *arguments, "--steps", 8, "--workdir", tmp_path / "a")
    run(PRETRAIN, *arguments, "--steps", 12, "--workdir", tmp_path / "a")
    run(PRETRAIN, *arguments, "--steps", 12, "--workdir", tmp_path / "b")
    resumed, whole = metrics(tmp_path / "a"), metrics(tmp_path / "b")
    assert [resumed[i]["loss"] for i in range(1, 13)] == [whole[i]["loss"] for i in range(1, 13)]


@pytest.mark.parametrize(
    "flags",
    [["--data.subwords", "wordpiece", "--data.pack"], ["--data.subwords", "unigram"]],
    ids=lambda flags: flags[1],
)
def test_other_tokenizers(run, arguments, tmp_path, flags):
    run(PRETRAIN, *arguments, *flags, "--steps", 20, "--workdir", tmp_path / "w")
    losses = held_out(tmp_path / "w")
    assert losses[-1] < losses[0] - 0.4


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--objective.length", "65"], ["--objective.length is 65", "64 positions"]),
        (["--model.kind", "span"], ["--model.kind is span", "go on with texts, choose lm"]),
        (["--model.heads", "3"], ["64, which does not divide into 3 heads"]),
        (["--model.vocab", "128"], ["128", "rows"]),
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

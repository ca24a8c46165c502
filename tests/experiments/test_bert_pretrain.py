"""What BERT has of its own; what all pretraining on text shares is in test_t5_pretrain.py."""

import time

import pytest

import lmjax
from lmjax.interop.bert import save_pretrained
from tests.experiments.test_t5_pretrain import held_out, metrics

PRETRAIN = "experiments.bert_pretrain"
SMALL = """--model.vocab 400 --model.positions 64 --model.layers 2 --model.width 64 --model.heads 4
--model.feed-forward 128 --objective.length 64 --objective.predictions 10 --batch 8
--data.vocab-size 400 --eval-batches 2 --fit.eval-every 20""".split()


@pytest.fixture
def arguments(corpus):
    return [*SMALL, "--data.files", corpus / "*.txt"]


def test_learns_shows_what_and_goes_on_elsewhere(run, arguments, tmp_path):
    done = run(PRETRAIN, *arguments, "--steps", 80, "--workdir", tmp_path / "w")
    losses = held_out(tmp_path / "w")
    assert losses[-1] < losses[0] - 0.4
    assert done.stdout.count("held-out text") >= 2 and " / " in done.stdout
    assert done.stdout.count("then its own second half") >= 2

    model, params, tokenizer = lmjax.load(tmp_path / "w")
    save_pretrained(tmp_path / "exported", model.config, params, tokenizer)
    again = [*arguments, "--init", tmp_path / "exported", "--steps", 2, "--seed", 1]
    run(PRETRAIN, *again, "--workdir", tmp_path / "on")
    assert held_out(tmp_path / "on")[0] == pytest.approx(losses[-1], abs=1e-4)


def test_resumes_bit_for_bit_with_whole_words_and_lines(run, arguments, tmp_path):
    flags = ["--objective.whole-words", "--objective.lines", "--objective.copies", 2]
    flags += ["--fit.log-every", 1]
    run(PRETRAIN, *arguments, *flags, "--steps", 6, "--workdir", tmp_path / "a")
    run(PRETRAIN, *arguments, *flags, "--steps", 3, "--workdir", tmp_path / "b")
    run(PRETRAIN, *arguments, *flags, "--steps", 6, "--workdir", tmp_path / "b")
    whole, parts = metrics(tmp_path / "a"), metrics(tmp_path / "b")
    for step in range(1, 7):
        assert whole[step]["loss"] == parts[step]["loss"], step


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--objective.length", "65"], ["--objective.length is 65", "64 positions"]),
        (["--model.kind", "masked_lm"], ["--model.kind is masked_lm"]),
        (["--data.subwords", "unigram"], ["--data.subwords wordpiece"]),
        (["--data.pack"], ["data.stream and data.pack", "drop them"]),
        (["--data.stream"], ["data.stream and data.pack", "drop them"]),
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

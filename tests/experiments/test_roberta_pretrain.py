"""What RoBERTa has of its own; what all pretraining on text shares is in test_t5_pretrain.py."""

import time

import pytest

import lmjax
from lmjax.interop.bert import save_pretrained
from tests.experiments.test_t5_pretrain import held_out

PRETRAIN = "experiments.roberta_pretrain"
SMALL = """--model.vocab 400 --model.positions 64 --model.layers 2 --model.width 64 --model.heads 4
--model.feed-forward 128 --objective.length 64 --batch 8 --data.vocab-size 400 --eval-batches 2
--fit.eval-every 20""".split()


@pytest.fixture
def arguments(corpus):
    return [*SMALL, "--data.files", corpus / "*.txt"]


def test_learns_shows_what_and_goes_on_elsewhere(run, arguments, tmp_path):
    done = run(PRETRAIN, *arguments, "--steps", 80, "--workdir", tmp_path / "w")
    losses = held_out(tmp_path / "w")
    assert losses[-1] < losses[0] - 0.5
    assert done.stdout.count("held-out text") >= 2 and " / " in done.stdout

    model, params, tokenizer = lmjax.load(tmp_path / "w")
    save_pretrained(tmp_path / "exported", model.config, params, tokenizer)
    again = [*arguments, "--init", tmp_path / "exported", "--steps", 2, "--seed", 1]
    run(PRETRAIN, *again, "--workdir", tmp_path / "on")
    assert held_out(tmp_path / "on")[0] == pytest.approx(losses[-1], abs=1e-4)


def test_packs_documents_of_wordpiece(run, arguments, tmp_path):
    flags = ["--data.subwords", "wordpiece", "--data.pack", "--objective.no-full-sentences"]
    run(PRETRAIN, *arguments, *flags, "--steps", 60, "--workdir", tmp_path / "w")
    losses = held_out(tmp_path / "w")
    assert losses[-1] < losses[0] - 0.4


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--objective.length", "65"], ["--objective.length is 65", "64 positions"]),
        (["--model.kind", "pretraining"], ["--model.kind is pretraining"]),
        (["--data.subwords", "unigram"], ["a mask", "--data.subwords byte_bpe"]),
        (["--data.stream"], ["whole text", "--objective.no-full-sentences"]),
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

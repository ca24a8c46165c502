"""What BART has of its own; what all pretraining on text shares is in test_t5_pretrain.py."""

import time

import pytest

import lmjax
from lmjax.interop.bart import save_pretrained
from tests.experiments.test_t5_pretrain import held_out

PRETRAIN = "experiments.bart_pretrain"
SMALL = """--model.vocab 400 --model.positions 64 --model.layers 1 --model.decoder-layers 2
--model.width 64 --model.heads 4 --model.feed-forward 128 --objective.length 64 --batch 8
--data.vocab-size 400 --eval-batches 2 --fit.eval-every 20""".split()


@pytest.fixture
def arguments(corpus):
    return [*SMALL, "--data.files", corpus / "*.txt"]


def test_learns_shows_what_and_goes_on_elsewhere(run, arguments, tmp_path):
    done = run(PRETRAIN, *arguments, "--steps", 60, "--workdir", tmp_path / "w")
    losses = held_out(tmp_path / "w")
    assert losses[-1] < losses[0] - 1
    assert done.stdout.count("truth") >= 2

    model, params, tokenizer = lmjax.load(tmp_path / "w")
    save_pretrained(tmp_path / "exported", model.config, params, tokenizer)
    again = [*arguments, "--init", tmp_path / "exported", "--steps", 2, "--seed", 1]
    run(PRETRAIN, *again, "--workdir", tmp_path / "on")
    assert held_out(tmp_path / "on")[0] == pytest.approx(losses[-1], abs=1e-4)


def test_other_noise_on_documents_joined(run, arguments, tmp_path):
    noise = "--objective.infill 0 --objective.permute 0 --objective.delete 0.2 --objective.rotate 1"
    flags = [*noise.split(), "--data.no-pack", "--steps", 40, "--workdir", tmp_path / "w"]
    run(PRETRAIN, *arguments, *flags)
    losses = held_out(tmp_path / "w")
    assert losses[-1] < losses[0] - 0.5


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--objective.length", "65"], ["--objective.length is 65", "64 positions"]),
        (["--model.kind", "span"], ["--model.kind is span", "restore texts, choose lm"]),
        (["--data.subwords", "wordpiece"], ["--data.subwords is wordpiece", "byte_bpe"]),
        (["--objective.infill", "2"], ["infill is 2.0, not a share"]),
    ],
)
def test_bad_settings_end_in_one_sentence(refused, arguments, tmp_path, flags, words):
    said = refused(PRETRAIN, *arguments, "--workdir", tmp_path / "w", *flags)
    for word in words:
        assert word in said
    assert not (tmp_path / "w").exists()


def test_text_without_sentences_has_none_to_permute(refused, arguments, tmp_path):
    (tmp_path / "list.txt").write_text("\n\n".join(f"item {i} of a list" for i in range(900)))
    flags = ["--data.files", tmp_path / "list.txt", "--workdir", tmp_path / "w"]
    said = refused(PRETRAIN, *arguments, *flags)
    assert "no document has a sentence end" in said
    assert "--objective.permute 0" in said and not (tmp_path / "w").exists()


@pytest.mark.full
def test_the_default_run(run, tmp_path):
    began = time.monotonic()
    done = run(PRETRAIN, "--workdir", tmp_path / "w")
    print(done.stdout, f"{time.monotonic() - began:.0f} s")
    losses = held_out(tmp_path / "w")
    assert losses[-1] < losses[0] - 3

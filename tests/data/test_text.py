"""`read_text`: what becomes of small texts, and which settings it refuses before tokenizing."""

import random

import numpy as np
import pytest

from lmjax.data import text as module
from lmjax.data.text import TokenizedText, read_text
from lmjax.data.tokenizers import SentencePieceTokenizer, train_tokenizer
from lmjax.objectives.denoising import IidDenoising, PrefixLM, SpanCorruption

OBJECTIVE = SpanCorruption(inputs_length=32)


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("LMJAX_CACHE", str(tmp_path / "cache"))


def sentences(count):
    draw = random.Random(0)
    words = "the array is returned as sorted values unless an axis was given by name".split()
    return [" ".join(draw.choices(words, k=12)) for _ in range(count)]


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer(sentences(200), 60)


@pytest.fixture
def files(tmp_path):
    """Much to train on, and a few words to evaluate on: less than one example takes."""
    (tmp_path / "train.txt").write_text("\n\n".join(sentences(400)))
    (tmp_path / "validation.txt").write_text("the array is sorted")
    train, validation = f"{tmp_path}/train.txt", f"{tmp_path}/validation.txt"
    return {"files": (train,), "validation_files": (validation,)}


def read(data, tokenizer=None, objective=OBJECTIVE, **options):
    return read_text(data, objective, batch=4, seed=0, tokenizer=tokenizer, **options)


@pytest.mark.parametrize("objective", [OBJECTIVE, IidDenoising(32), PrefixLM(32)])
@pytest.mark.parametrize("how", [{}, {"stream": True, "shards": 2}, {"pack": True}])
def test_held_out_text_shorter_than_an_example_is_one_row(files, tokenizer, objective, how):
    found = read(TokenizedText(**files, **how), tokenizer, objective)
    [batch] = found.evaluation
    assert batch["loss_weights"].any(axis=1).tolist() == [True, False, False, False]
    assert "1 rows held out" in found.summary
    [words] = tokenizer.encode_batch(["the array is sorted"])
    [sample] = found.samples
    np.testing.assert_array_equal(sample, words)
    seen = {*batch["inputs"][0].tolist(), *batch["targets"][0].tolist()}
    assert set(words.tolist()) <= seen
    assert next(found.batches.start(None))[0]["loss_weights"].any(axis=1).all()


def test_streaming_evaluates_what_a_store_does(files, tokenizer):
    fraction = {"files": files["files"], "validation_fraction": 0.3}
    whole, streamed = (
        read(TokenizedText(**fraction, stream=stream, shards=2), tokenizer, eval_batches=3)
        for stream in (False, True)
    )
    assert len(whole.evaluation) == len(streamed.evaluation) == 3
    for one, other in zip(whole.evaluation, streamed.evaluation, strict=True):
        for name in one:
            np.testing.assert_array_equal(one[name], other[name])


@pytest.mark.parametrize("stream", [False, True])
def test_too_little_to_train_on_names_the_split(files, tokenizer, stream):
    few = TokenizedText(
        files=files["validation_files"], validation_files=files["files"], stream=stream, shards=1
    )
    with pytest.raises(ValueError, match=r"the train text has \d+ tokens and one example takes \d"):
        next(read(few, tokenizer).batches.start(None))


def test_sentinels_are_part_of_what_a_run_is(files, tokenizer):
    few = SentencePieceTokenizer(tokenizer.model, extra_ids=30)
    assert read(TokenizedText(**files), few).identity["extra_ids"] == 30


@pytest.fixture
def untouched(monkeypatch):
    """Fails where text is tokenized."""

    def never(*_, **__):
        raise AssertionError("the text was tokenized")

    monkeypatch.setattr(SentencePieceTokenizer, "encode_batch", never)


def test_too_few_rows_are_refused_before_tokenizing(files, tokenizer, untouched):
    size = tokenizer.vocab_size
    sentence = f"has {size} ids and the model's embedding {size - 1} rows: set --model.vocab"
    with pytest.raises(ValueError, match=sentence):
        read(TokenizedText(**files), tokenizer, rows=size - 1)
    with pytest.raises(AssertionError, match="was tokenized"):
        read(TokenizedText(**files), tokenizer, rows=size)


def test_another_tokenizer_than_the_checkpoints_is_refused(files, tokenizer, tmp_path, untouched):
    other = train_tokenizer(sentences(100), 50)
    other.save(tmp_path / "other.model")
    with pytest.raises(ValueError, match="other.model is not the tokenizer that the checkpoint"):
        read(TokenizedText(**files, tokenizer=str(tmp_path / "other.model")), tokenizer)


def test_the_checkpoints_own_tokenizer_may_be_named(files, tokenizer, tmp_path):
    few = SentencePieceTokenizer(tokenizer.model, extra_ids=30)
    few.save(tmp_path / "own.model")
    data = TokenizedText(**files, tokenizer=str(tmp_path / "own.model"))
    assert read(data, few).tokenizer.vocab_size == few.vocab_size
    assert read(data).tokenizer.vocab_size == tokenizer.vocab_size


def test_streaming_takes_no_workers(files, tokenizer):
    with pytest.raises(ValueError, match="reads in one thread: drop --workers"):
        read(TokenizedText(**files, stream=True), tokenizer, workers=2)


def test_progress_knows_how_many_documents_there_are(files, tokenizer, monkeypatch):
    class Counted(module.open_source(TokenizedText(**files)).__class__):
        def num_documents(self, split):
            return {"train": 400, "validation": 1}[split]

    totals = []
    build = module.build_token_store

    def counting(*arguments, total=None, **options):
        totals.append(total)
        return build(*arguments, total=total, **options)

    monkeypatch.setattr(module, "build_token_store", counting)
    source = Counted(files["files"], files["validation_files"])
    monkeypatch.setattr(module, "open_source", lambda data: source)
    read(TokenizedText(**files), tokenizer)
    assert totals == [400, 1]

"""Models on equal terms, XLNet's memory, and the experiment from its beginning to its picture."""

import dataclasses
import json
import time
import types

import jax
import numpy as np
import pytest
from PIL import Image

from experiments.compare import (
    TITLES,
    Compare,
    check_tokenizer,
    contestants,
    equally_fed,
    parameters,
    result_of,
    text_of,
    tokens_of_a_row,
    word_nats,
)
from experiments.xlnet_pretrain import memories
from lmjax.data.sources import open_source
from lmjax.data.text import TokenizedText, choose_tokenizer
from lmjax.models.bert import BertConfig

COMPARE = "experiments.compare"
SMALL = """--layers 2 --width 64 --heads 2 --window 30 --rows 4 --steps 12 --evaluations 2
--questions 20 --passage 20 --memory-batches 4 --data.vocab-size 220""".split()
IDS = types.SimpleNamespace(vocab_size=4_096, pad_id=0, eos_id=1)


@pytest.mark.parametrize(
    "settings",
    [Compare(), Compare(layers=6, width=192, heads=8), Compare(layers=3, window=90)],
    ids=["the default", "larger", "an odd number of layers"],
)
def test_all_are_equally_large_and_read_equally_much(settings):
    runs = contestants(settings, IDS, TokenizedText(tokenizer="a.model"))
    assert tuple(runs) == tuple(TITLES)
    sizes = {name: parameters(run) for name, run in runs.items()}
    assert max(sizes.values()) < 1.01 * min(sizes.values())
    tokens = {name: run.batch * tokens_of_a_row(run.objective) for name, run in runs.items()}
    assert tokens.pop("bert") < settings.rows * settings.window  # see the test below
    assert set(tokens.values()) == {settings.rows * settings.window}
    assert runs["xlnet"].model.memory > runs["xlnet"].model.reuse
    forgetful = dataclasses.replace(runs["xlnet"].model, memory=0)
    assert runs["xlnet_forgetful"].model == forgetful


def test_a_model_too_small_to_match_is_refused():
    settings = Compare(width=8, heads=2, layers=2, models=("bert", "xlnet"))
    with pytest.raises(ValueError, match="within one percent.*larger --width"):
        contestants(settings, IDS, TokenizedText(tokenizer="a.model"))


@pytest.fixture
def small(corpus, cache, tmp_path, monkeypatch):
    """Settings, tokenizer and data, with the caches of the other tests."""
    monkeypatch.setenv("LMJAX_CACHE", str(cache))
    settings = Compare(
        data=TokenizedText((str(corpus / "*.txt"),), subwords="common_unigram", vocab_size=220),
        layers=2,
        width=64,
        heads=2,
        window=30,
        rows=4,
        passage=20,
        steps=40,
        memory_batches=3,
    )
    tokenizer = choose_tokenizer(settings.data, open_source(settings.data))
    tokenizer.save(tmp_path / "tokenizer.model")
    data = dataclasses.replace(settings.data, tokenizer=str(tmp_path / "tokenizer.model"))
    return settings, tokenizer, data


def test_bert_reads_as_much_in_more_rows(small):
    settings = dataclasses.replace(small[0], window=240)  # longer than the documents
    run = contestants(settings, *small[1:])["bert"]
    assert isinstance(run.model, BertConfig)
    fed, text = equally_fed(run, settings)
    assert fed.batch > run.batch
    assert fed.optimizer.schedule.horizon == fed.steps
    tokens = result_of(fed, text).tokens
    assert tokens == pytest.approx(settings.rows * settings.window * settings.steps, rel=0.03)


def test_nats_of_words_are_those_of_the_loss_with_and_without_memory(small):
    run = contestants(*small)["xlnet"]
    task = run.task()
    params = jax.jit(lambda: task.init(jax.random.key(0)).params)()
    params = jax.tree.map(lambda x: 5 * x if x.ndim > 1 else x, params)
    nats, evaluate = word_nats(run, params), jax.jit(task.evaluate)
    batch, extra = list(memories(run, params, text_of(run).evaluation))[1]
    counts = task.normalizers(batch)
    found = []
    for memory in (extra["memory"], 0 * extra["memory"]):
        loss = evaluate(params, {"memory": memory}, batch, counts)[0]["loss"]
        found.append(nats(batch, memory))
        own = (found[-1] * batch["loss_weights"]).sum() / counts["tokens"]
        assert own == pytest.approx(float(loss), rel=1e-5)
    assert np.abs(found[0] - found[1]).max() > 1e-3


def test_trains_draws_and_knows_what_is_done(run, corpus, tmp_path):
    models = ["xlnet", "xlnet_forgetful"]
    arguments = [*SMALL, "--data.files", corpus / "*.txt", "--workdir", tmp_path, "--models"]
    done = run(COMPARE, *arguments, *models)
    assert all(TITLES[name] in done.stdout for name in models)
    assert "nats per hidden word" in done.stdout and "by chance" in done.stdout
    with Image.open(tmp_path / "compare.png") as picture:
        assert picture.size == (1680, 600)
    found = json.loads((tmp_path / "compare.json").read_text())
    assert list(found["models"]) == models
    for result in found["models"].values():
        assert result["tokens"] == 12 * 4 * 30
        assert [tokens for tokens, *_ in result["curve"]] == [0, 720, 1440]
        assert all(0 <= accuracy <= 1 and nats > 0 for _, accuracy, nats in result["curve"])
    memory = found["memory"]
    assert memory["words"] > 20 and len(memory["nats"]) == 3
    assert len(set(memory["mean"].values())) == 3

    again = run(COMPARE, *arguments, models[1])
    assert "nothing is left to do" in again.stdout
    redrawn = json.loads((tmp_path / "compare.json").read_text())
    assert redrawn["models"] == {models[1]: found["models"][models[1]]}
    assert redrawn["memory"] is None


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"window": 31}, "--window is 31.*multiples of 3 and of 4"),
        ({"rows": 6}, "--rows 6.*multiples of 3 and of 4"),
        ({"passage": 127}, "--passage is 127.*2 to 126 tokens"),
        ({"questions": 0}, "--questions is 0, not 1 or more"),
    ],
)
def test_bad_settings(settings, words):
    with pytest.raises(ValueError, match=words):
        Compare(**settings)


def test_a_tokenizer_that_does_not_serve_all_is_refused():
    ids = {f"{name}_id": 1 for name in ("pad", "bos", "eos", "cls", "sep")}
    lacking = types.SimpleNamespace(**ids, mask_id=None, sentinels=np.zeros(0, np.int32))
    with pytest.raises(ValueError, match="no mask and no sentinels.*common_unigram"):
        check_tokenizer(lacking)


@pytest.mark.full
def test_the_default_run(run, tmp_path):
    began = time.monotonic()
    done = run(COMPARE, "--workdir", tmp_path)
    print(done.stdout, f"{time.monotonic() - began:.0f} s")
    found = json.loads((tmp_path / "compare.json").read_text())
    for name, result in found["models"].items():
        assert result["curve"][-1][1] > 0.2, name
    mean = found["memory"]["mean"].values()
    assert min(mean) == list(mean)[0]

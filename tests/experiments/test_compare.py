"""Models on equal terms, XLNet's memory, and the experiment from its beginning to its picture."""

import dataclasses
import json
import time
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from experiments.compare import (
    EMPTIED,
    TITLES,
    WITH,
    WITHOUT,
    Compare,
    check_tokenizer,
    contestants,
    equally_fed,
    gone_on,
    parameters,
    result_of,
    text_of,
    tokens_of_a_row,
    worth_of_memory,
)
from experiments.xlnet_pretrain import memories
from lmjax.data.sources import open_source
from lmjax.data.text import TokenizedText, choose_tokenizer
from lmjax.models.bert import BertConfig
from lmjax.training.state import abstract_parameters

COMPARE = "experiments.compare"
SMALL = """--layers 2 --width 64 --heads 2 --window 30 --rows 4 --steps 12 --evaluations 2
--questions 20 --passage 20 --memory-steps 6 --memory-batches 4 --data.vocab-size 220""".split()
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
    ways = gone_on(runs["xlnet"], settings)
    assert ways[WITH].model.memory == settings.window
    assert ways[WITHOUT].model == runs["xlnet"].model
    names = ("objective", "optimizer", "data", "batch", "seed", "steps")
    assert [getattr(ways[WITH], n) for n in names] == [getattr(ways[WITHOUT], n) for n in names]


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


def test_memory_is_judged_by_words_of_documents_that_began_in_rows_before(small):
    """Against the task's own loss, with and without memory, where all its words are such."""
    settings, tokenizer, _ = small
    runs = gone_on(contestants(*small)["xlnet"], settings)
    run, draw = runs[WITH], np.random.default_rng(0)
    shapes, _ = abstract_parameters(run.task())
    params = jax.tree.map(lambda x: jnp.float32(draw.normal(0, 0.3, x.shape)), shapes)
    readers = {name: (run, params) for name, run in runs.items()}
    batches = text_of(run).evaluation[:2]
    found = worth_of_memory(readers, batches, tokenizer)

    second, reuse = batches[1], run.objective.reuse
    known = np.zeros(second["targets"].shape, bool)
    for row, target in np.ndindex(*known.shape):
        place = second["targets_positions"][row, target]
        between = [batches[0]["inputs"][row, reuse - 1], *second["inputs"][row, : place + 1]]
        known[row, target] = place < reuse and tokenizer.eos_id not in between
    known &= second["loss_weights"] > 0
    assert found.words == known.sum() > 5
    _, (_, extra) = memories(run, params, batches)
    task = run.task()
    evaluate = jax.jit(task.evaluate)
    chosen = {**second, "loss_weights": known.astype(np.float32)}
    for name, memory in ((WITH, extra["memory"]), (EMPTIED, 0 * extra["memory"])):
        total = {"tokens": np.float32(known.sum())}
        loss = evaluate(params, {"memory": memory}, chosen, total)[0]["loss"]
        assert found.mean[name] == pytest.approx(float(loss), rel=1e-4)
    assert len(set(found.mean.values())) == 3  # the forgetful one has no empty states to read
    assert found.error[WITH] == 0 < found.error[EMPTIED]


def test_trains_draws_and_knows_what_is_done(run, corpus, tmp_path):
    models = ["xlnet", "gpt2"]
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
    assert len(found["memory"]["nats"]) == 3

    again = run(COMPARE, *arguments, "gpt2")
    assert "nothing is left to do" in again.stdout
    redrawn = json.loads((tmp_path / "compare.json").read_text())
    assert redrawn["models"] == {"gpt2": found["models"]["gpt2"]}
    assert redrawn["memory"] is None


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"window": 31}, "--window is 31.*multiples of 3 and of 4"),
        ({"rows": 6}, "--rows 6.*multiples of 3 and of 4"),
        ({"passage": 67}, "--passage is 67.*2 to 66 tokens"),
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
    mean, error = (found["memory"][name] for name in ("mean", "error"))
    assert mean[WITHOUT] - mean[WITH] > 4 * error[WITHOUT]
    at_first = {name: nats[0] for name, nats in found["memory"]["nats"].items()}
    assert at_first[WITHOUT] - at_first[WITH] > 0.05

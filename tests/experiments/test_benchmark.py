import dataclasses
import importlib
import json
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from experiments.benchmark import alone, flax_models, harness, lmjax_models, torch_models
from experiments.benchmark.__main__ import DALLE, Text
from experiments.benchmark.transformers_configs import transformers_config

TINY = Text(layers=1, width=64, batch=2, length=16, steps=1, decode_tokens=3)


@pytest.fixture(autouse=True)
def one_thread():
    """Two wait for each other most of the time, where others use the machine too."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def test_t5(run, tmp_path):
    tiny = ["--batch", 2, "--inputs", 16, "--targets", 8, "--steps", 1, "--rounds", 1]
    tiny += ["--decode-batch", 2, "--decode-inputs", 8, "--decode-tokens", 3, "--no-extras"]
    done = run("experiments.benchmark", "t5", *tiny, "--json", tmp_path / "figures.json")
    best = json.loads((tmp_path / "figures.json").read_text())["best"]
    assert best["t5"].keys() == {"lmjax", "transformers PyTorch", "transformers Flax"}
    for figures in best["t5"].values():
        assert figures["step_seconds"] > 0 and figures["decode_tokens_per_second"] > 0
    assert "ratio" in done.stdout


def libraries_of(model):
    return [pytest.param(model, name, id=f"{model} {name}") for name in harness.libraries(model)]


@pytest.mark.parametrize(
    ("model", "library"), [pair for model in Text().models for pair in libraries_of(model)]
)
def test_text(model, library, monkeypatch):
    monkeypatch.setattr(jnp, "clip", jnp.clip)  # flax_models puts another in its place
    (case,) = dataclasses.replace(TINY, models=(model,)).cases()
    figures = importlib.import_module(harness.MODULES[library]).measure(case)
    expected = {"step_seconds", "compile_seconds", "peak_bytes"}
    expected |= {"decode_tokens_per_second"} if model == "gpt2" else set()
    assert figures.keys() == expected and figures["step_seconds"] > 0


@pytest.mark.parametrize("model", Text().models)
def test_all_libraries_compute_the_same_loss(model, monkeypatch):
    """Of models that know nothing: all their guesses are near the uniform one."""
    monkeypatch.setattr(jnp, "clip", flax_models.clip_of_old)
    (case,) = dataclasses.replace(TINY, models=(model,)).cases()
    nothing = np.log(case.sizes.vocab) + (np.log(2) if model == "bert" else 0)
    task = lmjax_models.task_of(case)
    state = task.init(jax.random.key(0))
    batch = lmjax_models.batch_of(case)
    loss, _ = task.loss(state.params, state.extra, batch, task.normalizers(batch), {}, 0)
    assert loss == pytest.approx(nothing, rel=0.05)
    theirs = torch_models.MODELS[model](transformers_config(case))
    given = {name: torch.from_numpy(x) for name, x in torch_models.batch_of(case).items()}
    assert theirs(**given).loss.item() == pytest.approx(nothing, rel=0.05)
    if model in flax_models.MODELS:
        theirs = flax_models.MODELS[model](transformers_config(case), seed=0)
        loss = flax_models.loss(theirs, theirs.params, harness.examples(case), case)
        assert loss == pytest.approx(nothing, rel=0.05)


def test_orders_hide_the_same_words_from_xlnets_guesses():
    (case,) = dataclasses.replace(TINY, models=("xlnet",)).cases()
    order = harness.examples(case)["order"]
    hidden = torch_models.batch_of(case)["perm_mask"]
    for row, of_row in zip(order, hidden, strict=True):
        for i, own in enumerate(row):
            for j, other in enumerate(row):
                # Words that are not to be guessed read each other; the reference adds a token's
                # own word to the stream of contents, as `order` does.
                read = other == -1 if own == -1 else other < own
                assert of_row[i, j] == (not read)
        assert sorted(row[row >= 0]) == list(range(case.targets))


def test_dalle_draws_and_says_what_its_cache_and_sparsity_are_worth():
    sizes = {"text_length": 8, "grid": 4, "conv_extent": 3, "layers": 1, "width": 16, "steps": 1}
    (case,) = DALLE(**sizes).cases()
    figures = lmjax_models.measure(case)
    assert figures["step_seconds"] > 0 and figures["decode_tokens_per_second"] > 0
    worth = alone.measure("dalle", case)
    assert "drawing 2 x 16 tokens, seconds" in worth
    # Of 24 x 24, the text's 8 x 8, and of 16 image positions 8 of text and the lines in reach.
    for kind, share in (("row", 0.56), ("column", 0.44), ("conv", 0.67)):
        assert f"{share} of its products" in worth[f"attention of a {kind} layer, gradient, ms"]


def test_dalle_is_compared_with_what_is_installed(monkeypatch):
    util = types.SimpleNamespace(find_spec=lambda name: name != "dalle_pytorch" or None)
    monkeypatch.setattr(harness, "importlib", types.SimpleNamespace(util=util))
    assert harness.libraries("dalle") == {"lmjax": True, "dalle-pytorch": False}


@pytest.mark.parametrize("missing", ["torch", "transformers"])
def test_what_is_not_installed_is_left_out(monkeypatch, missing):
    find = harness.importlib.util.find_spec

    def hidden(name, *arguments):
        if name == missing:
            return None
        if name.startswith(f"{missing}."):
            raise ModuleNotFoundError(name)
        return find(name, *arguments)

    util = types.SimpleNamespace(find_spec=hidden)
    monkeypatch.setattr(harness, "importlib", types.SimpleNamespace(util=util))
    expected = {"lmjax": True, "transformers PyTorch": False}
    assert harness.libraries("xlnet") == expected
    assert harness.libraries("gpt2") == expected | {"transformers Flax": missing == "torch"}


def test_objectives_are_timed():
    speeds = alone.text_speeds()
    assert len(speeds) == 5 and all(float(speed) > 0 for speed in speeds.values())


def test_unknown_preset(run):
    done = run("experiments.benchmark", "t5", "--preset", "smal", check=False)
    assert done.returncode != 0 and "smal" in done.stderr and "Traceback" not in done.stderr

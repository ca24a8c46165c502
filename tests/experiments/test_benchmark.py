import json
import types

import pytest

from experiments import benchmark


def test_every_contestant_is_measured(run, tmp_path):
    tiny = ["--batch", 2, "--inputs", 16, "--targets", 8, "--steps", 1, "--rounds", 1]
    tiny += ["--decode-batch", 2, "--decode-inputs", 8, "--decode-tokens", 3, "--no-extras"]
    done = run("experiments.benchmark", "t5", *tiny, "--json", tmp_path / "figures.json")
    best = json.loads((tmp_path / "figures.json").read_text())["best"]
    assert best.keys() == {"lmjax", "transformers PyTorch", "transformers Flax"}
    for figures in best.values():
        assert figures["step_seconds"] > 0 and figures["decode_tokens_per_second"] > 0
    assert "ratio" in done.stdout


@pytest.mark.parametrize("missing", ["torch", "transformers"])
def test_what_is_not_installed_is_left_out(monkeypatch, missing):
    find = benchmark.importlib.util.find_spec

    def hidden(name, *arguments):
        if name == missing:
            return None
        if name.startswith(f"{missing}."):
            raise ModuleNotFoundError(name)
        return find(name, *arguments)

    util = types.SimpleNamespace(find_spec=hidden)
    monkeypatch.setattr(benchmark, "importlib", types.SimpleNamespace(util=util))
    assert not benchmark.has_torch_t5()
    assert benchmark.has_flax_t5() == (missing == "torch")


def test_unknown_preset(run):
    done = run("experiments.benchmark", "t5", "--preset", "smal", check=False)
    assert done.returncode != 0 and "smal" in done.stderr and "Traceback" not in done.stderr

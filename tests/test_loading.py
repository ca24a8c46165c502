import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import lmjax
from lmjax.data.tokenizers import SentencePieceTokenizer, train_tokenizer
from lmjax.interop.t5 import parameter_shapes, save_pretrained
from lmjax.loading import describe
from lmjax.models.t5 import T5Config
from lmjax.training.checkpoints import Checkpoints, claim_workdir
from lmjax.training.state import TrainState

CONFIG = T5Config(vocab=128, layers=1, width=8, heads=2, head_width=4, feed_forward=8, gated=True)


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer(["a few words to train on", "and a few more words"], 25)


@pytest.fixture(scope="module")
def params():
    rng = np.random.default_rng(0)
    return jax.tree.map(lambda x: rng.normal(size=x.shape).astype("f4"), parameter_shapes(CONFIG))


def check(directory, params, tokenizer):
    model, found, found_tokenizer = lmjax.load(directory)
    assert model.config == CONFIG and model.execution.dtype == "float32"
    assert all(isinstance(leaf, jax.Array) for leaf in jax.tree.leaves(found))
    jax.tree.map(np.testing.assert_array_equal, found, params)
    assert found_tokenizer.sha256 == tokenizer.sha256
    tokens = jnp.array([found_tokenizer.encode("a few words")])
    logits = model.apply({"params": found}, tokens, jnp.zeros_like(tokens))
    assert logits.shape == (*tokens.shape, CONFIG.vocab)


def test_a_hugging_face_directory_loads(tmp_path, params, tokenizer):
    save_pretrained(tmp_path / "hf", CONFIG, params, tokenizer)
    check(tmp_path / "hf", params, tokenizer)
    model, found, _ = lmjax.load(str(tmp_path / "hf"), dtype="bfloat16")
    assert model.execution.dtype == "bfloat16" and found["embedding"].dtype == jnp.float32
    with pytest.raises(ValueError, match="dtype is 'float64'"):
        lmjax.load(tmp_path / "hf", dtype="float64")


def test_a_directory_without_a_tokenizer_loads(tmp_path, params):
    save_pretrained(tmp_path / "hf", CONFIG, params)
    assert lmjax.load(tmp_path / "hf").tokenizer is None


def workdir_of_a_run(workdir, params, tokenizer):
    data = {"extra_ids": tokenizer.extra_ids}
    identity = {"model_type": "t5", "model": CONFIG, "batch": 8, "data": data}
    claim_workdir(workdir, "t5_pretrain", identity, {"steps": 3})
    tokenizer.save(workdir / "tokenizer.model")
    state = TrainState(jnp.array(3), params, {}, {}, None, jax.random.key(0))
    checkpoints = Checkpoints(workdir)
    checkpoints.save(3, jax.tree.map(jnp.asarray, state), {})
    checkpoints.wait()
    checkpoints.close()


def as_directory(directory, params, tokenizer):
    save_pretrained(directory, CONFIG, params, tokenizer)


def test_a_run_loads(tmp_path, params, tokenizer):
    workdir_of_a_run(tmp_path / "run", params, tokenizer)
    check(tmp_path / "run", params, tokenizer)


def test_a_run_keeps_how_many_sentinels_its_tokenizer_had(tmp_path, params, tokenizer):
    few = SentencePieceTokenizer(tokenizer.model, extra_ids=7)
    workdir_of_a_run(tmp_path / "run", params, few)
    assert lmjax.load(tmp_path / "run").tokenizer.sha256 == few.sha256


@pytest.mark.parametrize("write", [workdir_of_a_run, as_directory])
def test_a_description_reads_parameters_only_when_asked(
    tmp_path, params, tokenizer, write, monkeypatch
):
    write(tmp_path / "it", params, tokenizer)
    with monkeypatch.context() as patch:
        for name in ("lmjax.training.checkpoints.restore_params", "lmjax.loading.Tensors.read"):
            patch.delattr(name)
        found = describe(tmp_path / "it")
    assert (found.model_type, found.config) == ("t5", CONFIG)
    assert found.tokenizer.sha256 == tokenizer.sha256
    loaded = found.load_params()
    assert all(type(leaf) is np.ndarray for leaf in jax.tree.leaves(loaded))
    jax.tree.map(np.testing.assert_array_equal, loaded, params)


def test_missing_parameters_are_named_before_any_is_read(tmp_path, params, tokenizer):
    as_directory(tmp_path / "hf", params, tokenizer)
    (tmp_path / "hf/model.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match="has no model.safetensors"):
        describe(tmp_path / "hf")
    claim_workdir(tmp_path / "run", "t5_pretrain", {"model_type": "t5", "model": CONFIG}, {})
    tokenizer.save(tmp_path / "run/tokenizer.model")
    with pytest.raises(ValueError, match="run .*checkpoint"):
        describe(tmp_path / "run")


def test_a_damaged_description_of_a_run_is_named(tmp_path, params, tokenizer):
    workdir_of_a_run(tmp_path / "run", params, tokenizer)
    content = json.loads((tmp_path / "run/config.json").read_text())
    content["identity"]["model"]["wings"] = 2
    (tmp_path / "run/config.json").write_text(json.dumps(content))
    with pytest.raises(ValueError, match="run/config.json describes no T5Config: .*wings"):
        lmjax.load(tmp_path / "run")


def test_a_vocabulary_smaller_than_the_tokenizer_is_refused(tmp_path, params, tokenizer):
    small = dataclasses.replace(CONFIG, vocab=64)
    cut = {**params, "embedding": params["embedding"][:64]}
    save_pretrained(tmp_path / "hf", small, cut)
    tokenizer.save(tmp_path / "hf" / "spiece.model")
    with pytest.raises(ValueError, match=f"{tokenizer.vocab_size} ids .* 64 rows"):
        lmjax.load(tmp_path / "hf")


@pytest.mark.parametrize(
    "content", [{"model_type": "llama"}, {"identity": {"model_type": "llama"}}]
)
def test_an_unknown_model_type_lists_those_known(tmp_path, content):
    (tmp_path / "config.json").write_text(json.dumps(content))
    with pytest.raises(ValueError, match="config.json has model_type 'llama'; .* knows t5, mt5"):
        lmjax.load(tmp_path)


def test_a_directory_of_something_else_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="has no config.json"):
        lmjax.load(tmp_path)

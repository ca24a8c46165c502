import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import lmjax
from lmjax.data.tokenizers import train_tokenizer
from lmjax.interop.t5 import parameter_shapes, save_pretrained
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
    with pytest.raises(ValueError, match="dtype is 'float16'"):
        lmjax.load(tmp_path / "hf", dtype="float16")


def test_a_directory_without_a_tokenizer_loads(tmp_path, params):
    save_pretrained(tmp_path / "hf", CONFIG, params)
    assert lmjax.load(tmp_path / "hf").tokenizer is None


def workdir_of_a_run(workdir, params, tokenizer):
    identity = {"model_type": "t5", "model": CONFIG, "batch": 8}
    claim_workdir(workdir, "t5_pretrain", identity, {"steps": 3})
    tokenizer.save(workdir / "tokenizer.model")
    state = TrainState(jnp.array(3), params, {}, {}, None, jax.random.key(0))
    checkpoints = Checkpoints(workdir)
    checkpoints.save(3, jax.tree.map(jnp.asarray, state), {})
    checkpoints.wait()
    checkpoints.close()


def test_a_run_loads(tmp_path, params, tokenizer):
    workdir_of_a_run(tmp_path / "run", params, tokenizer)
    check(tmp_path / "run", params, tokenizer)


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

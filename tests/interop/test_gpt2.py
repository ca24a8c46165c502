"""Parity with transformers' PyTorch GPT-2, through files."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from transformers import GPT2Config as TheirConfig
from transformers import GPT2LMHeadModel

import lmjax
from lmjax.data import fast_tokenizers
from lmjax.decoding.beam_search import Beam
from lmjax.decoding.generate import generate
from lmjax.interop import gpt2 as interop
from lmjax.interop.safetensors import Tensors, read_json, write_json
from lmjax.models import gpt2
from lmjax.models.gpt2 import PRESETS, GPT2Config
from lmjax.tasks.causal import Causal

SIZES = dict(vocab_size=97, n_positions=40, n_layer=3, n_embd=24, n_head=4)
LENGTHS = np.array([11, 7, 1, 15])


@pytest.fixture(scope="module")
def theirs():
    torch.manual_seed(0)
    model = GPT2LMHeadModel(TheirConfig(**SIZES, n_inner=56, attn_implementation="eager")).eval()
    with torch.no_grad():
        for parameter in model.parameters():  # biases and norms away from 0 and 1
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model


@pytest.fixture(scope="module")
def directory(theirs, tmp_path_factory):
    directory = tmp_path_factory.mktemp("gpt2")
    theirs.save_pretrained(directory, safe_serialization=True)
    return directory


@pytest.fixture(scope="module")
def ours(directory):
    return lmjax.load(directory)


@pytest.fixture(scope="module")
def tokens():
    return np.random.default_rng(0).integers(0, 97, (4, 15))


def test_logits(theirs, ours, tokens):
    model, params, tokenizer = ours
    assert tokenizer is None
    with torch.no_grad():
        expected = theirs(torch.from_numpy(tokens)).logits.numpy()
    with jax.default_matmul_precision("highest"):
        found = model.apply({"params": params}, jnp.asarray(tokens))
    assert np.abs(expected).max() > 1
    np.testing.assert_allclose(found, expected, atol=2e-5)


def test_the_decoding_state(theirs, ours, tokens):
    """Eleven tokens at once, then one at a time."""
    model, params, _ = ours
    with torch.no_grad():
        expected = theirs(torch.from_numpy(tokens)).logits.numpy()
    with jax.default_matmul_precision("highest"):
        state = gpt2.start_decoding(model, 4, 20)
        found, state = gpt2.extend(model, params, jnp.asarray(tokens[:, :11]), state)
        np.testing.assert_allclose(found, expected[:, :11], atol=2e-5)
        for i in range(11, 15):
            found, state = gpt2.extend(model, params, jnp.asarray(tokens[:, i : i + 1]), state)
            np.testing.assert_allclose(found[:, 0], expected[:, i], atol=2e-5)
    assert state.length.tolist() == [15] * 4


def test_gradients(theirs, ours, tokens):
    model, params, _ = ours
    theirs.zero_grad()
    theirs(torch.from_numpy(tokens), labels=torch.from_numpy(tokens)).loss.backward()
    theirs_gradients = {name: p.grad.numpy() for name, p in theirs.named_parameters()}
    batch = {
        "inputs": tokens[:, :-1],
        "inputs_positions": np.broadcast_to(np.arange(14), (4, 14)),
        "inputs_segment_ids": np.ones((4, 14), np.int32),
        "targets": tokens[:, 1:],
        "loss_weights": np.ones((4, 14), np.float32),
    }
    task = Causal(dataclasses.replace(model, config=dataclasses.replace(model.config, dropout=0.0)))
    batch = jax.tree.map(jnp.asarray, batch)

    def loss(params):
        return task.loss(params, {}, batch, task.normalizers(batch), {}, 0)[0]

    with jax.default_matmul_precision("highest"):
        gradients = jax.jit(jax.grad(loss))(params)
    found = dict(interop.export_tensors(model.config, gradients))
    assert found.keys() == theirs_gradients.keys()
    for name, expected in theirs_gradients.items():
        np.testing.assert_allclose(
            found[name], expected, atol=2e-5 * np.abs(expected).max(), err_msg=name
        )


def test_packed_texts_do_not_see_each_other(ours, tokens):
    model, params, _ = ours
    together = np.concatenate([tokens[0, :6], tokens[1, :9]])[None]
    segments = np.repeat([1, 2], [6, 9])[None]
    positions = np.concatenate([np.arange(6), np.arange(9)])[None]
    with jax.default_matmul_precision("highest"):
        packed = model.apply({"params": params}, together, positions, segments)
        alone = [
            model.apply({"params": params}, tokens[i : i + 1, :n]) for i, n in ((0, 6), (1, 9))
        ]
    np.testing.assert_allclose(packed, np.concatenate(alone, 1), atol=2e-5)


def test_no_token_sees_a_later_one(ours, tokens):
    model, params, _ = ours
    embedded = params["embedding"]

    def logit(moved):
        changed = {**params, "positions": params["positions"] + moved}
        return model.apply({"params": changed}, tokens[:1])[0, 8].sum()

    gradient = jax.jit(jax.grad(logit))(jnp.zeros_like(params["positions"]))
    assert embedded.shape[1] == gradient.shape[1]
    seen = np.abs(gradient).sum(1) > 0
    assert seen.tolist() == [True] * 9 + [False] * 31


def test_greedy_continuations_of_several_lengths(theirs, ours, tokens):
    model, params, _ = ours
    found = generate(
        model, params, jnp.asarray(tokens), lengths=jnp.asarray(LENGTHS), max_length=9, eos=None
    )
    for row, length in enumerate(LENGTHS):
        expected = theirs.generate(
            torch.from_numpy(tokens[row : row + 1, :length]),
            attention_mask=torch.ones(1, int(length), dtype=torch.long),
            max_new_tokens=9,
            min_new_tokens=9,
            do_sample=False,
            pad_token_id=0,
        )
        assert found.tokens[row].tolist() == expected[0, length:].tolist()


def test_beams(theirs, ours, tokens):
    model, params, _ = ours
    prompt = tokens[:2, :8]
    found = generate(
        model, params, jnp.asarray(prompt), max_length=7, strategy=Beam(3, alpha=0), eos=None
    )
    expected = theirs.generate(
        torch.from_numpy(prompt),
        attention_mask=torch.ones(2, 8, dtype=torch.long),
        max_new_tokens=7,
        min_new_tokens=7,
        num_beams=3,
        length_penalty=0.0,
        do_sample=False,
        pad_token_id=0,
    )
    assert found.tokens[:, 0].tolist() == expected[:, 8:].tolist()


def test_files_come_back_byte_for_byte(ours, directory, tmp_path):
    model, params, _ = ours
    interop.save_pretrained(tmp_path / "again", model.config, params)
    before, after = Tensors(directory), Tensors(tmp_path / "again")
    assert before.keys() == after.keys()
    for key in before.keys():
        shape = before.shape(key)
        assert before.read(key, shape).tobytes() == after.read(key, shape).tobytes()
    theirs = GPT2LMHeadModel.from_pretrained(tmp_path / "again")
    assert theirs.config.n_inner == 56


def test_a_tokenizer_goes_with_it(ours, tmp_path):
    model, params, _ = ours
    texts = ["the list is empty", "목록이 비어 있습니다"] * 3
    tokenizer = fast_tokenizers.train("byte_bpe", texts, 300)
    with pytest.raises(ValueError, match=f"{tokenizer.vocab_size} ids .* only 97 rows"):
        interop.save_pretrained(tmp_path / "small", model.config, params, tokenizer)
    assert not (tmp_path / "small").exists()
    config = dataclasses.replace(model.config, vocab=tokenizer.vocab_size)
    params = {**params, "embedding": np.zeros((tokenizer.vocab_size, 24), np.float32)}
    interop.save_pretrained(tmp_path / "whole", config, params, tokenizer)
    found = lmjax.load(tmp_path / "whole").tokenizer
    for text in texts:
        assert found.decode(found.encode(text)) == text


@pytest.mark.parametrize(
    ("preset", "parameters"),
    [
        ("small", 124_439_808),
        ("medium", 354_823_168),
        ("large", 774_030_080),
        ("xl", 1_557_611_200),
        ("kogpt2", 125_164_032),
    ],
)
def test_published_sizes(preset, parameters):
    shapes = interop.parameter_shapes(PRESETS[preset])
    assert sum(x.size for x in jax.tree.leaves(shapes)) == parameters
    config = interop.config_from_json(interop.config_to_json(PRESETS[preset]))
    assert config == PRESETS[preset]


def test_old_files(directory, tmp_path, ours):
    """Without a prefix, with masks among the parameters and the tied output matrix."""
    from safetensors.numpy import save_file

    tensors = Tensors(directory)
    found = {}
    for key in tensors.keys():
        found[key.removeprefix("transformer.")] = tensors.read(key, tensors.shape(key))
    found["h.0.attn.bias"] = np.tril(np.ones((1, 1, 40, 40), np.float32))
    found["lm_head.weight"] = found["wte.weight"].copy()
    save_file(found, tmp_path / "model.safetensors")
    write_json(tmp_path / "config.json", read_json(directory / "config.json"))
    jax.tree.map(np.testing.assert_array_equal, lmjax.load(tmp_path).params, ours.params)
    found["lm_head.weight"][3, 4] += 1
    save_file(found, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match="lm_head.weight .* differs from wte.weight"):
        lmjax.load(tmp_path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"activation_function": "relu"}, "activation_function is 'relu'"),
        ({"scale_attn_by_inverse_layer_idx": True}, "scale_attn_by_inverse_layer_idx is True"),
        ({"attn_pdrop": 0.3}, "one rate for all"),
        ({"n_head": 5}, "24, which does not divide into 5 heads"),
        ({"n_layer": 2}, "no place for"),
        ({"n_layer": 4}, "lacks transformer.h.3"),
    ],
)
def test_what_cannot_be_loaded(directory, tmp_path, change, message):
    (tmp_path / "model.safetensors").symlink_to(directory / "model.safetensors")
    write_json(tmp_path / "config.json", {**read_json(directory / "config.json"), **change})
    with pytest.raises(ValueError, match=message):
        lmjax.load(tmp_path)


def test_too_long(ours):
    model, params, _ = ours
    with pytest.raises(ValueError, match="41 tokens do not fit the 40 positions"):
        model.apply({"params": params}, np.zeros((1, 41), np.int32))
    with pytest.raises(ValueError, match="49 tokens do not fit the 40 positions"):
        generate(model, params, np.zeros((1, 20), np.int32), max_length=30, eos=None)


def test_training_flops_count_the_products():
    """PaLM's appendix B: 6 x parameters in products + 12 x L x D x T per token."""
    kernels = 12 * 12 * 768**2 + 50_257 * 768
    per_token = GPT2Config().training_flops(2, 1_024) / 2_048
    assert per_token == 6 * kernels + 12 * 12 * 768 * 1_024

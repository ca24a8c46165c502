"""Parity with transformers' PyTorch BERT and RoBERTa, through files."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers

import lmjax
from lmjax.interop import bert as interop
from lmjax.interop.safetensors import Tensors, read_json, write_json
from lmjax.models.bert import PRESETS, Bert

SIZES = dict(
    vocab_size=97,
    hidden_size=24,
    num_hidden_layers=3,
    num_attention_heads=4,
    intermediate_size=56,
    attn_implementation="eager",
)
KINDS = {
    "pretraining": lambda: transformers.BertForPreTraining(
        transformers.BertConfig(**SIZES, max_position_embeddings=40)
    ),
    "masked": lambda: transformers.BertForMaskedLM(
        transformers.BertConfig(**SIZES, max_position_embeddings=40, hidden_act="gelu_new")
    ),
    "encoder": lambda: transformers.BertModel(
        transformers.BertConfig(**SIZES, max_position_embeddings=40)
    ),
    "roberta": lambda: transformers.RobertaForMaskedLM(
        transformers.RobertaConfig(**SIZES, max_position_embeddings=42, type_vocab_size=1)
    ),
}
LENGTHS = np.array([15, 11, 4, 8])


@pytest.fixture(scope="module", params=KINDS)
def pair(request, tmp_path_factory):
    """(kind, their model, its directory, ours)."""
    torch.manual_seed(0)
    theirs = KINDS[request.param]().eval()
    with torch.no_grad():
        for parameter in theirs.parameters():  # biases and norms away from 0 and 1
            parameter.add_(0.1 * torch.randn_like(parameter))
    directory = tmp_path_factory.mktemp(request.param)
    theirs.save_pretrained(directory, safe_serialization=True)
    return request.param, theirs, directory, lmjax.load(directory)


@pytest.fixture(scope="module")
def batch():
    rng = np.random.default_rng(0)
    real = np.arange(15) < LENGTHS[:, None]
    return np.where(real, rng.integers(5, 97, (4, 15)), 1), rng.integers(0, 2, (4, 15)), real


def their_outputs(theirs, kind, batch):
    tokens, types, real = (torch.from_numpy(x).long() for x in batch)
    types = types * 0 if kind == "roberta" else types
    return theirs(input_ids=tokens, token_type_ids=types, attention_mask=real)


def our_inputs(kind, batch):
    tokens, types, real = batch
    return tokens, types * (kind != "roberta"), None, real.astype(np.int32)


def test_outputs_with_padding(pair, batch):
    kind, theirs, _, (model, params, _) = pair
    with torch.no_grad():
        expected = their_outputs(theirs, kind, batch)
    variables, real = {"params": params}, batch[2]
    with jax.default_matmul_precision("highest"):
        found = model.apply(variables, *our_inputs(kind, batch))
        encoded = model.apply(variables, *our_inputs(kind, batch), method="encode")
        if kind == "pretraining":
            verdict = model.apply(variables, encoded, method="judge")
            assert np.abs(verdict - expected.seq_relationship_logits.numpy()).max() < 2e-5
        if kind == "encoder":
            pooled = model.apply(variables, encoded, method="pool")
            assert np.abs(pooled - expected.pooler_output.numpy()).max() < 2e-5
    words = {"pretraining": "prediction_logits", "encoder": "last_hidden_state"}
    logits = expected[words.get(kind, "logits")].numpy()
    assert np.abs(logits[real]).max() > 1
    np.testing.assert_allclose(np.asarray(found)[real], logits[real], atol=2e-5)


@pytest.mark.parametrize("pair", [kind for kind in KINDS if kind != "encoder"], indirect=True)
def test_gradients(pair, batch):
    """Of the cross-entropy of some words, and of the verdict."""
    kind, theirs, _, (model, params, _) = pair
    places = np.array([[1, 3], [0, 7], [2, 3], [5, 6]])
    words = np.array([[9, 10], [11, 12], [13, 14], [15, 16]])
    theirs.zero_grad()
    outputs = their_outputs(theirs, kind, batch)
    logits = outputs["prediction_logits" if kind == "pretraining" else "logits"]
    chosen = logits[torch.arange(4)[:, None], torch.from_numpy(places)]
    loss = torch.nn.functional.cross_entropy(
        chosen.flatten(0, 1), torch.from_numpy(words).flatten()
    )
    if kind == "pretraining":
        loss = loss + outputs.seq_relationship_logits.log_softmax(-1)[:, 1].sum()
    loss.backward()
    expected = {name: p.grad.numpy() for name, p in theirs.named_parameters() if p.grad is not None}

    quiet = Bert(dataclasses.replace(model.config, dropout=0.0))

    def our_loss(params):
        variables = {"params": params}
        logits = quiet.apply(variables, *our_inputs(kind, batch))
        chosen = jax.nn.log_softmax(logits[jnp.arange(4)[:, None], places])
        loss = -jnp.take_along_axis(chosen, words[..., None], -1).mean()
        if kind == "pretraining":
            encoded = quiet.apply(variables, *our_inputs(kind, batch), method="encode")
            verdict = quiet.apply(variables, encoded, method="judge")
            loss += jax.nn.log_softmax(verdict)[:, 1].sum()
        return loss

    with jax.default_matmul_precision("highest"):
        found = dict(interop.export_tensors(model.config, jax.jit(jax.grad(our_loss))(params)))
    assert found.keys() == expected.keys()
    for name, gradient in expected.items():
        if name.endswith("self.key.bias"):  # no score depends on it but by rounding
            assert np.abs(found[name]).max() < 1e-5
            continue
        tolerance = 2e-5 * np.abs(gradient).max()
        np.testing.assert_allclose(found[name], gradient, atol=tolerance, err_msg=name)


def test_packed_texts_do_not_see_each_other(pair, batch):
    kind, _, _, (model, params, _) = pair
    tokens = batch[0]
    row = np.concatenate([tokens[0, :6], tokens[1, :9]])[None]
    segments = np.repeat([1, 2], [6, 9])[None]
    positions = np.concatenate([np.arange(6), np.arange(9)])[None]
    with jax.default_matmul_precision("highest"):
        packed = model.apply({"params": params}, row, None, positions, segments)
        alone = [
            model.apply({"params": params}, tokens[i : i + 1, :n]) for i, n in ((0, 6), (1, 9))
        ]
    np.testing.assert_allclose(packed, np.concatenate(alone, 1), atol=2e-5)


def test_files_come_back_byte_for_byte(pair, tmp_path):
    _, theirs, directory, (model, params, _) = pair
    interop.save_pretrained(tmp_path / "again", model.config, params)
    before, after = Tensors(directory), Tensors(tmp_path / "again")
    assert before.keys() == after.keys()
    for key in before.keys():
        shape = before.shape(key)
        assert before.read(key, shape).tobytes() == after.read(key, shape).tobytes()
    again = type(theirs).from_pretrained(tmp_path / "again")
    assert again.config.hidden_act == theirs.config.hidden_act
    assert lmjax.load(tmp_path / "again").model.config == model.config


@pytest.mark.parametrize("pair", ["pretraining"], indirect=True)
def test_old_names_and_what_a_file_holds_beside_its_model(pair, tmp_path):
    from safetensors.numpy import save_file

    _, _, directory, (model, params, _) = pair
    tensors, found = Tensors(directory), {}
    for key in tensors.keys():
        name = key.replace("LayerNorm.weight", "LayerNorm.gamma")
        found[name.replace("LayerNorm.bias", "LayerNorm.beta")] = tensors.read(
            key, tensors.shape(key)
        )
    save_file(found, tmp_path / "model.safetensors")
    content = read_json(directory / "config.json")
    for architecture, left in (
        ("BertForPreTraining", set()),
        ("BertForMaskedLM", {"pooler", "verdict"}),
    ):
        write_json(tmp_path / "config.json", {**content, "architectures": [architecture]})
        loaded = lmjax.load(tmp_path).params
        assert loaded.keys() == params.keys() - left
        for name in loaded:
            jax.tree.map(np.testing.assert_array_equal, loaded[name], params[name])


@pytest.mark.parametrize(
    ("preset", "kind", "parameters"),
    [
        ("base", "encoder", 109_482_240),
        ("base", "pretraining", 110_106_428),
        ("base", "masked_lm", 109_514_298),
        ("large", "encoder", 335_141_888),
        ("large", "pretraining", 336_226_108),
        ("large", "masked_lm", 335_174_458),
        ("base-cased", "encoder", 108_310_272),
        ("base-cased", "pretraining", 108_932_934),
        ("roberta-base", "masked_lm", 124_697_433),
        ("roberta-base", "encoder", 124_645_632),
        ("roberta-large", "masked_lm", 355_412_057),
        ("roberta-large", "encoder", 355_359_744),
    ],
)
def test_published_sizes(preset, kind, parameters):
    config = dataclasses.replace(PRESETS[preset], kind=kind)
    shapes = interop.parameter_shapes(config)
    assert sum(x.size for x in jax.tree.leaves(shapes)) == parameters
    assert interop.config_from_json(interop.config_to_json(config)) == config


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"hidden_act": "relu"}, "hidden_act is 'relu', not one of"),
        ({"is_decoder": True}, "is_decoder is True"),
        ({"attention_probs_dropout_prob": 0.3}, "one rate for both"),
        ({"num_attention_heads": 5}, "24, which does not divide into 5 heads"),
        ({"num_hidden_layers": 2}, "a BERT of its config has no place for"),
        ({"num_hidden_layers": 4}, "lacks .*encoder.layer.3"),
        ({"model_type": "electra"}, "model_type 'electra'"),
    ],
)
def test_what_cannot_be_loaded(pair, tmp_path, change, message):
    _, _, directory, _ = pair
    (tmp_path / "model.safetensors").symlink_to(directory / "model.safetensors")
    write_json(tmp_path / "config.json", {**read_json(directory / "config.json"), **change})
    with pytest.raises(ValueError, match=message):
        lmjax.load(tmp_path)


def test_too_long(pair):
    _, _, _, (model, params, _) = pair
    with pytest.raises(ValueError, match="41 tokens do not fit the 40 positions"):
        model.apply({"params": params}, np.zeros((1, 41), np.int32))

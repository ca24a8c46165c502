"""Parity with transformers' PyTorch BART, through files."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from transformers import BartConfig as TheirConfig
from transformers import BartForConditionalGeneration

import lmjax
from lmjax.decoding.beam_search import Beam
from lmjax.decoding.generate import generate
from lmjax.interop import bart as interop
from lmjax.interop.safetensors import Tensors, read_json, write_json
from lmjax.models import bart
from lmjax.models.bart import PRESETS, Bart, BartConfig

SIZES = dict(
    vocab_size=97,
    max_position_embeddings=40,
    d_model=24,
    encoder_layers=3,
    decoder_layers=2,
    encoder_attention_heads=4,
    decoder_attention_heads=4,
    encoder_ffn_dim=56,
    decoder_ffn_dim=56,
)
LENGTHS = np.array([11, 7, 2, 15])


@pytest.fixture(scope="module")
def theirs():
    torch.manual_seed(0)
    config = TheirConfig(**SIZES, attn_implementation="eager", forced_eos_token_id=None)
    model = BartForConditionalGeneration(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():  # biases and norms away from 0 and 1
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model


@pytest.fixture(scope="module")
def directory(theirs, tmp_path_factory):
    directory = tmp_path_factory.mktemp("bart")
    theirs.save_pretrained(directory, safe_serialization=True)
    return directory


@pytest.fixture(scope="module")
def ours(directory):
    return lmjax.load(directory)


@pytest.fixture(scope="module")
def texts():
    """Sources of several lengths, padded with 1, and what the decoder reads."""
    draw = np.random.default_rng(0)
    inputs = draw.integers(3, 97, (4, 15))
    inputs[np.arange(15) >= LENGTHS[:, None]] = 1
    decoder_inputs = draw.integers(3, 97, (4, 9))
    decoder_inputs[:, 0] = 2
    return inputs, decoder_inputs


@pytest.fixture(scope="module")
def expected(theirs, texts):
    return torch_logits(theirs, *texts).detach().numpy()


def torch_logits(model, inputs, decoder_inputs):
    return model(
        torch.from_numpy(inputs),
        attention_mask=torch.from_numpy(inputs != 1).long(),
        decoder_input_ids=torch.from_numpy(decoder_inputs),
    ).logits


def test_logits(ours, texts, expected):
    model, params, tokenizer = ours
    assert tokenizer is None
    with jax.default_matmul_precision("highest"):
        found = jax.jit(model.apply)({"params": params}, *texts)
    assert np.abs(expected).max() > 1
    np.testing.assert_allclose(found, expected, atol=2e-5)


def test_the_decoding_state(ours, texts, expected):
    """Four tokens at once, then one at a time."""
    model, params, _ = ours
    inputs, decoder_inputs = map(jnp.asarray, texts)
    with jax.default_matmul_precision("highest"):
        state = bart.start_decoding(model, params, inputs, 12)
        found, state = bart.extend(model, params, decoder_inputs[:, :4], state)
        np.testing.assert_allclose(found, expected[:, :4], atol=2e-5)
        for i in range(4, 9):
            found, state = bart.extend(model, params, decoder_inputs[:, i : i + 1], state)
            np.testing.assert_allclose(found[:, 0], expected[:, i], atol=2e-5)
    assert state.length.tolist() == [9] * 4


def test_gradients(theirs, ours, texts):
    model, params, _ = ours
    targets = np.random.default_rng(1).integers(0, 97, (4, 9))
    theirs.zero_grad()
    logits = torch_logits(theirs, *texts)
    torch.nn.functional.cross_entropy(
        logits.reshape(-1, 97), torch.from_numpy(targets).reshape(-1)
    ).backward()
    theirs_gradients = {name: p.grad.numpy() for name, p in theirs.named_parameters()}

    def loss(params):
        log_p = jax.nn.log_softmax(model.apply({"params": params}, *texts))
        return -jnp.take_along_axis(log_p, targets[..., None], -1).mean()

    with jax.default_matmul_precision("highest"):
        gradients = jax.jit(jax.grad(loss))(params)
    found = dict(interop.export_tensors(model.config, gradients))
    del found[interop.BIAS]
    assert found.keys() == theirs_gradients.keys()
    for name, expected in theirs_gradients.items():
        scale = max(np.abs(expected).max(), 1e-3)
        np.testing.assert_allclose(found[name], expected, atol=2e-5 * scale, err_msg=name)


def test_packed_texts_do_not_see_each_other(ours, texts):
    _, params, _ = ours
    apply = jax.jit(ours.model.apply)
    (inputs, targets), sizes = texts, [(11, 5), (7, 4)]
    lengths = np.array(sizes).T
    segments = [np.repeat([1, 2], n)[None] for n in lengths]
    together = [
        np.concatenate([rows[i, :k] for i, k in enumerate(n)])[None]
        for rows, n in zip((inputs, targets), lengths, strict=True)
    ]
    with jax.default_matmul_precision("highest"):
        packed = apply({"params": params}, *together, *segments)
        alone = [
            apply({"params": params}, inputs[i : i + 1, :s], targets[i : i + 1, :t])
            for i, (s, t) in enumerate(sizes)
        ]
    np.testing.assert_allclose(packed, np.concatenate(alone, 1), atol=2e-5)


def test_no_target_sees_a_later_one_and_no_source_its_padding(ours, texts):
    model, params, _ = ours

    def logit(moved):
        tables = {
            half: {**params[half], "table": params[half]["table"] + moved[half]} for half in moved
        }
        return model.apply({"params": {**params, **tables}}, *(x[1:2] for x in texts))[0, 5].sum()

    zeros = {
        half: jnp.zeros_like(params[half]["table"])
        for half in ("encoder_positions", "decoder_positions")
    }
    seen = {half: np.abs(g).sum(1) > 0 for half, g in jax.jit(jax.grad(logit))(zeros).items()}
    assert np.flatnonzero(seen["encoder_positions"]).tolist() == [*range(2, 9)]
    assert np.flatnonzero(seen["decoder_positions"]).tolist() == [*range(2, 8)]


@pytest.mark.parametrize("beams", [1, 3])
def test_generation(theirs, ours, texts, beams):
    model, params, _ = ours
    inputs = texts[0]
    strategy = {"strategy": Beam(beams, alpha=0)} if beams > 1 else {}
    found = generate(model, params, inputs, max_length=8, eos=None, **strategy).tokens
    expected = theirs.generate(
        torch.from_numpy(inputs),
        attention_mask=torch.from_numpy(inputs != 1).long(),
        min_new_tokens=8,
        max_new_tokens=8,
        num_beams=beams,
        length_penalty=0.0,
        do_sample=False,
        eos_token_id=None,
    )
    found = found[:, 0] if beams > 1 else found
    assert found.tolist() == expected[:, 1:].tolist()


def test_files_come_back_byte_for_byte(ours, theirs, directory, texts, expected, tmp_path):
    model, params, _ = ours
    interop.save_pretrained(tmp_path / "again", model.config, params)
    before, after = Tensors(directory), Tensors(tmp_path / "again")
    assert before.keys() <= after.keys() <= before.keys() | {interop.BIAS}
    for key in before.keys():
        shape = before.shape(key)
        assert before.read(key, shape).tobytes() == after.read(key, shape).tobytes()
    again, how = BartForConditionalGeneration.from_pretrained(
        tmp_path / "again", output_loading_info=True
    )
    assert not how["missing_keys"] and not how["unexpected_keys"]
    assert again.config.decoder_ffn_dim == 56
    found = torch_logits(again.eval(), *texts).detach().numpy()
    np.testing.assert_allclose(found, expected, atol=2e-6)  # here with PyTorch's fused attention


@pytest.mark.parametrize(("preset", "parameters"), [("base", 139_420_416), ("large", 406_291_456)])
def test_published_sizes(preset, parameters):
    shapes = interop.parameter_shapes(PRESETS[preset])
    assert sum(x.size for x in jax.tree.leaves(shapes)) == parameters
    config = interop.config_from_json(interop.config_to_json(PRESETS[preset]))
    assert config == PRESETS[preset]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"activation_function": "relu"}, "activation_function is 'relu'"),
        ({"scale_embedding": True}, "scale_embedding is True"),
        ({"decoder_ffn_dim": 60}, "decoder_ffn_dim is 60 and encoder_ffn_dim 56"),
        ({"encoder_attention_heads": 5, "decoder_attention_heads": 5}, "into 5 heads"),
        ({"encoder_layers": 2}, "no place for"),
        ({"decoder_layers": 3}, "lacks model.decoder.layers.2"),
        ({"pad_token_id": 97}, "padding is 97"),
        ({"classifier_dropout": 1.0}, "classifier_dropout is 1.0"),
        (
            {"architectures": ["BartForSequenceClassification"], "eos_token_id": 3},
            "eos_token_id is 3 and decoder_start_token_id 2",
        ),
    ],
)
def test_what_cannot_be_loaded(directory, tmp_path, change, message):
    (tmp_path / "model.safetensors").symlink_to(directory / "model.safetensors")
    write_json(tmp_path / "config.json", {**read_json(directory / "config.json"), **change})
    with pytest.raises(ValueError, match=message):
        lmjax.load(tmp_path)


def test_too_long(ours):
    model, params, _ = ours
    text, long = np.zeros((1, 3), np.int32), np.zeros((1, 41), np.int32)
    for inputs in ((long, text), (text, long)):
        with pytest.raises(ValueError, match="41 tokens do not fit the 40 positions"):
            model.apply({"params": params}, *inputs)
    with pytest.raises(ValueError, match="50 tokens do not fit the 40 positions"):
        generate(model, params, text, max_length=50, eos=None)


def test_dropout_is_only_for_training(ours, texts):
    config = dataclasses.replace(ours.model.config, dropout=0.5, activation_dropout=0.5)
    apply, variables = jax.jit(Bart(config).apply), {"params": ours.params}
    calm = jax.jit(ours.model.apply)(variables, *texts)
    np.testing.assert_array_equal(apply(variables, *texts), calm)
    shaken = apply(variables, *texts, rngs={"dropout": jax.random.key(0)})
    assert np.abs(shaken - calm).max() > 0.1


def test_training_flops_count_the_products():
    kernels = 6 * (4 * 768**2 + 2 * 768 * 3_072) * 256 + 6 * (6 * 768**2 + 2 * 768 * 3_072) * 64
    kernels += 6 * 2 * 768**2 * 256 + 50_265 * 768 * 64
    scores = 6 * 2 * 768 * (256**2 + 64**2 + 64 * 256)
    assert BartConfig().training_flops(4, 256, 64) == 6 * 4 * (kernels + scores)

"""Parity with transformers' PyTorch T5, on small random models that both sides hold."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.numpy import save_file
from transformers import (
    AutoModelForSeq2SeqLM,
    MT5Config,
    T5ForConditionalGeneration,
    T5Tokenizer,
)
from transformers import T5Config as TorchConfig

from lmjax.data.tokenizers import SentencePieceTokenizer, train_tokenizer
from lmjax.interop import t5 as interop
from lmjax.interop.safetensors import Tensors
from lmjax.models import t5
from lmjax.models.t5 import PRESETS, T5, T5Config

# Heads x head width differs from the width, and the decoder has its own number of layers.
SIZES = {"vocab_size": 97, "d_model": 24, "d_kv": 8, "d_ff": 40, "num_heads": 4, "num_layers": 3}
SIZES |= {"num_decoder_layers": 2, "dropout_rate": 0.0, "decoder_start_token_id": 0}
CONFIGS = {
    "1.0": TorchConfig(**SIZES),
    "1.1": TorchConfig(**SIZES, feed_forward_proj="gated-gelu", tie_word_embeddings=False),
    "mt5": MT5Config(**SIZES),  # by its defaults what 1.1 says explicitly
}
TOLERANCE = 2e-4


def save_reference(directory, config, **options):
    """A random transformers model, written by its own save_pretrained."""
    torch.manual_seed(0)
    model = AutoModelForSeq2SeqLM.from_config(config).eval()
    for parameter in model.parameters():  # norms begin at one and would hide a mistake
        parameter.data += 0.1 * torch.randn_like(parameter)
    model.save_pretrained(directory, **options)
    return model


@pytest.fixture(scope="module", params=["1.0", "mt5"])
def reference(request, tmp_path_factory):
    directory = tmp_path_factory.mktemp("reference") / request.param
    return save_reference(directory, CONFIGS[request.param]), directory


def batch():
    """Two texts; the second ends in padding on the input side. Longer than the exact buckets."""
    rng = np.random.default_rng(0)
    inputs, targets = rng.integers(2, 97, (2, 30)), rng.integers(2, 97, (2, 40))
    inputs[1, 19:] = 0
    return inputs, np.concatenate([np.zeros((2, 1), int), targets[:, :-1]], 1), targets


def export(params, config, directory):
    interop.save_pretrained(directory, config, params)
    return directory


def tensors(directory):
    with safe_open(directory / "model.safetensors", framework="np") as file:
        return {key: file.get_tensor(key) for key in file.keys()}


def test_logits_and_gradients_are_those_of_transformers(reference, tmp_path):
    model, directory = reference
    inputs, decoder_inputs, targets = batch()
    attention_mask = torch.tensor(inputs != 0)
    model.zero_grad()
    out = model(
        torch.tensor(inputs),
        attention_mask=attention_mask,
        decoder_input_ids=torch.tensor(decoder_inputs),
        labels=torch.tensor(targets),
    )
    out.loss.backward()
    config, params = interop.load_pretrained(directory)

    def loss(params):
        logits = T5(config).apply({"params": params}, inputs, decoder_inputs)
        nll = -jax.nn.log_softmax(logits)[jnp.arange(2)[:, None], jnp.arange(40), targets]
        return nll.mean(), logits

    with jax.default_matmul_precision("highest"):
        grads, logits = jax.jit(jax.grad(loss, has_aux=True))(params)
    np.testing.assert_allclose(logits, out.logits.detach().numpy(), rtol=0, atol=TOLERANCE)

    # Torch's gradients are a checkpoint like any other: the same table maps them.
    save_file(
        {name: p.grad.numpy() for name, p in model.named_parameters()},
        tmp_path / "model.safetensors",
    )
    expected = interop.import_params(config, Tensors(tmp_path))
    for grad, wanted in zip(jax.tree.leaves(grads), jax.tree.leaves(expected), strict=True):
        size = np.abs(wanted).max()
        assert size > 1e-5
        np.testing.assert_allclose(grad, wanted, rtol=0, atol=2e-5 * size)


def test_cached_decoding_is_that_of_transformers(reference):
    model, directory = reference
    config, params = interop.load_pretrained(directory)
    inputs, decoder_inputs, _ = batch()
    ours = T5(config)
    start_decoding = jax.jit(
        lambda params: t5.start_decoding(ours, params, jnp.asarray(inputs), length=12),
    )
    extend = jax.jit(
        lambda params, tokens, state: t5.extend(ours, params, tokens, state),
    )
    with jax.default_matmul_precision("highest"), torch.no_grad():
        state = start_decoding(params)
        encoded = model.encoder(torch.tensor(inputs), attention_mask=torch.tensor(inputs != 0))
        past, start = None, 0
        for length in (4, 1, 4):  # a prefix, one step, several at once
            tokens = decoder_inputs[:, start : start + length]
            logits, state = extend(params, tokens, state)
            out = model(
                encoder_outputs=encoded,
                attention_mask=torch.tensor(inputs != 0),
                decoder_input_ids=torch.tensor(tokens),
                past_key_values=past,
                use_cache=True,
            )
            np.testing.assert_allclose(logits, out.logits.numpy(), rtol=0, atol=TOLERANCE)
            past, start = out.past_key_values, start + length


def test_an_import_exports_the_same_tensors(reference, tmp_path):
    _, directory = reference
    config, params = interop.load_pretrained(directory)
    once = export(params, config, tmp_path / "once")
    theirs, ours = tensors(directory), tensors(once)
    assert theirs.keys() == ours.keys()
    assert all(theirs[key].tobytes() == ours[key].tobytes() for key in theirs)

    again, params_again = interop.load_pretrained(once)
    twice = export(params_again, again, tmp_path / "twice")
    for file in once.iterdir():
        assert file.read_bytes() == (twice / file.name).read_bytes()


def test_transformers_reads_an_export_completely(reference, tmp_path):
    model, directory = reference
    config, params = interop.load_pretrained(directory)
    exported = export(params, config, tmp_path / "export")
    theirs, info = T5ForConditionalGeneration.from_pretrained(exported, output_loading_info=True)
    assert not any(info.values()), info
    assert theirs.generation_config.decoder_start_token_id == 0
    # Class names apart, their configuration of our directory is their own.
    named = (
        "model_type",
        "architectures",
        "tokenizer_class",
        "_name_or_path",
        "torch_dtype",
        "dtype",
    )
    mine, own = (
        {k: v for k, v in c.to_dict().items() if k not in named}
        for c in (theirs.config, model.config)
    )
    assert mine == own
    state = theirs.state_dict()
    assert all(torch.equal(tensor, state[key]) for key, tensor in model.state_dict().items())


@pytest.mark.parametrize("name", PRESETS)
def test_configs_survive_the_way_through_json(name):
    content = json.loads(json.dumps(interop.config_to_json(PRESETS[name])))
    assert content["model_type"] == ("mt5" if name.startswith("mt5") else "t5")
    assert interop.config_from_json(content) == PRESETS[name]


def test_fields_that_old_configs_lack_have_their_model_types_defaults():
    old = {"d_model": 768, "num_layers": 12, "num_heads": 12, "d_ff": 3072}
    assert interop.config_from_json({"model_type": "t5", **old}) == PRESETS["base"]
    assert interop.config_from_json({"model_type": "mt5"}) == PRESETS["mt5-small"]


@pytest.mark.parametrize(
    ("architecture", "preset"),
    [
        ("T5WithLMHeadModel", "small"),
        ("T5Model", "small"),
        ("MT5ForConditionalGeneration", "mt5-small"),
    ],
)
def test_the_oldest_configs_have_only_an_architecture(architecture, preset):
    content = {"architectures": [architecture]}
    assert interop.config_from_json(content) == PRESETS[preset]
    assert interop.config_from_json({**content, "model_type": None}) == PRESETS[preset]
    with pytest.raises(ValueError, match="model_type is None, not one of"):
        interop.config_from_json({"architectures": ["BertModel"]})


def test_null_in_a_config_means_the_default():
    known = interop.config_to_json(PRESETS["v1_1-small"])
    kept = ("architectures", "model_type", "d_model", "num_layers", "num_heads")
    content = {name: value if name in kept else None for name, value in known.items()}
    expected = {name: known[name] for name in kept}
    assert interop.config_from_json(content) == interop.config_from_json(expected)


def test_transformers_5_says_by_another_field_whether_output_is_tied():
    content = {"model_type": "t5", "tie_word_embeddings": True, "scale_decoder_outputs": False}
    assert not interop.config_from_json(content).tied


@pytest.mark.parametrize(
    "change",
    [
        {"feed_forward_proj": "gated-silu"},
        {"is_gated_act": True},
        {"model_type": "umt5"},
        {"decoder_start_token_id": 2},
        {"d_model": "wide"},
        {"num_heads": 0},
    ],
)
def test_a_config_of_something_else_is_refused_by_name(change):
    with pytest.raises(ValueError, match=f"here.json.*({'|'.join(change)}|describes no T5)"):
        interop.config_from_json({"model_type": "t5", **change}, "here.json")


# --- files that differ


@pytest.fixture
def tied(tmp_path):
    save_reference(tmp_path / "tied", CONFIGS["1.0"])
    return tmp_path / "tied"


def rewrite(directory, **changes):
    """Replaces tensors (None removes one) of a directory that is one file."""
    content = {**tensors(directory), **changes}
    content = {key: value for key, value in content.items() if value is not None}
    save_file(content, directory / "model.safetensors", metadata={"format": "pt"})


def test_copies_of_the_embedding_and_the_unused_table_are_dropped(tied):
    embedding = tensors(tied)["shared.weight"]
    expected = interop.load_pretrained(tied)
    names = [*interop.EMBEDDINGS[1:], "lm_head.weight"]
    rewrite(tied, **dict.fromkeys(names, embedding), **{interop.UNUSED: np.zeros((32, 4), "f4")})
    assert_same(interop.load_pretrained(tied), expected)
    rewrite(tied, **{"shared.weight": None})  # some tools keep one of the other names
    assert_same(interop.load_pretrained(tied), expected)


def assert_same(one, other):
    assert one[0] == other[0]
    jax.tree.map(np.testing.assert_array_equal, one[1], other[1])


def test_a_copy_that_differs_is_refused(tied):
    rewrite(tied, **{"lm_head.weight": tensors(tied)["shared.weight"] + 1})
    with pytest.raises(ValueError, match="lm_head.weight in .* differs from shared.weight"):
        interop.load_pretrained(tied)


def test_missing_and_left_over_tensors_are_named(tied):
    key = "decoder.block.1.layer.1.EncDecAttention.q.weight"
    kept = tensors(tied)[key]
    rewrite(tied, **{key: None, "shared.weight": None})
    with pytest.raises(ValueError, match=f"lacks {key} and 1 more"):
        interop.load_pretrained(tied)
    rewrite(tied, **{key: kept, "shared.weight": np.zeros((97, 24), "f4"), "head.bias": kept})
    with pytest.raises(ValueError, match="holds head.bias, which a T5"):
        interop.load_pretrained(tied)


@pytest.mark.parametrize(
    "key", ["shared.weight", "encoder.block.2.layer.1.DenseReluDense.wi.weight"]
)
def test_a_tensor_of_another_shape_is_named(tied, key):
    rewrite(tied, **{key: tensors(tied)[key][:-1]})
    with pytest.raises(ValueError, match=rf"{key} in .*model.safetensors is F32 .* calls for"):
        interop.load_pretrained(tied)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_files_of_another_precision_become_float32(tmp_path, dtype):
    model = save_reference(tmp_path / "whole", CONFIGS["1.1"])
    model.to(dtype).save_pretrained(tmp_path / "other")
    _, params = interop.load_pretrained(tmp_path / "other")
    expected = model.get_parameter("lm_head.weight").detach().float().numpy()
    assert params["output"].dtype == np.float32
    np.testing.assert_array_equal(params["output"], expected)


def test_sharded_directories_go_both_ways(reference, tmp_path):
    model, directory = reference
    expected = interop.load_pretrained(directory)
    model.save_pretrained(tmp_path / "theirs", max_shard_size="20KB")
    assert len(list((tmp_path / "theirs").glob("*.safetensors"))) > 2
    assert_same(interop.load_pretrained(tmp_path / "theirs"), expected)

    interop.save_pretrained(tmp_path / "ours", *expected, shard_bytes=20_000)
    shards = sorted((tmp_path / "ours").glob("*.safetensors"))
    assert len(shards) > 2 and all(shard.stat().st_size < 23_000 for shard in shards)
    assert_same(interop.load_pretrained(tmp_path / "ours"), expected)
    read, info = T5ForConditionalGeneration.from_pretrained(
        tmp_path / "ours", output_loading_info=True
    )
    assert not any(info.values()), info
    assert torch.equal(read.shared.weight, model.shared.weight)


# --- writing


def test_parameters_of_another_config_are_not_written(tied, tmp_path):
    config, params = interop.load_pretrained(tied)
    with pytest.raises(ValueError, match="params: decoder/layers/attention/key is .* has"):
        interop.save_pretrained(
            tmp_path / "out", dataclasses.replace(config, decoder_layers=3), params
        )
    del params["embedding"]
    with pytest.raises(ValueError, match="params: embedding is absent"):
        interop.save_pretrained(tmp_path / "out", config, params)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["tied"]


def test_a_directory_in_use_is_not_overwritten(tied):
    before = {p.name: p.read_bytes() for p in tied.iterdir()}
    with pytest.raises(FileExistsError, match="exists already"):
        interop.save_pretrained(tied, *interop.load_pretrained(tied))
    assert before == {p.name: p.read_bytes() for p in tied.iterdir()}


def test_a_tokenizer_goes_along(tmp_path):
    """transformers' T5Tokenizer reads what we write, and gives the ids that ours does."""
    words = "the quick brown fox jumps over lazy dogs and runs far away from here".split()
    rng = np.random.default_rng(0)
    tokenizer = train_tokenizer((" ".join(rng.choice(words, 9)) for _ in range(200)), 60)
    config = dataclasses.replace(T5Config(), vocab=256, width=8, feed_forward=8, layers=1)
    shapes = interop.parameter_shapes(config)
    params = jax.tree.map(lambda x: np.zeros(x.shape, x.dtype), shapes)
    interop.save_pretrained(tmp_path / "out", config, params, tokenizer)

    theirs = T5Tokenizer.from_pretrained(tmp_path / "out", legacy=True)
    for text in ("the lazy fox runs", "the <extra_id_0> fox <extra_id_1>"):
        assert theirs(text).input_ids == [*tokenizer.encode(text), tokenizer.eos_id]
    assert len(theirs) == tokenizer.vocab_size
    assert interop.load_tokenizer(tmp_path / "out").sha256 == tokenizer.sha256


@pytest.mark.parametrize("extra_ids", [100, 7, 0])
def test_the_number_of_appended_sentinels_is_kept(tied, tmp_path, extra_ids):
    model = train_tokenizer(["a few words to train on", "and a few more words"], 25).model
    tokenizer = SentencePieceTokenizer(model, extra_ids)
    config, params = interop.load_pretrained(tied)
    params["embedding"] = np.zeros((200, config.width), "f4")
    config = dataclasses.replace(config, vocab=200)
    interop.save_pretrained(tmp_path / "out", config, params, tokenizer)
    assert interop.load_tokenizer(tmp_path / "out").vocab_size == tokenizer.vocab_size
    assert interop.load_tokenizer(tied) is None


def test_a_tokenizer_with_more_ids_than_rows_is_refused(tied, tmp_path):
    class Large:
        vocab_size = 98

    with pytest.raises(ValueError, match="98 ids .* 97 rows"):
        interop.save_pretrained(tmp_path / "out", *interop.load_pretrained(tied), Large())

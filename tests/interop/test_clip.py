"""Parity with transformers' PyTorch CLIP, through files."""

import dataclasses

import jax
import numpy as np
import pytest
import tokenizers
import torch
from safetensors.numpy import save_file
from transformers import CLIPConfig as TheirConfig
from transformers import CLIPImageProcessor, CLIPModel

import lmjax
from lmjax.interop import clip as interop
from lmjax.interop.safetensors import Tensors, read_json, write_json
from lmjax.models.clip import DEVIATION, MEAN, PRESETS
from lmjax.tasks.contrastive import Contrastive

TEXT = dict(
    vocab_size=97,
    max_position_embeddings=12,
    num_hidden_layers=3,
    hidden_size=24,
    num_attention_heads=4,
    intermediate_size=56,
)
PICTURE = dict(
    image_size=24,
    patch_size=8,
    num_hidden_layers=2,
    hidden_size=20,
    num_attention_heads=2,
    intermediate_size=44,
)
END = 90


def their_model(**common):
    """With an end token that is not the largest id, but for `eos_token_id` among `common`."""
    torch.manual_seed(0)
    text = TEXT | dict(eos_token_id=END) | common
    settings = TheirConfig(
        text_config=text,
        vision_config=PICTURE | common,
        projection_dim=16,
        attn_implementation="eager",
    )
    model = CLIPModel(settings).eval()
    with torch.no_grad():
        for parameter in model.parameters():  # biases and norms away from 0 and 1
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model


@pytest.fixture(scope="module")
def theirs():
    return their_model()


@pytest.fixture(scope="module")
def directory(theirs, tmp_path_factory):
    directory = tmp_path_factory.mktemp("clip")
    theirs.save_pretrained(directory, safe_serialization=True)
    return directory


@pytest.fixture(scope="module")
def ours(directory):
    return lmjax.load(directory)


@pytest.fixture(scope="module")
def batch():
    """Five pairs; texts end at different places, with anything after that."""
    rng = np.random.default_rng(0)
    tokens = rng.integers(0, END, (5, 12))
    tokens[np.arange(5), [3, 11, 1, 7, 7]] = END
    tokens[0, 8:10] = 96, END
    pictures = rng.uniform(size=(5, 24, 24, 3)).astype(np.float32)
    return {"pictures": pictures, "captions": tokens, "loss_weights": np.ones(5, np.float32)}


def outputs(model, batch):
    normalized = (batch["pictures"] - np.float32(MEAN)) / np.float32(DEVIATION)
    return model(
        input_ids=torch.from_numpy(batch["captions"]),
        pixel_values=torch.from_numpy(normalized.transpose(0, 3, 1, 2).copy()),
        return_loss=True,
    )


def check_embeddings_and_logits(theirs, model, params, batch):
    with torch.no_grad():
        expected = outputs(theirs, batch)

    def ours(params):
        bound = model.bind({"params": params})
        pictures, texts = batch["pictures"], batch["captions"]
        vectors = bound.encode_pictures(pictures), bound.encode_texts(texts)
        return *vectors, bound(pictures, texts)

    with jax.default_matmul_precision("highest"):
        pictures, texts, logits = jax.jit(ours)(params)
    np.testing.assert_allclose(pictures, expected.image_embeds, atol=2e-6)
    np.testing.assert_allclose(texts, expected.text_embeds, atol=2e-6)
    assert expected.logits_per_image.std() > 0.5
    np.testing.assert_allclose(logits, expected.logits_per_image, atol=2e-5)


def test_embeddings_and_logits(theirs, ours, batch):
    model, params, tokenizer = ours
    assert tokenizer is None and model.config.end == END
    check_embeddings_and_logits(theirs, model, params, batch)


def test_the_largest_id_ends_a_text_where_openai_says_so(tmp_path, batch):
    """As in OpenAI's files, whose end token has number 2; and GELU, which others have."""
    theirs = their_model(eos_token_id=2, hidden_act="gelu")
    theirs.save_pretrained(tmp_path, safe_serialization=True)
    model, params, _ = lmjax.load(tmp_path)
    assert model.config.end is None and model.config.exact_gelu
    check_embeddings_and_logits(theirs, model, params, batch)


def test_loss_and_gradients(theirs, ours, batch):
    model, params, _ = ours
    theirs.zero_grad()
    expected = outputs(theirs, batch)
    expected.loss.backward()
    task = Contrastive(model)

    def loss(params):
        return task.loss(params, {}, batch, task.normalizers(batch), {}, 0)[0]

    with jax.default_matmul_precision("highest"):
        both = jax.jit(jax.value_and_grad(loss))
        value, gradients = both(params)
    assert value == pytest.approx(expected.loss.item(), abs=1e-5)
    found = dict(interop.export_tensors(model.config, gradients))
    theirs_gradients = {name: p.grad.numpy() for name, p in theirs.named_parameters()}
    assert found.keys() == theirs_gradients.keys()
    largest = max(np.abs(gradient).max() for gradient in theirs_gradients.values())
    for name, gradient in theirs_gradients.items():
        np.testing.assert_allclose(found[name], gradient, atol=1e-5 * largest, err_msg=name)


def test_export(theirs, ours, tmp_path):
    model, params, _ = ours
    interop.save_pretrained(tmp_path / "again", model.config, params)
    assert Tensors(tmp_path / "again").shape("logit_scale") == ()
    again = CLIPModel.from_pretrained(tmp_path / "again")
    for name, tensor in theirs.state_dict().items():
        np.testing.assert_array_equal(again.state_dict()[name], tensor, err_msg=name)
    assert again.config.text_config.eos_token_id == END
    assert again.config.text_config.hidden_act == "quick_gelu"
    processor = CLIPImageProcessor.from_pretrained(tmp_path / "again")
    picture = np.random.default_rng(0).integers(256, size=(24, 24, 3)).astype(np.uint8)
    found = processor(picture, return_tensors="np")["pixel_values"][0].transpose(1, 2, 0)
    np.testing.assert_allclose(found, (picture / 255 - MEAN) / DEVIATION, atol=1e-6)
    assert interop.config_from_json(read_json(tmp_path / "again" / "config.json")) == model.config


def test_tokenizers(ours, tmp_path):
    """OpenAI's tokens begin and end a text; its older files are not read as GPT-2's."""
    vocabulary = {"a": 0, "a</w>": 1, "<|startoftext|>": 2, "<|endoftext|>": 3}
    model = tokenizers.models.BPE(vocabulary, [], end_of_word_suffix="</w>")
    whole = tokenizers.Tokenizer(model)
    whole.add_special_tokens(["<|startoftext|>", "<|endoftext|>"])
    model.save(str(tmp_path))
    assert (tmp_path / "merges.txt").is_file() and interop.load_tokenizer(tmp_path) is None
    whole.save(str(tmp_path / "tokenizer.json"))
    found = interop.load_tokenizer(tmp_path)
    assert (found.bos_id, found.eos_id) == (2, 3)
    model, params, _ = ours
    interop.save_pretrained(tmp_path / "saved", model.config, params, found)
    assert lmjax.load(tmp_path / "saved").tokenizer.sha256 == found.sha256


def test_every_setting_survives_a_config_json():
    default = PRESETS["vit-b-32"]
    assert interop.config_from_json({"projection_dim": None}) == default
    for config in (
        PRESETS["emoji"],
        dataclasses.replace(default, end=7, exact_gelu=True, norm_epsilon=1e-6, joint_width=99),
    ):
        assert interop.config_from_json(interop.config_to_json(config)) == config


def test_what_transformers_would_read_otherwise_is_not_saved(ours, tmp_path):
    """To it, an end of 2 means the largest id; and it does not bound the scale."""
    model, params, _ = ours
    config = dataclasses.replace(model.config, end=2)
    with pytest.raises(ValueError, match="end is 2, with which transformers takes the largest id"):
        interop.save_pretrained(tmp_path / "saved", config, params)
    assert not (tmp_path / "saved").exists()
    high = {**params, "scale": np.float32(6)}
    tensors = dict(interop.export_tensors(model.config, high))
    assert tensors["logit_scale"] == pytest.approx(np.log(100))


@pytest.mark.parametrize(
    ("tower", "setting", "value", "message"),
    [
        ("text_config", "attention_dropout", 0.1, "text_config.attention_dropout is 0.1"),
        ("vision_config", "num_channels", 1, "vision_config.num_channels is 1"),
        ("vision_config", "hidden_act", "gelu", "the same for both"),
        ("vision_config", "patch_size", 7, "describes no CLIP: .* patches of 7"),
        ("text_config", "num_attention_heads", 5, "width is 24, .* 5 heads"),
    ],
)
def test_settings_that_are_not_here_are_refused(directory, tower, setting, value, message):
    content = read_json(directory / "config.json")
    content[tower][setting] = value
    with pytest.raises(ValueError, match=message):
        interop.config_from_json(content)


def test_old_files_with_position_ids(theirs, ours, directory, tmp_path):
    """They hold the numbers of the positions as a tensor."""
    tensors = Tensors(directory)
    whole = {key: tensors.read(key, tensors.shape(key)) for key in tensors.keys()}
    whole["text_model.embeddings.position_ids"] = np.arange(12, dtype=np.float32)[None]
    save_file(whole, tmp_path / "model.safetensors")
    write_json(tmp_path / "config.json", read_json(directory / "config.json"))
    _, params, _ = lmjax.load(tmp_path)
    jax.tree.map(np.testing.assert_array_equal, params, ours.params)
    whole["text_model.embeddings.other"] = np.zeros(1, np.float32)
    save_file(whole, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match="holds text_model.embeddings.other, .* a CLIP of its"):
        lmjax.load(tmp_path)

"""Heads for fine-tuning: parity with transformers' PyTorch models, through files."""

import dataclasses
import functools
from typing import NamedTuple

import jax
import numpy as np
import pytest
import torch
import transformers

import lmjax
from lmjax.interop import bart, bert, gpt2, xlnet
from lmjax.interop.safetensors import Tensors
from lmjax.loading import describe
from lmjax.models.bart import Bart

PAD, END = 1, 2
ENCODER = dict(
    hidden_size=24,
    num_hidden_layers=2,
    num_attention_heads=4,
    intermediate_size=56,
    attn_implementation="eager",
)
SIZES = {
    "Bert": dict(ENCODER, max_position_embeddings=40),
    "Roberta": dict(ENCODER, max_position_embeddings=42, type_vocab_size=1),
    "GPT2": dict(n_positions=40, n_layer=2, n_embd=24, n_head=4, attn_implementation="eager"),
    "Bart": dict(
        max_position_embeddings=40,
        d_model=24,
        encoder_layers=2,
        decoder_layers=2,
        encoder_attention_heads=4,
        decoder_attention_heads=4,
        encoder_ffn_dim=56,
        decoder_ffn_dim=56,
        attn_implementation="eager",
    ),
    "XLNet": dict(d_model=24, n_layer=2, n_head=4, d_inner=56),
}
INTEROP = {"Bert": bert, "Roberta": bert, "GPT2": gpt2, "Bart": bart, "XLNet": xlnet}
LENGTHS = np.array([15, 11, 4, 8])


class Batch(NamedTuple):
    tokens: np.ndarray
    types: np.ndarray
    """Sentence A or B."""
    real: np.ndarray
    """What is no padding."""


def texts(family: str) -> Batch:
    """Of several lengths, padded, XLNet's in front. Each has </s> at its end, and once before."""
    rng = np.random.default_rng(0)
    tokens, types = rng.integers(5, 97, (4, 15)), rng.integers(0, 2, (4, 15))
    real = np.arange(15) < LENGTHS[:, None]
    tokens[:, 1] = tokens[np.arange(4), LENGTHS - 1] = END
    if family == "XLNet":
        tokens, types, real = (
            np.stack([np.roll(row, 15 - n) for row, n in zip(rows, LENGTHS, strict=True)])
            for rows in (tokens, types, real)
        )
    types = types * (family != "Roberta")
    return Batch(np.where(real, tokens, PAD), types, real)


def make(directory, family: str, head: str, labels: int | None = None):
    """Their model, saved, and ours, loaded."""
    torch.manual_seed(0)
    chosen = {} if labels is None else {"num_labels": labels}
    config = getattr(transformers, f"{family}Config")(
        **SIZES[family], **chosen, vocab_size=97, pad_token_id=PAD
    )
    theirs = getattr(transformers, f"{family}For{head}")(config).eval()
    with torch.no_grad():
        for parameter in theirs.parameters():  # biases and norms away from 0 and 1
            parameter.add_(0.1 * torch.randn_like(parameter))
    theirs.save_pretrained(directory, safe_serialization=True)
    return theirs, lmjax.load(directory)


def their_outputs(theirs, family: str, batch: Batch):
    tokens, types, real = (torch.from_numpy(x).long() for x in batch)
    more = {} if family in ("GPT2", "Bart") else {"token_type_ids": types}
    outputs = theirs(input_ids=tokens, attention_mask=real, **more)
    if "start_logits" in outputs:
        return torch.stack([outputs.start_logits, outputs.end_logits], -1)
    return outputs.logits


def our_outputs(model, params, family: str, batch: Batch):
    variables, segments = {"params": params}, batch.real.astype(np.int32)
    match family:
        case "GPT2":
            return model.apply(variables, batch.tokens, segment_ids=segments)
        case "Bart":
            return model.apply(variables, batch.tokens)
    outputs = model.apply(variables, batch.tokens, token_types=batch.types, segment_ids=segments)
    return outputs[0] if family == "XLNet" else outputs


CASES = [
    (family, head, labels)
    for family in SIZES
    for head, labels in (
        ("SequenceClassification", 5),
        ("TokenClassification", 3),
        ("QuestionAnsweringSimple" if family == "XLNet" else "QuestionAnswering", None),
    )
    if (family, head) != ("Bart", "TokenClassification")  # transformers has none
]


@pytest.mark.parametrize(("family", "head", "labels"), CASES)
def test_outputs_gradients_and_files(tmp_path, family, head, labels):
    """Gradients are of a random sum of the outputs."""
    theirs, (model, params, _) = make(tmp_path / "theirs", family, head, labels)
    batch, interop = texts(family), INTEROP[family]
    expected = their_outputs(theirs, family, batch)
    shown = batch.real[..., None] if expected.ndim == 3 else True
    weights = np.random.default_rng(1).normal(size=expected.shape) * shown
    (expected * torch.from_numpy(weights)).sum().backward()
    expected = expected.detach().numpy()

    @functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})
    @functools.partial(jax.value_and_grad, has_aux=True)
    def weighed(params):  # it runs once, so that compiling is what takes time
        outputs = our_outputs(model, params, family, batch)
        return (outputs * weights).sum(), outputs

    with jax.default_matmul_precision("highest"):
        (_, found), gradients = weighed(params)
    assert found.shape == expected.shape and np.abs(expected).max() > 0.3
    np.testing.assert_allclose(found * shown, expected * shown, atol=2e-5)
    gradients = dict(interop.export_tensors(model.config, gradients))
    theirs_by_name = dict(theirs.named_parameters())
    assert gradients.keys() == theirs_by_name.keys()
    largest = max(np.abs(gradient).max() for gradient in gradients.values())
    for name, parameter in theirs_by_name.items():
        unused = parameter.grad is None  # XLNet's vector of a word to guess
        gradient = np.zeros(parameter.shape) if unused else parameter.grad.numpy()
        np.testing.assert_allclose(gradients[name], gradient, atol=1e-5 * largest, err_msg=name)

    interop.save_pretrained(tmp_path / "again", model.config, params)
    assert describe(tmp_path / "again").config == model.config
    before, after = Tensors(tmp_path / "theirs"), Tensors(tmp_path / "again")
    assert before.keys() == after.keys()
    for key in before.keys():
        shape = before.shape(key)
        assert before.read(key, shape).tobytes() == after.read(key, shape).tobytes()
    again, how = type(theirs).from_pretrained(tmp_path / "again", output_loading_info=True)
    assert not how["missing_keys"] and not how["unexpected_keys"]
    assert again.config.num_labels == theirs.config.num_labels


@pytest.mark.parametrize("family", SIZES)
def test_as_many_labels_as_transformers_has_where_none_are_given(tmp_path, family):
    theirs, (model, _, _) = make(tmp_path, family, "SequenceClassification")
    assert model.config.labels == theirs.config.num_labels


def test_a_text_is_classified_alike_whichever_side_is_padded(tmp_path):
    """The reference reads the last place of the row, which is padding if that comes behind."""
    _, (model, params, _) = make(tmp_path, "XLNet", "SequenceClassification")
    front = texts("XLNet")
    behind = Batch(
        *(
            np.stack([np.roll(row, n) for row, n in zip(rows, LENGTHS, strict=True)])
            for rows in front
        )
    )
    assert behind.real[:, 0].all() and not behind.real[1:, -1].any()
    logits = jax.jit(lambda batch: our_outputs(model, params, "XLNet", batch))
    with jax.default_matmul_precision("highest"):
        np.testing.assert_allclose(logits(behind), logits(front), atol=2e-5)


def test_packed_texts_have_spans_of_their_own(tmp_path):
    """BART's decoder starts anew with each."""
    _, (model, params, _) = make(tmp_path, "Bart", "QuestionAnswering")
    two = texts("Bart").tokens[:2, :8]

    @jax.jit
    def logits(inputs, segments):
        return model.apply({"params": params}, inputs, inputs_segment_ids=segments)

    with jax.default_matmul_precision("highest"):
        packed = logits(two.reshape(1, 16), np.repeat([1, 2], 8)[None])
        alone = logits(two, np.ones((2, 8), np.int32))
    np.testing.assert_allclose(packed, np.concatenate(alone)[None], atol=2e-5)


def test_dropout_before_a_classifier(tmp_path):
    _, (model, params, _) = make(tmp_path, "Bart", "SequenceClassification")
    rates = dict(dropout=0.0, attention_dropout=0.0, classifier_dropout=0.5)
    model, tokens = Bart(dataclasses.replace(model.config, **rates)), texts("Bart").tokens

    @jax.jit
    def logits(key):
        return model.apply({"params": params}, tokens, rngs={"dropout": key})

    one, other = (logits(jax.random.key(i)) for i in range(2))
    assert np.abs(one - other).max() > 0.1

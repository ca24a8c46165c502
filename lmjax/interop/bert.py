"""BERT and RoBERTa to and from Hugging Face directories.

Reference files: transformers configuration_bert.py, modeling_bert.py, configuration_roberta.py,
modeling_roberta.py. The oldest files call a norm's scale and bias gamma and beta.
Departures: decoders, other activations, other kinds of positions and two different dropout rates
are refused by name.
"""

import os
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lmjax.data.fast_tokenizers import FastTokenizer
from lmjax.interop import mapping
from lmjax.interop.mapping import Source, Table
from lmjax.interop.safetensors import CONFIG, Tensors
from lmjax.models.bert import PRESETS, Bert, BertConfig
from lmjax.models.layers import unboxed

FIELDS = {
    "vocab": "vocab_size",
    "token_types": "type_vocab_size",
    "layers": "num_hidden_layers",
    "width": "hidden_size",
    "heads": "num_attention_heads",
    "feed_forward": "intermediate_size",
    "dropout": "hidden_dropout_prob",
    "norm_epsilon": "layer_norm_eps",
    "init_scale": "initializer_range",
}
DEFAULTS = {"bert": PRESETS["base"], "roberta": PRESETS["roberta-base"]}
"""What a config.json that lacks a field means, by its model_type."""
ARCHITECTURES = {
    "BertForPreTraining": "pretraining",
    "BertForMaskedLM": "masked_lm",
    "BertModel": "encoder",
    "BertForSequenceClassification": "text_classifier",
    "BertForTokenClassification": "token_classifier",
    "BertForQuestionAnswering": "span",
    "RobertaForMaskedLM": "masked_lm",
    "RobertaModel": "encoder",
    "RobertaForSequenceClassification": "text_classifier",
    "RobertaForTokenClassification": "token_classifier",
    "RobertaForQuestionAnswering": "span",
}
ACTIVATIONS = {"gelu": False, "gelu_new": True, "gelu_pytorch_tanh": True}
"""hidden_act -> BertConfig.tanh_gelu."""
FIXED = {"is_decoder": False, "position_embedding_type": "absolute", "tie_word_embeddings": True}
"""What a config.json may say only so, or leave out."""


def config_from_json(content: dict[str, Any], source: str = CONFIG) -> BertConfig:
    """The model that a config.json describes; null is as good as absent.

    Raises:
      ValueError: a setting that this BERT does not have.
    """
    content = {name: value for name, value in content.items() if value is not None}
    family = content.get("model_type")
    if family not in DEFAULTS:
        raise ValueError(f"{source}: model_type is {family!r}, not one of {list(DEFAULTS)}")
    default = DEFAULTS[family]
    for name, known in FIXED.items():
        if content.get(name, known) != known:
            raise ValueError(f"{source}: {name} is {content[name]!r}, but BERT here has {known!r}")
    fields = {ours: content.get(theirs, getattr(default, ours)) for ours, theirs in FIELDS.items()}
    attention = content.get("attention_probs_dropout_prob", fields["dropout"])
    if attention != fields["dropout"]:
        raise ValueError(
            f"{source}: attention_probs_dropout_prob is {attention} and hidden_dropout_prob"
            f" {fields['dropout']}, but BERT here has one rate for both"
        )
    activation = content.get("hidden_act", "gelu")
    if activation not in ACTIVATIONS:
        raise ValueError(f"{source}: hidden_act is {activation!r}, not one of {list(ACTIVATIONS)}")
    first = default.first_position
    rows = content.get("max_position_embeddings", first + default.positions)
    try:
        return BertConfig(
            positions=rows - first,
            first_position=first,
            tanh_gelu=ACTIVATIONS[activation],
            **fields,
            **mapping.head(content, ARCHITECTURES, "encoder", default.labels),
        )
    except (TypeError, ValueError) as error:
        raise ValueError(f"{source} describes no BERT: {error}") from error


def model_type(config: BertConfig) -> str:
    """RoBERTa is the one that leaves rows of its table of positions unused."""
    return "roberta" if config.first_position else "bert"


def config_to_json(config: BertConfig) -> dict[str, Any]:
    family = model_type(config)
    (architecture,) = (
        name
        for name, kind in ARCHITECTURES.items()
        if kind == config.kind and name.lower().startswith(family)
    )
    activation = next(name for name, tanh in ACTIVATIONS.items() if tanh == config.tanh_gelu)
    return {
        "architectures": [architecture],
        "model_type": family,
        **{theirs: getattr(config, ours) for ours, theirs in FIELDS.items()},
        "max_position_embeddings": config.first_position + config.positions,
        "attention_probs_dropout_prob": config.dropout,
        "hidden_act": activation,
        **mapping.label_names(config.labels),
        "pad_token_id": 1 if family == "roberta" else 0,
        **FIXED,
        "torch_dtype": "float32",
    }


def sources(config: BertConfig, prefix: str | None = None, old: bool = False) -> Table:
    """The key of every parameter.

    Args:
      prefix: of the encoder's keys; by default what `config` has in a file written today.
      old: norms have gamma and beta.
    """
    family = model_type(config)
    if prefix is None:
        prefix = "" if config.kind == "encoder" else f"{family}."
    table = {
        "embedding": Source(f"{prefix}embeddings.word_embeddings.weight"),
        "positions": Source(f"{prefix}embeddings.position_embeddings.weight"),
        "token_types": Source(f"{prefix}embeddings.token_type_embeddings.weight"),
    }
    layer = f"{prefix}encoder.layer.{{}}"
    dense = {
        "layers/attention/query": f"{layer}.attention.self.query",
        "layers/attention/key": f"{layer}.attention.self.key",
        "layers/attention/value": f"{layer}.attention.self.value",
        "layers/attention/out": f"{layer}.attention.output.dense",
        "layers/feed_forward/up": f"{layer}.intermediate.dense",
        "layers/feed_forward/down": f"{layer}.output.dense",
    }
    norms = {
        "embedding_norm": f"{prefix}embeddings.LayerNorm",
        "layers/attention_norm": f"{layer}.attention.output.LayerNorm",
        "layers/feed_forward_norm": f"{layer}.output.LayerNorm",
    }
    # RoBERTa's classifier of texts has in itself what BERT has in the pooler.
    own_pooler = family == "roberta" and config.kind == "text_classifier"
    match config.kind:
        case "pretraining" | "masked_lm":
            head, dense_layer, norm = {
                "bert": ("cls.predictions", "transform.dense", "transform.LayerNorm"),
                "roberta": ("lm_head", "dense", "layer_norm"),
            }[family]
            dense["head/transform"] = f"{head}.{dense_layer}"
            norms["head/norm"] = f"{head}.{norm}"
            table["output_bias"] = Source(f"{head}.bias")
        case "text_classifier" | "token_classifier":
            dense["classifier/dense"] = "classifier.out_proj" if own_pooler else "classifier"
        case "span":
            dense["classifier/dense"] = "qa_outputs"
    if config.kind == "pretraining":
        dense["verdict/dense"] = "cls.seq_relationship"
    if config.kind in ("pretraining", "encoder", "text_classifier"):
        dense["pooler/dense"] = "classifier.dense" if own_pooler else f"{prefix}pooler.dense"
    for ours, theirs in dense.items():
        table[ours] = Source(f"{theirs}.weight", transposed=True)
        table[f"{ours}_bias"] = Source(f"{theirs}.bias")
    for ours, theirs in norms.items():
        table[f"{ours}/scale"] = Source(f"{theirs}.{'gamma' if old else 'weight'}")
        table[f"{ours}/bias"] = Source(f"{theirs}.{'beta' if old else 'bias'}")
    return table


def parameter_shapes(config: BertConfig):
    """Our tree of parameters as `jax.ShapeDtypeStruct`s."""
    token = jnp.zeros((1, 1), jnp.int32)
    return jax.eval_shape(lambda: unboxed(Bert(config).init(jax.random.key(0), token)["params"])[0])


def import_params(config: BertConfig, tensors: Tensors):
    """Our tree of float32 NumPy arrays. What a file holds beside the model of its config.json, such
    as the pooler of a masked language model, is left.

    Raises:
      ValueError: tensors are missing, left over, or of another shape than `config` says.
    """
    keys, family = tensors.keys(), model_type(config)
    prefix = "" if "embeddings.word_embeddings.weight" in keys else f"{family}."
    old = f"{prefix}embeddings.LayerNorm.gamma" in keys
    copies = {
        "cls.predictions.decoder.weight": "embedding",
        "lm_head.decoder.weight": "embedding",
        "cls.predictions.decoder.bias": "output_bias",
        "lm_head.decoder.bias": "output_bias",
    }
    unused = {f"{prefix}embeddings.position_ids"}
    unused |= {key for key in keys if key.startswith((f"{prefix}pooler.", "cls.", "lm_head."))}
    table = sources(config, prefix, old)
    params = mapping.import_params(
        table, parameter_shapes(config), tensors, ignored=unused, system="BERT"
    )
    for copy, ours in copies.items():
        if ours in table:
            why = "BERT's output matrix is its embedding, and its bias one"
            mapping.refuse_other_copies(tensors, table[ours].key, [copy], why)
    return params


def export_tensors(config: BertConfig, params) -> Iterator[tuple[str, np.ndarray]]:
    """(key, float32 array) of every tensor of a Hugging Face file, one at a time.

    Raises:
      ValueError: `params` are not those of `config`.
    """
    return mapping.export_tensors(sources(config), parameter_shapes(config), params)


def save_pretrained(
    directory: str | os.PathLike,
    config: BertConfig,
    params,
    tokenizer: FastTokenizer | None = None,
    *,
    shard_bytes: int = 5 * 10**9,
) -> None:
    """Writes a directory that `transformers` and `lmjax.load` read, in float32; see `mapping.save`.

    Files larger than `shard_bytes` are split.

    Raises:
      FileExistsError: the directory is there and not empty.
      ValueError: `params` or `tokenizer` do not fit `config`.
    """
    content, tensors = config_to_json(config), export_tensors(config, params)
    mapping.save(directory, config, content, tensors, tokenizer, shard_bytes)

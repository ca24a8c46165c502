"""BART to and from Hugging Face directories.

Reference files: transformers configuration_bart.py, modeling_bart.py.
Departures: settings that no published BART has (scaled embeddings, other activations, an encoder of
another width than the decoder) are refused by name.
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
from lmjax.models.bart import Bart, BartConfig
from lmjax.models.layers import unboxed

FIELDS = {
    "vocab": "vocab_size",
    "positions": "max_position_embeddings",
    "layers": "encoder_layers",
    "decoder_layers": "decoder_layers",
    "width": "d_model",
    "heads": "encoder_attention_heads",
    "feed_forward": "encoder_ffn_dim",
    "padding": "pad_token_id",
    "start": "decoder_start_token_id",
    "dropout": "dropout",
    "attention_dropout": "attention_dropout",
    "activation_dropout": "activation_dropout",
    "classifier_dropout": "classifier_dropout",
    "init_scale": "init_std",
}
ABSENT = {
    "encoder_layers": 12,
    "decoder_layers": 12,
    "d_model": 1_024,
    "encoder_attention_heads": 16,
    "encoder_ffn_dim": 4_096,
    "attention_dropout": 0.0,
}
"""What transformers takes where a config.json says nothing, if it is not what bart-base has."""
FIXED = {
    "activation_function": "gelu",
    "scale_embedding": False,
    "tie_word_embeddings": True,
    "normalize_before": False,
    "add_final_layer_norm": False,
    "static_position_embeddings": False,
}
"""What a config.json may say only so, or leave out."""
ARCHITECTURES = {
    "BartForConditionalGeneration": "lm",
    "BartForSequenceClassification": "text_classifier",
    "BartForQuestionAnswering": "span",
}
EQUAL = {
    "decoder_attention_heads": "encoder_attention_heads",
    "decoder_ffn_dim": "encoder_ffn_dim",
}
COPIES = [
    "model.encoder.embed_tokens.weight",
    "model.decoder.embed_tokens.weight",
    "lm_head.weight",
]
BIAS = "final_logits_bias"
"""Zero in every published BART."""


def config_from_json(content: dict[str, Any], source: str = CONFIG) -> BartConfig:
    """The model that a config.json describes; null is as good as absent.

    Raises:
      ValueError: a setting that this BART does not have.
    """
    content = ABSENT | {name: value for name, value in content.items() if value is not None}
    for name, known in FIXED.items():
        if content.get(name, known) != known:
            raise ValueError(f"{source}: {name} is {content[name]!r}, but BART here has {known!r}")
    for decoder, encoder in EQUAL.items():
        if content.get(decoder, content[encoder]) != content[encoder]:
            raise ValueError(
                f"{source}: {decoder} is {content[decoder]} and {encoder} {content[encoder]}, but"
                " BART here has one number for both"
            )
    default = BartConfig()
    fields = {ours: content.get(theirs, getattr(default, ours)) for ours, theirs in FIELDS.items()}
    fields |= mapping.head(content, ARCHITECTURES, "lm", default.labels)
    end = content.get("eos_token_id", fields["start"])
    if fields["kind"] == "text_classifier" and end != fields["start"]:
        raise ValueError(
            f"{source}: eos_token_id is {end} and decoder_start_token_id {fields['start']}, but"
            " BART's classifier here has one id for both"
        )
    try:
        return BartConfig(**fields)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{source} describes no BART: {error}") from error


def config_to_json(config: BartConfig, tokenizer: FastTokenizer | None = None) -> dict[str, Any]:
    fields = {theirs: getattr(config, ours) for ours, theirs in FIELDS.items()}
    both = {decoder: fields[encoder] for decoder, encoder in EQUAL.items()}
    ends = {"eos_token_id": config.start} if config.kind == "text_classifier" else {}
    if tokenizer is not None:
        ends = {"bos_token_id": tokenizer.bos_id, "eos_token_id": tokenizer.eos_id}
    return {
        "architectures": [name for name, kind in ARCHITECTURES.items() if kind == config.kind],
        "model_type": "bart",
        **fields,
        **mapping.label_names(config.labels),
        **both,
        **FIXED,
        **ends,
        "is_encoder_decoder": True,
        "torch_dtype": "float32",
    }


def sources(config: BartConfig) -> Table:
    """The key of every parameter."""
    table = {"embedding": Source("model.shared.weight")}
    attention = {"query": "q_proj", "key": "k_proj", "value": "v_proj", "out": "out_proj"}
    for half in ("encoder", "decoder"):
        table[f"{half}_positions/table"] = Source(f"model.{half}.embed_positions.weight")
        norms = {f"{half}_positions/norm": f"model.{half}.layernorm_embedding"}
        layer = f"model.{half}.layers.{{}}"
        kinds = {"attention": "self_attn"}
        kinds |= {"cross_attention": "encoder_attn"} if half == "decoder" else {}
        kernels = {"feed_forward/up": "fc1", "feed_forward/down": "fc2"}
        for ours, theirs in kinds.items():
            kernels |= {f"{ours}/{a}": f"{theirs}.{b}" for a, b in attention.items()}
            norms[f"{half}_layers/{ours}_norm"] = f"{layer}.{theirs}_layer_norm"
        norms[f"{half}_layers/feed_forward_norm"] = f"{layer}.final_layer_norm"
        for ours, theirs in norms.items():
            table[f"{ours}/scale"] = Source(f"{theirs}.weight")
            table[f"{ours}/bias"] = Source(f"{theirs}.bias")
        for ours, theirs in kernels.items():
            table[f"{half}_layers/{ours}"] = Source(f"{layer}.{theirs}.weight", transposed=True)
            table[f"{half}_layers/{ours}_bias"] = Source(f"{layer}.{theirs}.bias")
    dense = {}
    match config.kind:
        case "text_classifier":
            head = "classification_head"
            dense = {"pooler": f"{head}.dense", "classifier": f"{head}.out_proj"}
        case "span":
            dense = {"classifier": "qa_outputs"}
    for ours, theirs in dense.items():
        table[f"{ours}/dense"] = Source(f"{theirs}.weight", transposed=True)
        table[f"{ours}/dense_bias"] = Source(f"{theirs}.bias")
    return table


def parameter_shapes(config: BartConfig):
    """Our tree of parameters as `jax.ShapeDtypeStruct`s."""
    token = jnp.zeros((1, 1), jnp.int32)

    def init():
        return unboxed(Bart(config).init(jax.random.key(0), token, token)["params"])[0]

    return jax.eval_shape(init)


def import_params(config: BartConfig, tensors: Tensors):
    """Our tree of float32 NumPy arrays.

    Raises:
      ValueError: tensors are missing, left over, or of another shape than `config` says; or the
        logits have a bias.
    """
    params = mapping.import_params(
        sources(config), parameter_shapes(config), tensors, ignored={*COPIES, BIAS}, system="BART"
    )
    why = "BART has one embedding"
    mapping.refuse_other_copies(tensors, "model.shared.weight", COPIES, why)
    if BIAS in tensors.keys() and tensors.read(BIAS, tensors.shape(BIAS)).any():
        raise ValueError(f"{BIAS} in {tensors.directory} is not zero, but BART here has none")
    return params


def export_tensors(config: BartConfig, params) -> Iterator[tuple[str, np.ndarray]]:
    """(key, float32 array) of every tensor of a Hugging Face file, one at a time.

    Raises:
      ValueError: `params` are not those of `config`.
    """
    yield from mapping.export_tensors(sources(config), parameter_shapes(config), params)
    if config.kind == "lm":
        yield BIAS, np.zeros((1, config.vocab), np.float32)


def save_pretrained(
    directory: str | os.PathLike,
    config: BartConfig,
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
    content, tensors = config_to_json(config, tokenizer), export_tensors(config, params)
    mapping.save(directory, config, content, tensors, tokenizer, shard_bytes)

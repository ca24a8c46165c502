"""XLNet to and from Hugging Face directories.

Reference files: transformers configuration_xlnet.py, modeling_xlnet.py.
Departures: settings that no published XLNet has (biases shared by the layers, clamped distances,
memories of the same length for every token) are refused by name. A config.json without a length of
memory means one without limit there, and none here. `bi_data` there makes the second half of a
batch backward; here each row is told (`backward`). Spans are XLNetForQuestionAnsweringSimple's; the
head that searches answers with a beam (XLNetForQuestionAnswering) is not to be had.
"""

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lmjax.data.fast_tokenizers import FastTokenizer
from lmjax.data.tokenizers import SentencePieceTokenizer, Tokenizer
from lmjax.interop import mapping
from lmjax.interop.mapping import Source, Table
from lmjax.interop.safetensors import CONFIG, Tensors
from lmjax.models.layers import unboxed
from lmjax.models.xlnet import XLNet, XLNetConfig

FIELDS = {
    "vocab": "vocab_size",
    "layers": "n_layer",
    "width": "d_model",
    "heads": "n_head",
    "feed_forward": "d_inner",
    "memory": "mem_len",
    "reuse": "reuse_len",
    "dropout": "dropout",
    "norm_epsilon": "layer_norm_eps",
    "init_scale": "initializer_range",
}
ABSENT = {"d_model": 1_024, "n_layer": 24, "n_head": 16, "d_inner": 4_096}
"""What transformers takes where a config.json says nothing, if it is not what xlnet-base-cased
has."""
FIXED = {
    "untie_r": True,
    "clamp_len": -1,
    "same_length": False,
    "tie_word_embeddings": True,
    "summary_type": "last",
    "summary_use_proj": True,
    "summary_activation": "tanh",
}
"""What a config.json may say only so, or leave out."""
ARCHITECTURES = {
    "XLNetLMHeadModel": "lm",
    "XLNetForSequenceClassification": "text_classifier",
    "XLNetForTokenClassification": "token_classifier",
    "XLNetForQuestionAnsweringSimple": "span",
}
ACTIVATIONS = {"gelu": "gelu", "gelu_new": "tanh_gelu", "relu": "relu"}
ATTENTION = {"bi": False, "uni": True}
COPIES = ["lm_loss.weight"]


def config_from_json(content: dict[str, Any], source: str = CONFIG) -> XLNetConfig:
    """The model that a config.json describes; null is as good as absent.

    Raises:
      ValueError: a setting that this XLNet does not have.
    """
    content = ABSENT | {name: value for name, value in content.items() if value is not None}
    for name, known in FIXED.items():
        if content.get(name, known) != known:
            raise ValueError(f"{source}: {name} is {content[name]!r}, but XLNet here has {known!r}")
    chosen = {}
    for ours, theirs, known in (
        ("activation", "ff_activation", ACTIVATIONS),
        ("causal", "attn_type", ATTENTION),
    ):
        value = content.get(theirs, next(iter(known)))
        if value not in known:
            raise ValueError(f"{source}: {theirs} is {value!r}, not one of {list(known)}")
        chosen[ours] = known[value]
    default = XLNetConfig()
    fields = {ours: content.get(theirs, getattr(default, ours)) for ours, theirs in FIELDS.items()}
    summary = content.get("summary_last_dropout", fields["dropout"])
    chosen |= mapping.head(content, ARCHITECTURES, "lm", default.labels)
    if chosen["kind"] == "text_classifier" and summary != fields["dropout"]:
        raise ValueError(
            f"{source}: summary_last_dropout is {summary} and dropout {fields['dropout']}, but"
            " XLNet here has one rate for both"
        )
    try:
        return XLNetConfig(**fields, **chosen)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{source} describes no XLNet: {error}") from error


def config_to_json(config: XLNetConfig, tokenizer: Tokenizer | None = None) -> dict[str, Any]:
    fields = {theirs: getattr(config, ours) for ours, theirs in FIELDS.items()}
    ids = {}
    if tokenizer is not None:
        ids = {
            "bos_token_id": tokenizer.bos_id,
            "eos_token_id": tokenizer.eos_id,
            "pad_token_id": tokenizer.pad_id,
        }
    return {
        "architectures": [name for name, kind in ARCHITECTURES.items() if kind == config.kind],
        "model_type": "xlnet",
        **fields,
        **mapping.label_names(config.labels),
        "summary_last_dropout": config.dropout,
        "d_head": config.head_width,
        "mem_len": config.memory or None,
        "ff_activation": {ours: theirs for theirs, ours in ACTIVATIONS.items()}[config.activation],
        "attn_type": "uni" if config.causal else "bi",
        "bi_data": False,
        **FIXED,
        **ids,
        "torch_dtype": "float32",
    }


def sources(config: XLNetConfig) -> Table:
    """The key of every parameter, and its shape in a file where that has axes for the heads."""
    layer = "transformer.layer.{}"
    heads = (config.heads, config.head_width)
    table = {
        "embedding": Source("transformer.word_embedding.weight"),
        "mask_embedding": Source("transformer.mask_emb", shape=(1, 1, config.width)),
        "layers/attention/segments": Source(f"{layer}.rel_attn.seg_embed", shape=(2, *heads)),
    }
    kernels = {"query": "q", "key": "k", "value": "v", "distance": "r", "out": "o"}
    for ours, theirs in kernels.items():
        table[f"layers/attention/{ours}"] = Source(
            f"{layer}.rel_attn.{theirs}",
            transposed=ours == "out",  # its tensor, too, has the width first
            shape=(config.width, *heads),
        )
    biases = {"content_bias": "r_w_bias", "distance_bias": "r_r_bias", "segment_bias": "r_s_bias"}
    for ours, theirs in biases.items():
        table[f"layers/attention/{ours}"] = Source(f"{layer}.rel_attn.{theirs}", shape=heads)
    for ours, theirs in {"up": "layer_1", "down": "layer_2"}.items():
        table[f"layers/feed_forward/{ours}"] = Source(f"{layer}.ff.{theirs}.weight", True)
        table[f"layers/feed_forward/{ours}_bias"] = Source(f"{layer}.ff.{theirs}.bias")
    for ours, theirs in {"attention": "rel_attn", "feed_forward": "ff"}.items():
        table[f"layers/{ours}_norm/scale"] = Source(f"{layer}.{theirs}.layer_norm.weight")
        table[f"layers/{ours}_norm/bias"] = Source(f"{layer}.{theirs}.layer_norm.bias")
    dense = {}
    match config.kind:
        case "lm":
            table["output_bias"] = Source("lm_loss.bias")
        case "text_classifier":
            dense = {"pooler": "sequence_summary.summary", "classifier": "logits_proj"}
        case "token_classifier":
            dense = {"classifier": "classifier"}
        case "span":
            dense = {"classifier": "qa_outputs"}
    for ours, theirs in dense.items():
        table[f"{ours}/dense"] = Source(f"{theirs}.weight", transposed=True)
        table[f"{ours}/dense_bias"] = Source(f"{theirs}.bias")
    return table


def parameter_shapes(config: XLNetConfig):
    """Our tree of parameters as `jax.ShapeDtypeStruct`s."""
    token = jnp.zeros((1, 1), jnp.int32)

    def init():
        return unboxed(XLNet(config).init(jax.random.key(0), token)["params"])[0]

    return jax.eval_shape(init)


def import_params(config: XLNetConfig, tensors: Tensors):
    """Our tree of float32 NumPy arrays.

    Raises:
      ValueError: tensors are missing, left over, or of another shape than `config` says; or the
        output matrix is not the embedding.
    """
    table = sources(config)
    params = mapping.import_params(
        table, parameter_shapes(config), tensors, ignored=COPIES, system="XLNet"
    )
    why = "XLNet's output matrix is its embedding"
    mapping.refuse_other_copies(tensors, table["embedding"].key, COPIES, why)
    return params


def export_tensors(config: XLNetConfig, params) -> Iterator[tuple[str, np.ndarray]]:
    """(key, float32 array) of every tensor of a Hugging Face file, one at a time.

    Raises:
      ValueError: `params` are not those of `config`.
    """
    return mapping.export_tensors(sources(config), parameter_shapes(config), params)


def load_tokenizer(directory: Path) -> Tokenizer | None:
    """The tokenizer of a directory, if it has one.

    Raises:
      ValueError: it is damaged.
    """
    return SentencePieceTokenizer.find(directory) or FastTokenizer.find(directory)


def save_pretrained(
    directory: str | os.PathLike,
    config: XLNetConfig,
    params,
    tokenizer: Tokenizer | None = None,
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

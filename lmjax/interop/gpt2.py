"""GPT-2 to and from Hugging Face directories.

Reference files: transformers configuration_gpt2.py, modeling_gpt2.py.
Departures: settings that no published GPT-2 has (other activations, unscaled attention, untied
output, three different dropout rates) are refused by name.
"""

import os
import re
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lmjax.data.fast_tokenizers import FastTokenizer
from lmjax.interop import mapping
from lmjax.interop.mapping import Source, Table
from lmjax.interop.safetensors import CONFIG, Tensors
from lmjax.models.gpt2 import GPT2, GPT2Config
from lmjax.models.layers import unboxed

FIELDS = {
    "vocab": "vocab_size",
    "positions": "n_positions",
    "layers": "n_layer",
    "width": "n_embd",
    "heads": "n_head",
    "feed_forward": "n_inner",
    "dropout": "resid_pdrop",
    "norm_epsilon": "layer_norm_epsilon",
}
FIXED = {
    "activation_function": "gelu_new",
    "scale_attn_weights": True,
    "scale_attn_by_inverse_layer_idx": False,
    "tie_word_embeddings": True,
    "add_cross_attention": False,
}
"""What a config.json may say only so, or leave out."""
ARCHITECTURES = {
    "GPT2LMHeadModel": "lm",
    "GPT2ForSequenceClassification": "text_classifier",
    "GPT2ForTokenClassification": "token_classifier",
    "GPT2ForQuestionAnswering": "span",
}
UNUSED = re.compile(r"(transformer\.)?h\.\d+\.attn\.(masked_)?bias")
"""Causal masks, which old files hold as if they were parameters."""


def config_from_json(content: dict[str, Any], source: str = CONFIG) -> GPT2Config:
    """The model that a config.json describes; null is as good as absent.

    Raises:
      ValueError: a setting that this GPT-2 does not have.
    """
    content = {name: value for name, value in content.items() if value is not None}
    for name, known in FIXED.items():
        if content.get(name, known) != known:
            raise ValueError(f"{source}: {name} is {content[name]!r}, but GPT-2 here has {known!r}")
    default = GPT2Config()
    fields = {ours: content.get(theirs, getattr(default, ours)) for ours, theirs in FIELDS.items()}
    fields["feed_forward"] = content.get("n_inner", 4 * fields["width"])
    for name in ("embd_pdrop", "attn_pdrop"):
        if content.get(name, fields["dropout"]) != fields["dropout"]:
            raise ValueError(
                f"{source}: {name} is {content[name]} and resid_pdrop {fields['dropout']}, but"
                " GPT-2 here has one rate for all"
            )
    try:
        return GPT2Config(**fields, **mapping.head(content, ARCHITECTURES, "lm", default.labels))
    except (TypeError, ValueError) as error:
        raise ValueError(f"{source} describes no GPT-2: {error}") from error


def config_to_json(config: GPT2Config, tokenizer: FastTokenizer | None = None) -> dict[str, Any]:
    fields = {theirs: getattr(config, ours) for ours, theirs in FIELDS.items()}
    ends = {} if tokenizer is None else {"bos_token_id": tokenizer.eos_id}
    return {
        "architectures": [name for name, kind in ARCHITECTURES.items() if kind == config.kind],
        "model_type": "gpt2",
        **fields,
        **mapping.label_names(config.labels),
        "embd_pdrop": config.dropout,
        "attn_pdrop": config.dropout,
        **FIXED,
        **ends,
        **({} if tokenizer is None else {"eos_token_id": tokenizer.eos_id}),
        "torch_dtype": "float32",
    }


def sources(config: GPT2Config, prefix: str = "transformer.") -> Table:
    """The key of every parameter; no layer's kernel is transposed, GPT-2's files have them so."""
    table = {
        "embedding": Source(f"{prefix}wte.weight"),
        "positions": Source(f"{prefix}wpe.weight"),
    }
    norms = {"final_norm": "ln_f"}
    norms |= {"layers/attention_norm": "h.{}.ln_1", "layers/feed_forward_norm": "h.{}.ln_2"}
    for ours, theirs in norms.items():
        table[f"{ours}/scale"] = Source(f"{prefix}{theirs}.weight")
        table[f"{ours}/bias"] = Source(f"{prefix}{theirs}.bias")
    kernels = {
        "attention/query": ("attn.c_attn", (0, 3)),
        "attention/key": ("attn.c_attn", (1, 3)),
        "attention/value": ("attn.c_attn", (2, 3)),
        "attention/out": ("attn.c_proj", None),
        "feed_forward/up": ("mlp.c_fc", None),
        "feed_forward/down": ("mlp.c_proj", None),
    }
    for ours, (theirs, part) in kernels.items():
        key = f"{prefix}h.{{}}.{theirs}"
        table[f"layers/{ours}"] = Source(f"{key}.weight", part=part)
        table[f"layers/{ours}_bias"] = Source(f"{key}.bias", part=part)
    if config.kind == "text_classifier":
        table["classifier/dense"] = Source("score.weight", transposed=True)
    if config.kind in ("token_classifier", "span"):
        name = "classifier" if config.kind == "token_classifier" else "qa_outputs"
        table["classifier/dense"] = Source(f"{name}.weight", transposed=True)
        table["classifier/dense_bias"] = Source(f"{name}.bias")
    return table


def parameter_shapes(config: GPT2Config):
    """Our tree of parameters as `jax.ShapeDtypeStruct`s."""
    token = jnp.zeros((1, 1), jnp.int32)
    return jax.eval_shape(lambda: unboxed(GPT2(config).init(jax.random.key(0), token)["params"])[0])


def import_params(config: GPT2Config, tensors: Tensors):
    """Our tree of float32 NumPy arrays.

    Raises:
      ValueError: tensors are missing, left over, or of another shape than `config` says.
    """
    keys = tensors.keys()
    prefix = "" if "wte.weight" in keys else "transformer."  # the first released files have none
    ignored = {"lm_head.weight", *filter(UNUSED.fullmatch, keys)}
    table = sources(config, prefix)
    params = mapping.import_params(
        table, parameter_shapes(config), tensors, ignored=ignored, system="GPT-2"
    )
    why = "GPT-2's output matrix is its embedding"
    mapping.refuse_other_copies(tensors, table["embedding"].key, ["lm_head.weight"], why)
    return params


def export_tensors(config: GPT2Config, params) -> Iterator[tuple[str, np.ndarray]]:
    """(key, float32 array) of every tensor of a Hugging Face file, one at a time.

    Raises:
      ValueError: `params` are not those of `config`.
    """
    return mapping.export_tensors(sources(config), parameter_shapes(config), params)


def save_pretrained(
    directory: str | os.PathLike,
    config: GPT2Config,
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

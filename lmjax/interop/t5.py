"""T5, T5 1.1 and mT5 to and from Hugging Face directories.

Reference files: transformers configuration_t5.py, configuration_mt5.py, modeling_t5.py.
Departures: transformers lets a configuration choose any activation and special ids; here the three
published families load and everything else is refused by name.
"""

import os
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lmjax.data.tokenizers import SentencePieceTokenizer
from lmjax.interop import mapping
from lmjax.interop.mapping import Source, Table
from lmjax.interop.safetensors import (
    CONFIG,
    Tensors,
    local_directory,
    read_json,
    write_pretrained,
)
from lmjax.models.layers import unboxed
from lmjax.models.t5 import PRESETS, T5, T5Config

# What a config.json that lacks a field means, by its model_type.
DEFAULTS = {"t5": T5Config(), "mt5": PRESETS["mt5-small"]}
ARCHITECTURES = {
    f"{family}{head}": family.lower()
    for family in ("T5", "MT5")
    for head in ("ForConditionalGeneration", "WithLMHeadModel", "Model")
}
"""model_type, by an entry of `architectures`: the oldest files have only these."""
FIELDS = {
    "vocab": "vocab_size",
    "layers": "num_layers",
    "decoder_layers": "num_decoder_layers",
    "width": "d_model",
    "heads": "num_heads",
    "head_width": "d_kv",
    "feed_forward": "d_ff",
    "dropout": "dropout_rate",
    "relative_buckets": "relative_attention_num_buckets",
    "relative_distance": "relative_attention_max_distance",
    "norm_epsilon": "layer_norm_epsilon",
}
ACTIVATIONS = {"relu": False, "gated-gelu": True}
"""feed_forward_proj -> T5Config.gated; transformers' "gated-gelu" is the tanh approximation."""
SPECIAL_IDS = {"pad_token_id": 0, "eos_token_id": 1, "decoder_start_token_id": 0}

EMBEDDINGS = ("shared.weight", "encoder.embed_tokens.weight", "decoder.embed_tokens.weight")
"""One matrix; files hold it under one or more of these names."""
UNUSED = "decoder.block.0.layer.1.EncDecAttention.relative_attention_bias.weight"
"""Old files have this table, which no version of the model reads."""


# --- configuration


def model_type(content: dict[str, Any]) -> str | None:
    """What a config.json says it is, by name or, in old files, by architecture."""
    if content.get("model_type") is not None:
        return content["model_type"]
    known = [ARCHITECTURES[a] for a in content.get("architectures") or () if a in ARCHITECTURES]
    return known[0] if known else None


def config_from_json(content: dict[str, Any], source: str = CONFIG) -> T5Config:
    """The model that a config.json describes; null is as good as absent.

    Args:
      content: of the file.
      source: names it in errors.

    Raises:
      ValueError: a setting that this T5 does not have.
    """
    content = {name: value for name, value in content.items() if value is not None}
    family = model_type(content)
    if family not in DEFAULTS:
        raise ValueError(f"{source}: model_type is {family!r}, not one of {list(DEFAULTS)}")
    default = DEFAULTS[family]
    fields = {
        ours: content.get(theirs, None if ours == "decoder_layers" else getattr(default, ours))
        for ours, theirs in FIELDS.items()
    }
    activation = content.get("feed_forward_proj", "gated-gelu" if default.gated else "relu")
    gated = ACTIVATIONS.get(activation)
    if gated is None or content.get("is_gated_act", gated) != gated:
        raise ValueError(
            f"{source}: feed_forward_proj is {activation!r} (is_gated_act "
            f"{content.get('is_gated_act')}), not one of {list(ACTIVATIONS)}"
        )
    for name, known in SPECIAL_IDS.items():
        if content.get(name, known) != known:
            raise ValueError(f"{source}: {name} is {content[name]}, but T5 here has it at {known}")
    # transformers 5 ties names of matrices by one field and means the family by the other.
    tied = content.get("tie_word_embeddings", default.tied)
    tied = content.get("scale_decoder_outputs", tied)
    try:
        return T5Config(gated=gated, tied=tied, **fields)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{source} describes no T5: {error}") from error


def config_to_json(config: T5Config) -> dict[str, Any]:
    """The config.json of a model; one with mT5's vocabulary is called mT5."""
    mt5 = config.vocab == DEFAULTS["mt5"].vocab
    activation = next(name for name, gated in ACTIVATIONS.items() if gated == config.gated)
    return {
        "architectures": [f"{'MT5' if mt5 else 'T5'}ForConditionalGeneration"],
        "model_type": "mt5" if mt5 else "t5",
        **{theirs: getattr(config, ours) for ours, theirs in FIELDS.items()},
        "feed_forward_proj": activation,
        "tie_word_embeddings": config.tied,
        **SPECIAL_IDS,
        "is_encoder_decoder": True,
        "use_cache": True,
        "torch_dtype": "float32",
    }


# --- parameters


def sources(config: T5Config) -> Table:
    """The key of every parameter, by its path in our tree; both directions follow this table."""
    attention = {"query": "q", "key": "k", "value": "v", "out": "o"}
    gated = {"gate": "wi_0", "up": "wi_1", "down": "wo"}
    feed_forward = gated if config.gated else {"up": "wi", "down": "wo"}
    own = ("attention", "SelfAttention", attention)
    cross = ("cross_attention", "EncDecAttention", attention)
    last = ("feed_forward", "DenseReluDense", feed_forward)

    table = {"embedding": Source(EMBEDDINGS[0])}
    if not config.tied:
        table["output"] = Source("lm_head.weight")
    for side, sublayers in {"encoder": (own, last), "decoder": (own, cross, last)}.items():
        bias = f"{side}.block.0.layer.0.SelfAttention.relative_attention_bias.weight"
        table[f"{side}/relative_bias/table"] = Source(bias)
        table[f"{side}/final_norm/scale"] = Source(f"{side}.final_layer_norm.weight")
        for index, (ours, theirs, kernels) in enumerate(sublayers):
            key, path = f"{side}.block.{{}}.layer.{index}", f"{side}/layers/{ours}"
            table[f"{path}_norm/scale"] = Source(f"{key}.layer_norm.weight")
            for kernel, name in kernels.items():
                table[f"{path}/{kernel}"] = Source(f"{key}.{theirs}.{name}.weight", True)
    return table


def parameter_shapes(config: T5Config):
    """Our tree of parameters as `jax.ShapeDtypeStruct`s."""
    tokens = jnp.zeros((1, 1), jnp.int32)
    return jax.eval_shape(
        lambda: unboxed(T5(config).init(jax.random.key(0), tokens, tokens)["params"])[0]
    )


def import_params(config: T5Config, tensors: Tensors):
    """Our tree of float32 NumPy arrays, read one tensor at a time into the stacked arrays.

    Raises:
      ValueError: tensors are missing, left over, or of another shape than `config` says.
    """
    table = sources(config)
    present = [key for key in EMBEDDINGS if key in tensors.keys()]
    if present:
        table["embedding"] = Source(present[0])
    copies = {*present[1:], "lm_head.weight"} if config.tied else set(present[1:])
    params = mapping.import_params(
        table, parameter_shapes(config), tensors, ignored={*copies, UNUSED}, system="T5"
    )
    mapping.refuse_other_copies(
        tensors,
        table["embedding"].key,
        copies,
        "T5 has one matrix for both (a T5 1.1 says tie_word_embeddings: false in its config.json)",
    )
    return params


def export_tensors(config: T5Config, params) -> Iterator[tuple[str, np.ndarray]]:
    """(key, float32 array) of every tensor of a Hugging Face file, one at a time.

    Raises:
      ValueError: `params` are not those of `config`.
    """
    return mapping.export_tensors(sources(config), parameter_shapes(config), params)


# --- directories


def load_pretrained(path_or_repo: str | os.PathLike) -> tuple[T5Config, Any]:
    """(config, params) of a directory or Hub repository; params are float32 arrays on the host.

    Host memory peaks at one copy of the parameters, whatever the file's float type, beside pages of
    the mapped file, which the system takes back at will.

    Raises:
      FileNotFoundError: no such directory or repository, or it has no safetensors.
      ValueError: another model, or a damaged or incomplete file; the message names it.
    """
    directory = local_directory(path_or_repo)
    config = config_from_json(read_json(directory / CONFIG), str(directory / CONFIG))
    return config, import_params(config, Tensors(directory))


def load_tokenizer(path_or_repo: str | os.PathLike) -> SentencePieceTokenizer | None:
    """The tokenizer of a directory or Hub repository; None if it has no SentencePiece model.

    Raises:
      FileNotFoundError: no such directory or repository.
      ValueError: the model is damaged.
    """
    return SentencePieceTokenizer.find(local_directory(path_or_repo))


def save_pretrained(
    directory: str | os.PathLike,
    config: T5Config,
    params,
    tokenizer: SentencePieceTokenizer | None = None,
    *,
    shard_bytes: int = 5 * 10**9,
) -> None:
    """Writes a directory that `transformers` and `load_pretrained` read, in float32.

    The directory appears whole or not at all. Files larger than `shard_bytes` are split.

    Raises:
      FileExistsError: the directory is there and not empty.
      ValueError: `params` or `tokenizer` do not fit `config`.
    """
    contents = {CONFIG: config_to_json(config), "generation_config.json": SPECIAL_IDS}
    files = {}
    if tokenizer is not None:
        mapping.check_vocabulary(config, tokenizer)
        files = tokenizer.files()
    write_pretrained(directory, export_tensors(config, params), contents, files, shard_bytes)

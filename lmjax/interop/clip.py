"""CLIP to and from Hugging Face directories.

Reference files: transformers configuration_clip.py, modeling_clip.py.
Departures: settings that no published CLIP has (dropout, three different sorts of activation or
norm, other than three colours) are refused by name.
"""

import math
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from PIL.Image import Resampling

from lmjax.data import fast_tokenizers
from lmjax.data.fast_tokenizers import FastTokenizer
from lmjax.interop import mapping
from lmjax.interop.mapping import Source, Table
from lmjax.interop.safetensors import CONFIG, Tensors
from lmjax.models.clip import CLIP, DEVIATION, LARGEST_SCALE, MEAN, CLIPConfig
from lmjax.models.layers import unboxed

SIZES = {
    "layers": "num_hidden_layers",
    "width": "hidden_size",
    "heads": "num_attention_heads",
    "feed_forward": "intermediate_size",
}
TEXT = {**SIZES, "vocab": "vocab_size", "positions": "max_position_embeddings"}
PICTURE = {f"picture_{ours}": theirs for ours, theirs in SIZES.items()}
PICTURE |= {"size": "image_size", "patch": "patch_size"}
FIXED = {"attention_dropout": 0.0}
"""What either tower's settings may say only so, or leave out."""
ACTIVATIONS = {"quick_gelu": False, "gelu": True}
"""hidden_act -> CLIPConfig.exact_gelu."""
LARGEST_ID = 2
"""An `eos_token_id` with which transformers takes the largest id of a text as its end."""


def config_from_json(content: dict[str, Any], source: str = CONFIG) -> CLIPConfig:
    """The model that a config.json describes; null is as good as absent.

    Raises:
      ValueError: a setting that this CLIP does not have.
    """
    default = CLIPConfig()
    width = content.get("projection_dim")
    fields = {"joint_width": default.joint_width if width is None else width}
    both = {}
    for tower, names in {"text_config": TEXT, "vision_config": PICTURE}.items():
        own = content.get(tower) or {}
        own = {name: value for name, value in own.items() if value is not None}
        for name, known in {**FIXED, "num_channels": 3}.items():
            if own.get(name, known) != known:
                raise ValueError(
                    f"{source}: {tower}.{name} is {own[name]!r}, but CLIP here has {known!r}"
                )
        fields |= {ours: own.get(theirs, getattr(default, ours)) for ours, theirs in names.items()}
        both[tower] = own.get("hidden_act", "quick_gelu"), own.get("layer_norm_eps", 1e-5)
    if both["text_config"] != both["vision_config"]:
        raise ValueError(
            f"{source}: (hidden_act, layer_norm_eps) are {both['text_config']} for texts and"
            f" {both['vision_config']} for pictures, but CLIP here has the same for both"
        )
    activation, epsilon = both["text_config"]
    if activation not in ACTIVATIONS:
        raise ValueError(f"{source}: hidden_act is {activation!r}, not one of {list(ACTIVATIONS)}")
    end = (content.get("text_config") or {}).get("eos_token_id")
    try:
        return CLIPConfig(
            **fields,
            # The last id is the largest one, which needs no search for a first occurrence.
            end=None if end in (None, LARGEST_ID, fields["vocab"] - 1) else end,
            exact_gelu=ACTIVATIONS[activation],
            norm_epsilon=epsilon,
        )
    except (TypeError, ValueError) as error:
        raise ValueError(f"{source} describes no CLIP: {error}") from error


def config_to_json(config: CLIPConfig) -> dict[str, Any]:
    """The config.json that describes a model.

    Raises:
      ValueError: transformers would take another token for the end of its texts.
    """
    if config.end == LARGEST_ID:
        raise ValueError(
            f"CLIPConfig.end is {LARGEST_ID}, with which transformers takes the largest id for the"
            " end of a text, so it cannot have this model: train one whose tokenizer ends texts"
            " with another id (--data.tokenizer and --model.end)"
        )
    activation = next(name for name, exact in ACTIVATIONS.items() if exact == config.exact_gelu)
    common = {
        "hidden_act": activation,
        "layer_norm_eps": config.norm_epsilon,
        "projection_dim": config.joint_width,
        **FIXED,
    }
    text = {theirs: getattr(config, ours) for ours, theirs in TEXT.items()}
    picture = {theirs: getattr(config, ours) for ours, theirs in PICTURE.items()}
    end = LARGEST_ID if config.end is None else config.end
    return {
        "architectures": ["CLIPModel"],
        "model_type": "clip",
        "projection_dim": config.joint_width,
        "text_config": {"model_type": "clip_text_model", **text, **common, "eos_token_id": end},
        "vision_config": {"model_type": "clip_vision_model", **picture, **common},
        "torch_dtype": "float32",
    }


def preprocessor_to_json(config: CLIPConfig) -> dict[str, Any]:
    """How transformers makes of a picture what its model reads; here that is the model's part."""
    return {
        "image_processor_type": "CLIPImageProcessor",
        "do_convert_rgb": True,
        "do_resize": True,
        "size": {"shortest_edge": config.size},
        "resample": int(Resampling.BICUBIC),
        "do_center_crop": True,
        "crop_size": {"height": config.size, "width": config.size},
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": list(MEAN),
        "image_std": list(DEVIATION),
    }


def sources(config: CLIPConfig) -> Table:
    """The key of every parameter."""
    pixels = (config.picture_width, 3, config.patch, config.patch)
    vision, text = "vision_model.embeddings", "text_model.embeddings"
    table = {
        "scale": Source("logit_scale"),
        "pictures/patches": Source(f"{vision}.patch_embedding.weight", True, shape=pixels),
        "pictures/class_token": Source(f"{vision}.class_embedding"),
        "pictures/positions": Source(f"{vision}.position_embedding.weight"),
        "pictures/out": Source("visual_projection.weight", transposed=True),
        "texts/embedding": Source(f"{text}.token_embedding.weight"),
        "texts/positions": Source(f"{text}.position_embedding.weight"),
        "texts/out": Source("text_projection.weight", transposed=True),
    }
    norms = {
        "pictures/first_norm": "vision_model.pre_layrnorm",  # so it is spelled
        "pictures/final_norm": "vision_model.post_layernorm",
        "texts/final_norm": "text_model.final_layer_norm",
    }
    kernels = {"query": "q_proj", "key": "k_proj", "value": "v_proj", "out": "out_proj"}
    kernels = {f"attention/{ours}": f"self_attn.{theirs}" for ours, theirs in kernels.items()}
    kernels |= {"feed_forward/up": "mlp.fc1", "feed_forward/down": "mlp.fc2"}
    for tower, theirs_tower in {"pictures": "vision_model", "texts": "text_model"}.items():
        layer = f"{theirs_tower}.encoder.layers.{{}}"
        norms[f"{tower}/layers/attention_norm"] = f"{layer}.layer_norm1"
        norms[f"{tower}/layers/feed_forward_norm"] = f"{layer}.layer_norm2"
        for ours, theirs in kernels.items():
            key = f"{layer}.{theirs}"
            table[f"{tower}/layers/{ours}"] = Source(f"{key}.weight", transposed=True)
            table[f"{tower}/layers/{ours}_bias"] = Source(f"{key}.bias")
    for ours, theirs in norms.items():
        table[f"{ours}/scale"] = Source(f"{theirs}.weight")
        table[f"{ours}/bias"] = Source(f"{theirs}.bias")
    return table


def parameter_shapes(config: CLIPConfig):
    """Our tree of parameters as `jax.ShapeDtypeStruct`s."""
    picture, token = jnp.zeros((1, config.size, config.size, 3)), jnp.zeros((1, 1), jnp.int32)

    def init():
        return unboxed(CLIP(config).init(jax.random.key(0), picture, token)["params"])[0]

    return jax.eval_shape(init)


def import_params(config: CLIPConfig, tensors: Tensors):
    """Our tree of float32 NumPy arrays.

    Raises:
      ValueError: tensors are missing, left over, or of another shape than `config` says.
    """
    # Old files hold the numbers 0, 1, 2, ... as if they were parameters.
    ignored = [key for key in tensors.keys() if key.endswith(".embeddings.position_ids")]
    shapes = parameter_shapes(config)
    return mapping.import_params(sources(config), shapes, tensors, ignored=ignored, system="CLIP")


def export_tensors(config: CLIPConfig, params) -> Iterator[tuple[str, np.ndarray]]:
    """(key, float32 array) of every tensor of a Hugging Face file, one at a time.

    The similarities' scale is bounded in them, which it is in our model and not in theirs.

    Raises:
      ValueError: `params` are not those of `config`.
    """
    params = {**params, "scale": np.minimum(params["scale"], math.log(LARGEST_SCALE))}
    return mapping.export_tensors(sources(config), parameter_shapes(config), params)


def save_pretrained(
    directory: str | os.PathLike,
    config: CLIPConfig,
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
    others = {"preprocessor_config.json": preprocessor_to_json(config)}
    mapping.save(directory, config, content, tensors, tokenizer, shard_bytes, others)


def load_tokenizer(directory: Path) -> FastTokenizer | None:
    """The directory's tokenizer.json. OpenAI's older vocab.json and merges.txt are no byte-level
    BPE as GPT-2's are: their words have an end of their own."""
    path = directory / fast_tokenizers.WHOLE
    return FastTokenizer.load(path) if path.is_file() else None

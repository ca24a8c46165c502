"""`lmjax.load`: a model, its parameters and its tokenizer in one line, wherever they were kept."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from lmjax.data.tokenizers import SentencePieceTokenizer
from lmjax.interop import t5 as t5_interop
from lmjax.interop.safetensors import CONFIG, local_directory, read_json
from lmjax.models.layers import Execution
from lmjax.models.t5 import T5, T5Config
from lmjax.training import checkpoints

TOKENIZER = "tokenizer.model"
"""In a run's workdir."""


class System(NamedTuple):
    """What loading needs to know of a model."""

    config: type
    module: Callable[[Any, Execution], nn.Module]
    load_pretrained: Callable[[Path], tuple[Any, Any]]
    load_tokenizer: Callable[[Path], SentencePieceTokenizer | None]


_T5 = System(T5Config, T5, t5_interop.load_pretrained, t5_interop.load_tokenizer)
SYSTEMS = {"t5": _T5, "mt5": _T5}
"""By the `model_type` of a config.json, Hugging Face's or a run's."""


class Loaded(NamedTuple):
    model: nn.Module
    params: dict[str, Any]
    tokenizer: SentencePieceTokenizer | None
    """None where the directory has no SentencePiece model (ByT5, for example)."""


def load(path_or_repo: str | os.PathLike, *, dtype: str | None = None) -> Loaded:
    """(model, params, tokenizer) of a Hugging Face directory or repository, or of a run's workdir.

        model, params, tokenizer = lmjax.load("google-t5/t5-small")

    Args:
      path_or_repo: a directory with config.json and safetensors, the name of such a repository on
        the Hub (downloaded once), or the workdir of a run (its last checkpoint).
      dtype: of activations, "float32" or "bfloat16"; by default bfloat16 on accelerators and
        float32 on a CPU. Parameters are float32 on the default device either way.

    Raises:
      FileNotFoundError: no such directory or repository, or a file of it is missing.
      ValueError: an unknown model_type, a damaged file (the message names it), or a run without a
        checkpoint.
    """
    execution = Execution(dtype or ("float32" if jax.default_backend() == "cpu" else "bfloat16"))
    directory = local_directory(path_or_repo)
    content = read_json(directory / CONFIG)
    is_run = "identity" in content
    kind = (content["identity"] if is_run else content).get("model_type")
    if kind not in SYSTEMS:
        raise ValueError(
            f"{directory / CONFIG} has model_type {kind!r}; lmjax.load knows {', '.join(SYSTEMS)}"
        )
    system = SYSTEMS[kind]
    if is_run:
        config = _run_config(system.config, content["identity"], directory)
        params = checkpoints.restore_params(directory)
        tokenizer = SentencePieceTokenizer.load(directory / TOKENIZER)
    else:
        config, params = system.load_pretrained(directory)
        _move_to_device(params)
        tokenizer = system.load_tokenizer(directory)
    if tokenizer is not None:
        t5_interop.check_vocabulary(config, tokenizer)
    return Loaded(system.module(config, execution), params, tokenizer)


def _run_config(config: type, identity: dict[str, Any], directory: Path):
    try:
        return config(**{k: v for k, v in identity["model"].items() if k != "type"})
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{directory / CONFIG} describes no {config.__name__}: {error}") from error


def _move_to_device(params) -> None:
    """Replaces host arrays one by one, so that there are never two copies of everything."""
    for name, value in params.items():
        if isinstance(value, dict):
            _move_to_device(value)
        else:
            params[name] = jnp.asarray(value)

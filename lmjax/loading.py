"""`lmjax.load`: a model, its parameters and its tokenizer in one line, wherever they were kept."""

import functools
import hashlib
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from lmjax.data.fast_tokenizers import FastTokenizer
from lmjax.data.tokenizers import Tokenizer, load_tokenizer
from lmjax.interop import bart as bart_interop
from lmjax.interop import bert as bert_interop
from lmjax.interop import clip as clip_interop
from lmjax.interop import gpt2 as gpt2_interop
from lmjax.interop import mapping
from lmjax.interop import t5 as t5_interop
from lmjax.interop import xlnet as xlnet_interop
from lmjax.interop.safetensors import CONFIG, Tensors, local_directory, read_json
from lmjax.models.bart import Bart, BartConfig
from lmjax.models.bert import Bert, BertConfig
from lmjax.models.clip import CLIP, CLIPConfig
from lmjax.models.dalle import DALLE, DALLEConfig
from lmjax.models.dvae import DVAE, DVAEConfig
from lmjax.models.gpt2 import GPT2, GPT2Config
from lmjax.models.layers import Execution, unboxed
from lmjax.models.t5 import T5, T5Config
from lmjax.models.xlnet import XLNet, XLNetConfig
from lmjax.training import checkpoints

TOKENIZER = "tokenizer.model"
"""In a run's workdir."""


class System(NamedTuple):
    """What loading needs to know of a model."""

    config: type
    module: Callable[[Any, Execution], nn.Module]
    parameter_shapes: Callable[[Any], dict[str, Any]]
    # Of Hugging Face directories, where there are such:
    config_from_json: Callable[[dict[str, Any], str], Any] | None = None
    import_params: Callable[[Any, Tensors], dict[str, Any]] | None = None
    load_tokenizer: Callable[[Path], Tokenizer | None] | None = None


_T5 = System(
    T5Config,
    T5,
    t5_interop.parameter_shapes,
    t5_interop.config_from_json,
    t5_interop.import_params,
    t5_interop.load_tokenizer,
)
_GPT2 = System(
    GPT2Config,
    GPT2,
    gpt2_interop.parameter_shapes,
    gpt2_interop.config_from_json,
    gpt2_interop.import_params,
    FastTokenizer.find,
)
_BERT = System(
    BertConfig,
    Bert,
    bert_interop.parameter_shapes,
    bert_interop.config_from_json,
    bert_interop.import_params,
    FastTokenizer.find,
)
_BART = System(
    BartConfig,
    Bart,
    bart_interop.parameter_shapes,
    bart_interop.config_from_json,
    bart_interop.import_params,
    FastTokenizer.find,
)
_XLNET = System(
    XLNetConfig,
    XLNet,
    xlnet_interop.parameter_shapes,
    xlnet_interop.config_from_json,
    xlnet_interop.import_params,
    xlnet_interop.load_tokenizer,
)
_CLIP = System(
    CLIPConfig,
    CLIP,
    clip_interop.parameter_shapes,
    clip_interop.config_from_json,
    clip_interop.import_params,
    clip_interop.load_tokenizer,
)


def _dvae_shapes(config: DVAEConfig) -> dict[str, Any]:
    return _shapes(DVAE(config), jnp.zeros((1, config.size, config.size, 3)))


def _dalle_shapes(config: DALLEConfig) -> dict[str, Any]:
    return _shapes(DALLE(config), jnp.zeros((1, config.text_length), jnp.int32))


def _shapes(model: nn.Module, example: jax.Array) -> dict[str, Any]:
    return jax.eval_shape(lambda: unboxed(model.init(jax.random.key(0), example)["params"])[0])


_DVAE = System(DVAEConfig, DVAE, _dvae_shapes)
_DALLE = System(DALLEConfig, DALLE, _dalle_shapes)
SYSTEMS = {
    "t5": _T5,
    "mt5": _T5,
    "gpt2": _GPT2,
    "bert": _BERT,
    "roberta": _BERT,
    "bart": _BART,
    "xlnet": _XLNET,
    "clip": _CLIP,
    "dvae": _DVAE,
    "dalle": _DALLE,
}
"""By the `model_type` of a config.json, Hugging Face's or a run's."""


class Description(NamedTuple):
    """A model that is not loaded yet."""

    model_type: str
    config: Any
    tokenizer: Tokenizer | None
    """None where the directory has none that is known here (ByT5's, for example)."""
    load_params: Callable[[], dict[str, Any]]
    """Reads the parameters: float32 NumPy arrays on the host."""


class Loaded(NamedTuple):
    model: nn.Module
    params: dict[str, Any]
    tokenizer: Tokenizer | None
    """As in `Description`."""


def load(path_or_repo: str | os.PathLike, *, dtype: str | None = None) -> Loaded:
    """(model, params, tokenizer) of a Hugging Face directory or repository, or of a run's workdir.

        model, params, tokenizer = lmjax.load("google-t5/t5-small")

    Args:
      path_or_repo: a directory with config.json and safetensors, the name of such a repository on
        the Hub (downloaded once), or the workdir of a run (its last checkpoint).
      dtype: of activations, "float32", "bfloat16" or "float16"; by default bfloat16 on accelerators
        and float32 on a CPU. Parameters are float32 on the default device either way.

    Raises:
      FileNotFoundError: no such directory or repository, or a file of it is missing.
      ValueError: an unknown model_type, a damaged file (the message names it), or a run without a
        checkpoint.
    """
    execution = Execution(dtype or ("float32" if jax.default_backend() == "cpu" else "bfloat16"))
    found = describe(path_or_repo)
    params = found.load_params()
    _move_to_device(params)
    model = SYSTEMS[found.model_type].module(found.config, execution)
    return Loaded(model, params, found.tokenizer)


def describe(path_or_repo: str | os.PathLike) -> Description:
    """What `load` would load, found and checked as far as is possible without reading parameters.

    Takes and raises what `load` does.
    """
    directory = local_directory(path_or_repo)
    content = read_json(directory / CONFIG)
    is_run = "identity" in content
    kind = t5_interop.model_type(content["identity"] if is_run else content)
    if kind not in SYSTEMS:
        raise ValueError(
            f"{directory / CONFIG} has model_type {kind!r}; lmjax.load knows {', '.join(SYSTEMS)}"
        )
    system = SYSTEMS[kind]
    if is_run:
        config, extra_ids = _of_run(system.config, content["identity"], directory)
        has_tokenizer = (directory / TOKENIZER).exists()
        tokenizer = load_tokenizer(directory / TOKENIZER, extra_ids) if has_tokenizer else None
        step = checkpoints.latest_step(directory)
        load_params = functools.partial(
            _restore_on_host, system.parameter_shapes, config, directory, step
        )
    elif system.config_from_json is None:
        raise ValueError(
            f"{directory} is no run's workdir, the only place that lmjax reads a {kind} from: train"
            " one"
        )
    else:
        config = system.config_from_json(content, str(directory / CONFIG))
        tokenizer = system.load_tokenizer(directory)
        load_params = functools.partial(system.import_params, config, Tensors(directory))
    if tokenizer is not None:
        mapping.check_vocabulary(config, tokenizer)
    return Description(kind, config, tokenizer, load_params)


def _of_run(config: type, identity: dict[str, Any], directory: Path) -> tuple[Any, int]:
    """The config, and how many sentinels were appended to the tokenizer's pieces."""
    try:
        model = config(**{k: v for k, v in identity["model"].items() if k != "type"})
        return model, identity.get("data", {}).get("extra_ids", 100)
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{directory / CONFIG} describes no {config.__name__}: {error}") from error


def _restore_on_host(
    parameter_shapes: Callable[[Any], dict[str, Any]], config: Any, directory: Path, step: int
) -> dict[str, Any]:
    def host_array(leaf):  # tells the checkpoint where to restore to, and takes no memory
        return np.broadcast_to(np.zeros((), leaf.dtype), leaf.shape)

    target = jax.tree.map(host_array, parameter_shapes(config))
    return checkpoints.restore_params(directory, target, step)


def fingerprint(params: dict[str, Any]) -> str:
    """Of a model that another one is trained with: the SHA-256 of its parameters."""
    digest = hashlib.sha256()
    for path, leaf in jax.tree.leaves_with_path(params):
        digest.update(jax.tree_util.keystr(path).encode())
        digest.update(np.ascontiguousarray(leaf).tobytes())
    return digest.hexdigest()


def _move_to_device(params) -> None:
    """Replaces host arrays one by one, so that there are never two copies of everything."""
    for name, value in params.items():
        if isinstance(value, dict):
            _move_to_device(value)
        else:
            params[name] = jnp.asarray(value)

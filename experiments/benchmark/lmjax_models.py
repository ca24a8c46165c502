"""What lmjax does with a `Case`: the step that `fit` takes, with its checks, and `generate`."""

import functools
from collections.abc import Callable
from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from experiments.benchmark.harness import (
    Case,
    Figures,
    examples,
    picture_tokens,
    prompts,
    timed_decoding,
    timed_jax_training,
)
from lmjax.decoding.generate import generate
from lmjax.decoding.pictures import draw
from lmjax.models.bart import Bart, BartConfig
from lmjax.models.bert import Bert, BertConfig
from lmjax.models.dalle import DALLE, DALLEConfig
from lmjax.models.gpt2 import GPT2, GPT2Config
from lmjax.models.t5 import T5, T5Config
from lmjax.models.xlnet import XLNet, XLNetConfig
from lmjax.tasks.causal import Causal
from lmjax.tasks.masked import Masked
from lmjax.tasks.permuted import Permuted
from lmjax.tasks.seq2seq import Seq2Seq
from lmjax.tasks.task import Task
from lmjax.tasks.text_to_image import TextToImage
from lmjax.training.execution import ExecutionOptions
from lmjax.training.optimizers import AdamW
from lmjax.training.schedules import Constant
from lmjax.training.step import arrange, prepare


class System(NamedTuple):
    model: type[nn.Module]
    config: type


SYSTEMS = {
    "bart": System(Bart, BartConfig),
    "bert": System(Bert, BertConfig),
    "dalle": System(DALLE, DALLEConfig),
    "gpt2": System(GPT2, GPT2Config),
    "t5": System(T5, T5Config),
    "xlnet": System(XLNet, XLNetConfig),
}


def measure(case: Case) -> Figures:
    task = task_of(case)
    step, build = fit_step(task, AdamW(Constant(1e-3), gradient_clip=None))
    state = jax.jit(build)()
    batch = jax.tree.map(jnp.asarray, batch_of(case))
    figures, state = timed_jax_training(lambda state: step(state, batch), state, case.steps)
    if not case.decode_batch:
        return figures
    write = writing(case, task.model, state.params)
    return figures | timed_decoding(lambda: jax.block_until_ready(write()), case)


def writing(case: Case, model: nn.Module, params) -> Callable[[], object]:
    """What writes `decode_tokens` in each of `decode_batch` rows."""
    if case.model == "dalle":
        captions, _ = picture_tokens(case, case.decode_batch)
        return functools.partial(draw, model, params, captions, key=jax.random.key(0))
    length = case.decode_tokens
    tokens = jnp.asarray(prompts(case))
    return functools.partial(generate, model, params, tokens, max_length=length, eos=None)


def task_of(case: Case) -> Task:
    system = SYSTEMS[case.model]
    execution = ExecutionOptions(dtype="float32").resolve()
    model = system.model(system.config(**case.config), execution)
    match case.model:
        case "bert":
            return Masked(model)
        case "dalle":
            return TextToImage(model)
        case "gpt2":
            return Causal(model)
        case "xlnet":
            return Permuted(model, case.batch)
        case "bart":
            return Seq2Seq(model, start=model.config.start)
        case _:
            return Seq2Seq(model)


def batch_of(case: Case) -> dict[str, np.ndarray]:
    """The arrays of a batch with no padding."""
    if case.model == "dalle":
        captions, codes = picture_tokens(case, case.batch)
        lengths = np.full(case.batch, case.inputs, np.int32)
        batch = {"captions": captions, "captions_lengths": lengths, "image_tokens": codes}
        return batch | {"loss_weights": np.ones(case.batch, np.float32)}
    given = examples(case)
    batch = whole_batch(given["inputs"], given["targets"])
    if case.model in ("bert", "xlnet"):
        batch["targets_positions"] = given["places"]
    one = np.ones((case.batch, 1), np.int32)
    if case.model == "bert":
        second = np.full_like(one, case.inputs // 2)
        batch |= {"pairs": one, "pairs_positions": second, "pairs_segment_ids": one}
    if case.model == "xlnet":
        batch |= {"inputs_order": given["order"], "inputs_token_types": given["types"]}
        batch |= {"lane": 0 * one, "lane_positions": 0 * one}
    return batch


def whole_batch(inputs: np.ndarray, targets: np.ndarray) -> dict[str, np.ndarray]:
    batch = {"loss_weights": np.ones(targets.shape, np.float32)}
    for name, tokens in (("inputs", inputs), ("targets", targets)):
        positions = np.broadcast_to(np.arange(tokens.shape[1], dtype=np.int32), tokens.shape)
        batch |= {name: tokens, f"{name}_positions": positions}
        batch[f"{name}_segment_ids"] = np.ones_like(tokens)
    return batch


def fit_step(task, optimizer):
    """The step that `fit` compiles for one device, and a function that builds its first state."""
    layout = arrange(task, optimizer, batch_size=1, devices=jax.devices()[:1])
    prepared = prepare(task, optimizer, layout)
    return prepared.step, functools.partial(prepared.build, None)

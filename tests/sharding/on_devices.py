"""Trains a small model on eight devices that this process pretends to have.

python -m tests.sharding.on_devices MODEL LAYOUT...

prints JSON: for each layout its losses, and bytes; and what a plan says of `PLANNED`.
"""

import dataclasses
import json
import os
import sys

import jax
import numpy as np

from lmjax.models.bart import Bart, BartConfig
from lmjax.models.bert import Bert, BertConfig
from lmjax.models.clip import CLIP, CLIPConfig
from lmjax.models.dalle import DALLE, DALLEConfig
from lmjax.models.dvae import DVAE, DVAEConfig
from lmjax.models.gpt2 import GPT2, GPT2Config
from lmjax.models.layers import Execution
from lmjax.models.t5 import T5, T5Config
from lmjax.models.xlnet import XLNet, XLNetConfig
from lmjax.sharding.hlo import collectives, parse_hlo
from lmjax.sharding.mesh import activate, put_batch
from lmjax.sharding.planning import plan_step
from lmjax.sharding.strategies import MeshOptions
from lmjax.sharding.topology import Topology
from lmjax.tasks.causal import Causal
from lmjax.tasks.contrastive import Contrastive
from lmjax.tasks.dvae import GumbelSoftmax, HalfCosine, Nearest
from lmjax.tasks.masked import Masked
from lmjax.tasks.permuted import Permuted
from lmjax.tasks.seq2seq import Seq2Seq
from lmjax.tasks.text_to_image import TextToImage
from lmjax.training.optimizers import Adafactor, AdamW
from lmjax.training.reporting import bytes_per_device
from lmjax.training.schedules import Constant
from lmjax.training.step import arrange, lower_step, prepare, shardings

STEPS = 4
ROWS = 16

# Gated, because GELU is smooth: where an input of ReLU is 0 up to rounding, as one unit's was here
# in the third step on some machines, gradients jump, and no two layouts need agree.
EVEN = T5Config(
    vocab=1_024,
    layers=2,
    width=128,
    heads=8,
    head_width=16,
    feed_forward=512,
    gated=True,
    dropout=0.0,
)
# Nothing in it divides by two but the heads.
ODD = T5Config(
    vocab=1_003, layers=3, width=125, heads=6, head_width=17, feed_forward=511, dropout=0.0
)


# GPT-2's own vocabulary, which divides by nothing but 29 and 1,733.
GPT2_SIZES = GPT2Config(
    vocab=50_257, positions=32, layers=2, width=128, heads=8, feed_forward=512, dropout=0.0
)
# Of these, fifteen heads and 1,005 rows divide by nothing that eight devices make.
BERT_SIZES = BertConfig(
    vocab=1_005,
    positions=32,
    first_position=2,
    token_types=1,
    layers=2,
    width=120,
    heads=15,
    feed_forward=512,
    kind="masked_lm",
    dropout=0.0,
)
BART_SIZES = BartConfig(
    vocab=1_005,
    positions=32,
    layers=2,
    decoder_layers=2,
    width=120,
    heads=15,
    feed_forward=512,
    dropout=0.0,
    attention_dropout=0.0,
)
DALLE_SIZES = DALLEConfig(
    text_vocab=1_000,
    text_length=8,
    image_vocab=500,
    grid=6,
    layers=3,  # one of each kind: row, column, conv
    width=124,
    heads=31,
    feed_forward=512,
    conv_extent=3,
)
CLIP_SIZES = CLIPConfig(
    size=20,
    patch=4,
    picture_layers=2,
    picture_width=120,
    picture_heads=15,
    picture_feed_forward=512,
    vocab=1_005,
    positions=12,
    layers=2,
    width=96,
    heads=6,
    feed_forward=384,
    joint_width=100,
)
DVAE_SIZES = DVAEConfig(
    size=16, codes=1_005, width=64, code_width=64, groups=2, blocks=1, kernel=3, patch=2
)
XLNET_SIZES = XLNetConfig(
    vocab=1_005,
    layers=2,
    width=120,
    heads=15,
    feed_forward=512,
    memory=16,
    reuse=12,
    dropout=0.0,
)


def t5(config: T5Config, remat: str):
    return Seq2Seq(T5(config, Execution("float32", remat)), z_loss=1e-4)


def text_to_text(config, seed: int = 0) -> dict[str, np.ndarray]:
    """Rows of which some are short and some are packed, so that normalizers matter."""
    rng = np.random.default_rng(seed)
    arrays = {}
    for name, length in (("inputs", 24), ("targets", 12)):
        ends = rng.integers(length // 2, length + 1, (ROWS, 1))
        cut = rng.integers(2, length // 2, (ROWS, 1))
        place = np.arange(length)
        arrays[name] = np.where(place < ends, rng.integers(2, config.vocab, (ROWS, length)), 0)
        arrays[f"{name}_segment_ids"] = np.where(place < ends, 1 + (place >= cut), 0)
        arrays[f"{name}_positions"] = np.where(place < cut, place, place - cut)
    arrays = {name: array.astype(np.int32) for name, array in arrays.items()}
    return {**arrays, "loss_weights": (arrays["targets"] > 0).astype(np.float32)}


def causal(config) -> dict[str, np.ndarray]:
    rows = text_to_text(config)
    names = [f"inputs{part}" for part in ("", "_positions", "_segment_ids")]
    targets = np.roll(rows["inputs"], -1, axis=1)
    weights = (rows["inputs_segment_ids"] > 0).astype(np.float32)
    return {name: rows[name] for name in names} | {"targets": targets, "loss_weights": weights}


def masked(config) -> dict[str, np.ndarray]:
    """Guesses the words at three places of each row; where a text has no fourth, none."""
    rows = text_to_text(config)
    batch = {name: array for name, array in rows.items() if name.startswith("inputs")}
    places = np.array([0, 1, 1, 3]) + np.zeros((ROWS, 1), int)
    segments = np.array([1, 1, 2, 2]) + np.zeros((ROWS, 1), int)
    lengths = [(rows["inputs_segment_ids"] == segment).sum(1) for segment in (1, 2)]
    there = places < np.where(segments == 1, lengths[0][:, None], lengths[1][:, None])
    starts = np.where(segments == 1, 0, lengths[0][:, None])
    truth = np.take_along_axis(rows["inputs"], np.where(there, starts + places, 0), 1)
    targets = {"targets": truth, "targets_positions": places, "targets_segment_ids": segments}
    targets = {name: np.where(there, x, 0).astype(np.int32) for name, x in targets.items()}
    return {**batch, **targets, "loss_weights": there.astype(np.float32)}


def permuted(config) -> dict[str, np.ndarray]:
    """As `masked`, in a random order; every second row is read backward, some begin their lanes."""
    rows, rng = masked(config), np.random.default_rng(1)
    shape = rows["inputs"].shape
    batch = {name: array for name, array in rows.items() if not name.endswith("inputs_positions")}
    order = np.argsort(rng.random(shape), axis=1)
    types = (np.arange(shape[1]) > 12) + np.zeros(shape, int)
    lanes = {"lane": np.arange(ROWS) % 2, "lane_positions": 12 * (np.arange(ROWS) % 3)}
    more = {"inputs_order": order, "inputs_token_types": types}
    more |= {name: array[:, None] for name, array in lanes.items()}
    return batch | {name: array.astype(np.int32) for name, array in more.items()}


def codes(config) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    arrays = {
        "captions": rng.integers(0, config.text_vocab, (ROWS, config.text_length)),
        "captions_lengths": rng.integers(1, config.text_length + 1, ROWS),
        "image_tokens": rng.integers(0, config.image_vocab, (ROWS, config.image_length)),
    }
    arrays = {name: array.astype(np.int32) for name, array in arrays.items()}
    return {**arrays, "loss_weights": (np.arange(ROWS) % 5 > 0).astype(np.float32)}


def pictures(config) -> dict[str, np.ndarray]:
    size = (ROWS, config.size, config.size, 3)
    pixels = np.random.default_rng(0).integers(0, 256, size).astype(np.uint8)
    return {"pictures": pixels, "loss_weights": (np.arange(ROWS) % 5 > 0).astype(np.float32)}


def pairs(config) -> dict[str, np.ndarray]:
    captions = np.random.default_rng(1).integers(0, config.vocab, (ROWS, config.positions))
    return {**pictures(config), "captions": captions.astype(np.int32)}


# Every model has a line here, and one with a shape that divides by nothing.
MODELS = {
    "t5": (t5(EVEN, "matmuls"), Adafactor(Constant(0.03)), text_to_text(EVEN)),
    "t5-odd": (
        t5(dataclasses.replace(ODD, gated=True, tied=False), "none"),
        AdamW(Constant(3e-3)),
        text_to_text(ODD),
    ),
    "gpt2": (
        Causal(GPT2(GPT2_SIZES, Execution("float32", "full"))),
        AdamW(Constant(3e-3)),
        causal(GPT2_SIZES),
    ),
    "bert": (
        Masked(Bert(BERT_SIZES, Execution("float32", "matmuls"))),
        AdamW(Constant(3e-3)),
        masked(BERT_SIZES),
    ),
    "bart": (
        Seq2Seq(Bart(BART_SIZES, Execution("float32", "full")), start=BART_SIZES.start),
        AdamW(Constant(3e-3)),
        text_to_text(BART_SIZES),
    ),
    "xlnet": (
        Permuted(XLNet(XLNET_SIZES, Execution("float32", "matmuls")), ROWS),
        AdamW(Constant(3e-3)),
        permuted(XLNET_SIZES),
    ),
    "dalle": (
        TextToImage(DALLE(DALLE_SIZES, Execution("float32", "full"))),
        AdamW(Constant(3e-3)),
        codes(DALLE_SIZES),
    ),
    "clip": (
        Contrastive(CLIP(CLIP_SIZES, Execution("float32", "matmuls"))),
        AdamW(Constant(1e-3)),
        pairs(CLIP_SIZES),
    ),
    "dvae": (
        GumbelSoftmax(
            DVAE(DVAE_SIZES, Execution("float32", "none")), balance=HalfCosine(0.1, 0.1, 1)
        ),
        AdamW(Constant(1e-2)),
        pictures(DVAE_SIZES),
    ),
    "vq_vae": (
        Nearest(
            DVAE(dataclasses.replace(DVAE_SIZES, nearest=True), Execution("float32", "matmuls"))
        ),
        AdamW(Constant(3e-4)),
        pictures(DVAE_SIZES),
    ),
}
LAYOUTS = {
    "one device": ("dp", MeshOptions(), 1),
    "pmap": ("pmap", MeshOptions(), 8),
    "dp": ("dp", MeshOptions(), 8),
    "fsdp": ("fsdp", MeshOptions(), 8),
    "fsdp, replicated": ("fsdp", MeshOptions(fsdp=2, slices=2), 8),
    "tp": ("tp", MeshOptions(), 8),
    "tp 2": ("tp", MeshOptions(model=2), 8),
    "fsdp_tp": ("fsdp_tp", MeshOptions(fsdp=2, model=2), 8),
    "fsdp_tp, width": ("fsdp_tp", MeshOptions(fsdp=4, model=2, activations="width"), 8),
    "fsdp_tp, length": ("fsdp_tp", MeshOptions(fsdp=2, model=4, activations="length"), 8),
    "fsdp_tp, accumulated": ("fsdp_tp", MeshOptions(fsdp=2, model=2), 8, 2),
}

PLANNED = "fsdp_tp, width"
"""The layout of which there is a plan."""


def train(task, optimizer, rows, strategy, options, devices, microbatches=1) -> dict:
    layout = arrange(
        task,
        optimizer,
        ROWS,
        microbatches=microbatches,
        strategy=strategy,
        options=options,
        devices=jax.devices()[:devices],
    )
    with activate(layout):
        prepared = prepare(task, optimizer, layout, seed=1, microbatches=microbatches)
        state = jax.jit(prepared.build, out_shardings=shardings(prepared.target))(None)
        batch = put_batch(rows, layout.batch)
        if strategy == "pmap":
            batch = jax.tree.map(lambda x: x.reshape(devices, -1, *x.shape[1:]), batch)
        lowered = lower_step(prepared, batch, layout)
        step = lowered.compile()
        losses, norms = [], []
        for _ in range(STEPS):
            state, outcome = step(state, batch)
            losses.append(float(outcome.metrics["loss"]))
            norms.append(float(outcome.metrics["grad_norm"]))
    sent = sum(one.bytes * one.count for one in collectives(parse_hlo(step.as_text()), layout.mesh))
    held = step.memory_analysis().temp_size_in_bytes + bytes_per_device((state, batch))
    return {
        "losses": losses,
        "grad_norm": norms[0],
        "constraints": lowered.as_text().count("sdy.sharding_constraint"),
        "params": bytes_per_device(prepared.target.params),
        "optimizer": bytes_per_device(prepared.target.opt_state),
        "sent": sent,
        "held": held,
    }


def plan(task, optimizer, rows, strategy, options, devices) -> dict:
    """What a plan says of such a step."""
    layout = arrange(task, optimizer, ROWS, strategy=strategy, options=options)
    report = plan_step(
        prepare(task, optimizer, layout, seed=1),
        {name: jax.ShapeDtypeStruct(x.shape, x.dtype) for name, x in rows.items()},
        layout,
        Topology(f"cpu:{devices}", jax.devices(), None, f"cpu:{devices}"),
        reads=(),
        model_flops=1.0,
        steps=1,
    )
    return {
        "sent": sum(sum(axes.values()) for axes in report.collective_bytes.values()),
        "held": report.bytes_per_device,
        "flops": report.hardware_flops_per_step,
        "formula": task.flops({name: x.shape for name, x in rows.items()}),
    }


def main() -> None:
    os.environ["XLA_FLAGS"] = "--xla_force_host_platform_device_count=8"  # read at the first use
    jax.config.update("jax_platforms", "cpu")
    model, *names = sys.argv[1:]
    results = {name: train(*MODELS[model], *LAYOUTS[name]) for name in names}
    results["planned"] = plan(*MODELS[model], *LAYOUTS[PLANNED])
    print(json.dumps(results))


if __name__ == "__main__":
    main()

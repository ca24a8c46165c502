"""How fast lmjax is, beside whatever else is installed, in one run on one machine.

    python -m experiments.benchmark t5
    python -m experiments.benchmark t5 --batch 4 --inputs 128 --targets 32 --rounds 1

Trains (AdamW, float32, dropout off) and decodes (greedy, with a cache) a T5 of the same shape with
lmjax, with transformers' PyTorch T5 and with transformers 4.57's Flax T5, each in a process of its
own, in turns, so that a busy machine slows them alike; the best turn counts. lmjax takes the step
that `fit` takes, with its checks. Peak memory is that of training, on the accelerator if there is
one. Then what only lmjax has: span corruption and batches per second, and the memory of the loss
over mT5's vocabulary. About ten minutes on two CPU cores with the defaults.
"""

import dataclasses
import functools
import importlib.util
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
import types
from collections.abc import Callable
from pathlib import Path
from typing import Literal

import numpy as np
import tyro
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from lmjax import command_line

MEASURE = "--measure"  # how the benchmark calls itself


@dataclasses.dataclass(frozen=True)
class Benchmark:
    system: tyro.conf.Positional[Literal["t5"]]
    """Which model: t5."""
    preset: str = "small"
    """Which size: small, base, v1_1-small, mt5-small, ..."""
    batch: int = 8
    inputs: int = 512
    targets: int = 114
    steps: int = 4
    """Training steps timed in each turn."""
    decode_batch: int = 8
    decode_inputs: int = 128
    decode_tokens: int = 64
    rounds: int = 2
    """Turns of each implementation; the best counts."""
    extras: bool = True
    """Also measure span corruption, batches, and the memory of the loss."""
    json: Path | None = None
    """Write the figures here too."""


def main() -> None:
    settings = tyro.cli(Benchmark, description=__doc__)
    from lmjax.models import t5

    if settings.preset not in t5.PRESETS:
        raise ValueError(f"--preset {settings.preset} is none of {', '.join(t5.PRESETS)}")
    given = {**dataclasses.asdict(settings), "json": None}
    given["config"] = dataclasses.asdict(t5.PRESETS[settings.preset])
    console = Console()
    peers = {"transformers PyTorch": has_torch_t5, "transformers Flax": has_flax_t5}
    names = ["lmjax", *(name for name, installed in peers.items() if installed())]
    for name in peers.keys() - names:
        console.print(f"{name} is not installed, and left out")
    turns = [(name, turn) for turn in range(settings.rounds) for name in names]
    results: dict[str, list[dict]] = {name: [] for name in names}
    with Progress(console=console) as progress:
        for name, _ in progress.track(turns, description="training and decoding"):
            results[name].append(in_own_process(name, given))
    best = {name: combined(turns) for name, turns in results.items()}
    console.print(table(best, settings))
    extras = in_own_process("extras", given) if settings.extras else {}
    for name, value in extras.items():
        console.print(f"{name}: {value}")
    if settings.json is not None:
        content = {"settings": dataclasses.asdict(settings), "best": best, "extras": extras}
        settings.json.write_text(json.dumps(content, indent=2, default=str))


def in_own_process(name: str, given: dict) -> dict:
    """The figures of one turn, measured where nothing else has run."""
    command = [sys.executable, "-m", "experiments.benchmark", MEASURE, name]
    done = subprocess.run(command, input=json.dumps(given), capture_output=True, text=True)
    if done.returncode:
        lines = done.stderr.strip().splitlines() or [f"it ended with {done.returncode}"]
        raise ValueError(f"{name} failed: {lines[-1]}")
    return json.loads(done.stdout.splitlines()[-1])


def measure() -> None:
    """What those processes do: settings from standard input, figures to standard output."""
    given = types.SimpleNamespace(**json.load(sys.stdin))
    print(json.dumps(MEASURES[sys.argv[2]](given)))


def combined(turns: list[dict]) -> dict:
    """The best turn of each figure."""
    best = {name: min(turn[name] for turn in turns) for name in turns[0]}
    best["decode_tokens_per_second"] = max(turn["decode_tokens_per_second"] for turn in turns)
    return best


def table(best: dict[str, dict], settings: Benchmark) -> Table:
    shape = f"{settings.batch} x ({settings.inputs} in, {settings.targets} out)"
    result = Table(title=f"T5 {settings.preset}, {shape}, float32; ratios are to lmjax")
    for column in ("", "step s", "ratio", "compile s", "peak GB", "decode tokens/s", "ratio"):
        result.add_column(column, justify="right" if column else "left")
    ours = best["lmjax"]
    for name, figures in best.items():
        decode = figures["decode_tokens_per_second"]
        result.add_row(
            name,
            f"{figures['step_seconds']:.2f}",
            f"{figures['step_seconds'] / ours['step_seconds']:.2f}",
            f"{figures['compile_seconds']:.1f}",
            f"{figures['peak_bytes'] / 1e9:.2f}",
            f"{decode:.0f}",
            f"{decode / ours['decode_tokens_per_second']:.2f}",
        )
    return result


# --- what every contestant is given, and how it is timed


def sizes(settings):
    """The T5Config of the preset; the processes of other libraries need none of lmjax for it."""
    return types.SimpleNamespace(**settings.config)


def random_tokens(*shape: int) -> np.ndarray:
    return np.random.default_rng(0).integers(3, 32_000, shape).astype(np.int32)


def training_batch(settings: Benchmark) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """inputs, decoder inputs, targets."""
    targets = random_tokens(settings.batch, settings.targets)
    shifted = np.pad(targets[:, :-1], ((0, 0), (1, 0)))
    return random_tokens(settings.batch, settings.inputs), shifted, targets


def timed(call: Callable[[], object], repeats: int) -> float:
    """Seconds of the fastest call."""
    seconds = []
    for _ in range(repeats):
        start = time.perf_counter()
        call()
        seconds.append(time.perf_counter() - start)
    return min(seconds)


def peak_bytes() -> int:
    """Of this process so far; of the first accelerator if JAX has one."""
    if "jax" in sys.modules:
        import jax

        statistics = jax.local_devices()[0].memory_stats() or {}
        if "peak_bytes_in_use" in statistics:
            return statistics["peak_bytes_in_use"]
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def timed_jax_training(step: Callable, state, settings) -> tuple[dict, object]:
    """Figures of `step(state) -> (state, outcome)`, compiled with its memory reused; the state."""
    import jax

    start = time.perf_counter()
    compiled = jax.jit(step, donate_argnums=0).lower(state).compile()
    compile_seconds = time.perf_counter() - start

    def call():
        nonlocal state
        state, outcome = compiled(state)
        jax.block_until_ready((state, outcome))

    call()
    figures = {
        "step_seconds": timed(call, settings.steps),
        "compile_seconds": compile_seconds,
        "peak_bytes": peak_bytes(),
    }
    return figures, state


# --- the contestants


def measure_lmjax(settings) -> dict:
    import jax
    import jax.numpy as jnp

    from lmjax.decoding.generate import generate
    from lmjax.models.t5 import T5, T5Config
    from lmjax.tasks.seq2seq import Seq2Seq
    from lmjax.training.execution import ExecutionOptions
    from lmjax.training.optimizers import AdamW
    from lmjax.training.schedules import Constant

    config = T5Config(**{**settings.config, "dropout": 0.0})
    task = Seq2Seq(T5(config, ExecutionOptions(dtype="float32").resolve()))
    optimizer = AdamW(Constant(1e-3), gradient_clip=None)
    step, build = fit_step(task, optimizer)
    state = jax.jit(build)()
    inputs, _, targets = training_batch(settings)
    batch = jax.tree.map(jnp.asarray, whole_batch(inputs, targets))
    training, state = timed_jax_training(lambda state: step(state, batch), state, settings)
    decoded = jnp.asarray(random_tokens(settings.decode_batch, settings.decode_inputs))
    length = settings.decode_tokens
    options = {"max_length": length, "eos": None}
    write = functools.partial(generate, task.model, state.params, decoded, **options)
    jax.block_until_ready(write())
    seconds = timed(lambda: jax.block_until_ready(write()), 3)
    return training | {"decode_tokens_per_second": settings.decode_batch * length / seconds}


def fit_step(task, optimizer):
    """The step that `fit` compiles for one device, and a function that builds its first state."""
    import jax

    from lmjax.training.step import arrange, prepare

    layout = arrange(task, optimizer, batch_size=1, devices=jax.devices()[:1])
    prepared = prepare(task, optimizer, layout)
    return prepared.step, functools.partial(prepared.build, None)


def whole_batch(inputs: np.ndarray, targets: np.ndarray) -> dict[str, np.ndarray]:
    """The seven arrays of a batch with no padding."""
    batch = {"loss_weights": np.ones(targets.shape, np.float32)}
    for name, tokens in (("inputs", inputs), ("targets", targets)):
        positions = np.broadcast_to(np.arange(tokens.shape[1], dtype=np.int32), tokens.shape)
        batch |= {name: tokens, f"{name}_positions": positions}
        batch[f"{name}_segment_ids"] = np.ones_like(tokens)
    return batch


def measure_flax(settings) -> dict:
    import jax
    import jax.numpy as jnp
    import optax

    clip = jnp.clip

    def clip_of_old(x, min=None, max=None, *, a_min=None, a_max=None):
        """transformers 4.57 calls `jnp.clip` with the names of an older JAX."""
        return clip(x, a_min if min is None else min, a_max if max is None else max)

    jnp.clip = clip_of_old
    from transformers import FlaxT5ForConditionalGeneration

    model = FlaxT5ForConditionalGeneration(transformers_config(settings), seed=0)
    inputs, shifted, targets = map(jnp.asarray, training_batch(settings))
    optimizer = optax.adamw(1e-3)

    def loss(params):
        logits = model(inputs, decoder_input_ids=shifted, params=params, train=False).logits
        return optax.softmax_cross_entropy_with_integer_labels(logits, targets).mean()

    def step(carry):
        params, state = carry
        value, gradients = jax.value_and_grad(loss)(params)
        updates, state = optimizer.update(gradients, state, params)
        return (optax.apply_updates(params, updates), state), value

    start = jax.tree.map(jnp.copy, model.params), optimizer.init(model.params)
    training, _ = timed_jax_training(step, start, settings)
    decoded = jnp.asarray(random_tokens(settings.decode_batch, settings.decode_inputs))
    length = settings.decode_tokens
    options = {"max_length": length + 1, "min_length": length + 1, "num_beams": 1}
    write = functools.partial(model.generate, decoded, **options)
    jax.block_until_ready(write().sequences)
    seconds = timed(lambda: jax.block_until_ready(write().sequences), 3)
    return training | {"decode_tokens_per_second": settings.decode_batch * length / seconds}


def measure_torch(settings) -> dict:
    import torch
    from transformers import T5ForConditionalGeneration

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model = T5ForConditionalGeneration(transformers_config(settings)).train().to(device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    batch = [torch.from_numpy(array).long().to(device) for array in training_batch(settings)]
    inputs, shifted, targets = batch

    def call():
        optimizer.zero_grad()
        loss = model(input_ids=inputs, decoder_input_ids=shifted, labels=targets).loss
        loss.backward()
        optimizer.step()
        loss.item()

    start = time.perf_counter()
    call()
    first = time.perf_counter() - start
    seconds = timed(call, settings.steps)
    peak = torch.cuda.max_memory_allocated() if device.type == "cuda" else peak_bytes()

    model.eval()
    length, rows = settings.decode_tokens, settings.decode_batch
    decoded = torch.from_numpy(random_tokens(rows, settings.decode_inputs)).long().to(device)
    options = {"max_new_tokens": length, "min_new_tokens": length, "do_sample": False}
    decode_seconds = []
    for threads in {1, torch.get_num_threads()}:  # small products are often faster on one
        torch.set_num_threads(threads)
        decode_seconds.append(timed(lambda: model.generate(decoded, **options), 3))
    return {
        "step_seconds": seconds,
        "compile_seconds": max(first - seconds, 0.0),
        "peak_bytes": peak,
        "decode_tokens_per_second": rows * length / min(decode_seconds),
    }


def transformers_config(settings):
    from transformers import T5Config

    config = sizes(settings)
    return T5Config(
        vocab_size=config.vocab,
        d_model=config.width,
        d_kv=config.head_width,
        d_ff=config.feed_forward,
        num_layers=config.layers,
        num_decoder_layers=config.decoder_layers,
        num_heads=config.heads,
        feed_forward_proj="gated-gelu" if config.gated else "relu",
        tie_word_embeddings=config.tied,
        dropout_rate=0.0,
        decoder_start_token_id=0,
    )


# --- what only lmjax has


def measure_extras(settings: Benchmark) -> dict:
    del settings
    return {**data_speeds(), **loss_memory(512), **loss_memory(768), **mt5_base_memory()}


def data_speeds() -> dict:
    """Tokens per second of the objective alone, and of batches out of a token store."""
    from lmjax.data.batches import IndexedBatches, Windows
    from lmjax.data.token_store import TokenStore, build_token_store
    from lmjax.objectives.denoising import SpanCorruption

    objective = SpanCorruption()
    sentinels = np.arange(32_099, 31_999, -1, dtype=np.int32)
    bound = objective.bind(types.SimpleNamespace(sentinels=sentinels, eos_id=1))
    tokens = random_tokens(objective.window)
    generator = np.random.default_rng(0)
    seconds = timed(lambda: [bound(tokens, generator) for _ in range(2_000)], 3)
    speeds = {"span corruption, tokens/s on one core": round(2_000 * objective.window / seconds)}

    class Counted:
        vocab_size, sha256 = 32_100, "benchmark"

        def encode_batch(self, texts):
            return [random_tokens(568_000) for _ in texts]

    with tempfile.TemporaryDirectory() as directory:
        store: TokenStore = build_token_store(
            ["."] * 4, Counted(), Path(directory) / "store", "benchmark", progress=False
        )
        rows = Windows(store, objective.window)
        batches = IndexedBatches(rows, bound, objective.lengths, 128, seed=0)
        stream = batches.start(None)
        next(stream)
        seconds = timed(lambda: [next(stream) for _ in range(20)], 3)
        stream.close()
    speeds["batches of 128, tokens/s on one core"] = round(20 * 128 * objective.window / seconds)
    return speeds


def loss_memory(width: int) -> dict:
    """Compiled temporary memory of loss and gradient from features, 4,096 tokens of mT5."""
    import jax
    import jax.numpy as jnp
    import optax

    from lmjax.tasks.losses import cross_entropy

    shapes = [(8, 512, width), (250_112, width)]
    arrays = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes]
    targets, weights = jnp.zeros((8, 512), jnp.int32), jnp.ones((8, 512))

    def chunked(features, matrix):
        return cross_entropy(features, matrix, targets, weights)[0]

    def full(features, matrix):
        logits = jnp.einsum("BTD,VD->BTV", features, matrix)
        return optax.softmax_cross_entropy_with_integer_labels(logits, targets).sum()

    def gigabytes(function):
        compiled = jax.jit(jax.value_and_grad(function, (0, 1))).lower(*arrays).compile()
        return compiled.memory_analysis().temp_size_in_bytes / 1e9

    ours, theirs = gigabytes(chunked), gigabytes(full)
    text = f"{ours:.2f} against {theirs:.2f} with full logits ({ours / theirs:.2f})"
    return {f"loss of 4,096 tokens, 250,112 rows, width {width}, temporary GB": text}


def mt5_base_memory() -> dict:
    """Compiled memory of mT5-base's whole step, batch 8 x (512, 114)."""
    import jax

    from lmjax.models.t5 import PRESETS, T5
    from lmjax.tasks.seq2seq import Seq2Seq
    from lmjax.training.execution import ExecutionOptions
    from lmjax.training.optimizers import Adafactor

    config = dataclasses.replace(PRESETS["mt5-base"], dropout=0.0)
    task = Seq2Seq(T5(config, ExecutionOptions().resolve()), z_loss=1e-4)
    step, build = fit_step(task, Adafactor())
    state = jax.eval_shape(build)
    batch = whole_batch(random_tokens(8, 512), random_tokens(8, 114))
    memory = jax.jit(step, donate_argnums=0).lower(state, batch).compile().memory_analysis()
    state_bytes, temporary = memory.argument_size_in_bytes, memory.temp_size_in_bytes
    text = f"{temporary / 1e9:.2f} temporary beside {state_bytes / 1e9:.2f} of state"
    return {"mT5-base, a whole step of 8 x (512, 114), GB": text}


def has_torch_t5() -> bool:
    return all(importlib.util.find_spec(name) for name in ("torch", "transformers"))


def has_flax_t5() -> bool:
    """transformers dropped its Flax models in version 5."""
    if importlib.util.find_spec("transformers") is None:
        return False
    return importlib.util.find_spec("transformers.models.t5.modeling_flax_t5") is not None


MEASURES = {
    "lmjax": measure_lmjax,
    "transformers PyTorch": measure_torch,
    "transformers Flax": measure_flax,
    "extras": measure_extras,
}

if __name__ == "__main__":
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    command_line.run(measure if sys.argv[1:2] == [MEASURE] else main)

"""What only lmjax has: how fast its objectives and batches are, the memory of its loss, and what
DALL-E's sparse attention and its cache are worth."""

import dataclasses
import functools
import tempfile
import types
from collections.abc import Callable
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax

from experiments.benchmark.harness import Case, random_tokens, timed
from experiments.benchmark.lmjax_models import fit_step, task_of, whole_batch, writing
from lmjax.data.batches import IndexedBatches, Windows
from lmjax.data.lanes import Lane, Sentences
from lmjax.data.token_store import TokenStore, build_token_store
from lmjax.models.dalle import DALLEConfig, mask, stream_attention
from lmjax.models.layers import whole_attention
from lmjax.models.t5 import PRESETS, T5
from lmjax.objectives.bart_denoising import BartDenoising
from lmjax.objectives.causal_lm import CausalLM
from lmjax.objectives.denoising import SpanCorruption
from lmjax.objectives.masked_lm import MaskedLM
from lmjax.objectives.masked_pairs import MaskedPairs, Pair
from lmjax.objectives.permutation_lm import LaneRow, PermutationLM
from lmjax.tasks.losses import cross_entropy
from lmjax.tasks.seq2seq import Seq2Seq
from lmjax.training.execution import ExecutionOptions
from lmjax.training.optimizers import Adafactor

VOCAB, END, STOP = 32_000, 4, 5
"""END ends a sentence for the objectives, STOP is a full stop in the text."""
SENTENCE = 25
"""Tokens of a sentence, END included."""


def measure(system: str, case: Case) -> dict[str, str]:
    if system == "text":
        return text_speeds()
    if system == "dalle":
        return {**worth_of_cache(case), **worth_of_sparsity(case)}
    return {**t5_speeds(), **loss_memory(512), **loss_memory(768), **mt5_base_memory()}


class Counted:
    """A tokenizer that has everything, for texts that are their own count of tokens."""

    vocab_size, sha256 = VOCAB, "benchmark"
    bos_id, eos_id, mask_id, unk_id, sep_id, cls_id = 1, END, 2, 3, END, 0
    special_ids = (0, 1, 2, 3, END)
    sentinels = np.arange(VOCAB - 1, VOCAB - 101, -1, dtype=np.int32)

    def decode(self, ids: list[int]) -> str:
        return "." if ids == [STOP] else "a"

    def encode_batch(self, texts: list[str]) -> list[np.ndarray]:
        return [random_tokens(int(text), vocab=VOCAB) for text in texts]

    def starts_word(self) -> np.ndarray:
        """Two of three ids start one."""
        return np.arange(VOCAB) % 3 > 0


def text_speeds() -> dict[str, str]:
    """Tokens per second of each objective on one core, in rows of its own length."""
    tokens = random_tokens(1_000_000, vocab=VOCAB)
    tokens[SENTENCE - 1 :: SENTENCE] = END
    text = Sentences(types.SimpleNamespace(tokens=tokens, offsets=[0, len(tokens)]), END)
    lane = Lane(text, 0, len(text), backward=False)
    stops = tokens.copy()
    stops[stops == END] = STOP
    pairs = MaskedPairs()
    half = pairs.window // 2

    def pair_at(place: int) -> Pair:
        middle, end = place + half, place + pairs.window
        return Pair(stops[place:middle], stops[middle:end], elsewhere=False)

    def window_of(length: int):
        return lambda place: stops[place : place + length]

    objectives = {
        "masked pairs (BERT)": (pairs, pair_at),
        "masked words (RoBERTa)": (MaskedLM(), window_of(MaskedLM().window)),
        "permutations (XLNet)": (PermutationLM(), lambda place: LaneRow(lane, place)),
        "denoising (BART)": (BartDenoising(), window_of(BartDenoising().window)),
        "successors (GPT-2)": (CausalLM(), window_of(CausalLM().window)),
    }
    speeds = {}
    for name, (objective, row_at) in objectives.items():
        bound, generator = objective.bind(Counted()), np.random.default_rng(0)
        rows = [row_at(place) for place in generator.integers(len(text) - 2_000, size=500)]
        seconds = timed(lambda: [bound(row, generator) for row in rows], 5)  # noqa: B023
        rate = len(rows) * objective.window / seconds
        speeds[f"{name}, million tokens/s on one core"] = f"{rate / 1e6:.2f}"
    return speeds


def t5_speeds() -> dict[str, str]:
    """Tokens per second of span corruption alone, and of batches out of a token store."""
    objective = SpanCorruption()
    bound, generator = objective.bind(Counted()), np.random.default_rng(0)
    tokens = random_tokens(objective.window, vocab=VOCAB)
    seconds = timed(lambda: [bound(tokens, generator) for _ in range(2_000)], 3)
    rate = 2_000 * objective.window / seconds
    speeds = {"span corruption, million tokens/s on one core": f"{rate / 1e6:.2f}"}
    with tempfile.TemporaryDirectory() as directory:
        store: TokenStore = build_token_store(
            ["568000"] * 4, Counted(), Path(directory) / "store", "benchmark", progress=False
        )
        rows = Windows(store, objective.window)
        stream = IndexedBatches(rows, bound, objective.lengths, 128, seed=0).start(None)
        next(stream)
        seconds = timed(lambda: [next(stream) for _ in range(20)], 3)
        stream.close()
    rate = 20 * 128 * objective.window / seconds
    return speeds | {"batches of 128, million tokens/s on one core": f"{rate / 1e6:.2f}"}


def loss_memory(width: int) -> dict[str, str]:
    """Compiled temporary memory of loss and gradient from features, 4,096 tokens of mT5."""
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


def mt5_base_memory() -> dict[str, str]:
    """Compiled memory of mT5-base's whole step, batch 8 x (512, 114)."""
    config = dataclasses.replace(PRESETS["mt5-base"], dropout=0.0)
    task = Seq2Seq(T5(config, ExecutionOptions().resolve()), z_loss=1e-4)
    step, build = fit_step(task, Adafactor())
    state = jax.eval_shape(build)
    rows = (random_tokens(8, length, vocab=VOCAB) for length in (512, 114))
    batch = whole_batch(*rows)
    memory = jax.jit(step, donate_argnums=0).lower(state, batch).compile().memory_analysis()
    state_bytes, temporary = memory.argument_size_in_bytes, memory.temp_size_in_bytes
    text = f"{temporary / 1e9:.2f} temporary beside {state_bytes / 1e9:.2f} of state"
    return {"mT5-base, a whole step of 8 x (512, 114), GB": text}


def worth_of_cache(case: Case) -> dict[str, str]:
    """Drawing with and without; every pass over the whole stream takes the same time, so a few of
    them are timed and counted as one for each token."""
    task = task_of(case)
    c, model, params = task.model.config, task.model, task.init(jax.random.key(0)).params
    tokens = jnp.zeros((case.decode_batch, c.length), jnp.int32)

    @jax.jit
    def next_code(params, tokens):
        features = model.apply({"params": params}, tokens, method="features")[:, -1]
        return (features @ params["output"][: c.image_vocab].T).argmax(-1)

    whole = c.image_length * fastest(lambda: next_code(params, tokens))
    cached = fastest(writing(case, model, params))
    text = f"{cached:.2f} with a cache, {whole:.1f} without ({whole / cached:.0f})"
    return {f"drawing {case.decode_batch} x {c.image_length} tokens, seconds": text}


def worth_of_sparsity(case: Case) -> dict[str, str]:
    """One layer of each kind, forwards and backwards, by blocks and as a masked product."""
    config = DALLEConfig(**case.config)
    shape = (3, case.decode_batch, config.length, config.heads, config.head_width)
    operands = jax.random.normal(jax.random.key(0), shape)

    def gradient(attend: Callable):
        run = jax.jit(jax.grad(lambda operands: jnp.square(attend(*operands)).sum()))
        return 1e3 * fastest(lambda: run(operands))

    figures = {}
    for kind in ("row", "column", "conv"):
        ours = gradient(functools.partial(stream_attention, config, kind))
        full = gradient(lambda *qkv, kind=kind: whole_attention(*qkv, mask(kind, config)))
        products = config.scores(kind) / config.length**2
        figures[f"attention of a {kind} layer, gradient, ms"] = (
            f"{ours:.1f} by blocks, {full:.1f} masked ({ours / full:.2f}; {products:.2f} of its"
            " products)"
        )
    return figures


def fastest(run: Callable[[], object]) -> float:
    """Seconds of the fastest of three, after one that compiles."""
    jax.block_until_ready(run())
    return timed(lambda: jax.block_until_ready(run()), 3)

"""What every library is given to do, in a process of its own, and how it is timed.

A library is a module of this package with `measure(case) -> Figures`; it is imported only where it
is measured, so that no library counts in another one's memory.
"""

import dataclasses
import importlib
import importlib.util
import json
import resource
import subprocess
import sys
import time
import types
from collections.abc import Callable
from typing import Any

import numpy as np
from rich.progress import Progress
from rich.table import Table

Figures = dict[str, float]
"""`step_seconds`, `compile_seconds`, `peak_bytes`, and `decode_tokens_per_second` of what writes.
Peak memory is that of training, on the accelerator if there is one."""

MODULES = {
    "lmjax": "experiments.benchmark.lmjax_models",
    "transformers PyTorch": "experiments.benchmark.torch_models",
    "transformers Flax": "experiments.benchmark.flax_models",
    "dalle-pytorch": "experiments.benchmark.dalle_pytorch_model",
}
MEASURE = "--measure"  # how the benchmark calls itself


@dataclasses.dataclass(frozen=True)
class Case:
    """A model of a shape, to be trained and, where `decode_batch` is not 0, to write."""

    model: str
    config: dict[str, Any]
    """The fields of lmjax's config."""
    batch: int
    inputs: int
    targets: int
    """Of each row: tokens to write or to continue with, or words to guess."""
    steps: int
    """Training steps timed in each turn."""
    decode_batch: int = 0
    decode_inputs: int = 0
    decode_tokens: int = 0
    kinds: tuple[str, ...] = ()
    """Of DALL-E's layers: row, column or conv."""

    @property
    def sizes(self) -> types.SimpleNamespace:
        """The config, for processes that import nothing of lmjax."""
        return types.SimpleNamespace(**self.config)

    def __str__(self) -> str:
        return f"{self.model}, {self.batch} x ({self.inputs}, {self.targets})"


def libraries(model: str) -> dict[str, bool]:
    """Those that have the model; and whether they are installed."""
    if model == "dalle":
        return {"lmjax": True, "dalle-pytorch": has_dalle_pytorch()}
    installed = {"lmjax": True, "transformers PyTorch": has_torch_models()}
    if model != "xlnet":
        installed["transformers Flax"] = has_flax_models()
    return installed


def has_torch_models() -> bool:
    return all(importlib.util.find_spec(name) for name in ("torch", "transformers"))


def has_flax_models() -> bool:
    """transformers dropped its Flax models in version 5."""
    if importlib.util.find_spec("transformers") is None:
        return False
    return importlib.util.find_spec("transformers.models.t5.modeling_flax_t5") is not None


def has_dalle_pytorch() -> bool:
    return all(importlib.util.find_spec(name) for name in ("torch", "dalle_pytorch"))


def compare(cases: list[Case], rounds: int, progress: Progress) -> dict[str, dict[str, Figures]]:
    """Of each case and each library that is installed, the best of `rounds` turns.

    Libraries take turns, so that a busy machine slows them alike.
    """
    turns = [
        (case, name)
        for case in cases
        for _ in range(rounds)
        for name, installed in libraries(case.model).items()
        if installed
    ]
    results: dict[str, dict[str, list[Figures]]] = {}
    for case, name in progress.track(turns, description="training and decoding"):
        figures = in_own_process(name, MODULES[name], case=dataclasses.asdict(case))
        results.setdefault(case.model, {}).setdefault(name, []).append(figures)
    return {
        model: {name: best_of(turns) for name, turns in of_case.items()}
        for model, of_case in results.items()
    }


def best_of(turns: list[Figures]) -> Figures:
    """The best turn of each figure."""
    rates = ("decode_tokens_per_second",)
    return {
        name: (max if name in rates else min)(turn[name] for turn in turns) for name in turns[0]
    }


def in_own_process(name: str, module: str, **arguments) -> dict[str, Any]:
    """What the module's `measure` returns, called where nothing else has run."""
    command = [sys.executable, "-m", "experiments.benchmark", MEASURE, module]
    given = json.dumps(arguments)
    done = subprocess.run(command, input=given, capture_output=True, text=True)
    if done.returncode:
        lines = done.stderr.strip().splitlines() or [f"it ended with {done.returncode}"]
        raise ValueError(f"{name} failed: {lines[-1]}")
    return json.loads(done.stdout.splitlines()[-1])


def measure() -> None:
    """What those processes do: arguments from standard input, figures to standard output."""
    arguments = json.load(sys.stdin)
    if "case" in arguments:
        arguments["case"] = Case(**arguments["case"])
    print(json.dumps(importlib.import_module(sys.argv[2]).measure(**arguments)))


def table(best: dict[str, dict[str, Figures]], cases: list[Case]) -> Table:
    result = Table(title="float32, dropout off; ratios are to lmjax")
    columns = ("step s", "ratio", "compile s", "peak GB", "decode tokens/s", "ratio")
    for column in ("", *columns):
        result.add_column(column, justify="right" if column else "left")
    for case in cases:
        result.add_section()
        result.add_row(str(case))
        ours = best[case.model]["lmjax"]
        for name, figures in best[case.model].items():
            row = [
                f"{figures['step_seconds']:.2f}",
                f"{figures['step_seconds'] / ours['step_seconds']:.2f}",
                f"{figures['compile_seconds']:.1f}",
                f"{figures['peak_bytes'] / 1e9:.2f}",
            ]
            if case.decode_batch:
                rates = [x["decode_tokens_per_second"] for x in (figures, ours)]
                row += [f"{rates[0]:.0f}", f"{rates[0] / rates[1]:.2f}"]
            result.add_row(f"  {name}", *row)
    return result


# --- for the libraries


def random_tokens(*shape: int, vocab: int, seed: int = 0) -> np.ndarray:
    """None of the first ids, which models have for padding and the like."""
    return np.random.default_rng(seed).integers(3, vocab, shape).astype(np.int32)


def examples(case: Case) -> dict[str, np.ndarray]:
    """`inputs` and `targets`; what a decoder reads, `shifted`; and for models that guess words the
    `places` of the targets [B, targets], of which each sees those in an `order` below its own, and
    the two sentences' `types`."""
    inputs = random_tokens(case.batch, case.inputs, vocab=case.sizes.vocab)
    targets = random_tokens(case.batch, case.targets, vocab=case.sizes.vocab, seed=1)
    generator = np.random.default_rng(0)
    chosen = min(case.targets, case.inputs)
    drawn = [generator.permutation(case.inputs)[:chosen] for _ in range(case.batch)]
    places = np.sort(drawn).astype(np.int32)
    order = np.full(inputs.shape, -1, np.int32)
    turns = np.broadcast_to(np.arange(chosen, dtype=np.int32), places.shape)
    np.put_along_axis(order, places, generator.permuted(turns, axis=1), 1)
    types = np.broadcast_to(np.arange(case.inputs) >= case.inputs // 2, inputs.shape)
    return {
        "inputs": inputs,
        "targets": targets,
        "shifted": np.pad(targets[:, :-1], ((0, 0), (1, 0))),
        "places": places,
        "order": order,
        "types": types.astype(np.int32),
    }


def prompts(case: Case) -> np.ndarray:
    return random_tokens(case.decode_batch, case.decode_inputs, vocab=case.sizes.vocab)


def picture_tokens(case: Case, rows: int) -> tuple[np.ndarray, np.ndarray]:
    """Captions [rows, inputs] and the codes of their pictures [rows, targets]."""
    captions = random_tokens(rows, case.inputs, vocab=case.sizes.text_vocab)
    return captions, random_tokens(rows, case.targets, vocab=case.sizes.image_vocab, seed=1)


def timed(call: Callable[[], object], repeats: int) -> float:
    """Seconds of the fastest call."""
    seconds = []
    for _ in range(repeats):
        start = time.perf_counter()
        call()
        seconds.append(time.perf_counter() - start)
    return min(seconds)


def timed_decoding(write: Callable[[], object], case: Case) -> Figures:
    """Of what writes `decode_tokens` in each of `decode_batch` rows; called once before."""
    write()
    tokens = case.decode_batch * case.decode_tokens
    return {"decode_tokens_per_second": tokens / timed(write, 3)}


def peak_bytes() -> int:
    """Of this process so far; of the first accelerator if JAX has one."""
    if "jax" in sys.modules:
        import jax

        statistics = jax.local_devices()[0].memory_stats() or {}
        if "peak_bytes_in_use" in statistics:
            return statistics["peak_bytes_in_use"]
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def timed_jax_training(step: Callable, state, steps: int) -> tuple[Figures, Any]:
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
        "step_seconds": timed(call, steps),
        "compile_seconds": compile_seconds,
        "peak_bytes": peak_bytes(),
    }
    return figures, state


def timed_torch_training(loss: Callable[[], Any], parameters: list, steps: int) -> Figures:
    """Figures of AdamW's steps down the gradient of `loss()`."""
    import torch

    optimizer = torch.optim.AdamW(parameters, lr=1e-3)

    def call():
        optimizer.zero_grad()
        value = loss()
        value.backward()
        optimizer.step()
        value.item()

    first = timed(call, 1)
    seconds = timed(call, steps)
    gpu = torch.cuda.is_available()
    return {
        "step_seconds": seconds,
        "compile_seconds": max(first - seconds, 0.0),
        "peak_bytes": torch.cuda.max_memory_allocated() if gpu else peak_bytes(),
    }

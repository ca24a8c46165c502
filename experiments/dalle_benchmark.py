"""What DALL-E's sparse attention and its cache are worth, on this machine.

    python -m experiments.dalle_benchmark
    python -m experiments.dalle_benchmark --grid 16 --text-length 64 --conv-extent 5

Paper: Ramesh et al. 2021, "Zero-Shot Text-to-Image Generation", section 2.2 and appendix B. Draws
pictures of the paper's 1,024 tokens after 256 of text with a narrow model, with a cache and without
one (every pass over the whole stream takes the same time, so a few of them are timed and counted as
one for each token). Then one layer of each kind, forwards and backwards, by blocks and as a masked
product of the whole stream. About a minute on two CPU cores.
"""

import dataclasses
import functools
import time
from collections.abc import Callable

import jax
import jax.numpy as jnp
import tyro
from rich.console import Console
from rich.table import Table

from lmjax import command_line
from lmjax.decoding.pictures import draw
from lmjax.models.dalle import DALLE, DALLEConfig, mask, stream_attention
from lmjax.models.layers import unboxed, whole_attention


@dataclasses.dataclass(frozen=True)
class DALLEBenchmark:
    text_length: int = 256
    grid: int = 32
    conv_extent: int = 11
    layers: int = 4
    width: int = 128
    heads: int = 2
    samples: int = 2
    """Pictures drawn at once."""
    rounds: int = 3
    """Turns of each; the best counts."""


def main() -> None:
    settings, console = tyro.cli(DALLEBenchmark, description=__doc__), Console()
    config = DALLEConfig(
        text_vocab=512,
        text_length=settings.text_length,
        image_vocab=512,
        grid=settings.grid,
        layers=settings.layers,
        width=settings.width,
        heads=settings.heads,
        feed_forward=4 * settings.width,
        conv_extent=settings.conv_extent,
    )
    console.print(drawing(config, settings))
    console.print(attention(config, settings))


def drawing(config: DALLEConfig, settings: DALLEBenchmark) -> Table:
    """With and without a cache."""
    model, samples = DALLE(config), settings.samples
    text = jnp.zeros((1, config.text_length), jnp.int32)
    shapes = jax.eval_shape(lambda: unboxed(model.init(jax.random.key(0), text)["params"])[0])
    params = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)  # as quick as any others
    tokens = jnp.zeros((samples, config.length), jnp.int32)

    @jax.jit
    def next_code(params, tokens, place):
        features = model.apply({"params": params}, tokens, method="features")[:, place]
        return (features @ params["output"][: config.image_vocab].T).argmax(-1)

    whole = best(settings.rounds, next_code, params, tokens, config.length - 1)
    whole *= config.image_length
    caption = jnp.zeros((1, config.text_length - 1), jnp.int32)
    key = jax.random.key(0)
    cached = best(settings.rounds, draw, model, params, caption, samples=samples, key=key)
    table = Table("drawing", "seconds", "ratio", title=f"{samples} x {config.image_length} tokens")
    table.add_row("without a cache", f"{whole:.2f}", "")
    table.add_row("with a cache", f"{cached:.2f}", f"{whole / cached:.0f} x faster")
    return table


def attention(config: DALLEConfig, settings: DALLEBenchmark) -> Table:
    """By blocks and masked, forwards and backwards."""
    shape = (3, settings.samples, config.length, config.heads, config.head_width)
    operands = jax.random.normal(jax.random.key(0), shape)
    table = Table(
        *("layer", "by blocks, ms", "masked, ms", "ratio", "ratio of products"),
        title=f"attention over {config.length} positions",
    )

    def gradient(attend: Callable):
        return jax.jit(jax.grad(lambda operands: jnp.square(attend(*operands)).sum()))

    for kind in ("row", "column", "conv"):
        by_blocks = gradient(functools.partial(stream_attention, config, kind))
        masked = gradient(lambda *qkv, kind=kind: whole_attention(*qkv, mask(kind, config)))
        ours, full = (1e3 * best(settings.rounds, run, operands) for run in (by_blocks, masked))
        products = config.scores(kind) / config.length**2
        row = (f"{ours:.1f}", f"{full:.1f}", f"{ours / full:.2f}", f"{products:.2f}")
        table.add_row(kind, *row)
    return table


def best(rounds: int, run: Callable, *arguments, **settings) -> float:
    """Seconds of the fastest run but the first, which compiles."""
    jax.block_until_ready(run(*arguments, **settings))
    times = []
    for _ in range(rounds):
        began = time.perf_counter()
        jax.block_until_ready(run(*arguments, **settings))
        times.append(time.perf_counter() - began)
    return min(times)


if __name__ == "__main__":
    command_line.run(main)

"""XLNet's pretraining: guess words of a text in a random order, with a memory of the text before.

Paper: Yang et al. 2019, "XLNet: Generalized Autoregressive Pretraining for Language Understanding".

    python -m experiments.xlnet_pretrain
    python -m experiments.xlnet_pretrain --data.files 'my/*.txt' --workdir runs/mine
    python -m experiments.xlnet_pretrain --model.memory 0 --workdir runs/forgetful
    python -m experiments.xlnet_pretrain --preset base --data.tokenizer spiece.model
        --data.files '~/wikipedia/*.txt' --objective.lines --workdir /data/xlnet-base

The first trains `mini` on the documentation installed on this machine: about five minutes on two
CPU cores; then it restores the hidden words of a few held-out texts, one after the other in a
random order, each from those restored before, and says what its memory of the text before is worth.
The same command, run again, continues the run in --workdir.

The text is divided into as many lanes as a batch has rows, half of them read from their ends; the
next row of a lane begins after the reused part of this one.

`base` and `large` are the published models with the published settings: rows of 512 tokens, 256 of
them reused, 384 states of memory, 85 words to guess; 500,000 steps of 8,192 rows, Adam without bias
correction, decay 0.01, clipping at 1, a linear decay from 4e-4 after 40,000 steps of warm-up. The
batch and rate of `base` are not published: it takes 2,048 rows, as the released code's example, and
the same rate. Their text and their tokenizer (spiece.model) are yours to give.
"""

import dataclasses
from collections.abc import Iterator, Sequence
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from rich.console import Console

from experiments.roberta_pretrain import guessed
from lmjax import command_line
from lmjax.data.batches import Batch
from lmjax.data.text import Text, TokenizedText
from lmjax.loading import Description
from lmjax.models import xlnet
from lmjax.models.layers import all_logits
from lmjax.models.xlnet import XLNet, XLNetConfig
from lmjax.objectives.permutation_lm import PermutationLM
from lmjax.pretraining import TextRun, optimizer_choices, pretrain
from lmjax.tasks.masked import places
from lmjax.tasks.permuted import Permuted
from lmjax.training.execution import ExecutionOptions
from lmjax.training.fit import FitOptions
from lmjax.training.optimizers import AdamW
from lmjax.training.schedules import Linear


@dataclasses.dataclass(frozen=True, kw_only=True)
class XLNetPretrain(TextRun):
    model_type = "xlnet"

    model: XLNetConfig
    objective: PermutationLM

    def __post_init__(self):
        super().__post_init__()
        if self.model.kind != "lm":
            raise ValueError(
                f"--model.kind is {self.model.kind}: XLNet learns to guess words, choose lm"
            )
        if self.model.reuse != self.objective.reuse:
            raise ValueError(
                f"--model.reuse is {self.model.reuse} and --objective.reuse {self.objective.reuse},"
                " but what goes into memory is what the next row begins after: give both the same"
            )
        if self.objective.backward and self.batch % 2:
            raise ValueError(
                f"--batch is {self.batch}, which cannot be half forward and half backward: choose"
                " an even one, or --objective.no-backward"
            )

    def read(self, start: Description | None, share: tuple[int, int]) -> Text:
        """Raises ValueError also where a lane of the text would never fill the memory."""
        text = super().read(start, share)
        length = text.batches.rows.length
        if self.model.memory > length:
            raise ValueError(
                f"--model.memory is {self.model.memory:,}, but each of the {self.batch} lanes has"
                f" only {length:,} tokens of text: choose a smaller memory or --batch, or add text"
            )
        return text

    def task(self, devices: Sequence[jax.Device] | None = None) -> Permuted:
        return Permuted(XLNet(self.model, self.execution.resolve(devices)), self.batch)


MINI = XLNetPretrain(
    model=XLNetConfig(
        vocab=4_096,
        layers=2,
        width=128,
        heads=8,
        feed_forward=512,
        memory=96,
        reuse=64,
        dropout=0.0,
        init_scale=0.07,
    ),
    objective=PermutationLM(length=128, reuse=64, targets=21),
    data=TokenizedText(subwords="xlnet_unigram", vocab_size=4_096),
    optimizer=AdamW(Linear(2e-3, horizon=1_200, warmup=120), beta2=0.98, bias_correction=False),
    batch=24,
    steps=1_200,
    workdir=Path("runs/xlnet-mini"),
    fit=FitOptions(log_every=1, eval_every=50, checkpoint_every=50),
)


def published(name: str, batch: int) -> XLNetPretrain:
    model = dataclasses.replace(xlnet.PRESETS[name], memory=384, reuse=256)
    return XLNetPretrain(
        model=model,
        objective=PermutationLM(),
        data=TokenizedText(subwords="xlnet_unigram", vocab_size=model.vocab),
        optimizer=AdamW(Linear(4e-4, horizon=500_000, warmup=40_000), bias_correction=False),
        batch=batch,
        steps=500_000,
        workdir=Path("runs") / f"xlnet-{name}",
        execution=ExecutionOptions(remat="matmuls"),
        fit=FitOptions(log_every=100, eval_every=5_000, checkpoint_every=5_000),
    )


PRESETS = {"mini": MINI, "base": published("base", 2_048), "large": published("large", 8_192)}
DEFAULT = "mini"
CHOICES = optimizer_choices()


def main() -> None:
    settings = command_line.parse(PRESETS, DEFAULT, __doc__, CHOICES)
    pretrain(settings, PRESETS, "xlnet_pretrain", show_restored)


def show_restored(
    settings: XLNetPretrain, model: XLNet, params, text: Text, console: Console
) -> None:
    """Prints held-out texts with the words that the model restores, the truth beside them, and what
    its memory is worth on the text that it has been shown the beginning of."""
    tokenizer = text.tokenizer
    held_out = jax.device_get(list(memories(settings, params, text.evaluation)))
    batch, extra = held_out[-1]
    rows = np.flatnonzero((batch["lane"][:, 0] == 0) & (batch["loss_weights"].sum(1) > 0))[:3]
    batch = {name: array[rows] for name, array in batch.items()}
    memory = extra["memory"][:, rows] if extra else None
    words = restored(model, params, batch, memory, tokenizer.vocab_size)
    for row, guesses in enumerate(words):
        count = int(batch["loss_weights"][row].sum())
        example = {name: batch[name][row, :count] for name in ("targets", "targets_positions")}
        # Several documents may be in a row, and a tokenizer reads no further than the end of one.
        inputs = batch["inputs"][row]
        example["inputs"] = np.where(inputs == tokenizer.eos_id, tokenizer.sep_id, inputs)
        console.rule("held-out text")
        end = len(example["inputs"]) - 1
        console.print(guessed(tokenizer, example, guesses[:count], 0, end))
    if extra and len(held_out) > 1:
        with_memory, without = worth_of_memory(settings, params, held_out[1:])
        console.print(
            f"\nwords of texts whose beginning it has read before: {with_memory:.3f} nats with its"
            f" memory of that, {without:.3f} without"
        )


def memories(
    settings: XLNetPretrain, params, batches: Sequence[Batch]
) -> Iterator[tuple[Batch, dict[str, np.ndarray]]]:
    """Each held-out batch, and what the model remembers when it comes to it."""
    # Of several processes each has its part of the rows.
    task = dataclasses.replace(settings.task(), rows=len(batches[0]["inputs"]))
    evaluate = jax.jit(task.evaluate)
    extra = jax.jit(lambda: task.init(jax.random.key(0)).extra)()
    for batch in batches:
        yield batch, extra
        _, extra = evaluate(params, extra, batch, task.normalizers(batch))


def worth_of_memory(
    settings: XLNetPretrain, params, batches: Sequence[tuple[Batch, dict[str, np.ndarray]]]
) -> tuple[float, float]:
    """Nats per hidden word of these batches with what is remembered, and with nothing."""
    task = settings.task()
    evaluate = jax.jit(lambda *given: task.evaluate(*given)[0]["loss"])
    count = sum(batch["loss_weights"].sum() for batch, _ in batches)

    def loss(remember: bool) -> float:
        return sum(
            float(
                evaluate(
                    params,
                    extra,
                    # A row that begins its lane remembers nothing.
                    batch if remember else {**batch, "lane_positions": 0 * batch["lane_positions"]},
                    {"tokens": count},
                )
            )
            for batch, extra in batches
        )

    return loss(True), loss(False)


def restored(
    model: XLNet, params, batch: Batch, memory: np.ndarray | None, vocab_size: int
) -> np.ndarray:
    """[B, R]: the likeliest word of each place to guess, in their order, each from the text and the
    words that were restored before it."""
    at = np.asarray(places(batch))
    order = np.take_along_axis(batch["inputs_order"], at, 1)
    order = np.where(batch["loss_weights"] > 0, order, np.iinfo(np.int32).max)
    inputs = batch["inputs"].copy()

    @jax.jit
    def guess(inputs):
        features, _ = model.apply(
            {"params": params},
            inputs,
            memory,
            order=batch["inputs_order"],
            places=at,
            token_types=batch["inputs_token_types"],
            method="features",
        )
        logits = all_logits(features, params["embedding"]) + params["output_bias"]
        return logits[..., :vocab_size].argmax(-1)

    words = np.zeros_like(at)
    rows = np.arange(len(at))
    for turn in np.argsort(order, axis=1).T:
        found = np.asarray(guess(jnp.asarray(inputs)))[rows, turn]
        real = batch["loss_weights"][rows, turn] > 0
        words[rows, turn] = found
        inputs[rows[real], at[rows, turn][real]] = found[real]
    return words


if __name__ == "__main__":
    command_line.run(main)

"""BART's pretraining: put the sentences of a text in another order, hide spans of its words, and
write it as it was.

Paper: Lewis et al. 2020, "BART: Denoising Sequence-to-Sequence Pre-training for Natural Language
Generation, Translation, and Comprehension".

    python -m experiments.bart_pretrain
    python -m experiments.bart_pretrain --data.files 'my/*.txt' --workdir runs/mine
    python -m experiments.bart_pretrain --objective.permute 0 --objective.infill 0
        --objective.delete 0.15 --workdir runs/deletion
    python -m experiments.bart_pretrain --preset base --data.tokenizer bart-base/
        --data.files '~/openwebtext/*.jsonl.gz' --workdir /data/bart-base

The first trains `mini` on the documentation installed on this machine: about four minutes on two
CPU cores; then it restores a few held-out texts. The same command, run again, continues the run in
--workdir.

`base` and `large` are the published models with the released recipe and the paper's batch: 500,000
steps of 8,000 rows of 512 tokens, each document by itself, Adam with decay 0.01, clipping at 0.1
and a linear decay from 4e-4 after 10,000 steps of warm-up. Their text and their tokenizer
(vocab.json and merges.txt, or tokenizer.json) are yours to give.
"""

import dataclasses
from collections.abc import Sequence
from pathlib import Path

import jax
import numpy as np
from rich.console import Console
from rich.markup import escape

from lmjax import command_line
from lmjax.data.text import Text, TokenizedText
from lmjax.decoding.generate import generate
from lmjax.loading import Description
from lmjax.models import bart
from lmjax.models.bart import Bart, BartConfig
from lmjax.objectives.bart_denoising import STOPS, BartDenoising, sentence_ends
from lmjax.pretraining import TextRun, optimizer_choices, pretrain
from lmjax.tasks.seq2seq import Seq2Seq
from lmjax.training.execution import ExecutionOptions
from lmjax.training.fit import FitOptions
from lmjax.training.optimizers import AdamW
from lmjax.training.schedules import Linear

PIECE = 1 << 20
"""Tokens to look for sentence ends in at a time."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class BartPretrain(TextRun):
    model_type = "bart"

    model: BartConfig
    objective: BartDenoising
    label_smoothing: float = 0.0
    """Probability that the smoothed target spreads over the other entries of the vocabulary."""

    def __post_init__(self):
        super().__post_init__()
        if self.objective.length > self.model.positions:
            raise ValueError(
                f"--objective.length is {self.objective.length}, but the model has"
                f" {self.model.positions} positions: choose a smaller length or more"
                " --model.positions"
            )
        if self.model.kind != "lm":
            raise ValueError(
                f"--model.kind is {self.model.kind}: BART learns to restore texts, choose lm"
            )
        if self.data.tokenizer is None and self.data.subwords != "byte_bpe":
            raise ValueError(
                f"--data.subwords is {self.data.subwords}, but BART trains byte_bpe: choose that,"
                " or give a vocabulary with --data.tokenizer, --model.padding and --model.start"
            )

    def read(self, start: Description | None, share: tuple[int, int]) -> Text:
        """Raises ValueError also for a tokenized text without sentences to permute."""
        text = super().read(start, share)
        if self.objective.permute and not self.data.stream:
            ends = sentence_ends(text.tokenizer)
            tokens = text.batches.rows.store.tokens
            pieces = (tokens[i : i + PIECE] for i in range(0, len(tokens), PIECE))
            if not any(ends[piece].any() for piece in pieces):
                raise ValueError(
                    "no document has a sentence end, so that there are no sentences to permute:"
                    f" give text with any of {' '.join(STOPS)}, or set --objective.permute 0"
                )
        return text

    def task(self, devices: Sequence[jax.Device] | None = None) -> Seq2Seq:
        model = Bart(self.model, self.execution.resolve(devices))
        return Seq2Seq(model, label_smoothing=self.label_smoothing, start=self.model.start)


MINI = BartPretrain(
    model=BartConfig(
        vocab=4_096,
        positions=64,
        layers=2,
        decoder_layers=2,
        width=128,
        heads=8,
        feed_forward=512,
        dropout=0.0,
        attention_dropout=0.0,
        init_scale=0.06,
    ),
    objective=BartDenoising(length=64),
    data=TokenizedText(subwords="byte_bpe", vocab_size=4_096, pack=True),
    optimizer=AdamW(Linear(2e-3, horizon=1_500, warmup=150), beta2=0.98),
    batch=32,
    steps=1_500,
    workdir=Path("runs/bart-mini"),
    fit=FitOptions(log_every=10, eval_every=100, checkpoint_every=100),
)


def published(name: str, model: BartConfig) -> BartPretrain:
    """The released recipe (fairseq's issue 1899) for the published model of this name."""
    return BartPretrain(
        model=model,
        objective=BartDenoising(),
        data=TokenizedText(subwords="byte_bpe", vocab_size=model.vocab, pack=True),
        optimizer=AdamW(Linear(4e-4, horizon=500_000, warmup=10_000), gradient_clip=0.1),
        batch=8_000,
        steps=500_000,
        workdir=Path("runs") / f"bart-{name}",
        execution=ExecutionOptions(remat="matmuls"),
        fit=FitOptions(log_every=100, eval_every=5_000, checkpoint_every=5_000),
    )


PRESETS = {"mini": MINI} | {name: published(name, model) for name, model in bart.PRESETS.items()}
DEFAULT = "mini"
CHOICES = optimizer_choices()


def main() -> None:
    settings = command_line.parse(PRESETS, DEFAULT, __doc__, CHOICES)
    pretrain(settings, PRESETS, "bart_pretrain", show_restored)


def show_restored(
    settings: BartPretrain, model: Bart, params, text: Text, console: Console
) -> None:
    """Prints held-out texts damaged, as the model restores them, and as they were."""
    tokenizer = text.tokenizer
    damage = settings.objective.bind(tokenizer)
    examples = [
        damage(tokens[: settings.objective.window], np.random.default_rng(number))
        for number, tokens in enumerate(text.samples)
    ]
    if not examples:
        return
    length = max(len(example["inputs"]) for example in examples)
    padding = settings.model.padding
    sources = [
        np.pad(x["inputs"], (0, length - len(x["inputs"])), constant_values=padding)
        for x in examples
    ]
    written = generate(
        model,
        params,
        np.stack(sources),
        max_length=min(72, model.config.positions),
        eos=tokenizer.eos_id,
        vocab_size=tokenizer.vocab_size,
    )
    for example, output in zip(examples, np.asarray(written.tokens), strict=True):
        console.rule("held-out text")
        console.print(escape(tokenizer.decode(example["inputs"])), highlight=False)
        shown = escape(tokenizer.decode(output))
        truth = escape(tokenizer.decode(example["targets"]))
        console.print(f"  [bold]model[/bold] [cyan]{shown or '(nothing)'}[/cyan]")
        console.print(f"  [bold]truth[/bold] [green]{truth}[/green]")


if __name__ == "__main__":
    command_line.run(main)

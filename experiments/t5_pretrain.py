"""T5's pretraining by span corruption, from a laptop to the 11B model.

Paper: Raffel et al. 2020, "Exploring the Limits of Transfer Learning with a Unified Text-to-Text
Transformer". Spans of a text are hidden behind sentinels; the model writes what they hid.

    python -m experiments.t5_pretrain
    python -m experiments.t5_pretrain --data.files 'my/*.txt' --workdir runs/mine
    python -m experiments.t5_pretrain --preset base --data.stream --data.tokenizer spiece.model
        --data.files '~/c4/en/c4-train.*.json.gz' --workdir /data/t5-base

The first trains `mini` on the documentation installed on this machine: two to four minutes on two
CPU cores, held-out loss from 8.9 to below 5 nats a token; then it fills in a few held-out texts.
The same command, run again, continues the run in --workdir.

`small` to `11b`, `v1_1-*` and `mt5-*` are the published models under the published recipes: a batch
of 2,048 x 512 tokens (mT5: 1,024 x 1,024) for 1,000,000 steps of Adafactor at
1/sqrt(max(step, 10,000)) with z-loss 1e-4; dropout 0.1 for 1.0, none for 1.1 and mT5. Their text,
C4 or mC4, and their tokenizers' spiece.model are yours to give.
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
from lmjax.decoding.fill_in import spans_by_sentinel
from lmjax.decoding.generate import generate
from lmjax.models import t5
from lmjax.models.t5 import T5, T5Config
from lmjax.objectives.denoising import Denoising, IidDenoising, PrefixLM, SpanCorruption
from lmjax.pretraining import TextRun, optimizer_choices, pretrain
from lmjax.tasks.seq2seq import Seq2Seq
from lmjax.training.execution import ExecutionOptions
from lmjax.training.fit import FitOptions
from lmjax.training.optimizers import Adafactor
from lmjax.training.schedules import InverseSquareRoot


@dataclasses.dataclass(frozen=True, kw_only=True)
class T5Pretrain(TextRun):
    model_type = "t5"

    model: T5Config
    objective: Denoising
    z_loss: float = 1e-4
    """Weight of logsumexp(logits)^2, which keeps logits from drifting."""
    label_smoothing: float = 0.0
    """Probability taken from the target and spread over all other tokens."""

    def task(self, devices: Sequence[jax.Device] | None = None) -> Seq2Seq:
        model = T5(self.model, self.execution.resolve(devices))
        return Seq2Seq(model, self.z_loss, self.label_smoothing)


MINI = T5Pretrain(
    model=T5Config(
        vocab=4_096, layers=2, width=128, heads=8, head_width=16, feed_forward=512, dropout=0.0
    ),
    objective=SpanCorruption(inputs_length=128),
    data=TokenizedText(vocab_size=3_996),
    optimizer=Adafactor(InverseSquareRoot(scale=0.2, warmup=100)),
    batch=32,
    steps=400,
    workdir=Path("runs/t5-mini"),
    fit=FitOptions(log_every=1, eval_every=50, checkpoint_every=50),
)


def published(name: str, model: T5Config) -> T5Pretrain:
    """The recipe that the released model of this name was pretrained with."""
    multilingual = name.startswith("mt5")
    return T5Pretrain(
        model=model if model.tied else dataclasses.replace(model, dropout=0.0),
        objective=SpanCorruption(inputs_length=1_024 if multilingual else 512),
        data=TokenizedText(vocab_size=250_000 if multilingual else 32_000),
        optimizer=Adafactor(InverseSquareRoot(warmup=10_000)),
        batch=1_024 if multilingual else 2_048,
        workdir=Path("runs") / f"t5-{name}",
        # From the "large" sizes on, the activations of a step outgrow the parameters.
        execution=ExecutionOptions(remat="full" if model.layers >= 24 else "matmuls"),
        fit=FitOptions(log_every=100, eval_every=5_000, checkpoint_every=5_000),
    )


PRESETS = {"mini": MINI} | {name: published(name, model) for name, model in t5.PRESETS.items()}
DEFAULT = "mini"
CHOICES = {
    "objective": {
        "span_corruption": lambda s: SpanCorruption(s.objective.inputs_length),
        "iid_denoising": lambda s: IidDenoising(s.objective.inputs_length),
        "prefix_lm": lambda s: PrefixLM(s.objective.inputs_length),
    },
    **optimizer_choices(),
}


def main() -> None:
    settings = command_line.parse(PRESETS, DEFAULT, __doc__, CHOICES)
    pretrain(settings, PRESETS, "t5_pretrain", show_fill_ins)


def show_fill_ins(settings: T5Pretrain, model: T5, params, text: Text, console: Console) -> None:
    """Prints a few held-out texts, corrupted, with the model's guesses beside the truth."""
    tokenizer, objective = text.tokenizer, settings.objective
    if isinstance(objective, PrefixLM):
        bound = objective.bind(tokenizer)
    else:
        bound = SpanCorruption(inputs_length=64).bind(tokenizer)
    examples = [bound(tokens, np.random.default_rng(i)) for i, tokens in enumerate(text.samples)]
    if not examples:
        return
    longest = max(len(example["inputs"]) for example in examples)
    inputs = np.stack([np.pad(e["inputs"], (0, longest - len(e["inputs"]))) for e in examples])
    written = generate(
        model, params, inputs, max_length=40, eos=tokenizer.eos_id, vocab_size=tokenizer.vocab_size
    ).tokens
    for example, output in zip(examples, np.asarray(written), strict=True):
        console.rule("held-out text")
        console.print(escape(tokenizer.decode(example["inputs"])), highlight=False)
        truth, guess = (
            spans_by_sentinel(ids, tokenizer.sentinels, tokenizer.eos_id)
            for ids in (example["targets"], output)
        )
        if not truth:  # prefix LM
            truth, guess = {None: example["targets"]}, {None: output}
        for k, span in truth.items():
            label = "continuation" if k is None else f"<extra_id_{k}>"
            shown = escape(tokenizer.decode(guess.get(k, [])))
            console.print(f"  [bold]{label}[/bold]  model: [cyan]{shown or '(nothing)'}[/cyan]")
            console.print(
                f"  {' ' * len(label)}  truth: [green]{escape(tokenizer.decode(span))}[/]"
            )


if __name__ == "__main__":
    command_line.run(main)

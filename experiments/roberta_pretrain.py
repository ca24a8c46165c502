"""RoBERTa's pretraining: hide words of a text, guess them from what stands before and after.

Paper: Liu et al. 2019, "RoBERTa: A Robustly Optimized BERT Pretraining Approach".

    python -m experiments.roberta_pretrain
    python -m experiments.roberta_pretrain --data.files 'my/*.txt' --workdir runs/mine
    python -m experiments.roberta_pretrain --preset roberta-base --data.tokenizer roberta-base/
        --data.files '~/openwebtext/*.jsonl.gz' --workdir /data/roberta-base

The first trains `mini` on the documentation installed on this machine: about four minutes on two
CPU cores; then it guesses hidden words of a few held-out texts. The same command, run again,
continues the run in --workdir.

`roberta-base` and `roberta-large` are the published models with the paper's recipe: 500,000 steps
of 8,192 rows of 512 tokens, other words hidden in every epoch, Adam with betas 0.9 and 0.98, decay
0.01, no clipping, a linear decay from 6e-4 after 24,000 steps of warm-up (base) or from 4e-4 after
30,000 (large). Their text and their tokenizer (vocab.json and merges.txt, or tokenizer.json) are
yours to give.
"""

import dataclasses
import os
from collections.abc import Sequence
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from rich.console import Console
from rich.text import Text as Line

from lmjax import command_line
from lmjax.data.text import Text, TokenizedText
from lmjax.models import bert
from lmjax.models.bert import Bert, BertConfig
from lmjax.models.layers import all_logits
from lmjax.objectives.masked_lm import MaskedLM
from lmjax.pretraining import TextRun, optimizer_choices, pretrain
from lmjax.tasks.masked import Masked
from lmjax.training.execution import ExecutionOptions
from lmjax.training.fit import FitOptions
from lmjax.training.optimizers import AdamW
from lmjax.training.schedules import Linear


@dataclasses.dataclass(frozen=True, kw_only=True)
class RobertaPretrain(TextRun):
    model_type = "roberta"

    model: BertConfig
    objective: MaskedLM

    def __post_init__(self):
        super().__post_init__()
        if self.objective.length > self.model.positions:
            raise ValueError(
                f"--objective.length is {self.objective.length}, but the model has"
                f" {self.model.positions} positions: choose a smaller length or more"
                " --model.positions"
            )
        if self.model.kind != "masked_lm":
            raise ValueError(
                f"--model.kind is {self.model.kind}: RoBERTa only guesses words, choose masked_lm"
            )

    def task(self, devices: Sequence[jax.Device] | None = None) -> Masked:
        return Masked(Bert(self.model, self.execution.resolve(devices)))


MINI = RobertaPretrain(
    model=dataclasses.replace(
        bert.PRESETS["roberta-base"],
        vocab=4_096,
        positions=64,
        layers=2,
        width=128,
        heads=8,
        feed_forward=512,
        dropout=0.0,
        init_scale=0.06,
    ),
    objective=MaskedLM(length=64),
    data=TokenizedText(subwords="byte_bpe", vocab_size=4_096),
    optimizer=AdamW(Linear(2e-3, horizon=3_500, warmup=350), beta2=0.98),
    batch=32,
    steps=3_500,
    workdir=Path("runs/roberta-mini"),
    fit=FitOptions(log_every=10, eval_every=250, checkpoint_every=250),
)


def published(name: str, peak: float, warmup: int) -> RobertaPretrain:
    """The paper's recipe for the published model of this name."""
    model = bert.PRESETS[name]
    return RobertaPretrain(
        model=model,
        objective=MaskedLM(length=model.positions),
        data=TokenizedText(subwords="byte_bpe", vocab_size=model.vocab),
        optimizer=AdamW(
            Linear(peak, horizon=500_000, warmup=warmup), gradient_clip=None, beta2=0.98
        ),
        batch=8_192,
        steps=500_000,
        workdir=Path("runs") / name,
        execution=ExecutionOptions(remat="matmuls"),
        fit=FitOptions(log_every=100, eval_every=5_000, checkpoint_every=5_000),
    )


PRESETS = {
    "mini": MINI,
    "roberta-base": published("roberta-base", 6e-4, 24_000),
    "roberta-large": published("roberta-large", 4e-4, 30_000),
}
DEFAULT = "mini"
CHOICES = optimizer_choices()


def main() -> None:
    settings = command_line.parse(PRESETS, DEFAULT, __doc__, CHOICES)
    pretrain(settings, PRESETS, "roberta_pretrain", show_guesses)


def show_guesses(
    settings: RobertaPretrain, model: Bert, params, text: Text, console: Console
) -> None:
    """Prints held-out texts with the model's guess in each hidden place, the truth beside it."""
    tokenizer = text.tokenizer
    hide = dataclasses.replace(settings.objective, keep=0.0, replace=0.0).bind(tokenizer)
    for number, tokens in enumerate(text.samples):
        tokens = tokens[tokens != tokenizer.eos_id]  # behind each sentence
        example = hide(tokens[: settings.objective.window], np.random.default_rng(number))
        encoded = model.apply({"params": params}, example["inputs"][None], method="encode")
        places = jnp.asarray(example["targets_positions"])[None]
        features = model.apply({"params": params}, encoded, places, method="guess")
        logits = all_logits(features, params["embedding"]) + params["output_bias"]
        guesses = np.asarray(logits[0, :, : tokenizer.vocab_size].argmax(-1))
        console.rule("held-out text")
        console.print(guessed(tokenizer, example, guesses, 1, len(example["inputs"]) - 1))


def guessed(tokenizer, example, guesses: np.ndarray, begin: int, end: int) -> Line:
    """The text from place `begin` to `end` of the inputs, with [guess] in each hidden place: green
    where right, otherwise with the truth."""
    ids = example["inputs"].copy()
    ids[example["targets_positions"]] = example["targets"]
    ids = ids[begin:end]

    def added(start: int, *more: int) -> str:
        """What `more` adds to the text of `ids[:start]`, white space between words included."""
        before, after = tokenizer.decode(ids[:start]), tokenizer.decode([*ids[:start], *more])
        return after[len(os.path.commonprefix([before, after])) :].replace("\n", "⏎")

    line, start = Line(), 0
    places = zip(example["targets_positions"] - begin, example["targets"], guesses, strict=True)
    for place, truth, guess in places:
        if 0 <= place < len(ids):
            own, right = added(place, guess), added(place, truth)
            line.append(added(start, *ids[start:place]))
            line.append(*((f"[{own}]", "green") if own == right else (f"[{own} / {right}]", "red")))
            start = place + 1
    return line.append(added(start, *ids[start:]))


if __name__ == "__main__":
    command_line.run(main)

"""BERT's pretraining: guess hidden words of two stretches of text, and whether one follows the
other.

Paper: Devlin et al. 2019, "BERT: Pre-training of Deep Bidirectional Transformers for Language
Understanding".

    python -m experiments.bert_pretrain
    python -m experiments.bert_pretrain --data.files 'my/*.txt' --workdir runs/mine
    python -m experiments.bert_pretrain --objective.whole-words --workdir runs/whole-words
    python -m experiments.bert_pretrain --preset base --data.tokenizer vocab.txt
        --data.files '~/wikipedia/*.txt' --objective.lines --workdir /data/bert-base
    python -m experiments.bert_pretrain --preset base-512 --init /data/bert-base
        --data.files '~/wikipedia/*.txt' --objective.lines --workdir /data/bert-base-512

The first trains `mini` on the documentation installed on this machine: about four minutes on two
CPU cores; then it guesses hidden words of a few held-out texts and judges whether their halves
belong together. The same command, run again, continues the run in --workdir.

`base` and `large` are the published models with the paper's recipe: 256 rows of 128 tokens, Adam
without bias correction, decay 0.01, clipping at 1, a linear decay from 1e-4 over a million steps
after 10,000 of warm-up, of which they take nine tenths; `base-512` and `large-512` are the last
tenth, with rows of 512 tokens (Adam's averages begin anew there, hence a short warm-up of our own).
Their text and their tokenizer (vocab.txt or tokenizer.json) are yours to give.
"""

import dataclasses
from collections.abc import Sequence
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from rich.console import Console

from experiments.roberta_pretrain import guessed
from lmjax import command_line
from lmjax.data.text import Text, TokenizedText
from lmjax.models import bert
from lmjax.models.bert import Bert, BertConfig
from lmjax.models.layers import all_logits
from lmjax.objectives.masked_pairs import MaskedPairs, Pair
from lmjax.pretraining import TextRun, optimizer_choices, pretrain
from lmjax.tasks.masked import Masked
from lmjax.training.execution import ExecutionOptions
from lmjax.training.fit import FitOptions
from lmjax.training.optimizers import AdamW
from lmjax.training.schedules import Linear


@dataclasses.dataclass(frozen=True, kw_only=True)
class BertPretrain(TextRun):
    model_type = "bert"

    model: BertConfig
    objective: MaskedPairs

    def __post_init__(self):
        super().__post_init__()
        if self.objective.length > self.model.positions:
            raise ValueError(
                f"--objective.length is {self.objective.length}, but the model has"
                f" {self.model.positions} positions: choose a smaller length or more"
                " --model.positions"
            )
        if self.model.kind != "pretraining" or self.model.token_types < 2:
            raise ValueError(
                f"--model.kind is {self.model.kind} with {self.model.token_types} token types: BERT"
                " judges pairs of sentences, choose pretraining and 2"
            )

    def task(self, devices: Sequence[jax.Device] | None = None) -> Masked:
        return Masked(Bert(self.model, self.execution.resolve(devices)))


MINI = BertPretrain(
    model=dataclasses.replace(
        bert.PRESETS["base"],
        vocab=4_096,
        positions=64,
        layers=2,
        width=128,
        heads=8,
        feed_forward=512,
        dropout=0.0,
        init_scale=0.06,
    ),
    objective=MaskedPairs(length=64, predictions=10, copies=1),
    data=TokenizedText(subwords="wordpiece", vocab_size=4_096),
    optimizer=AdamW(
        Linear(2e-3, horizon=3_500, warmup=350, from_start=True),
        beta2=0.98,
        bias_correction=False,
    ),
    batch=32,
    steps=3_500,
    workdir=Path("runs/bert-mini"),
    fit=FitOptions(log_every=10, eval_every=250, checkpoint_every=250),
)


def published(name: str) -> BertPretrain:
    """The paper's recipe for the published model of this name: its first nine tenths."""
    model = bert.PRESETS[name]
    return BertPretrain(
        model=model,
        objective=MaskedPairs(),
        data=TokenizedText(subwords="wordpiece", vocab_size=model.vocab),
        optimizer=AdamW(
            Linear(1e-4, horizon=1_000_000, warmup=10_000, from_start=True), bias_correction=False
        ),
        batch=256,
        steps=900_000,
        workdir=Path("runs") / f"bert-{name}",
        execution=ExecutionOptions(remat="matmuls"),
        fit=FitOptions(log_every=100, eval_every=10_000, checkpoint_every=10_000),
    )


def published_end(name: str) -> BertPretrain:
    """The last tenth of the recipe, for --init with what the others made."""
    run = published(name)
    return dataclasses.replace(
        run,
        objective=MaskedPairs(length=512, predictions=77),
        optimizer=dataclasses.replace(
            run.optimizer, schedule=Linear(1e-5, horizon=100_000, warmup=1_000, from_start=True)
        ),
        steps=100_000,
        workdir=Path("runs") / f"bert-{name}-512",
    )


PRESETS = {
    "mini": MINI,
    "base": published("base"),
    "base-512": published_end("base"),
    "large": published("large"),
    "large-512": published_end("large"),
}
DEFAULT = "mini"
CHOICES = optimizer_choices()


def main() -> None:
    settings = command_line.parse(PRESETS, DEFAULT, __doc__, CHOICES)
    pretrain(settings, PRESETS, "bert_pretrain", show_guesses)


def show_guesses(settings: BertPretrain, model: Bert, params, text: Text, console: Console) -> None:
    """Prints held-out texts with the model's guess in each hidden place, the truth beside it, each
    with its own second half and with another text's, and the verdict on both."""
    tokenizer = text.tokenizer
    hide = settings.objective.bind(tokenizer)
    halves = []
    for tokens in text.samples:
        words = tokens[tokens != tokenizer.eos_id]
        halves.append(np.split(words, [len(words) // 2]))
    for number, (first, own) in enumerate(halves):
        console.rule("held-out text")
        for second, elsewhere in ((own, False), (halves[number - 1][1], True)):
            example = hide(Pair(first, second, elsewhere), np.random.default_rng(number))
            logits, verdict = read(model, params, example)
            guesses = logits[:, : tokenizer.vocab_size].argmax(-1)
            middle, end = int(example["pairs_positions"][0]), len(example["inputs"]) - 1
            console.print(guessed(tokenizer, example, guesses, 1, middle - 1))
            whose = "another text's" if elsewhere else "its own"
            console.print(
                f"[bold]then {whose} second half[/bold] (its own, says the model, with"
                f" {verdict[0]:.0%}):"
            )
            console.print(guessed(tokenizer, example, guesses, middle, end))


def read(model: Bert, params, example) -> tuple[np.ndarray, np.ndarray]:
    """Logits `[P, V]` of the hidden words of one example, and the probabilities that its second
    part follows the first, and that it does not."""
    variables = {"params": params}
    inputs = example["inputs"][None]
    token_types = (np.arange(inputs.shape[1]) >= example["pairs_positions"])[None].astype(np.int32)
    encoded = model.apply(variables, inputs, token_types, method="encode")
    places = jnp.asarray(example["targets_positions"])[None]
    features = model.apply(variables, encoded, places, method="guess")
    logits = all_logits(features, params["embedding"]) + params["output_bias"]
    verdict = jax.nn.softmax(model.apply(variables, encoded, method="judge")[0])
    return np.asarray(logits[0]), np.asarray(verdict)


if __name__ == "__main__":
    command_line.run(main)

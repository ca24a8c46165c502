"""T5's pretraining by span corruption, from a laptop to the 11B model.

Paper: Raffel et al. 2020, "Exploring the Limits of Transfer Learning with a Unified Text-to-Text
Transformer". Spans of a text are hidden behind sentinels; the model writes what they hid.

    python -m experiments.t5_pretrain
    python -m experiments.t5_pretrain --data.files 'my/*.txt' --workdir runs/mine
    python -m experiments.t5_pretrain --preset base --data.stream --data.tokenizer spiece.model
        --data.files '~/c4/en/c4-train.*.json.gz' --workdir /data/t5-base

The first trains `mini` on the documentation installed on this machine: about four minutes on two
CPU cores, held-out loss from 9.1 to below 5 nats a token; then it fills in a few held-out texts.
The same command, run again, continues the run in --workdir.

`small` to `11b`, `v1_1-*` and `mt5-*` are the published models under the published recipes: a batch
of 2,048 x 512 tokens (mT5: 1,024 x 1,024) for 1,000,000 steps of Adafactor at
1/sqrt(max(step, 10,000)) with z-loss 1e-4; dropout 0.1 for 1.0, none for 1.1 and mT5. Their text,
C4 or mC4, and their tokenizers' spiece.model are yours to give.
"""

import dataclasses
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.markup import escape

import lmjax
from lmjax import command_line
from lmjax.data.text import Text, TokenizedText, read_text
from lmjax.decoding.fill_in import spans_by_sentinel
from lmjax.decoding.generate import generate
from lmjax.models import t5
from lmjax.models.t5 import T5, T5Config
from lmjax.objectives.denoising import Denoising, IidDenoising, PrefixLM, SpanCorruption
from lmjax.tasks.seq2seq import Seq2Seq
from lmjax.training.execution import ExecutionOptions
from lmjax.training.fit import FitOptions, Fitted, fit
from lmjax.training.optimizers import Adafactor, AdamW
from lmjax.training.schedules import Constant, Cosine, InverseSquareRoot, Linear


@dataclasses.dataclass(frozen=True)
class T5Pretrain:
    """What is trained (these must stay the same when a run is resumed) and how it is run."""

    model: T5Config
    objective: Denoising
    data: TokenizedText
    optimizer: Adafactor | AdamW
    batch: int
    """Rows of the global batch, over all devices."""
    seed: int = 0
    """Of the parameters, the order of the text, its noise and dropout."""
    z_loss: float = 1e-4
    """Weight of logsumexp(logits)^2, which keeps logits from drifting."""
    label_smoothing: float = 0.0
    """Probability taken from the target and spread over all other tokens."""
    init: str | None = None
    """Start from these parameters, model and tokenizer: a run's workdir, a Hugging Face directory
    or repository (google/t5-v1_1-small)."""

    steps: int = 1_000_000
    """Train until so many steps are done. More of them continue a finished run."""
    workdir: Path = Path("runs/t5")
    """Where config.json, metrics.jsonl, loss.png, TensorBoard events and checkpoints go."""
    eval_batches: int = 8
    """Held-out batches per evaluation."""
    workers: int = 0
    """Processes that prepare batches; 0 is one thread, enough unless steps are very short."""
    execution: ExecutionOptions = ExecutionOptions()
    fit: FitOptions = FitOptions()


MINI = T5Pretrain(
    model=T5Config(
        vocab=8_192, layers=4, width=256, heads=8, head_width=32, feed_forward=1_024, dropout=0.0
    ),
    objective=SpanCorruption(inputs_length=128),
    data=TokenizedText(vocab_size=8_092),
    optimizer=Adafactor(InverseSquareRoot(warmup=100)),
    batch=32,
    steps=600,
    workdir=Path("runs/t5-mini"),
    fit=FitOptions(log_every=10, eval_every=100, checkpoint_every=100),
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
        execution=ExecutionOptions(remat="full" if model.width * model.layers > 20_000 else "none"),
        fit=FitOptions(log_every=100, eval_every=5_000, checkpoint_every=5_000),
    )


PRESETS = {"mini": MINI} | {name: published(name, model) for name, model in t5.PRESETS.items()}
CHOICES = {
    "objective": {
        "span_corruption": SpanCorruption(),
        "iid_denoising": IidDenoising(),
        "prefix_lm": PrefixLM(),
    },
    "optimizer": {
        "adafactor": Adafactor(),
        "adamw": AdamW(InverseSquareRoot(scale=0.1)),
    },
    "optimizer.schedule": {
        "inverse_square_root": InverseSquareRoot(),
        "linear": Linear(peak=1e-3, horizon=1_000_000, warmup=10_000),
        "cosine": Cosine(peak=1e-3, horizon=1_000_000, warmup=10_000),
        "constant": Constant(rate=1e-3),
    },
}


def main() -> None:
    settings = command_line.parse(PRESETS, "mini", __doc__, CHOICES)
    console = Console()
    pretrain(settings, console)


def pretrain(settings: T5Pretrain, console: Console) -> Fitted:
    """Trains, or goes on training, and fills in held-out texts at the end."""
    start = None
    if settings.init is not None:
        start = lmjax.load(settings.init)
        config = dataclasses.replace(start.model.config, dropout=settings.model.dropout)
        settings = dataclasses.replace(settings, model=config)
    text = read_text(
        settings.data,
        settings.objective,
        batch=settings.batch,
        seed=settings.seed,
        workers=settings.workers,
        eval_batches=settings.eval_batches,
        tokenizer=None if start is None else start.tokenizer,
    )
    if text.tokenizer.vocab_size > settings.model.vocab:
        raise ValueError(
            f"the tokenizer has {text.tokenizer.vocab_size:,} ids and the model's embedding"
            f" {settings.model.vocab:,} rows: set --model.vocab to that many or more, or a smaller"
            " --data.vocab-size"
        )
    console.print(escape(text.summary))
    model = T5(settings.model, settings.execution.resolve())
    fitted = fit(
        Seq2Seq(model, settings.z_loss, settings.label_smoothing),
        settings.optimizer,
        text.batches,
        steps=settings.steps,
        workdir=settings.workdir,
        seed=settings.seed,
        experiment="t5_pretrain",
        identity=identity(settings, text),
        runtime=settings.fit,
        evaluation=text.evaluation,
        init=None if start is None else lambda: start.params,
        files={"tokenizer.model": text.tokenizer.model},
    )
    if not fitted.interrupted:
        show_fill_ins(model, fitted.state.evaluated, text, settings.objective, console)
    return fitted


def identity(settings: T5Pretrain, text: Text) -> dict:
    """What the run learns, and from what."""
    names = ("model", "objective", "optimizer", "batch", "seed", "z_loss", "label_smoothing")
    fields = {name: getattr(settings, name) for name in (*names, "init")}
    return {"model_type": "t5", **fields, "data": text.identity}


def show_fill_ins(model: T5, params, text: Text, objective: Denoising, console: Console) -> None:
    """Prints a few held-out texts, corrupted, with the model's guesses beside the truth."""
    tokenizer = text.tokenizer
    if isinstance(objective, PrefixLM):
        bound = objective.bind(tokenizer.sentinels, tokenizer.eos_id)
    else:
        bound = SpanCorruption(inputs_length=64).bind(tokenizer.sentinels, tokenizer.eos_id)
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

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
from lmjax.data.batches import assemble
from lmjax.data.text import Text, TokenizedText, read_text
from lmjax.decoding.fill_in import spans_by_sentinel
from lmjax.decoding.generate import generate
from lmjax.loading import TOKENIZER, Description, describe
from lmjax.models import t5
from lmjax.models.t5 import T5, T5Config
from lmjax.objectives.denoising import Denoising, IidDenoising, PrefixLM, SpanCorruption
from lmjax.sharding import multihost
from lmjax.sharding.multihost import Distributed
from lmjax.sharding.strategies import MeshOptions, StrategyName
from lmjax.tasks.seq2seq import Seq2Seq
from lmjax.tasks.task import Workload
from lmjax.training.execution import ExecutionOptions
from lmjax.training.fit import FitOptions, Fitted, fit
from lmjax.training.optimizers import Adafactor, AdamW
from lmjax.training.schedules import Constant, Cosine, InverseSquareRoot, Linear
from lmjax.training.step import arrange


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
    strategy: StrategyName = "auto"
    """How model and batch are divided over the devices: pmap and dp (the whole model on each), fsdp
    (parameters divided), tp (products divided), fsdp_tp (both), or what the model's size asks for
    (auto). It may change when a run is resumed, as may --mesh."""
    mesh: MeshOptions = MeshOptions()
    distributed: Distributed = Distributed()
    execution: ExecutionOptions = ExecutionOptions()
    fit: FitOptions = FitOptions()

    def __post_init__(self):
        for name in ("batch", "steps", "eval_batches"):
            if getattr(self, name) < 1:
                raise ValueError(
                    f"--{name.replace('_', '-')} is {getattr(self, name)}, not 1 or more"
                )
        if not 0 <= self.seed < 2**32:
            raise ValueError(f"--seed is {self.seed}, not between 0 and 2**32 - 1")
        if self.workers < 0:
            raise ValueError(f"--workers is {self.workers}, not 0 or more")


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
    "optimizer": {
        "adafactor": lambda s: Adafactor(s.optimizer.schedule),
        "adamw": lambda s: AdamW(Cosine(1e-3, horizon=s.steps, warmup=warmup(s))),
    },
    "optimizer.schedule": {
        "inverse_square_root": lambda s: InverseSquareRoot(peak(s) * warmup(s) ** 0.5, warmup(s)),
        "linear": lambda s: Linear(peak(s), horizon=s.steps, warmup=warmup(s)),
        "cosine": lambda s: Cosine(peak(s), horizon=s.steps, warmup=warmup(s)),
        "constant": lambda s: Constant(peak(s) / 10, warmup=warmup(s)),
    },
}


def peak(settings: T5Pretrain) -> float:
    """A usual learning rate; Adafactor's is relative to the size of a parameter."""
    return 1e-2 if isinstance(settings.optimizer, Adafactor) else 1e-3


def warmup(settings: T5Pretrain) -> int:
    return min(10_000, max(1, settings.steps // 10))


def main() -> None:
    settings = command_line.parse(PRESETS, DEFAULT, __doc__, CHOICES)
    pretrain(settings)


def pretrain(settings: T5Pretrain) -> Fitted:
    """Trains, or goes on training, and fills in held-out texts at the end."""
    if joined := multihost.start(settings.distributed):
        print(joined, flush=True)
    console = Console(quiet=jax.process_index() > 0)
    start = None
    if settings.init is not None:
        start = describe(settings.init)
        settings = dataclasses.replace(settings, model=model_of(start, settings))
    task = task_of(settings)
    layout = arrange(
        task,
        settings.optimizer,
        settings.batch,
        microbatches=settings.fit.microbatches,
        strategy=settings.strategy,
        options=settings.mesh,
    )
    # Hosts may share a cache: the first one fills it.
    with multihost.first_process_first("text", timeout=24 * 3_600):
        text = read_text(
            settings.data,
            settings.objective,
            batch=settings.batch,
            seed=settings.seed,
            workers=settings.workers,
            eval_batches=settings.eval_batches,
            tokenizer=None if start is None else start.tokenizer,
            rows=settings.model.vocab,
            share=layout.share,
        )
    console.print(escape(text.summary), soft_wrap=True)
    fitted = fit(
        task,
        settings.optimizer,
        text.batches,
        steps=settings.steps,
        workdir=settings.workdir,
        seed=settings.seed,
        experiment="t5_pretrain",
        identity=identity(settings, text),
        runtime=settings.fit,
        layout=layout,
        evaluation=text.evaluation,
        init=None if start is None else start.load_params,
        files={TOKENIZER: text.tokenizer.model},
    )
    if not fitted.interrupted:
        show_fill_ins(task.model, fitted.state.evaluated, text, settings.objective, console)
    return fitted


def task_of(settings: T5Pretrain, devices: Sequence[jax.Device] | None = None) -> Seq2Seq:
    model = T5(settings.model, settings.execution.resolve(devices))
    return Seq2Seq(model, settings.z_loss, settings.label_smoothing)


def workload(settings: T5Pretrain, devices: Sequence[jax.Device]) -> Workload:
    """What `experiments.plan` compiles for `devices`."""
    rows = assemble([], settings.objective.lengths)
    batch = {
        name: jax.ShapeDtypeStruct((settings.batch, *x.shape[1:]), x.dtype)
        for name, x in rows.items()
    }
    return Workload(task_of(settings, devices), settings.optimizer, batch)


def model_of(start: Description, settings: T5Pretrain) -> T5Config:
    """The model to go on with: that of `--init`, with the settings' dropout.

    Raises:
        ValueError: the settings ask for yet another model, or its tokenizer is not known.
    """
    model = dataclasses.replace(start.config, dropout=settings.model.dropout)
    presets = [preset.model for preset in PRESETS.values()]
    untouched = [dataclasses.replace(p, dropout=settings.model.dropout) for p in presets]
    if settings.model not in (model, *untouched):
        raise ValueError(
            f"--model says {settings.model} but {settings.init} holds {start.config}: drop the"
            " --model options (but for --model.dropout), or --init"
        )
    if start.tokenizer is None and settings.data.tokenizer is None:
        raise ValueError(
            f"{settings.init} has no tokenizer: give the one it was trained with as"
            " --data.tokenizer spiece.model"
        )
    return model


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

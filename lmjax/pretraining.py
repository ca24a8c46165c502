"""Pretraining on text: what every such experiment is given, and what it does with it.

An experiment adds its model, its objective, its task, and what it shows at the end.
"""

import abc
import dataclasses
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

import jax
from rich.console import Console
from rich.markup import escape

from lmjax.data.batches import assemble
from lmjax.data.text import Text, TokenizedText, read_text
from lmjax.loading import TOKENIZER, Description, describe
from lmjax.sharding import multihost
from lmjax.sharding.multihost import Distributed
from lmjax.sharding.strategies import MeshOptions, StrategyName
from lmjax.tasks.task import Task, Workload
from lmjax.training.execution import ExecutionOptions
from lmjax.training.fit import FitOptions, Fitted, fit
from lmjax.training.optimizers import Adafactor, AdamW
from lmjax.training.schedules import Constant, Cosine, InverseSquareRoot, Linear
from lmjax.training.step import arrange


@dataclasses.dataclass(frozen=True, kw_only=True)
class TextRun(abc.ABC):
    """What is trained (these must stay the same when a run is resumed) and how it is run."""

    model_type: ClassVar[str]
    """In config.json; see `lmjax.loading.SYSTEMS`."""

    # The experiment's own dataclass says of which kinds they are:
    model: Any
    objective: Any
    data: TokenizedText
    optimizer: Adafactor | AdamW
    batch: int
    """Rows of the global batch, over all devices."""
    seed: int = 0
    """Of the parameters, the order of the text, its noise and dropout."""
    init: str | None = None
    """Start from these parameters, model and tokenizer: a run's workdir, a Hugging Face directory
    or repository."""

    steps: int = 1_000_000
    """Train until so many steps are done. More of them continue a finished run."""
    workdir: Path = Path("runs/text")
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

    @abc.abstractmethod
    def task(self, devices: Sequence[jax.Device] | None = None) -> Task:
        """The model and its loss, as they run on `devices` (all, by default)."""

    def workload(self, devices: Sequence[jax.Device]) -> Workload:
        """What `experiments.plan` compiles for `devices`."""
        rows = assemble([], self.objective.lengths)
        batch = {
            name: jax.ShapeDtypeStruct((self.batch, *x.shape[1:]), x.dtype)
            for name, x in rows.items()
        }
        return Workload(self.task(devices), self.optimizer, batch)


HOW_IT_RUNS = frozenset(
    (
        "steps",
        "workdir",
        "eval_batches",
        "workers",
        "strategy",
        "mesh",
        "distributed",
        "execution",
        "fit",
    )
)
"""Fields that may change when a run is resumed; all others are what it is."""


def pretrain(
    settings: TextRun,
    presets: Mapping[str, TextRun],
    experiment: str,
    show: Callable[[TextRun, Any, Any, Text, Console], None],
) -> Fitted:
    """Trains, or goes on training, and shows what was learned.

    Args:
        presets: the experiment's; `--init` brings a model of its own unless the settings ask for
            one that is in none of them.
        experiment: its name, for config.json.
        show: (settings, model, parameters, text, console), called when the last step is done.
    """
    if joined := multihost.start(settings.distributed):
        print(joined, flush=True)
    console = Console(quiet=jax.process_index() > 0)
    start = None
    if settings.init is not None:
        start = describe(settings.init)
        settings = dataclasses.replace(settings, model=model_of(start, settings, presets))
    task = settings.task()
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
        experiment=experiment,
        identity=identity(settings, text),
        runtime=settings.fit,
        layout=layout,
        evaluation=text.evaluation,
        init=None if start is None else start.load_params,
        files={TOKENIZER: text.tokenizer.model},
    )
    if not fitted.interrupted:
        show(settings, task.model, fitted.state.evaluated, text, console)
    return fitted


def model_of(start: Description, settings: TextRun, presets: Mapping[str, TextRun]) -> Any:
    """The model to go on with: that of `--init`, with the settings' dropout.

    Raises:
        ValueError: it is of another kind, the settings ask for yet another one, or its tokenizer is
            not known.
    """
    if type(start.config) is not type(settings.model):
        raise ValueError(
            f"{settings.init} holds a {start.model_type}, which this experiment does not train"
        )
    model = dataclasses.replace(start.config, dropout=settings.model.dropout)
    untouched = [
        dataclasses.replace(preset.model, dropout=settings.model.dropout)
        for preset in presets.values()
    ]
    if settings.model not in (model, *untouched):
        raise ValueError(
            f"--model says {settings.model} but {settings.init} holds {start.config}: drop the"
            " --model options (but for --model.dropout), or --init"
        )
    if start.tokenizer is None and settings.data.tokenizer is None:
        raise ValueError(
            f"{settings.init} has no tokenizer: give the one it was trained with as"
            " --data.tokenizer"
        )
    return model


def identity(settings: TextRun, text: Text) -> dict[str, Any]:
    """What the run learns, and from what."""
    names = [f.name for f in dataclasses.fields(settings) if f.name not in HOW_IT_RUNS]
    fields = {name: getattr(settings, name) for name in names}
    return {"model_type": settings.model_type, **fields, "data": text.identity}


# --- choices for the command line


def optimizer_choices() -> dict[str, dict[str, Callable[[TextRun], Any]]]:
    """--optimizer and --optimizer.schedule, for `command_line.parse`."""
    return {
        "optimizer": {
            "adafactor": lambda s: Adafactor(s.optimizer.schedule),
            "adamw": lambda s: AdamW(Cosine(1e-3, horizon=s.steps, warmup=_warmup(s))),
        },
        "optimizer.schedule": {
            "inverse_square_root": lambda s: InverseSquareRoot(
                _peak(s) * _warmup(s) ** 0.5, _warmup(s)
            ),
            "linear": lambda s: Linear(_peak(s), horizon=s.steps, warmup=_warmup(s)),
            "cosine": lambda s: Cosine(_peak(s), horizon=s.steps, warmup=_warmup(s)),
            "constant": lambda s: Constant(_peak(s) / 10, warmup=_warmup(s)),
        },
    }


def _peak(settings: TextRun) -> float:
    """A usual learning rate; Adafactor's is relative to the size of a parameter."""
    return 1e-2 if isinstance(settings.optimizer, Adafactor) else 1e-3


def _warmup(settings: TextRun) -> int:
    return min(10_000, max(1, settings.steps // 10))

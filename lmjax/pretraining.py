"""Training from nothing or from a checkpoint: what every such experiment is given, and what it does
with it.

An experiment adds its model, its objective, its task, and what it shows at the end.
"""

import abc
import dataclasses
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, Protocol

import jax
from rich.console import Console
from rich.markup import escape

from lmjax.data.batches import Batch, Batches, assemble
from lmjax.data.captions import CaptionedPictureData
from lmjax.data.picture_batches import PictureBatches, read_pictures, stack
from lmjax.data.pictures import PictureData
from lmjax.data.pixels import Crop
from lmjax.data.text import Text, TokenizedText, read_text
from lmjax.data.tokenizers import Tokenizer
from lmjax.loading import TOKENIZER, Description, describe
from lmjax.sharding import multihost
from lmjax.sharding.hardware import device_memory
from lmjax.sharding.multihost import Distributed
from lmjax.sharding.strategies import MeshOptions, StrategyName
from lmjax.tasks.task import Task, Workload
from lmjax.training.checkpoints import as_json, changed_fields
from lmjax.training.compression import PowerSGD
from lmjax.training.execution import ExecutionOptions
from lmjax.training.fit import FitOptions, Fitted, Watch, fit
from lmjax.training.optimizers import Adafactor, AdamW
from lmjax.training.schedules import Constant, Cosine, InverseSquareRoot, Linear
from lmjax.training.state import Averaging
from lmjax.training.step import arrange, compressed_sums


class Data(Protocol):
    """What training takes from a run's data."""

    tokenizer: Tokenizer | None
    batches: Batches
    evaluation: Sequence[Batch]
    identity: dict[str, Any]
    """What must be the same when a run is resumed."""
    summary: str


@dataclasses.dataclass(frozen=True, kw_only=True)
class Run(abc.ABC):
    """What is trained (these must stay the same when a run is resumed) and how it is run."""

    model_type: ClassVar[str]
    """In config.json; see `lmjax.loading.SYSTEMS`."""

    # The experiment's own dataclass says of which kinds they are:
    model: Any
    data: Any
    optimizer: Adafactor | AdamW
    batch: int
    """Rows of the global batch, over all devices."""
    average: float | None = None
    """Decay of a moving average of the parameters, which is then what is evaluated and used."""
    average_every: int = 1
    """Steps from one update of that average to the next."""
    compress: int | None = None
    """Sum gradients over the mesh's `data` axis as matrices of this rank, by PowerSGD: for slow
    networks between hosts. Devices that each hold a part of a parameter share the rank among them.
    Strategy and mesh must then stay when a run is resumed."""
    seed: int = 0
    """Of the parameters, the order of the data, its noise and dropout."""
    init: str | None = None
    """Start from these parameters, model and tokenizer: a run's workdir, a Hugging Face directory
    or repository."""

    steps: int = 1_000_000
    """Train until so many steps are done. More of them continue a finished run."""
    workdir: Path = Path("runs/run")
    """Where config.json, metrics.jsonl, loss.png, TensorBoard events and checkpoints go."""
    eval_batches: int = 8
    """Held-out batches per evaluation."""
    workers: int = 0
    """Processes that prepare batches; 0 is one thread, enough unless steps are very short."""
    strategy: StrategyName = "auto"
    """How model and batch are divided over the devices: pmap and dp (the whole model on each), fsdp
    (parameters divided), tp (products divided), fsdp_tp (both), or what the model's size asks for
    (auto). It may change when a run is resumed, as may --mesh, unless it is compressed."""
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
        if self.execution.dtype == "float16" and not self.keeps_small_gradients:
            raise ValueError(
                "--execution.dtype float16 lets small gradients vanish: choose bfloat16, or train"
                " DALL-E with --gradient-scaling"
            )
        self.averaging, self.compression  # noqa: B018 (checks them)

    @property
    def keeps_small_gradients(self) -> bool:
        """Whether they survive float16."""
        return False

    @abc.abstractmethod
    def task(self, devices: Sequence[jax.Device] | None = None) -> Task:
        """The model and its loss, as they run on `devices` (all, by default)."""

    @abc.abstractmethod
    def read(self, start: Description | None, share: tuple[int, int]) -> Data:
        """The data, after the tokenizer of the checkpoint to start from, if there is one.

        Args:
            share: which part of every batch, of how many, is this host's.
        """

    @abc.abstractmethod
    def no_rows(self) -> Batch:
        """A batch without rows: the names, lengths and types of its arrays."""

    @property
    def averaging(self) -> Averaging | None:
        return None if self.average is None else Averaging(self.average, self.average_every)

    @property
    def compression(self) -> PowerSGD | None:
        return None if self.compress is None else PowerSGD(self.compress)

    def check_tokenizer(self, start: Description | None) -> None:
        """Raises ValueError where the checkpoint to start from has none, and none is named."""
        if start is not None and start.tokenizer is None and self.data.tokenizer is None:
            raise ValueError(
                f"{self.init} has no tokenizer: give the one it was trained with as"
                " --data.tokenizer"
            )

    def workload(self, devices: Sequence[jax.Device]) -> Workload:
        """What `experiments.plan` compiles for `devices`."""
        batch = {
            name: jax.ShapeDtypeStruct((self.batch, *x.shape[1:]), x.dtype)
            for name, x in self.no_rows().items()
        }
        return Workload(self.task(devices), self.optimizer, batch)


@dataclasses.dataclass(frozen=True, kw_only=True)
class TextRun(Run):
    """A run on text."""

    objective: Any
    data: TokenizedText

    def read(self, start: Description | None, share: tuple[int, int]) -> Text:
        """Raises ValueError where the tokenizer is not known, and what `read_text` raises."""
        self.check_tokenizer(start)
        return read_text(
            self.data,
            self.objective,
            batch=self.batch,
            seed=self.seed,
            workers=self.workers,
            eval_batches=self.eval_batches,
            tokenizer=None if start is None else start.tokenizer,
            rows=self.model.vocab,
            share=share,
        )

    def no_rows(self) -> Batch:
        return assemble([], self.objective.lengths)


@dataclasses.dataclass(frozen=True, kw_only=True)
class PictureRun(Run):
    """A run on pictures."""

    data: PictureData

    @abc.abstractmethod
    def rows(self) -> Mapping[str, int]:
        """The lengths of a batch's arrays, as `picture_batches.stack` takes them."""

    def no_rows(self) -> Batch:
        return stack([], self.rows())

    def read_pictures(
        self, start: Description | None, share: tuple[int, int], crop: Crop, size: int, **more: Any
    ) -> PictureBatches:
        """`picture_batches.read_pictures` with this run's settings and `more` of its arguments.

        Raises ValueError where the captions' tokenizer is not known, and what that raises.
        """
        if isinstance(self.data, CaptionedPictureData):
            self.check_tokenizer(start)
        return read_pictures(
            self.data,
            crop,
            size,
            batch=self.batch,
            seed=self.seed,
            workers=self.workers,
            eval_batches=self.eval_batches,
            tokenizer=None if start is None else start.tokenizer,
            share=share,
            **more,
        )


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
    settings: Run,
    presets: Mapping[str, Run],
    experiment: str,
    show: Callable[[Any, Any, Any, Any, Console], None],
    watch: Callable[[Any, Any, Any], Watch] | None = None,
) -> Fitted:
    """Trains, or goes on training, and shows what was learned.

    Args:
        presets: the experiment's; `--init` brings a model of its own unless the settings ask for
            one that is in none of them.
        experiment: its name, for config.json.
        show: (settings, model, parameters, data, console), called when the last step is done: in
            the first process, with its rows of the held-out batches, if the model fits there.
        watch: (settings, model, data) -> what `fit` calls `watch`; not with several processes, of
            which none has all parameters while they train.
    """
    if joined := multihost.start(settings.distributed):
        print(joined, flush=True)
    console = Console(quiet=jax.process_index() > 0)
    command = {k: v for k, v in as_json(settings).items() if k != "distributed"}
    multihost.agree("command", command, changed_fields, settings.distributed.timeout)
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
    compressed_sums(task, layout, settings.compression)  # so that it is refused before data is read
    # Hosts may share a cache: the first one fills it.
    with multihost.first_process_first("data", timeout=24 * 3_600):
        data = settings.read(start, layout.share)
    multihost.barrier("all data", timeout=24 * 3_600)  # which may have taken the others as long
    console.print(escape(data.summary), soft_wrap=True)
    fitted = fit(
        task,
        settings.optimizer,
        data.batches,
        steps=settings.steps,
        workdir=settings.workdir,
        seed=settings.seed,
        experiment=experiment,
        identity=identity(settings, data),
        runtime=settings.fit,
        layout=layout,
        evaluation=data.evaluation,
        watch=watch(settings, task.model, data) if watch and jax.process_count() == 1 else None,
        averaging=settings.averaging,
        compression=settings.compression,
        init=None if start is None else start.load_params,
        files={} if data.tokenizer is None else {TOKENIZER: data.tokenizer.model},
    )
    if not fitted.interrupted:
        params = fitted.state.evaluated
        room = has_room(jax.local_devices()[0], params)
        if jax.process_count() > 1 and not all(multihost.gather("room", room)):
            console.print(
                "What was learned is not shown: the model does not fit on one device of this run."
            )
            return fitted
        params = multihost.on_first_process(params)
        if jax.process_index() == 0:
            show(settings, task.model, params, data, console)
        multihost.barrier("what was learned", timeout=24 * 3_600)
    return fitted


def has_room(device: jax.Device, params: Any) -> bool:
    """Whether a device can hold all parameters, and as much again to compute with them."""
    memory = device_memory(device)
    return memory is None or 2 * sum(x.nbytes for x in jax.tree.leaves(params)) <= memory


def model_of(start: Description, settings: Run, presets: Mapping[str, Run]) -> Any:
    """The model to go on with: that of `--init`, with the settings' dropout.

    Raises:
        ValueError: it is of another kind, or the settings ask for yet another one.
    """
    if type(start.config) is not type(settings.model):
        raise ValueError(
            f"{settings.init} holds a {start.model_type}, which this experiment does not train"
        )

    def with_its_dropout(model):
        own = getattr(settings.model, "dropout", None)
        return model if own is None else dataclasses.replace(model, dropout=own)

    model = with_its_dropout(start.config)
    untouched = [with_its_dropout(preset.model) for preset in presets.values()]
    if settings.model not in (model, *untouched):
        changes = changed_fields(as_json(model), as_json(settings.model))
        raise ValueError(
            f"the --model options ask for another model than {settings.init} holds"
            f" ({', '.join(changes)}): drop them (but for --model.dropout), or --init"
        )
    return model


def identity(settings: Run, data: Data) -> dict[str, Any]:
    """What the run learns, and from what."""
    names = [f.name for f in dataclasses.fields(settings) if f.name not in HOW_IT_RUNS]
    fields = {name: getattr(settings, name) for name in names}
    return {"model_type": settings.model_type, **fields, "data": data.identity}


# --- choices for the command line


def optimizer_choices() -> dict[str, dict[str, Callable[[Run], Any]]]:
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


def _peak(settings: Run) -> float:
    """A usual learning rate; Adafactor's is relative to the size of a parameter."""
    return 1e-2 if isinstance(settings.optimizer, Adafactor) else 1e-3


def _warmup(settings: Run) -> int:
    return min(10_000, max(1, settings.steps // 10))

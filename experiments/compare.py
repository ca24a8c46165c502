"""The objectives of BERT, RoBERTa, XLNet, BART, GPT-2 and T5 side by side: equal parameters, the
same text, equally many tokens of it, and one test that all can take. And what XLNet's memory of the
text before is worth.

Papers: Devlin et al. 2019 (BERT), Liu et al. 2019 (RoBERTa), Yang et al. 2019 (XLNet), Lewis et al.
2020 (BART), Radford et al. 2019 (GPT-2), Raffel et al. 2020 (T5).

    python -m experiments.compare
    python -m experiments.compare --data.files 'my/*.txt' --workdir runs/compare-mine
    python -m experiments.compare --models xlnet --workdir runs/memory

The first trains small models on the documentation installed on this machine, one after the other:
fifteen to twenty minutes on two CPU cores. The same command, run again, goes on where it was
stopped; when all is done, it only draws. --models chooses, and what is in --workdir already is not
trained again.

Equal terms: one SentencePiece vocabulary with all special tokens; the models, optimizers and
objectives of the experiments of these names, with one width and number of layers (half of them in
an encoder, half in a decoder where there are both) and feed-forward layers as wide as it takes for
equal parameters within one percent. A token of text counts once, however often it is read: XLNet's
rows overlap, so there are more of them. BERT's pairs do not fill their rows; it has more rows too,
and steps until it has seen as many tokens.

The test: 256 passages of 64 tokens, held out, with a word hidden, and ten words to choose from (see
`lmjax.evaluation.cloze`). The default run, 2.5 million tokens of text, gave

    model                  parameters   right answers   nats
    GPT-2                     929,792          84.4 %   0.42
    XLNet                     929,296          81.2 %   0.60
    BART                      931,552          70.7 %   0.92
    RoBERTa                   930,480          33.6 %   1.85
    BERT                      930,674          24.6 %   2.07
    T5                        930,944          24.6 %   2.00
    chance                                     10.0 %   2.30

(the shares have standard errors of 2 to 3 %). GPT-2 and BART, which write all of the text, are on
their way after 300,000 tokens, and XLNet, asked for one in four because its rows overlap, soon
after; BERT, RoBERTa and T5, asked for one token in seven, have begun to read the context.

XLNet is trained without its memory here, like the others. What a memory is worth is then judged by
letting it go on for 800 steps with one of a whole row, and from the same parameters over the same
rows without one: by the nats of held-out words in documents that began in the rows before, by the
word's place in its row. The memory is worth 0.168 nats among the first six places, where little of
the row lies before the word, and 0.038 over all (standard error 0.003); emptied, it is missed as
much. (With a memory from the first step on a model learns more slowly in so few steps.)
"""

import collections
import dataclasses
import hashlib
import io
import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Literal, NamedTuple, get_args

import jax
import jax.numpy as jnp
import numpy as np
from rich.console import Console
from rich.table import Table

from experiments.bart_pretrain import MINI as BART
from experiments.bert_pretrain import MINI as BERT
from experiments.gpt2_pretrain import MINI as GPT2
from experiments.roberta_pretrain import MINI as ROBERTA
from experiments.t5_pretrain import MINI as T5
from experiments.xlnet_pretrain import MINI as XLNET
from experiments.xlnet_pretrain import XLNetPretrain, memories
from lmjax import command_line
from lmjax.data.sources import open_source
from lmjax.data.text import Text, TokenizedText, choose_tokenizer, open_store, read_text
from lmjax.data.tokenizers import Tokenizer
from lmjax.evaluation.cloze import CANDIDATES, READERS, Cloze, SpecialTokens, ask
from lmjax.loading import TOKENIZER
from lmjax.models.layers import all_logits
from lmjax.objectives.bart_denoising import BartDenoising
from lmjax.objectives.causal_lm import CausalLM
from lmjax.objectives.denoising import SpanCorruption
from lmjax.objectives.masked_lm import MaskedLM
from lmjax.objectives.masked_pairs import MaskedPairs
from lmjax.objectives.permutation_lm import PermutationLM
from lmjax.objectives.span_corruption import span_corruption_lengths
from lmjax.pretraining import TextRun, identity
from lmjax.tasks.masked import places
from lmjax.tasks.task import Batch, Params
from lmjax.training.checkpoints import write_atomically
from lmjax.training.fit import FitOptions, Fitted, fit
from lmjax.training.reporting import METRICS, read_metrics
from lmjax.training.schedules import InverseSquareRoot, Linear
from lmjax.training.state import abstract_parameters

Name = Literal["bert", "roberta", "xlnet", "bart", "gpt2", "t5"]
TITLES: dict[str, str] = {
    "bert": "BERT",
    "roberta": "RoBERTa",
    "xlnet": "XLNet",
    "bart": "BART",
    "gpt2": "GPT-2",
    "t5": "T5",
}
QUESTIONS_AT_A_TIME = 16
PARTS = 7
"""Parts of a row whose words are taken together where XLNet's memory is judged."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Compare:
    models: tuple[Name, ...] = get_args(Name)
    """Which to train. Those that --workdir has are not trained again, only drawn."""
    data: TokenizedText = TokenizedText(subwords="common_unigram", vocab_size=4_096)
    layers: int = 2
    """Of a model with one stack; one with encoder and decoder has half of them in each."""
    width: int = 128
    heads: int = 4
    window: int = 66
    """Tokens of text in a row, divisible by 3: XLNet's rows advance by two thirds of it."""
    rows: int = 16
    """Rows of a batch, divisible by 4: XLNet has half as many more, for the same tokens of text;
    BERT as many as its pairs of sentences, which do not fill their rows, need."""
    steps: int = 2_400
    """The learning rates' decay is made for them: another number needs another --workdir."""
    seed: int = 0
    workdir: Path = Path("runs/compare")
    """compare.png, compare.json, and a run's directory for each model."""
    questions: int = 256
    """Held-out passages with a hidden word, the same for all."""
    passage: int = 64
    """Tokens of a passage."""
    evaluations: int = 8
    """How many times the questions are asked on the way."""
    memory_steps: int = 800
    """Steps that XLNet then goes on for, once with a memory and once without."""
    memory_batches: int = 80
    """Held-out batches, in their order, that both read."""

    def __post_init__(self):
        sizes = ("layers", "rows", "window", "steps", "questions", "evaluations")
        for name in (*sizes, "memory_steps", "memory_batches"):
            if getattr(self, name) < 1:
                flag = name.replace("_", "-")
                raise ValueError(f"--{flag} is {getattr(self, name)}, not 1 or more")
        if self.window % 3 or self.rows % 4:
            raise ValueError(
                f"--window is {self.window} and --rows {self.rows}: choose multiples of 3 and of 4,"
                " so that XLNet can read as much in rows that advance by two thirds of a window"
            )
        if not 2 <= self.passage <= self.window:
            raise ValueError(
                f"--passage is {self.passage}, but models read 2 to {self.window} tokens: choose a"
                " shorter one, or a longer --window"
            )


class Result(NamedTuple):
    """What became of a model."""

    parameters: int
    steps: int
    tokens: int
    """Of text, seen in all steps."""
    seconds: float
    """Of training; evaluations do not count."""
    curve: list[tuple[float, float, float]]
    """(tokens of text, share of questions answered right, nats) at each evaluation."""


class Memory(NamedTuple):
    """Nats per hidden word of held-out text, by its place in XLNet's row."""

    places: list[float]
    """The middles of parts of the row."""
    nats: dict[str, list[float]]
    """In each part, by how the row was read."""
    mean: dict[str, float]
    """Over the whole row."""
    error: dict[str, float]
    """Standard error of the difference from the first reading."""
    words: int


def main() -> None:
    settings = command_line.parse({"mini": Compare()}, "mini", __doc__)
    compare(settings, Console())


def compare(settings: Compare, console: Console) -> None:
    source = open_source(settings.data)
    tokenizer = choose_tokenizer(settings.data, source)
    check_tokenizer(tokenizer)
    tokenizer.save(settings.workdir / TOKENIZER)
    data = dataclasses.replace(settings.data, tokenizer=str(settings.workdir / TOKENIZER))
    questions = ask(
        open_store(source, "validation", tokenizer),
        np.bincount(open_store(source, "train", tokenizer).tokens, minlength=tokenizer.vocab_size),
        tokenizer,
        questions=settings.questions,
        length=settings.passage,
        batch=QUESTIONS_AT_A_TIME,
        seed=settings.seed,
    )
    results, memory = {}, None
    for name, run in contestants(settings, tokenizer, data).items():
        console.rule(TITLES[name])
        run, text = equally_fed(run, settings)
        fitted = train(run, text, questions)
        if fitted.interrupted:
            return
        results[name] = result_of(run, text)
        if name == "xlnet":
            readers = {}
            for going, further in gone_on(run, settings).items():
                console.rule(f"XLNet, {going}")
                text = text_of(further)
                on = train(further, text, params=fitted.state.evaluated)
                if on.interrupted:
                    return
                readers[going] = further, on.state.evaluated
            memory = worth_of_memory(readers, text.evaluation, tokenizer)
    show(settings, results, memory, console)


def check_tokenizer(tokenizer: Tokenizer) -> None:
    """Raises ValueError if it lacks a token that one of the objectives needs."""
    names = ("pad", "bos", "eos", "cls", "sep", "mask")
    lacking = [name for name in names if getattr(tokenizer, f"{name}_id") is None]
    lacking += ["sentinels"] * (len(tokenizer.sentinels) == 0)
    if lacking:
        raise ValueError(
            f"the tokenizer has no {' and no '.join(lacking)}, but all models shall read the same"
            " tokens: take one that is trained as --data.subwords common_unigram"
        )


# --- equal terms


def contestants(settings: Compare, tokenizer: Tokenizer, data: TokenizedText) -> dict[str, TextRun]:
    """The experiments' own small runs with the sizes and the text that are compared."""
    s, length = settings, settings.window + 2
    one = {"vocab": tokenizer.vocab_size, "layers": s.layers, "width": s.width, "heads": s.heads}
    half = (s.layers + 1) // 2
    two = one | {"layers": half, "decoder_layers": half}
    learned = {"positions": length}
    ends = {"padding": tokenizer.pad_id, "start": tokenizer.eos_id}
    reuse = s.window * 2 // 3
    forgetful = {"memory": 0, "reuse": reuse}
    permuted = PermutationLM(length=length, reuse=reuse, targets=length // 6)
    corrupted, _ = span_corruption_lengths(s.window)
    all_of_them = {
        "bert": (BERT, one | learned, MaskedPairs(length=length, copies=1)),
        "roberta": (ROBERTA, one | learned, MaskedLM(length=length, full_sentences=False)),
        "xlnet": (XLNET, one | forgetful, permuted),
        "bart": (BART, two | learned | ends, BartDenoising(length=length)),
        "gpt2": (GPT2, one | learned, CausalLM(length=s.window - 1)),
        "t5": (T5, two | {"head_width": s.width // s.heads}, SpanCorruption(corrupted)),
    }
    often = math.ceil(s.steps / s.evaluations)
    runs = {}
    for name, (mini, model, objective) in all_of_them.items():
        runs[name] = dataclasses.replace(
            mini,
            model=dataclasses.replace(mini.model, **model, feed_forward=4 * s.width),
            objective=objective,
            data=data,
            optimizer=paced(mini.optimizer, s.steps),
            batch=round(s.rows * s.window / tokens_of_a_row(objective)),
            seed=s.seed,
            steps=s.steps,
            workdir=s.workdir / name,
            eval_batches=s.memory_batches,
            fit=FitOptions(log_every=1, eval_every=often, checkpoint_every=often),
        )
    size = parameters(runs["gpt2"])
    return {name: resized(runs[name], size) for name in get_args(Name) if name in s.models}


def paced(optimizer, steps: int):
    """An experiment's optimizer with its decay, if it has one, made for so many steps."""
    schedule = optimizer.schedule
    if not isinstance(schedule, InverseSquareRoot):
        schedule = dataclasses.replace(schedule, horizon=steps, warmup=max(1, steps // 10))
    return dataclasses.replace(optimizer, schedule=schedule)


def resized(run: TextRun, size: int) -> TextRun:
    """The run with feed-forward layers, a multiple of 8 wide, by which its model has `size`
    parameters.

    Raises:
        ValueError: none comes within one percent.
    """

    def wide(feed_forward: int) -> TextRun:
        model = dataclasses.replace(run.model, feed_forward=feed_forward)
        return dataclasses.replace(run, model=model)

    narrowest = parameters(wide(8))
    eights = 1 + round((size - narrowest) / (parameters(wide(16)) - narrowest))
    resized = wide(8 * max(1, eights))
    if abs(parameters(resized) / size - 1) > 0.01:
        raise ValueError(
            f"no {run.model_type} comes within one percent of GPT-2's {size:,} parameters: choose a"
            " larger --width or other --layers"
        )
    return resized


def parameters(run: TextRun) -> int:
    arrays, _ = abstract_parameters(run.task())
    return sum(math.prod(array.shape) for array in jax.tree.leaves(arrays))


def tokens_of_a_row(objective) -> int:
    """Of text: those that the row's successor in XLNet's lane does not read once more."""
    return objective.reuse if objective.corpus == "lanes" else objective.window


def equally_fed(run: TextRun, settings: Compare) -> tuple[TextRun, Text]:
    """The run, with as many rows and steps as it needs to see as many tokens as the others.

    Only BERT's pairs of sentences do not fill their rows.
    """
    text = text_of(run)
    if run.objective.corpus != "pairs":
        return run, text
    step = settings.rows * settings.window
    rows = text.batches.rows
    pairs = [rows.row(i)[0][1] for i in range(0, len(rows), math.ceil(len(rows) / 2_000))]
    lengths = [min(len(pair.first) + len(pair.second), run.objective.window) for pair in pairs]
    batch = round(step / np.mean(lengths))
    steps = round(step * settings.steps / (batch * np.mean(lengths)))
    optimizer = paced(run.optimizer, steps)
    run = dataclasses.replace(run, batch=batch, steps=steps, optimizer=optimizer)
    return run, text_of(run)


def text_of(run: TextRun) -> Text:
    return read_text(
        run.data,
        run.objective,
        batch=run.batch,
        seed=run.seed,
        eval_batches=run.eval_batches,
        rows=run.model.vocab,
    )


# --- training


def train(
    run: TextRun, text: Text, questions: Sequence[Batch] = (), params: Params | None = None
) -> Fitted:
    """Trains a model, from `params` if they are given, or goes on with it; asks it the questions on
    the way."""
    task, asked = run.task(), {}
    if questions:
        task = Cloze(task, READERS[run.model_type], SpecialTokens.of(text.tokenizer))
        asked = {"questions": fingerprint(questions)}
    return fit(
        task,
        run.optimizer,
        text.batches,
        steps=run.steps,
        workdir=run.workdir,
        seed=run.seed,
        experiment="compare",
        identity=identity(run, text) | asked,
        runtime=run.fit,
        evaluation=questions,
        init=None if params is None else lambda: params,
        files={TOKENIZER: text.tokenizer.model},
    )


def fingerprint(questions: Sequence[Batch]) -> str:
    hash = hashlib.sha256()
    for batch in questions:
        for name in sorted(batch):
            hash.update(batch[name].tobytes())
    return hash.hexdigest()


def result_of(run: TextRun, text: Text) -> Result:
    """What a finished run has written down."""
    tokens = run.steps * run.batch * tokens_of_a_row(run.objective)
    if run.objective.corpus == "pairs":
        batches = map(text.batches.batch, range(run.steps))
        tokens = sum(
            np.count_nonzero(batch["inputs_segment_ids"]) - 3 * run.batch for batch in batches
        )
    records = read_metrics(run.workdir / METRICS)
    return Result(
        parameters(run),
        run.steps,
        int(tokens),
        sum(record.get("step_seconds", 0) for record in records),
        [
            (tokens * r["step"] / run.steps, r["eval_accuracy"], r["eval_loss"])
            for r in records
            if "eval_accuracy" in r
        ],
    )


# --- what a memory is worth

WITH, WITHOUT = "gone on with a memory", "gone on without one"
EMPTIED = "the first, its memory emptied"


def gone_on(run: XLNetPretrain, settings: Compare) -> dict[str, XLNetPretrain]:
    """The runs in which a trained XLNet goes on, from the same parameters over the same text, with
    a memory of a whole row and without one."""
    peak, steps = run.optimizer.schedule.peak / 2, settings.memory_steps
    schedule = Linear(peak, horizon=steps, warmup=max(1, steps // 10))
    runs = {}
    for going, memory in ((WITH, settings.window), (WITHOUT, 0)):
        runs[going] = dataclasses.replace(
            run,
            model=dataclasses.replace(run.model, memory=memory),
            optimizer=dataclasses.replace(run.optimizer, schedule=schedule),
            seed=settings.seed + 1,  # other rows
            steps=steps,
            workdir=settings.workdir / ("xlnet_with_memory" if memory else "xlnet_without_memory"),
        )
    return runs


def worth_of_memory(
    readers: dict[str, tuple[XLNetPretrain, Params]],
    batches: Sequence[Batch],
    tokenizer: Tokenizer,
) -> Memory:
    """How well XLNet guesses words of documents that began in the rows before, by what it reads.

    Only words of a row's reused part count: what follows it may come from elsewhere.
    """
    run, params = readers[WITH]
    reuse = run.objective.reuse
    own, others = word_nats(run, params), word_nats(*readers[WITHOUT])
    found = collections.defaultdict(list)
    at, last = [], np.full(run.batch, tokenizer.eos_id)
    for batch, extra in memories(run, params, batches):
        ended = np.cumsum(batch["inputs"] == tokenizer.eos_id, 1)
        begun = (last != tokenizer.eos_id) & (batch["lane_positions"][:, 0] > 0)
        place = batch["targets_positions"]
        chosen = begun[:, None] & (np.take_along_axis(ended, place, 1) == 0) & (place < reuse)
        chosen &= batch["loss_weights"] > 0
        at.append(place[chosen])
        memory = extra["memory"]
        found[WITH].append(own(batch, memory)[chosen])
        found[EMPTIED].append(own(batch, 0 * memory)[chosen])
        found[WITHOUT].append(others(batch, None)[chosen])
        last = batch["inputs"][:, reuse - 1]
    nats = {name: np.concatenate(parts) for name, parts in found.items()}
    part = np.concatenate(at) * PARTS // reuse
    known = np.unique(part)
    root = math.sqrt(len(part))
    return Memory(
        places=[(i + 0.5) * reuse / PARTS for i in known],
        nats={name: [float(x[part == i].mean()) for i in known] for name, x in nats.items()},
        mean={name: float(x.mean()) for name, x in nats.items()},
        error={name: float((x - nats[WITH]).std() / root) for name, x in nats.items()},
        words=len(part),
    )


def word_nats(run: XLNetPretrain, params: Params):
    """(batch, memory or None) -> [B, R]: of each word to guess, how unlikely the model found it."""
    model = run.task().model
    variables = {"params": params}

    @jax.jit
    def nats(batch, memory):
        features, _ = model.apply(
            variables,
            batch["inputs"],
            memory,
            order=batch["inputs_order"],
            places=places(batch),
            token_types=batch["inputs_token_types"],
            backward=batch["lane"][:, 0] > 0,
            method="features",
        )
        logits = all_logits(features, params["embedding"]) + params["output_bias"]
        likelihoods = jax.nn.log_softmax(logits)
        return -jnp.take_along_axis(likelihoods, batch["targets"][..., None], 2)[..., 0]

    return lambda batch, memory: np.asarray(nats(batch, memory))


# --- what is shown


def show(
    settings: Compare, results: dict[str, Result], memory: Memory | None, console: Console
) -> None:
    """A table, compare.json and compare.png."""
    console.print(table(results))
    if memory is not None:
        console.print(
            f"XLNet's nats per hidden word, {memory.words:,} words of documents that began in the"
            " rows before: "
            + "; ".join(f"{value:.3f} {name}" for name, value in memory.mean.items())
        )
    content = {
        "settings": dataclasses.asdict(settings),
        "models": {name: result._asdict() for name, result in results.items()},
        "memory": memory and memory._asdict(),
    }
    text = json.dumps(content, indent=2, default=str) + "\n"
    write_atomically(settings.workdir / "compare.json", text.encode())
    write_atomically(settings.workdir / "compare.png", picture(results, memory))
    console.print(f"{settings.workdir / 'compare.png'} and compare.json are written")


def table(results: dict[str, Result]) -> Table:
    columns = ("parameters", "tokens of text", "steps", "seconds", "cloze accuracy", "cloze nats")
    shown = Table()
    shown.add_column("")
    for column in columns:
        shown.add_column(column, justify="right")
    for name, result in results.items():
        _, accuracy, nats = result.curve[-1]
        shown.add_row(
            TITLES[name],
            f"{result.parameters:,}",
            f"{result.tokens:,}",
            f"{result.steps:,}",
            f"{result.seconds:.0f}",
            f"{accuracy:.1%}",
            f"{nats:.3f}",
        )
    shown.add_row(
        "by chance", "", "", "", "", f"{1 / CANDIDATES:.1%}", f"{math.log(CANDIDATES):.3f}"
    )
    return shown


COLORS = {
    "bert": "tab:blue",
    "roberta": "tab:cyan",
    "xlnet": "tab:red",
    "bart": "tab:green",
    "gpt2": "tab:purple",
    "t5": "tab:orange",
}


def picture(results: dict[str, Result], memory: Memory | None) -> bytes:
    """A PNG: the models' way through the text, and what a memory is worth by place in the row."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg  # slow to import
    from matplotlib.figure import Figure
    from matplotlib.ticker import PercentFormatter

    panels = 1 if memory is None else 2
    figure = Figure(figsize=(7 * panels, 5), dpi=120, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot(1, panels, 1)
    axes.set(
        title="Which of ten words is hidden?",
        xlabel="tokens of text seen, millions",
        ylabel="right answers on held-out text",
    )
    best_first = sorted(results, key=lambda name: -results[name].curve[-1][1])
    for name in best_first:
        tokens, accuracy, _ = np.array(results[name].curve).T
        axes.plot(
            tokens / 1e6,
            accuracy,
            marker="o",
            markersize=3.5,
            color=COLORS[name],
            label=f"{TITLES[name]}  {accuracy[-1]:.0%}",
        )
    axes.axhline(1 / CANDIDATES, color="gray", linewidth=1, linestyle=":")
    axes.annotate("chance", (0, 1 / CANDIDATES), (2, -12), textcoords="offset points", color="gray")
    axes.yaxis.set_major_formatter(PercentFormatter(1, decimals=0))
    axes.set_ylim(bottom=0)
    if memory is not None:
        axes_2 = figure.add_subplot(1, panels, 2)
        axes_2.set(
            title="XLNet in documents that began before the row",
            xlabel="the hidden word's place in its row",
            ylabel="nats per hidden word",
        )
        styles = {WITH: "-", EMPTIED: ":", WITHOUT: "--"}
        for name, nats in memory.nats.items():
            label = f"{name}  {memory.mean[name]:.2f}"
            axes_2.plot(
                memory.places,
                nats,
                styles[name],
                marker="o",
                markersize=3.5,
                color=COLORS["xlnet"],
                label=label,
            )
    for each in figure.axes:
        each.grid(alpha=0.3)
        each.legend(frameon=False)
        each.spines[["top", "right"]].set_visible(False)
    png = io.BytesIO()
    figure.savefig(png, format="png")
    return png.getvalue()


if __name__ == "__main__":
    command_line.run(main)

"""How fast lmjax is, beside whatever else is installed, in one run on one machine.

    python -m experiments.benchmark t5
    python -m experiments.benchmark t5 --batch 4 --inputs 128 --targets 32 --rounds 1
    python -m experiments.benchmark text
    python -m experiments.benchmark text --models bert gpt2
    python -m experiments.benchmark dalle

Trains (AdamW, float32, dropout off) a model of the same shape with lmjax, with transformers'
PyTorch and with transformers 4.57's Flax (which has no XLNet), and writes (greedily, with a cache)
with T5 and GPT-2. DALL-E's transformer is compared with dalle-pytorch's, and draws. Each library is
in a process of its own, in turns, so that a busy machine slows them alike; the best turn counts.
lmjax takes the step that `fit` takes, with its checks. Peak memory is that of training, on the
accelerator if there is one.

All compute the same loss, and the logits that it needs: those of every token in T5, GPT-2 and BART,
of guessed words in XLNet. In BERT, which guesses a sixth of the words and judges whether the second
sentence follows the first, lmjax computes the logits of guessed words alone; the others, as they
were written, those of all words.

Then what only lmjax has: tokens per second of the objectives and, with t5, of batches, and the
memory of the loss over mT5's vocabulary; with dalle, what its cache and its sparse attention are
worth, and how well the dVAE and the DALL-E do on emoji that `experiments.dvae_train` and
`dalle_train` have trained, where that has been done.
"""

import dataclasses
import json
import os
import sys
from pathlib import Path
from typing import Annotated, Literal

import tyro
from rich.console import Console
from rich.progress import Progress

from experiments.benchmark.harness import (
    MEASURE,
    Case,
    compare,
    in_own_process,
    libraries,
    measure,
    table,
)
from lmjax import command_line

SHAPES = {
    # Rows, tokens of each, and how many to guess or to write.
    "bert": (8, 128, lambda length: -(-length * 20 // 128)),
    "gpt2": (4, 256, lambda length: length),
    "bart": (4, 256, lambda length: length // 4),
    "xlnet": (4, 128, lambda length: -(-length * 21 // 128)),
}


@dataclasses.dataclass(frozen=True)
class Turns:
    steps: int = 4
    """Training steps timed in each turn."""
    rounds: int = 2
    """Turns of each library; the best counts."""
    extras: bool = True
    """Also measure what only lmjax has."""
    json: Path | None = None
    """Write the figures here too."""


@dataclasses.dataclass(frozen=True)
class T5(Turns):
    """T5. About ten minutes on two CPU cores with the defaults."""

    preset: str = "small"
    """Which size: small, base, v1_1-small, mt5-small, ..."""
    batch: int = 8
    inputs: int = 512
    targets: int = 114
    decode_batch: int = 8
    decode_inputs: int = 128
    decode_tokens: int = 64

    def cases(self) -> list[Case]:
        from lmjax.models.t5 import PRESETS

        if self.preset not in PRESETS:
            raise ValueError(f"--preset {self.preset} is none of {', '.join(PRESETS)}")
        shared = {field.name for field in dataclasses.fields(Case)} & vars(self).keys()
        shapes = {name: getattr(self, name) for name in shared}
        return [Case("t5", described(PRESETS[self.preset]), **shapes)]


@dataclasses.dataclass(frozen=True)
class Text(Turns):
    """BERT, GPT-2, BART and XLNet of base size. About 20 minutes on two CPU cores."""

    models: tuple[Literal["bert", "gpt2", "bart", "xlnet"], ...] = tuple(SHAPES)
    """Which models."""
    batch: int | None = None
    """Rows of a batch; unless given, 8 for BERT and 4 for the others."""
    length: int | None = None
    """Tokens of a row; unless given, 128 for BERT and XLNet and 256 for the others. BART writes a
    quarter of it."""
    layers: int | None = None
    """Layers, if not as many as published."""
    width: int | None = None
    """Width, if not the published one; 64 for each head."""
    decode_tokens: int = 64
    """Tokens that GPT-2 writes after 32 others."""

    def cases(self) -> list[Case]:
        return [self.case(model) for model in self.models]

    def case(self, model: str) -> Case:
        from lmjax.models import bart, bert, gpt2, xlnet

        configs = {
            "bert": bert.BertConfig(),
            "gpt2": gpt2.GPT2Config(),
            "bart": bart.BartConfig(attention_dropout=0.0),
            "xlnet": xlnet.XLNetConfig(),
        }
        config = configs[model]
        if self.layers is not None:
            config = dataclasses.replace(config, layers=self.layers)
            if model == "bart":
                config = dataclasses.replace(config, decoder_layers=self.layers)
        if self.width is not None:
            sizes = {"heads": self.width // 64, "feed_forward": 4 * self.width}
            config = dataclasses.replace(config, width=self.width, **sizes)
        batch, length, targets = SHAPES[model]
        length = self.length or length
        case = Case(
            model, described(config), self.batch or batch, length, targets(length), self.steps
        )
        if model != "gpt2":
            return case
        return dataclasses.replace(
            case, decode_batch=1, decode_inputs=32, decode_tokens=self.decode_tokens
        )


@dataclasses.dataclass(frozen=True)
class DALLE(Turns):
    """DALL-E's transformer, narrow, over the paper's stream of 256 + 1,024 tokens. About twelve
    minutes on two CPU cores, most of them dalle-pytorch's."""

    batch: int = 2
    text_length: int = 256
    grid: int = 32
    """Rows and columns of a picture's tokens."""
    conv_extent: int = 11
    layers: int = 4
    width: int = 128
    heads: int = 2
    samples: int = 2
    """Pictures drawn at once."""
    dvae: str = "runs/dvae-emoji"
    """The workdir of a trained dVAE, to be judged by what it leaves of pictures."""
    dalle: str = "runs/dalle-emoji"
    """The workdir of a DALL-E trained on the codes of that dVAE, to be judged by what it draws."""

    def cases(self) -> list[Case]:
        from lmjax.models.dalle import DALLEConfig

        if self.samples < 1:
            raise ValueError(f"--samples is {self.samples}, not 1 or more")
        for name in ("dvae", "dalle"):
            place = getattr(self, name)
            if place != getattr(DALLE, name) and not is_workdir(place):
                raise ValueError(
                    f"--{name} {place} holds no trained {name}: run `python -m"
                    f" experiments.{name}_train --workdir {place}` first, or leave it out"
                )
        config = DALLEConfig(
            text_vocab=512,
            text_length=self.text_length,
            image_vocab=512,
            grid=self.grid,
            layers=self.layers,
            width=self.width,
            heads=self.heads,
            feed_forward=4 * self.width,
            conv_extent=self.conv_extent,
        )
        return [
            Case(
                "dalle",
                described(config),
                batch=self.batch,
                inputs=config.text_length,
                targets=config.image_length,
                steps=self.steps,
                decode_batch=self.samples,
                decode_inputs=config.text_length,
                decode_tokens=config.image_length,
                kinds=config.kinds,
            )
        ]

    def trained(self) -> dict[str, str]:
        """Figures of what has been trained, or why there are none."""
        if not is_workdir(self.dvae):
            return {"what is trained": f"not judged: there is no dVAE in {self.dvae}"}
        dalle = self.dalle if is_workdir(self.dalle) else None
        try:
            return in_own_process(
                "judging", "experiments.benchmark.trained", dvae=self.dvae, dalle=dalle
            )
        except ValueError as error:
            return {"what is trained": str(error)}


def is_workdir(place: str) -> bool:
    return (Path(place) / "config.json").exists()


def described(config) -> dict:
    return dataclasses.asdict(dataclasses.replace(config, dropout=0.0))


def main() -> None:
    settings = tyro.cli(
        Annotated[T5, tyro.conf.subcommand("t5")]
        | Annotated[Text, tyro.conf.subcommand("text")]
        | Annotated[DALLE, tyro.conf.subcommand("dalle")],
        description=__doc__,
    )
    console = Console()
    cases = settings.cases()
    missing = {name for case in cases for name, here in libraries(case.model).items() if not here}
    for name in sorted(missing):
        console.print(f"{name} is not installed, and left out")
    with Progress(console=console) as progress:
        best = compare(cases, settings.rounds, progress)
    console.print(table(best, cases))
    extras = {}
    if settings.extras:
        system = type(settings).__name__.lower()
        given = {"system": system, "case": dataclasses.asdict(cases[0])}
        extras = in_own_process("lmjax alone", "experiments.benchmark.alone", **given)
        if isinstance(settings, DALLE):
            extras |= settings.trained()
    for name, value in extras.items():
        console.print(f"{name}: {value}")
    if settings.json is not None:
        content = {"settings": dataclasses.asdict(settings), "best": best, "extras": extras}
        settings.json.write_text(json.dumps(content, indent=2, default=str))


if __name__ == "__main__":
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    command_line.run(measure if sys.argv[1:2] == [MEASURE] else main)

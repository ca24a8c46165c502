"""DALL-E's first stage: a discrete VAE that turns pictures into grids of codes and back.

Paper: Ramesh et al. 2021, "Zero-Shot Text-to-Image Generation", sections 2.1 and A.

    python -m experiments.dvae_train
    python -m experiments.dvae_train --data.folder photos --workdir runs/dvae-photos
    python -m experiments.dvae_train --model.nearest --workdir runs/vqvae-emoji
    python -m experiments.dvae_train --preset coco --data.folder ~/coco --workdir /data/dvae-coco
    python -m experiments.dvae_train --preset paper --data.tfds coco_captions --workdir /data/dvae

The first trains `emoji` on 3,792 emoji of 64 x 64 pixels, which become 8 x 8 of 512 codes: about
seven minutes on two slow CPU cores. reconstructions.png in the workdir then shows held-out emoji
beside what is left of them after going through their codes, and codes.png how often each code is
used; TensorBoard has such reconstructions from every evaluation on the way. --model.nearest
makes a VQ-VAE of the same network.

`paper` is the published model with the paper's recipe: 3,000,000 steps of 512 pictures of 256 x 256
pixels; the weight of the KL divergence rises to 6.6 in 5,000 steps, the temperature falls to 1/16
in 150,000 and the rate from 1e-4 to 1.25e-6 in 1,200,000, all along half a cosine; a moving average
of the weights with decay 0.999. `coco` is that model for the 82,783 pictures of MS-COCO 2014, whose
codes the presets of that name of `experiments.dalle_train` take, by a recipe that is ours: 77
epochs, with a temperature that falls in 50,000 steps and a rate that does in 100,000. `emoji`
departs from the paper, as `lmjax.tasks.dvae` and the model say: with minutes instead of weeks,
codes must be kept in use.
"""

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import jax
import numpy as np
from jaxtyping import Int, UInt8
from PIL.Image import Image, fromarray
from rich.console import Console

from lmjax import command_line
from lmjax.data.picture_batches import PictureBatches
from lmjax.data.pictures import PictureData
from lmjax.data.pixels import dvae_crop
from lmjax.evaluation.pictures import as_bytes, in_parts, save_sheet, sheet
from lmjax.models import dvae
from lmjax.models.dvae import DVAE, DVAEConfig, codes_of, usage
from lmjax.pretraining import PictureRun, optimizer_choices, pretrain
from lmjax.tasks.dvae import Autoencoding, GumbelSoftmax, HalfCosine, Nearest, decibels
from lmjax.tasks.task import as_floats
from lmjax.training.execution import ExecutionOptions
from lmjax.training.fit import FitOptions, Watch
from lmjax.training.optimizers import AdamW
from lmjax.training.schedules import Cosine

SHOWN = 10


@dataclasses.dataclass(frozen=True, kw_only=True)
class DVAETrain(PictureRun):
    model_type = "dvae"

    model: DVAEConfig
    beta: HalfCosine = HalfCosine(0, 6.6, 5_000)
    """Weight of the KL divergence of each place's codes from the uniform distribution."""
    temperature: HalfCosine = HalfCosine(1, 1 / 16, 150_000)
    """Of the Gumbel-softmax."""
    balance: HalfCosine = HalfCosine(0, 0, 1)
    """Weight of the divergence of the codes' use over pictures; not in the paper."""
    commitment: float = 0.25
    """Of a VQ-VAE (--model.nearest): what keeps the encoder's vectors near the codes'."""

    def __post_init__(self):
        super().__post_init__()
        if not self.model.nearest:
            if self.commitment != DVAETrain.commitment and self.init is None:
                raise ValueError(
                    f"--commitment is {self.commitment}, but only a VQ-VAE has that: add"
                    " --model.nearest, or leave it out"
                )
            return
        mine, *presets = (
            (run.beta, run.temperature, run.balance) for run in (self, *PRESETS.values())
        )
        if mine not in presets:
            raise ValueError(
                "--beta, --temperature and --balance are the Gumbel-softmax's, and --model.nearest"
                " makes a VQ-VAE, which has none: drop them, or --model.nearest"
            )

    def task(self, devices: Sequence[jax.Device] | None = None) -> Autoencoding:
        model = DVAE(self.model, self.execution.resolve(devices))
        if self.model.nearest:
            return Nearest(model, self.commitment)
        balanced = self.balance.start > 0 or self.balance.end > 0
        return GumbelSoftmax(model, self.beta, self.temperature, self.balance if balanced else None)

    def rows(self) -> dict[str, int]:
        return {"pictures": self.model.size}

    def read(self, start, share) -> PictureBatches:
        return self.read_pictures(start, share, dvae_crop, self.model.size)


EMOJI = DVAETrain(
    model=dvae.PRESETS["emoji"],
    beta=HalfCosine(0, 0, 1),
    temperature=HalfCosine(1, 1 / 8, 6_600),
    balance=HalfCosine(25, 8, 5_300),
    data=PictureData(augment=False),
    optimizer=AdamW(Cosine(1.4e-3, horizon=8_000, warmup=50), weight_decay=0.1),
    average=0.998,
    batch=8,
    eval_batches=21,  # all 161
    steps=8_000,
    workdir=Path("runs/dvae-emoji"),
    fit=FitOptions(log_every=20, eval_every=1_000, checkpoint_every=1_000),
)
PAPER = DVAETrain(
    model=dvae.PRESETS["openai"],
    data=PictureData(),
    optimizer=AdamW(
        Cosine(1e-4, horizon=1_200_000, final_fraction=0.0125),
        gradient_clip=None,
        epsilon=1e-8,
        weight_decay=1e-4,
    ),
    average=0.999,
    batch=512,
    steps=3_000_000,
    workdir=Path("runs/dvae-paper"),
    execution=ExecutionOptions(remat="full"),
    fit=FitOptions(log_every=100, eval_every=10_000, checkpoint_every=10_000),
)
COCO = dataclasses.replace(
    PAPER,
    temperature=HalfCosine(1, 1 / 16, 50_000),
    optimizer=dataclasses.replace(
        PAPER.optimizer, schedule=Cosine(1e-4, horizon=100_000, final_fraction=0.0125)
    ),
    batch=64,
    steps=100_000,
    workdir=Path("runs/dvae-coco"),
    fit=FitOptions(log_every=100, eval_every=2_500, checkpoint_every=2_500),
)
PRESETS = {"emoji": EMOJI, "paper": PAPER, "coco": COCO}
DEFAULT = "emoji"
CHOICES = optimizer_choices()


def main() -> None:
    settings = command_line.parse(PRESETS, DEFAULT, __doc__, CHOICES)
    pretrain(settings, PRESETS, "dvae_train", show_reconstructions, watch_reconstructions)


def watch_reconstructions(settings: DVAETrain, model: DVAE, data: PictureBatches) -> Watch:
    """What makes a sheet of held-out pictures and what their codes give back."""
    del settings
    rebuild, batch = through_codes(model), data.evaluation[0]
    pictures = batch["pictures"][batch["loss_weights"] > 0][:SHOWN]

    def watch(params):
        _, again = rebuild(params, pictures)
        return {"reconstructions": beside(pictures, again)}

    return watch


def show_reconstructions(
    settings: DVAETrain, model: DVAE, params, data: PictureBatches, console: Console
) -> None:
    """Draws held-out pictures beside their reconstructions, and the use of the codes."""
    found = rebuilt(model, params, data)
    sheets = {
        "reconstructions": beside(found.pictures, found.again),
        "codes": use_chart(np.bincount(found.codes.reshape(-1), minlength=settings.model.codes)),
    }
    for name, image in sheets.items():
        save_sheet(image, settings.workdir, name, settings.steps)
    console.print(
        f"held-out pictures after going through their codes: {found.figures(settings.model)}"
        f"\nlook at {settings.workdir / 'reconstructions.png'} and codes.png"
    )


class Rebuilt(NamedTuple):
    """What is left of pictures after going through their codes."""

    pictures: UInt8[np.ndarray, "N R R 3"]
    again: UInt8[np.ndarray, "N R R 3"]
    codes: Int[np.ndarray, "N H W"]

    def figures(self, config: DVAEConfig) -> str:
        """In words, how much is left and how evenly codes are used."""
        errors = ((self.pictures / 255 - self.again / 255) ** 2).mean((1, 2, 3))
        used, perplexity = usage(self.codes, config)
        return (
            f"{decibels(errors).mean():.2f} dB; {used} of {config.codes} codes are in use, as"
            f" evenly as {perplexity:.0f}"
        )


def rebuilt(model: DVAE, params, data: PictureBatches) -> Rebuilt:
    """All pictures that evaluation looks at."""
    rebuild, parts = through_codes(model), []
    for batch in data.evaluation:
        pictures = batch["pictures"][batch["loss_weights"] > 0]
        codes, again = in_parts(lambda some: rebuild(params, some), pictures)
        parts.append((pictures, again, codes))
    return Rebuilt(*(np.concatenate(part) for part in zip(*parts, strict=True)))


def through_codes(model: DVAE):
    """(parameters, pictures) -> (their codes, what is left of them), in bytes as they came."""

    @jax.jit
    def rebuild(params, pictures):
        codes = codes_of(model.apply({"params": params}, as_floats(pictures), method="encode"))
        return codes, model.apply({"params": params}, codes, method="decode").picture()

    def in_bytes(params, pictures):
        codes, rebuilt = rebuild(params, pictures)
        return np.asarray(codes), as_bytes(rebuilt)

    return in_bytes


def beside(pictures: np.ndarray, again: np.ndarray) -> Image:
    """A sheet of some pictures, with what their codes give back below them."""
    some = slice(0, None, max(1, len(pictures) // SHOWN))
    rows = [("pictures", pictures[some][:SHOWN]), ("from codes", again[some][:SHOWN])]
    return sheet(rows)


def use_chart(counts: np.ndarray) -> Image:
    """How often each code occurs, the most frequent first."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg  # slow to import
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 3), dpi=120)
    canvas = FigureCanvasAgg(figure)
    axes = figure.add_subplot(xlabel="codes, the most frequent first", ylabel="share of places")
    axes.bar(np.arange(len(counts)), np.sort(counts)[::-1] / counts.sum(), width=1.0)
    axes.axhline(1 / len(counts), color="black", linewidth=0.8, linestyle="--")
    figure.tight_layout()
    canvas.draw()
    return fromarray(np.asarray(canvas.buffer_rgba())).convert("RGB")


if __name__ == "__main__":
    command_line.run(main)

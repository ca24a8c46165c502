"""DALL-E's third stage: a CLIP that says how well pictures and captions belong together.

Paper: Radford et al. 2021, "Learning Transferable Visual Models From Natural Language Supervision",
section 2; Ramesh et al. 2021, section 2.6, for ranking DALL-E's pictures with it.

    python -m experiments.clip_train
    python -m experiments.clip_train --data.language ko --workdir runs/clip-korean
    python -m experiments.clip_train --preset coco --data.folder ~/coco
        --data.captions ~/coco/MSCOCO_train_val_Korean.json --workdir runs/clip-coco
    python -m experiments.clip_train --init openai/clip-vit-base-patch32 --data.dropout 0
        --optimizer.schedule.peak 1e-5 --data.folder photos --workdir runs/clip-photos

The first trains `emoji` on 3,792 emoji and their names in English and Korean: about five minutes on
two CPU cores. Then it finds the pictures of held-out names: matches.png in the workdir has names
beside the pictures that it thinks belong to them, the likeliest first.

`vit-b-32` is the published model: 32 epochs of 400 million pairs in batches of 32,768, Adam with
decay 0.2, a rate of 5e-4 along a cosine. The published numbers come from that many pairs. (With a
tokenizer trained here, add --model.end 2.) `coco` is the same model for MS-COCO 2014, with captions
in English, Korean or both: 30 epochs, by a recipe that is ours; better is what starts from the
published parameters, as above.
"""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from PIL.Image import Image
from rich.console import Console

from lmjax import command_line
from lmjax.data.captions import CaptionedPictureData
from lmjax.data.picture_batches import PictureBatches
from lmjax.data.pixels import transformer_crop
from lmjax.evaluation.pictures import save_sheet, sheet
from lmjax.models import clip
from lmjax.models.clip import CLIP, CLIPConfig
from lmjax.pretraining import PictureRun, optimizer_choices, pretrain
from lmjax.tasks.contrastive import Contrastive
from lmjax.tasks.task import as_floats
from lmjax.training.execution import ExecutionOptions
from lmjax.training.fit import FitOptions, Watch
from lmjax.training.optimizers import AdamW
from lmjax.training.schedules import Cosine

SHOWN, BEST = 10, 6
JUDGED = 1_000
"""Held-out pairs, at most, that are compared with each other at once."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class CLIPTrain(PictureRun):
    model_type = "clip"

    model: CLIPConfig
    data: CaptionedPictureData

    def task(self, devices: Sequence[jax.Device] | None = None) -> Contrastive:
        return Contrastive(CLIP(self.model, self.execution.resolve(devices)))

    def rows(self) -> dict[str, int]:
        return {"pictures": self.model.size, "captions": self.model.positions}

    def read(self, start, share) -> PictureBatches:
        """Raises ValueError where the tokenizer ends texts with another token than the model's, or
        there are fewer pictures than stand in a batch."""
        data = self.read_pictures(
            start,
            share,
            transformer_crop,
            self.model.size,
            caption_length=self.model.positions,
            ends=True,
            rows=("--model.vocab", self.model.vocab),
        )
        end = self.model.vocab - 1 if self.model.end is None else self.model.end
        if data.tokenizer.eos_id != end:
            raise ValueError(
                f"the tokenizer ends texts with {data.tokenizer.eos_id} and the model looks for"
                f" {end}: set --model.end {data.tokenizer.eos_id}"
            )
        if (pictures := len(data.batches.rows)) < self.batch:
            raise ValueError(
                f"--batch is {self.batch} and there are {pictures} pictures to train on: choose"
                f" {pictures} or fewer, for a pair that stands twice in a batch is told apart from"
                " itself"
            )
        return data


EMOJI = CLIPTrain(
    model=dataclasses.replace(clip.PRESETS["emoji"], end=2),  # the </s> of tokenizers trained here
    data=CaptionedPictureData(vocab_size=2_048),
    optimizer=AdamW(Cosine(1e-3, horizon=600, warmup=50), beta2=0.98, weight_decay=0.1),
    batch=128,
    steps=600,
    workdir=Path("runs/clip-emoji"),
    fit=FitOptions(log_every=1, eval_every=100, checkpoint_every=100),
)
PUBLISHED = CLIPTrain(
    model=clip.PRESETS["vit-b-32"],
    data=CaptionedPictureData(language="en", vocab_size=49_408, dropout=0.0),
    optimizer=AdamW(
        Cosine(5e-4, horizon=390_625, warmup=2_000, final_fraction=0.0),
        gradient_clip=None,
        beta2=0.98,
        weight_decay=0.2,
    ),
    batch=32_768,
    steps=390_625,  # 32 epochs of 400 million pairs
    workdir=Path("runs/clip-vit-b-32"),
    execution=ExecutionOptions(remat="full"),
    fit=FitOptions(log_every=50, eval_every=1_000, checkpoint_every=1_000),
)
COCO = dataclasses.replace(
    PUBLISHED,
    model=dataclasses.replace(PUBLISHED.model, vocab=16_384, end=EMOJI.model.end),
    data=CaptionedPictureData(),
    optimizer=dataclasses.replace(
        PUBLISHED.optimizer,
        schedule=Cosine(5e-4, horizon=2_400, warmup=200, final_fraction=0.0),
    ),
    batch=1_024,
    steps=2_400,
    workdir=Path("runs/clip-coco"),
    fit=FitOptions(log_every=10, eval_every=200, checkpoint_every=200),
)
PRESETS = {"emoji": EMOJI, "vit-b-32": PUBLISHED, "coco": COCO}
DEFAULT = "emoji"
CHOICES = optimizer_choices()


def main() -> None:
    settings = command_line.parse(PRESETS, DEFAULT, __doc__, CHOICES)
    pretrain(settings, PRESETS, "clip_train", show_matches, watch_matches)


def watch_matches(settings: CLIPTrain, model: CLIP, data: PictureBatches) -> Watch:
    """What makes a sheet of held-out captions and their matches."""
    del settings
    prepared = functools.cache(lambda: matcher(model, data))
    return lambda params: {"matches": prepared()(params)[1]}


def show_matches(
    settings: CLIPTrain, model: CLIP, params, data: PictureBatches, console: Console
) -> None:
    """Draws held-out captions beside the held-out pictures that fit them best."""
    found, image = matcher(model, data)(params)
    path = save_sheet(image, settings.workdir, "matches", settings.steps)
    console.print(
        f"of {len(found)} held-out pictures, the one of a name is the first in"
        f" {found[:, 0].mean():.0%} of cases and among the first five in"
        f" {found[:, :5].any(1).mean():.0%} (chance: {1 / len(found):.1%})\nlook at {path}"
    )


def matcher(model: CLIP, data: PictureBatches) -> Callable[[Any], tuple[np.ndarray, Image]]:
    """From parameters to what they find for held-out captions, the first `JUDGED` of them.

    That is: bool [captions, places], whether a caption's own picture has this place among all of
    them; and a sheet of some captions and their first pictures.
    """
    logits = jax.jit(lambda params, p, t: model.apply({"params": params}, as_floats(p), t))
    pictures, captions = (
        np.concatenate(
            [batch[name][batch["loss_weights"] > 0][:JUDGED] for batch in data.evaluation]
        )[:JUDGED]
        for name in ("pictures", "captions")
    )

    def match(params):
        ranks = np.asarray(logits(params, pictures, captions)).argsort(0)[::-1].T
        rows = [
            (text_of(data.tokenizer, captions[i]), [pictures[i], *pictures[ranks[i, :BEST]]])
            for i in range(0, len(captions), max(1, len(captions) // SHOWN))
        ][:SHOWN]
        found = ranks == np.arange(len(ranks))[:, None]
        return found, sheet(rows, ["its own", *map(str, range(1, BEST + 1))])

    return match


def text_of(tokenizer, ids: np.ndarray) -> str:
    return tokenizer.decode(ids[1:]).strip()


if __name__ == "__main__":
    command_line.run(main)

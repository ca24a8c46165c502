"""DALL-E's second stage: a transformer that continues a caption with the codes of a picture.

Paper: Ramesh et al. 2021, "Zero-Shot Text-to-Image Generation", sections 2.2 and B.

    python -m experiments.dvae_train && python -m experiments.dalle_train
    python -m experiments.dalle_train --data.language ko --workdir runs/dalle-korean
    python -m experiments.dalle_train --preset korean-coco --dvae /data/dvae-coco
        --data.folder ~/coco --data.captions ~/coco/MSCOCO_train_val_Korean.json
    python -m experiments.plan dalle_train --preset paper --topology v4:8x8x16

The first trains `emoji` on 3,792 emoji with their names in English and Korean, as codes of the dVAE
in --dvae, which are made once and kept: about eleven minutes on two slow CPU cores. A fifth of the
codes before one is read wrong (--corruption), without which it takes twice as many steps to draw
what the caption says; the paper, with millions of pictures, has nothing of the kind. Then it draws:
samples.png in the workdir has captions beside their pictures, and for 64 captions of each language,
each drawn once, it says how often the drawing is nearer to its own original than to the 63 others:
62 % and 69 % (88 % and 98 % after an hour of --model.layers 6 --model.width 128 --model.heads 4
--model.feed-forward 512 --batch 64 --steps 9000 --optimizer.schedule.horizon 9000
--optimizer.schedule.final-fraction 0.1). TensorBoard has drawings from every evaluation on the way,
unless several processes train.

`paper` is the 12-billion-parameter model with the paper's recipe: 430,000 steps of 1,024 pictures
of 32 x 32 codes, AdamW with betas 0.9 and 0.96 and decay 0.045, clipping at 4, a rate of 4.5e-4
after 5,000 steps (which the paper halved five times when the loss stood still; here a run keeps its
rate, and --init begins another with the averaged weights, and Adam anew), a moving average of the
weights with decay 0.99 every 25 steps; the paper's PowerSGD is --strategy fsdp --mesh.fsdp 8
--compress 896. `coco` and `korean-coco` are models of a 120th of its size for MS-COCO 2014; the
recipe is ours.

Codes are made once and kept: of the middle of each picture, or of --crops random parts (Listing 2),
of which each step takes one. The paper makes them anew each time, 1.8 times of each picture.
"""

import contextlib
import dataclasses
import functools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from rich.console import Console

import lmjax
from lmjax import command_line
from lmjax.data.captions import CaptionedPictureData, CaptionEncoder, in_language
from lmjax.data.code_store import CodeStore, build_code_store
from lmjax.data.picture_batches import PictureBatches
from lmjax.data.pictures import Pictures, open_pictures
from lmjax.data.pixels import UnreadablePicture, middle_crop, read_picture
from lmjax.decoding.pictures import draw
from lmjax.decoding.sampling import Sampling
from lmjax.evaluation.pictures import AT_ONCE, as_bytes, nearest, save_sheet, sheet
from lmjax.interop.safetensors import CONFIG, read_json
from lmjax.loading import describe, fingerprint
from lmjax.models import dalle
from lmjax.models.dalle import DALLE, DALLEConfig
from lmjax.models.dvae import codes_of
from lmjax.pretraining import PictureRun, optimizer_choices, pretrain
from lmjax.tasks.gradient_scaling import GradientScaling
from lmjax.tasks.task import as_floats
from lmjax.tasks.text_to_image import TextToImage
from lmjax.training.execution import ExecutionOptions
from lmjax.training.fit import FitOptions, Watch
from lmjax.training.optimizers import AdamW
from lmjax.training.schedules import Constant, Cosine

JUDGED = 64
"""Captions of each language that are drawn once, to see whether they can be told apart."""
SHOWN, SAMPLES = 5, 8
COLUMNS = ["original", *map(str, range(1, SAMPLES + 1))]
WATCHED = 3
"""Captions of each language that are drawn after each evaluation, for TensorBoard."""
SAMPLING = Sampling(temperature=0.9, top_p=0.95)


@dataclasses.dataclass(frozen=True, kw_only=True)
class DALLETrain(PictureRun):
    model_type = "dalle"

    model: DALLEConfig
    data: CaptionedPictureData
    dvae: str = "runs/dvae-emoji"
    """The workdir of a dVAE (`experiments.dvae_train`), whose codes the pictures become."""
    crops: int | None = None
    """Make codes of so many random parts of each picture, as the paper's Listing 2 crops them, for
    training to choose from. By default of its middle."""
    text_weight: float = 1 / 8
    """Of the text in the loss; the image has the rest."""
    corruption: float = 0.0
    """Share of the image's codes that the model reads wrong in training; not in the paper."""
    gradient_scaling: int | None = None
    """N, for --execution.dtype float16: scale the gradients of each residual branch, from N x 8,192
    on and within N x 128 and N x 16,777,216. N is the number of GPUs in the paper. Needs
    --fit.nonfinite skip and --fit.max-skips 1500: a scale is found by overflowing."""

    def __post_init__(self):
        super().__post_init__()
        if self.data.augment:
            raise ValueError(
                "--data.augment is for training the dVAE or CLIP: DALL-E's codes are made once, so"
                " leave it out (--data.no-augment), and choose --crops for those of random parts"
            )
        if self.crops is not None and self.crops < 1:
            raise ValueError(f"--crops is {self.crops}, not 1 or more")
        if self.gradient_scaling is None:
            return
        if self.gradient_scaling < 1:
            raise ValueError(f"--gradient-scaling is {self.gradient_scaling}, not 1 or more")
        if self.execution.dtype != "float16":
            raise ValueError(
                f"--gradient-scaling is for float16, and --execution.dtype is"
                f" {self.execution.dtype}: add --execution.dtype float16, or leave it out"
            )
        skips = GradientScaling(self.gradient_scaling).longest_fall
        if self.fit.nonfinite != "skip" or self.fit.max_skips < skips:
            raise ValueError(
                "--gradient-scaling finds its scales by overflowing: add --fit.nonfinite skip"
                f" --fit.max-skips {skips}, so that such steps are left out"
            )

    @property
    def keeps_small_gradients(self) -> bool:
        return self.gradient_scaling is not None

    def task(self, devices: Sequence[jax.Device] | None = None) -> TextToImage:
        model = DALLE(self.model, self.execution.resolve(devices))
        replicas = self.gradient_scaling
        scaling = None if replicas is None else GradientScaling(replicas)
        return TextToImage(model, self.text_weight, self.corruption, scaling)

    @property
    def languages(self) -> list[str]:
        return [name for name in ("en", "ko") if self.data.language in (name, "both")]

    def rows(self) -> dict[str, int]:
        return {"image_tokens": self.model.image_length, "captions": self.model.text_length}

    def read(self, start, share) -> PictureBatches:
        """Raises ValueError where the dVAE is not there or does not fit the model."""
        size, encode, sha256 = encoder(self)
        data = self.read_pictures(
            start,
            share,
            middle_crop,
            size,
            caption_length=self.model.text_length,
            rows=("--model.text-vocab", self.model.text_vocab),
            encode=encode,
        )
        return data._replace(identity={**data.identity, "dvae": sha256})


def encoder(settings: DALLETrain):
    """(pixels a side, what makes a `CodeStore` of each split's pictures, the SHA-256 of the dVAE).

    Raises:
        ValueError: there is no dVAE, or one with other codes or another grid than the model's.
    """
    model, params = trained_dvae(settings.dvae, settings.model)
    sha256, size = fingerprint(params), model.config.size

    @jax.jit
    def codes(pictures):
        logits = model.apply({"params": params}, as_floats(pictures), method="encode")
        return codes_of(logits).reshape(len(pictures), -1)

    def encode(pictures: Pictures, crops: int | None = None) -> CodeStore:
        return build_code_store(
            pictures, codes, sha256, size, crops=crops, unusable=settings.data.unusable
        )

    train = functools.partial(encode, crops=settings.crops)
    return size, {"train": train, "validation": encode}, sha256


def trained_dvae(workdir: str, model: DALLEConfig):
    """(model, parameters) of the dVAE that a DALL-E draws with; raises as `encoder` does."""
    expected = model.image_vocab, model.grid
    if not (Path(workdir).expanduser() / CONFIG).exists():
        raise ValueError(
            f"--dvae {workdir} holds no trained dVAE: give the workdir of one with {expected[0]}"
            f" codes on a grid of {expected[1]}, as `python -m experiments.dvae_train` makes it"
        )
    described = describe(workdir)
    if described.model_type != "dvae":
        raise ValueError(
            f"--dvae {workdir} holds a {described.model_type}, not a dvae: give the workdir of a"
            " run of `python -m experiments.dvae_train`"
        )
    found = described.config.codes, described.config.grid
    if found != expected:
        raise ValueError(
            f"the dVAE in {workdir} has {found[0]} codes on a grid of {found[1]}, and the model"
            f" {expected[0]} on {expected[1]}: give the --dvae that belongs to it or, of a new"
            " model, choose --model.image-vocab and --model.grid as this dVAE has them"
        )
    return lmjax.load(workdir)[:2]


EMOJI = DALLETrain(
    model=dalle.PRESETS["emoji"],
    data=CaptionedPictureData(vocab_size=2_048, augment=False),
    corruption=0.2,
    optimizer=AdamW(
        Cosine(2e-3, horizon=1_700, warmup=100, final_fraction=0.0), beta2=0.98, weight_decay=0.01
    ),
    batch=32,
    steps=1_700,
    workdir=Path("runs/dalle-emoji"),
    execution=ExecutionOptions(remat="none", attention="whole"),  # the fastest for so small a one
    fit=FitOptions(log_every=1, eval_every=850, checkpoint_every=425),
)
PAPER = DALLETrain(
    model=dalle.PRESETS["12b"],
    data=CaptionedPictureData(augment=False),
    dvae="runs/dvae-paper",
    crops=2,  # 430,000 batches of 1,024 are 1.8 times 250 million pictures
    optimizer=AdamW(
        Constant(4.5e-4, warmup=5_000),
        gradient_clip=4.0,
        variance_clip=5.0,
        beta2=0.96,
        epsilon=1e-8,
        weight_decay=4.5e-2,
    ),
    average=0.99,
    average_every=25,
    batch=1_024,
    steps=430_000,
    workdir=Path("runs/dalle-paper"),
    execution=ExecutionOptions(remat="full"),
    fit=FitOptions(log_every=100, eval_every=5_000, checkpoint_every=5_000),
)


def coco(preset: str, language: str) -> DALLETrain:
    """For MS-COCO 2014: 82,783 pictures with five captions each; about 60 epochs."""
    return dataclasses.replace(
        PAPER,
        model=dalle.PRESETS[preset],
        data=CaptionedPictureData(language=language, augment=False),
        dvae="runs/dvae-coco",
        crops=4,
        optimizer=dataclasses.replace(
            PAPER.optimizer, schedule=Cosine(4.5e-4, horizon=20_000, warmup=1_000)
        ),
        average=None,
        batch=256,
        steps=20_000,
        workdir=Path("runs") / f"dalle-{preset}",
        execution=ExecutionOptions(remat="matmuls"),
        fit=FitOptions(log_every=50, eval_every=1_000, checkpoint_every=1_000),
    )


PRESETS = {
    "emoji": EMOJI,
    "paper": PAPER,
    "coco": coco("coco", "en"),
    "korean-coco": coco("korean-coco", "ko"),
}
DEFAULT = "emoji"
CHOICES = optimizer_choices()


def main() -> None:
    settings = command_line.parse(PRESETS, DEFAULT, __doc__, CHOICES)
    pretrain(settings, PRESETS, "dalle_train", show_drawings, watch_drawings)


def watch_drawings(settings: DALLETrain, model: DALLE, data: PictureBatches) -> Watch:
    """What makes a small sheet of drawings."""

    @functools.cache
    def prepared():
        return Easel(settings, model, data.tokenizer), open_pictures(settings.data)["train"]

    def watch(params):
        easel, pictures = prepared()
        rows = sample_rows(easel, params, pictures, settings.languages, WATCHED)
        return {"samples": sheet(rows, COLUMNS)} if rows else {}

    return watch


def show_drawings(
    settings: DALLETrain, model: DALLE, params, data: PictureBatches, console: Console
) -> None:
    """Draws captions of training and held-out pictures, and says how well they are told apart."""
    easel, splits = Easel(settings, model, data.tokenizer), open_pictures(settings.data)
    rows = []
    for split, about in (("train", ""), ("validation", " (held out)")):
        drawn = sample_rows(easel, params, splits[split], settings.languages, SHOWN)
        rows += [(caption + about, pictures) for caption, pictures in drawn]
    path = save_sheet(sheet(rows, COLUMNS), settings.workdir, "samples", settings.steps)
    for split, about in (("train", "captions it was trained on"), ("validation", "held-out ones")):
        for language in settings.languages:
            count, right = told_apart(easel, params, splits[split], language)
            if count:
                console.print(
                    f"{count} {about}, {language}: the drawing is nearest to its own original in"
                    f" {right:.0%} of cases (chance: {1 / count:.1%})"
                )
    console.print(f"look at {path}")


def told_apart(easel: "Easel", params, pictures: Pictures, language: str) -> tuple[int, float]:
    """(number of captions drawn once each, the share nearer to their own original than to others').

    As many as `JUDGED`, the same ones each time; 0 where no picture has a caption in the language.
    """
    some = captioned(easel, pictures, language, JUDGED, seed=0)
    if not some:
        return 0, 0.0
    captions, originals = zip(*some, strict=True)
    drawn = easel.draw(params, captions)[:, 0]
    right = nearest(drawn, np.stack(originals)) == np.arange(len(some))
    return len(some), float(right.mean())


def sample_rows(
    easel: "Easel", params, pictures: Pictures, languages: Sequence[str], count: int
) -> list[tuple[str, list[np.ndarray]]]:
    """(a caption, its original and drawings of it): `count` for each language that has some."""
    some = [pair for name in languages for pair in captioned(easel, pictures, name, count, seed=1)]
    if not some:
        return []
    drawn = easel.draw(params, [caption for caption, _ in some], samples=SAMPLES)
    return [
        (caption, [original, *samples])
        for (caption, original), samples in zip(some, drawn, strict=True)
    ]


def captioned(
    easel: "Easel", pictures: Pictures, language: str, count: int, seed: int
) -> list[tuple[str, np.ndarray]]:
    """(a caption, its picture) for some that have one in this language and can be read; training
    has left the others out, or refused them."""
    having = [i for i, all in enumerate(pictures.captions) if in_language(all, language)]
    found = []
    for index in np.random.default_rng(seed).permutation(having).astype(int):
        if len(found) == count:
            break
        with contextlib.suppress(UnreadablePicture):
            picture = easel.read(pictures.file(index))
            found.append((pictures.captions[index][language][0], picture))
    return found


def trained_on(workdir: str | Path) -> dict[str, str]:
    """What a run has recorded of its data: content hashes, and the captions' language."""
    return recorded(workdir)["data"]


def recorded(workdir: str | Path) -> dict[str, Any]:
    """What a run is: its settings and its data."""
    return read_json(Path(workdir).expanduser() / CONFIG)["identity"]


class Easel:
    """Draws pictures of captions with a transformer and the dVAE that it is trained with."""

    def __init__(self, settings: DALLETrain, model: DALLE, tokenizer):
        self._dvae, self._dvae_params = trained_dvae(settings.dvae, model.config)
        self._place = settings.dvae
        self._model, self._seed = model, settings.seed
        length = model.config.text_length
        self._encode = CaptionEncoder(tokenizer, length, truncate=settings.data.truncate).encode
        self._decode = jax.jit(
            lambda codes: self._dvae.apply(
                {"params": self._dvae_params}, codes, method="decode"
            ).picture()
        )

    def draw(
        self,
        params,
        captions: Sequence[str],
        samples: int = 1,
        sampling: Sampling = SAMPLING,
        top: np.ndarray | None = None,
    ) -> np.ndarray:
        """uint8 [captions, samples, R, R, 3]. `top` has the first codes of every caption's."""
        ids = [self._encode(caption) for caption in captions]
        lengths = np.array([len(one) for one in ids])
        padded = np.zeros((len(ids), self._model.config.text_length), np.int32)
        for row, one in zip(padded, ids, strict=True):
            row[: len(one)] = one
        key, drawn = jax.random.key(self._seed), []
        together = min(samples, AT_ONCE)  # of one caption, which is read once for these
        for start in range(0, len(ids), AT_ONCE // together):
            some = slice(start, start + AT_ONCE // together)
            parts = []
            for first in range(0, samples, together):
                key, now = jax.random.split(key)
                found = draw(
                    self._model,
                    params,
                    padded[some],
                    lengths=lengths[some],
                    samples=min(together, samples - first),
                    top=None if top is None else top[some],
                    sampling=sampling,
                    key=now,
                )
                parts.append(self._pictures(found.codes))
            drawn.append(np.concatenate(parts, axis=1))
        return np.concatenate(drawn)

    def check(self, workdir: str | Path) -> None:
        """Raises ValueError if the DALL-E in `workdir` was trained on the codes of another dVAE."""
        trained_with = trained_on(workdir)["dvae"]
        found = fingerprint(self._dvae_params)
        if found != trained_with:
            raise ValueError(
                f"--dvae {self._place} is not the one that {workdir} was trained with (of SHA-256"
                f" {trained_with[:12]}, and it has {found[:12]}): give the workdir of that one"
            )

    def codes(self, picture: np.ndarray) -> np.ndarray:
        """[grid x grid] of one picture, uint8 [R, R, 3]."""
        logits = self._dvae.apply(
            {"params": self._dvae_params}, as_floats(picture[None]), method="encode"
        )
        return np.asarray(codes_of(logits)).reshape(-1)

    def read(self, file: Path | bytes) -> np.ndarray:
        """uint8 [R, R, 3]: the middle of a picture."""
        size = self._dvae.config.size
        return middle_crop(read_picture(file, size), size)

    def _pictures(self, codes):
        """uint8 [captions, samples, R, R, 3], of codes [captions, samples, grid x grid]."""
        grid = self._model.config.grid
        pictures = as_bytes(self._decode(codes.reshape(-1, grid, grid)))
        return pictures.reshape(*codes.shape[:2], *pictures.shape[1:])


if __name__ == "__main__":
    command_line.run(main)

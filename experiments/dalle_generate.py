"""Draws pictures of captions with a trained DALL-E, and ranks them with a CLIP.

    python -m experiments.dalle_generate "avocado" "아보카도" "red heart" "빨간색 하트"
    python -m experiments.dalle_generate --samples 32 --rerank clip
        "a chair in the shape of an avocado"
    python -m experiments.dalle_generate --complete avocado.png --rows 4 "avocado"

Each caption becomes a row of drawings.png (--output), which the DALL-E's TensorBoard has too.
--rerank clip draws --samples pictures and shows the --shown best of them, as the CLIP in --clip
(`experiments.clip_train`) ranks them; without it the first ones are shown. --complete gives the
uppermost --rows rows of codes, to be completed. The DALL-E is that of `experiments.dalle_train`,
with the dVAE that it was trained with. Pictures keep their size, or a multiple of it.
"""

import dataclasses
import io
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
import tyro
from PIL.Image import registered_extensions
from rich.console import Console

import lmjax
from experiments import dalle_train
from experiments.dalle_train import SAMPLING, DALLETrain, Easel, recorded
from lmjax import command_line
from lmjax.data.cache import atomic_write
from lmjax.data.captions import CaptionEncoder
from lmjax.data.pictures import SUFFIXES
from lmjax.data.pixels import UnreadablePicture, read_picture
from lmjax.decoding.sampling import Sampling
from lmjax.evaluation.pictures import in_parts, log_sheet, sheet
from lmjax.loading import describe
from lmjax.models.clip import CLIP
from lmjax.tasks.task import as_floats
from lmjax.training.checkpoints import latest_step


@dataclasses.dataclass(frozen=True)
class DALLEGenerate:
    captions: tyro.conf.Positional[tuple[str, ...]]
    """One or more captions, English or Korean; quote each."""
    checkpoint: str = "runs/dalle-emoji"
    """The workdir of `experiments.dalle_train`."""
    dvae: str | None = None
    """The workdir of the dVAE that it was trained with, if that is not where it was then."""
    samples: int = 8
    """Pictures to draw of each caption."""
    shown: int = 8
    """Of these, how many to show."""
    rerank: Literal["none", "clip"] = "none"
    """Show the pictures that fit their caption best, in the opinion of a CLIP."""
    clip: str = "runs/clip-emoji"
    """The workdir of that CLIP, or a Hugging Face directory or repository."""
    temperature: float = SAMPLING.temperature
    """1: draw from the model's distribution. Less is tamer, 0 takes the likeliest codes."""
    top_k: int | None = None
    """Draw among so many likeliest codes only."""
    top_p: float = SAMPLING.top_p
    """Draw among the fewest codes that together have this probability."""
    complete: Path | None = None
    """A picture whose upper part is given."""
    rows: int | None = None
    """With --complete: how many rows of codes are given; by default half of them."""
    seed: int = 0
    """Of the draws."""
    truncate: bool = False
    """Cut captions that are longer than the model reads, which are else an error."""
    output: Path = Path("drawings.png")
    """Where the pictures go: a .png, .jpg or other file of pictures."""

    def __post_init__(self):
        if not self.captions or not all(caption.strip() for caption in self.captions):
            raise ValueError("give at least one caption, in quotes, and none without words")
        if self.samples < 1 or self.shown < 1:
            raise ValueError(f"samples ({self.samples}) and shown ({self.shown}) start at 1")
        if self.rows is not None and self.complete is None:
            raise ValueError("--rows says how much of --complete is given: name a picture there")
        if self.output.suffix.lower() not in SUFFIXES:
            raise ValueError(
                f"--output {self.output} does not end as a file of pictures does: name it with one"
                f" of {', '.join(sorted(SUFFIXES))}"
            )


def main() -> None:
    settings = tyro.cli(DALLEGenerate, description=__doc__)
    sampling = Sampling(settings.temperature, settings.top_k, settings.top_p)
    check_picture(settings.complete)
    model, params, tokenizer = trained("checkpoint", settings.checkpoint, "dalle")
    rank = None
    if settings.rerank == "clip":
        rank = ranker(*trained("clip", settings.clip, "clip"), settings.captions, settings.truncate)
    easel = Easel(drawn_with(settings), model, tokenizer)
    easel.check(settings.checkpoint)
    top = None
    if settings.complete is not None:
        top = given_rows(settings, easel, model.config.grid)
    settings.output.parent.mkdir(parents=True, exist_ok=True)
    console = Console(highlight=False, soft_wrap=True, markup=False)
    with console.status(f"drawing {settings.samples * len(settings.captions):,} pictures"):
        drawn = easel.draw(params, settings.captions, settings.samples, sampling, top)
    rows = []
    for caption, pictures in zip(settings.captions, drawn, strict=True):
        if rank is not None:
            scores = rank(caption, pictures)
            pictures = pictures[scores.argsort()[::-1]]
            console.print(
                f"{caption}: the best of {len(pictures)} scores {scores.max():.2f}, the mean"
                f" {scores.mean():.2f}"
            )
        rows.append((caption, list(pictures[: settings.shown])))
    image, content = sheet(rows), io.BytesIO()
    image.save(content, registered_extensions()[settings.output.suffix.lower()])
    atomic_write(settings.output, content.getvalue())
    console.print(f"look at {settings.output}")
    checkpoint = Path(settings.checkpoint).expanduser()
    try:
        log_sheet(image, checkpoint, "drawings", latest_step(checkpoint))
    except OSError as error:
        console.print(f"not in TensorBoard: {error}")  # a workdir to read only


def drawn_with(settings: DALLEGenerate) -> DALLETrain:
    """The settings of a run with which an easel draws what these ask for."""
    dvae = settings.dvae or recorded(settings.checkpoint)["dvae"]
    data = dataclasses.replace(dalle_train.EMOJI.data, truncate=settings.truncate)
    return dataclasses.replace(dalle_train.EMOJI, data=data, dvae=dvae, seed=settings.seed)


def check_picture(path: Path | None) -> None:
    """Raises ValueError if the picture to complete cannot be read."""
    try:
        if path is not None:
            read_picture(path)
    except UnreadablePicture as error:
        raise ValueError(
            f"--complete {path} cannot be read ({error}): give a file of a picture"
        ) from error


def trained(flag: str, place: str, kind: str):
    """(model, parameters, tokenizer); ValueError where there is none of this kind."""
    # Another name may be that of a repository, though there are none of a DALL-E.
    default = getattr(DALLEGenerate, flag)
    surely_a_path = kind == "dalle" or place == default or Path(place).is_absolute()
    if surely_a_path and not Path(place).expanduser().exists():
        raise ValueError(
            f"--{flag} {place} is not there: run `python -m experiments.{kind}_train` first, or"
            " give the workdir of such a run"
        )
    found = describe(place)
    if found.model_type != kind:
        raise ValueError(f"--{flag} {place} holds a {found.model_type}, not a {kind}")
    if found.tokenizer is None:
        raise ValueError(
            f"--{flag} {place} has no tokenizer to read captions with: put the file of the one that"
            " it was trained with there"
        )
    return lmjax.load(place)


def given_rows(settings: DALLEGenerate, easel: Easel, grid: int) -> np.ndarray:
    """[captions, rows x grid]: the first codes of the picture to complete."""
    rows = grid // 2 if settings.rows is None else settings.rows
    if not 0 < rows < grid:
        raise ValueError(f"--rows is {rows}, not between 1 and {grid - 1}: the picture has {grid}")
    codes = easel.codes(easel.read(settings.complete))[: rows * grid]
    return np.tile(codes, (len(settings.captions), 1))


def ranker(
    model: CLIP, params, tokenizer, captions: Sequence[str], truncate: bool
) -> Callable[[str, np.ndarray], np.ndarray]:
    """(one of the captions, pictures [N, R, R, 3] in bytes) -> how well each of them fits it.

    That is a logit: what a softmax over captions would take. Pictures are resized as CLIP's are.

    Raises:
        ValueError: a caption is too long for the CLIP, and shall not be cut.
    """
    read = CaptionEncoder(tokenizer, model.config.positions, truncate=truncate, ends=True).encode
    try:
        texts = {caption: read(caption) for caption in captions}
    except ValueError as error:
        raise ValueError(f"the CLIP that ranks cannot read all of a caption: {error}") from error
    size = model.config.size

    @jax.jit
    def similarities(text, pictures):
        shape = (len(pictures), size, size, 3)
        fitted = jax.image.resize(as_floats(pictures), shape, "cubic", antialias=True)
        return model.apply({"params": params}, jnp.clip(fitted, 0, 1), text[None])[:, 0]

    def rank(caption, pictures):
        return in_parts(lambda some: similarities(texts[caption], some), pictures)

    return rank


if __name__ == "__main__":
    command_line.run(main)

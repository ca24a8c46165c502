"""Pictures beside each other: which is nearest to which, and sheets of them to look at.

Axes: N and M pictures, R pixels a side.
"""

import importlib.util
import io
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jaxtyping import Float, Int, UInt8
from PIL import Image, ImageDraw, ImageFont

from lmjax.data import cache
from lmjax.training.reporting import EVENTS, Events

AT_ONCE = 32
"""Pictures that pass through a model together, at most: more are hardly faster, and may not fit."""
CELL = 96
"""Pixels a side of a picture on a sheet, at least; smaller ones are enlarged a whole number of
times."""
MARGIN = 6
LETTERS = 15
_FONT = "NanumGothic.ttf"


def in_parts(function: Callable[..., Any], *arrays: np.ndarray) -> Any:
    """What a function makes of the rows of arrays, from `AT_ONCE` rows at a time."""
    starts = range(0, len(arrays[0]), AT_ONCE)
    parts = [function(*(x[start : start + AT_ONCE] for x in arrays)) for start in starts]
    return jax.tree.map(lambda *some: np.concatenate(some), *parts)


def thumbnails(pictures: UInt8[np.ndarray, "N R R 3"], side: int = 16) -> Float[np.ndarray, "N F"]:
    """Pictures of `side` x `side` pixels from 0 to 1, each averaged over an area, as vectors."""
    small = [
        np.asarray(Image.fromarray(one).resize((side, side), Image.Resampling.BOX))
        for one in pictures
    ]
    return np.stack(small).reshape(len(pictures), -1) / 255


def nearest(
    pictures: UInt8[np.ndarray, "N R R 3"], originals: UInt8[np.ndarray, "M R R 3"], side: int = 16
) -> Int[np.ndarray, " N"]:
    """For each picture the original with the smallest mean squared error between thumbnails."""
    ours, theirs = thumbnails(pictures, side), thumbnails(originals, side)
    errors = ((ours[:, None] - theirs[None]) ** 2).mean(-1)
    return errors.argmin(1)


def as_bytes(pictures: Float[np.ndarray, "*N R R 3"]) -> UInt8[np.ndarray, "*N R R 3"]:
    """From [0, 1] to 0 ... 255."""
    return np.rint(np.clip(np.asarray(pictures), 0, 1) * 255).astype(np.uint8)


def sheet(
    rows: Sequence[tuple[str, Sequence[UInt8[np.ndarray, "R R 3"]]]], columns: Sequence[str] = ()
) -> Image.Image:
    """Rows of pictures with a caption each, English or Korean, under `columns`' names.

    They keep their size, or a multiple of it.
    """
    font = _font()
    side = max(len(picture) for _, pictures in rows for picture in pictures)
    cell = side * math.ceil(CELL / side)
    width = max([_length(font, caption) for caption, _ in rows] + [0])
    count = max(len(pictures) for _, pictures in rows)
    left, top = width + 2 * MARGIN, LETTERS + 2 * MARGIN if columns else MARGIN
    step = cell + MARGIN
    image = Image.new("RGB", (left + count * step, top + len(rows) * step), "white")
    draw = ImageDraw.Draw(image)
    for column, name in enumerate(columns):
        draw.text((left + column * step, MARGIN), name, "black", font)
    for row, (caption, pictures) in enumerate(rows):
        y = top + row * step
        draw.text((MARGIN, y + cell // 2), caption, "black", font, anchor="lm")
        for column, picture in enumerate(pictures):
            one = Image.fromarray(picture).resize((cell, cell), Image.Resampling.NEAREST)
            image.paste(one, (left + column * step, y))
    return image


def save_sheet(image: Image.Image, workdir: Path, name: str, step: int) -> Path:
    """Writes a run's `name`.png, whole or not at all, and shows it in TensorBoard."""
    path, content = workdir / f"{name}.png", io.BytesIO()
    image.save(content, "png")
    cache.atomic_write(path, content.getvalue())
    log_sheet(image, workdir, name, step)
    return path


def log_sheet(image: Image.Image, workdir: Path, name: str, step: int) -> None:
    """Shows it in TensorBoard alone."""
    events = Events(workdir / EVENTS, step)
    events.add_picture(name, image, step)
    events.close()


def _font() -> ImageFont.FreeTypeFont:
    """A font with Latin and Korean letters, which Pillow's and matplotlib's own lack.

    The package that brings it is not imported: that would change matplotlib's settings.
    """
    package = importlib.util.find_spec("koreanize_matplotlib")
    (directory,) = package.submodule_search_locations
    return ImageFont.truetype(str(Path(directory) / "fonts" / _FONT), LETTERS)


def _length(font: ImageFont.FreeTypeFont, text: str) -> int:
    return int(np.ceil(font.getlength(text)))

"""Encoded pictures to square arrays of pixels: reading them, and DALL-E's random crops.

Paper: Ramesh et al. 2021, appendix A, listing 1 (the dVAE's crops), and B, listing 2 (the
transformer's). As there, pictures shrink by averaging over areas.

Departures: pictures smaller than the crop, which the paper has none of, are enlarged to it; a crop
is made and resized at once, which gives the pixels that resizing the whole square would give.
"""

import errno
import io
from collections.abc import Callable
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps

Crop = Callable[[Image.Image, int, np.random.Generator], np.ndarray]
"""(picture, R, rng) -> uint8 [R, R, 3]"""


class UnreadablePicture(ValueError):
    """A file that is no whole picture, or cannot be read."""

    @property
    def passing(self) -> bool:
        """Whether the file may be whole, and its storage or this process is what failed."""
        if isinstance(self.__cause__, OSError):
            # Without a number it is what a decoder says.
            return self.__cause__.errno not in (None, errno.ENOENT, errno.EACCES, errno.EISDIR)
        return isinstance(self.__cause__, MemoryError)


def read_picture(file: Path | bytes, size: int | None = None) -> Image.Image:
    """An RGB picture, upright, on white where it is transparent.

    Args:
      file: its path, or what is in it.
      size: the side of what will be cropped of it; a JPEG of more than four times as many pixels
        a side is decoded at half, a quarter or an eighth of its size.

    Raises:
      UnreadablePicture: there is no such file, it is no picture, truncated or damaged, or its
        values have no natural range.
    """
    try:
        with Image.open(io.BytesIO(file) if isinstance(file, bytes) else file) as image:
            if size is not None:
                image.draft(None, (2 * size, 2 * size))
            image.load()
            return _as_rgb(ImageOps.exif_transpose(image))
    except Exception as error:  # whatever a damaged file makes the decoders raise
        if isinstance(error, OSError) and error.strerror:
            reason = error.strerror
        else:
            # The message may hold the file's whole content, or the path, which reports name anyway.
            known = "cannot identify image file" in str(error)
            reason = "no picture" if known or not str(error) else str(error).splitlines()[0]
        raise UnreadablePicture(reason) from error


def dvae_crop(image: Image.Image, size: int, rng: np.random.Generator) -> np.ndarray:
    """Listing 1: a random square of the shorter side, shrunk to 9/8 to 12/8 of `size` as far as it
    has as many pixels, then a random part of that, mirrored or not."""
    side = min(image.size)
    left, top = (int(rng.integers(length - side + 1)) for length in image.size)
    shortest, longest = (min(side, round(eighths / 8 * size)) for eighths in (9, 12))
    resized = max(size, int(rng.integers(shortest, longest + 1)))
    pixels = _random_part(image, (left, top, side), resized, size, rng)
    return pixels[:, ::-1] if rng.random() < 0.5 else pixels


def transformer_crop(image: Image.Image, size: int, rng: np.random.Generator) -> np.ndarray:
    """Listing 2: a square of the shorter side from around the middle, shrunk to between `size` and
    9/8 of it, then a random part of that. Not mirrored: there may be text in it."""
    side = min(image.size)
    left, top = (_near_middle(length - side, rng) for length in image.size)
    longest = max(size, min(side, round(9 / 8 * size)))
    resized = int(rng.integers(size, longest + 1))
    return _random_part(image, (left, top, side), resized, size, rng)


def middle_crop(
    image: Image.Image, size: int, rng: np.random.Generator | None = None
) -> np.ndarray:
    """The square in the middle, resized: nothing is random."""
    del rng
    side = min(image.size)
    left, top = ((length - side) // 2 for length in image.size)
    return _resized(image, (left, top, left + side, top + side), size, enlarge=side < size)


def _near_middle(room: int, rng: np.random.Generator) -> int:
    first = 3 * room // 8
    return int(rng.integers(first, max(first + 1, 5 * room // 8)))


def _random_part(
    image: Image.Image,
    square: tuple[int, int, int],
    resized: int,
    size: int,
    rng: np.random.Generator,
) -> np.ndarray:
    """A random part of `size` of a (left, top, side) square that is first resized to `resized`."""
    left, top, side = square
    scale = side / resized
    x, y = (int(part) for part in rng.integers(resized - size + 1, size=2))
    box = (
        left + x * scale,
        top + y * scale,
        left + min(side, (x + size) * scale),
        top + min(side, (y + size) * scale),
    )
    return _resized(image, box, size, enlarge=side < resized)


def _resized(
    image: Image.Image, box: tuple[float, float, float, float], size: int, enlarge: bool
) -> np.ndarray:
    resampling = Image.Resampling.BICUBIC if enlarge else Image.Resampling.BOX
    return np.asarray(image.resize((size, size), resampling, box))


def _as_rgb(image: Image.Image) -> Image.Image:
    if image.mode == "RGB" and not image.has_transparency_data:
        return image
    if image.mode == "F":
        raise ValueError("floating-point pixels")
    if image.mode.startswith("I"):  # 16 bits of grey; shifted, as Pillow does it with colours
        image = Image.fromarray((np.asarray(image) >> 8).clip(0, 255).astype(np.uint8))
    if image.has_transparency_data:
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, "white")
        image = Image.alpha_composite(white, image)
    return image.convert("RGB")

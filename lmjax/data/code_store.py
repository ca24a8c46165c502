"""Pictures as the codes of a discrete VAE, made once: a directory of memory-mapped arrays.

    codes.npy      uint16 [pictures, squares, codes]: row i belongs to picture i, and its captions
    meta.json      of which pictures and which model they are, and which files could not be read

The squares of a picture are its middle alone, or some that are cropped at random.

The transformer that learns to continue captions with pictures then needs neither files nor model.
"""

import hashlib
import json
import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
from PIL import Image
from rich.progress import track

from lmjax.data import cache
from lmjax.data.pictures import Pictures, Unusable, none_readable, report
from lmjax.data.pixels import UnreadablePicture, middle_crop, read_picture, transformer_crop

Encode = Callable[[np.ndarray], np.ndarray]
"""uint8 [B, R, R, 3] -> integers [B, codes]"""
FORMAT = 3
"""Changes with what the files hold."""


class CodeStore:
    """An opened store. Pickles as its path, so worker processes map the same file.

    Attributes:
        directory: where it is.
        codes: uint16 `[pictures, squares, codes]`, memory-mapped.
        unreadable: by picture, why it could not be read.
        readable: bool `[pictures]`.

    Raises:
        ValueError: there is no store in `directory`, or it is damaged.
    """

    def __init__(self, directory: str | os.PathLike):
        self.directory = Path(directory)
        try:
            self.meta: dict = json.loads((self.directory / "meta.json").read_text())
            # Plain arrays: rows of `np.memmap` objects cost several times as much.
            self.codes = np.load(self.directory / "codes.npy", mmap_mode="r").view(np.ndarray)
            self.unreadable = {int(i): reason for i, reason in self.meta["unreadable"].items()}
        except (OSError, ValueError, KeyError) as error:
            raise ValueError(f"no store of codes in {self.directory}: {error}") from error
        self.readable = np.ones(len(self.codes), bool)
        self.readable[list(self.unreadable)] = False

    def __reduce__(self):
        return CodeStore, (self.directory,)


def code_directory(
    pictures: Pictures, model_sha256: str, size: int, crops: int | None = None
) -> Path:
    """Where the cache keeps the codes that a model makes of the pictures, `size` pixels a side: of
    their middles, or of so many `crops` of each."""
    key = f"{FORMAT} {pictures.fingerprint} {model_sha256} {size} {crops}"
    name = hashlib.sha256(key.encode()).hexdigest()
    return cache.cache_dir() / "picture_codes" / name[:24]


def build_code_store(
    pictures: Pictures,
    encode: Encode,
    model_sha256: str,
    size: int,
    *,
    crops: int | None = None,
    batch_size: int = 32,
    unusable: Unusable = "skip",
) -> CodeStore:
    """Open the pictures' store in the cache, or fill it with the codes of squares of them.

    Args:
        encode: the model; called with batches of one shape, and only if there is something to do.
        model_sha256: of its parameters.
        size: pixels a side.
        crops: how many squares of each picture, cropped at random as DALL-E's are: the same ones
            each time. None: the middle of each.
        batch_size: pictures at once.
        unusable: what to do about files that cannot be read, or could not when the codes were made.

    Raises:
        OSError: the storage, rather than a file, does not work.
        ValueError: fewer crops than one; a file cannot be read, and those are refused, or none can
            be; or a code has more than 16 bits.
    """
    if crops is not None and crops < 1:
        raise ValueError(f"the codes of {crops} crops of each picture are asked for, not 1 or more")
    directory = code_directory(pictures, model_sha256, size, crops)
    with cache.lock(directory):
        if not directory.exists():
            with cache.atomic_directory(directory) as temporary:
                unreadable = _write(pictures, encode, size, crops, batch_size, unusable, temporary)
                meta = {
                    "pictures": pictures.fingerprint,
                    "model": model_sha256,
                    "size": size,
                    "crops": crops,
                    "unreadable": unreadable,
                }
                (temporary / "meta.json").write_text(json.dumps(meta, indent=2))
        store = CodeStore(directory)
    if store.unreadable:
        first, reason = next(iter(store.unreadable.items()))
        report(
            f"{len(store.unreadable):,} of {len(pictures):,} pictures that cannot be read, the"
            f" first of them {pictures.place(first)} ({reason})",
            unusable,
        )
    return store


def _write(
    pictures: Pictures,
    encode: Encode,
    size: int,
    crops: int | None,
    batch_size: int,
    unusable: Unusable,
    directory: Path,
) -> dict[int, str]:
    """Writes the codes, and returns which pictures cannot be read, and why."""
    unreadable = {}
    codes = None
    starts = range(0, len(pictures), batch_size)
    for start in track(starts, "encoding pictures", transient=True):
        stop = min(start + batch_size, len(pictures))
        batch = np.zeros((crops or 1, batch_size, size, size, 3), np.uint8)
        for index in range(start, stop):
            try:
                image = read_picture(pictures.file(index), size)
            except UnreadablePicture as error:
                if error.passing:
                    raise OSError(
                        f"{pictures.place(index)} could not be read ({error}), which is no fault of"
                        " the file, and codes are kept for later runs: try again when it can be"
                    ) from error
                unreadable[index] = str(error)
                report(f"{pictures.place(index)} ({error})", unusable)
                continue
            batch[:, index - start] = _squares(image, size, crops, index)
        encoded = np.stack([encode(squares) for squares in batch], 1)
        if encoded.max() >= 2**16:
            raise ValueError(f"a code is {encoded.max():,}: a store holds those below {2**16:,}")
        if codes is None:
            shape = (len(pictures), *encoded.shape[1:])
            codes = np.lib.format.open_memmap(directory / "codes.npy", "w+", np.uint16, shape)
        codes[start:stop] = encoded[: stop - start]
    if len(unreadable) == len(pictures):
        raise none_readable(pictures)
    codes.flush()
    return unreadable


def _squares(image: Image.Image, size: int, crops: int | None, index: int) -> list[np.ndarray]:
    if crops is None:
        return [middle_crop(image, size)]
    rng = np.random.default_rng(index)
    return [transformer_crop(image, size, rng) for _ in range(crops)]

"""Where pictures with captions come from: emoji, folders, JSON, TFDS data sets.

    splits = open_pictures(PictureData(folder="photos"))
    splits["train"].file(0), splits["train"].captions[0]

A picture is a file's path or its content, read when asked for; captions are in memory. Without a
validation part of its own, a set holds pictures out by the hash of their names: which ones does not
depend on their order or number. Names are in UTF-8.
"""

import collections
import dataclasses
import json
import os
import re
import unicodedata
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
from rich.console import Console

from lmjax.data.sources import check_fraction, content_hash, digest, document_hash

Captions = Mapping[str, tuple[str, ...]]
"""By language, "en" and "ko"."""
Unusable = Literal["skip", "refuse"]

SUFFIXES = frozenset((".png", ".jpg", ".jpeg", ".webp", ".gif", ".bmp", ".tif", ".tiff"))
FILE_KEYS = ("file_name", "image", "file_path")
"""Of an entry of JSON, the first that it has names its picture."""
CAPTION_KEYS = ("text", "caption", "captions", "en", "ko", "caption_ko", "captions_ko")
"""All that an entry has are its captions."""
# Of larger sets this many files, evenly chosen, are hashed whole, of the others the sizes.
HASHED_FILES = 1_000
_SIDE = re.compile(r"(train|val|test)(?:id|idation|ing)?\d*/", re.IGNORECASE)
_HANGUL = re.compile("[\u1100-\u11ff\u3131-\u318e\uac00-\ud7a3]")


@dataclasses.dataclass(frozen=True)
class PictureData:
    """Which pictures to train on. With nothing set: emoji, named in English and Korean."""

    folder: str | None = None
    """Your own pictures: all PNG, JPEG, WebP, GIF, BMP and TIFF files in it, at any depth. Each
    line of a .txt file of the same name is a caption."""
    captions: str | None = None
    """A file that says which pictures to take, with captions. JSON lines, or one list, of
    {"file_name": ..., "text": ...}; also "image" or "file_path", "caption" or "captions", and
    "caption_ko", as the Korean captions of MS-COCO have it. Names are relative to the folder, or,
    without one, to where the file is."""
    tfds: str | None = None
    """A TensorFlow Datasets name ('coco_captions'), or the directory of a prepared one (with
    dataset_info.json). TensorFlow is not needed to read it."""
    tfds_data_dir: str | None = None
    """Where prepared data sets lie; else TFDS's own ~/tensorflow_datasets."""
    tfds_download: bool = False
    """Download and prepare a data set that isn't there yet, which else is an error."""
    validation_fraction: float = 0.05
    """How much to hold out, by the hash of a picture's name, where there is no validation part: a
    'val' or 'validation' split, or first folders such as train2014 and val2014 (what is outside of
    these, or in test2014, is left out)."""
    unusable: Unusable = "skip"
    """What to do about files that cannot be read, or that have no caption where one is needed:
    leave them out and say so, or refuse the set. Whether a file can be read shows when training
    first comes to it or, of DALL-E, when its codes are made: reading all of a large set ahead would
    take as long as an epoch."""
    augment: bool = True
    """Train on random parts of the pictures, as in the paper, rather than on their middle. Not of
    DALL-E, whose pictures are codes."""


@dataclasses.dataclass(frozen=True)
class Pictures:
    """One split of a set of pictures.

    Attributes:
      name: of the set.
      names: of the pictures in it.
      files: each picture's path or content, a list or what reads it when asked; picklable.
      numbers: which of `files` these are.
      captions: of each picture; it may have none.
      fingerprint: a hash of the content.
      split: "train" or "validation".
    """

    name: str
    names: Sequence[str]
    files: Sequence[Path | bytes]
    numbers: np.ndarray
    captions: Sequence[Captions]
    fingerprint: str
    split: str = "train"

    def __len__(self) -> int:
        return len(self.numbers)

    def file(self, index: int) -> Path | bytes:
        return self.files[self.numbers[index]]

    def place(self, index: int) -> str:
        """Where a picture is, for reports."""
        return f"{self.name}/{self.names[index]}"

    def some(self, indices: Iterable[int], *why: Any) -> "Pictures":
        """These pictures only; `why` goes into the fingerprint."""
        indices = list(indices)
        return dataclasses.replace(
            self,
            names=[self.names[i] for i in indices],
            numbers=self.numbers[indices],
            captions=[self.captions[i] for i in indices],
            fingerprint=digest(self.fingerprint, *why),
        )


def open_pictures(data: PictureData = PictureData()) -> dict[str, Pictures]:  # noqa: B008 (frozen)
    """The "train" and "validation" pictures that the settings describe.

    Raises:
      ValueError: settings contradict each other, the captions' file is damaged, or there is nothing
        to train on or to hold out.
      FileNotFoundError: there is no such folder or file, or the TFDS data set isn't prepared here;
        or a picture is missing and `unusable` is "refuse".
    """
    check_fraction(data.validation_fraction)
    if data.tfds and (data.folder or data.captions):
        raise ValueError("data.tfds is set beside data.folder or data.captions: drop one of them")
    if (data.tfds_download or data.tfds_data_dir) and not data.tfds:
        raise ValueError("data.tfds_download or data.tfds_data_dir is set without data.tfds")
    splits = _opened(data)
    return {name: dataclasses.replace(splits[name], split=name) for name in splits}


def _opened(data: PictureData) -> dict[str, Pictures]:
    if data.folder or data.captions:
        return _split(picture_files(data.folder, data.captions, data.unusable), data)
    if data.tfds:
        from lmjax.data.tfds_pictures import tfds_pictures

        splits = tfds_pictures(data.tfds, data.tfds_data_dir, data.tfds_download)
        return splits if "validation" in splits else _split(splits["train"], data)

    from lmjax.data.emoji_captions import emoji_captions

    return emoji_captions()


def picture_files(
    folder: str | os.PathLike | None,
    captions: str | os.PathLike | None = None,
    unusable: Unusable = "skip",
) -> Pictures:
    """Pictures in a folder with captions beside them, or those that a file of captions names.

    Raises:
      ValueError: there are no pictures, or the captions' file is damaged.
      FileNotFoundError: the folder or the file is missing, or a picture, if those are refused.
    """
    if folder is None:
        folder = Path(captions).expanduser().parent
    folder = Path(folder).expanduser()
    if not folder.is_dir():
        raise FileNotFoundError(f"there is no folder of pictures {folder}")
    if captions is None:
        found = {path: _captions_beside(path) for path in _pictures_in(folder)}
        by_name = {path.relative_to(folder).as_posix(): found[path] for path in sorted(found)}
    else:
        by_name = _entries(Path(captions).expanduser())
    places = {name: path for name in by_name if (path := _readable(folder, name)) is not None}
    if missing := [name for name in by_name if name not in places]:
        # An escape in place of what no text can hold.
        first = missing[0].encode("utf-8", "backslashreplace").decode()
        report(
            f"{len(missing):,} of {len(by_name):,} pictures of {captions or folder} are not in"
            f" {folder}, may not be read, or have names that are not UTF-8, the first of them"
            f" {first}",
            unusable,
            FileNotFoundError,
        )
    names = sorted(places)
    if not names:
        raise ValueError(
            f"{captions or folder} holds no pictures: expected files in the folder that end in"
            f" {', '.join(sorted(SUFFIXES))}, and captions of them"
        )
    paths = [places[name] for name in names]
    texts = [by_name[name] for name in names]
    sizes = [path.stat().st_size for path in paths]
    hashed = content_hash(paths[:: -(-len(paths) // HASHED_FILES)])
    fingerprint = digest("Pictures 1", names, texts, sizes, hashed)
    return Pictures(str(folder), names, paths, np.arange(len(names)), texts, fingerprint)


def _readable(folder: Path, name: str) -> Path | None:
    """Where a picture of that name is: spelt so, or as another system composes its letters."""
    try:
        name.encode()
    except UnicodeEncodeError:
        return None
    for spelling in (name, *(unicodedata.normalize(form, name) for form in ("NFC", "NFD"))):
        path = folder / spelling
        if path.is_file():
            return path if os.access(path, os.R_OK) else None
    return None


def by_language(texts: Iterable[tuple[str, str]]) -> dict[str, tuple[str, ...]]:
    """Captions from (key, text): of the language that the key says or, by its script, the text."""
    captions = collections.defaultdict(list)
    for key, text in texts:
        # JSON may spell half of a surrogate pair, which no UTF-8 text can hold.
        text = " ".join(text.encode("utf-8", "replace").decode().split())
        korean = key == "ko" or key.endswith("_ko") or (key != "en" and _HANGUL.search(text))
        if text:
            captions["ko" if korean else "en"].append(text)
    return {language: tuple(found) for language, found in captions.items()}


def report(what: str, unusable: Unusable, error: type[Exception] = ValueError) -> None:
    """Says what is left out, or refuses it."""
    if unusable == "refuse":
        raise error(f"{what}: mend or remove it, or set data.unusable to skip")
    Console(stderr=True).print(f"left out: {what}", markup=False, soft_wrap=True)


def none_readable(pictures: Pictures) -> ValueError:
    """To be raised."""
    return ValueError(
        f"{pictures.name} holds no picture that can be read in its {pictures.split} split: mend the"
        " files, or give others"
    )


def _split(pictures: Pictures, data: PictureData) -> dict[str, Pictures]:
    """By the first folders' names if some are train and some val or test, else by hash."""
    sides = [match[1].lower() if (match := _SIDE.match(name)) else "" for name in pictures.names]
    if "train" in sides and {"val", "test"} & set(sides):
        others = sum(side not in ("train", "val") for side in sides)
        if others:
            what = f"{others:,} pictures of {pictures.name} that are in no folder train or val"
            report(what, "skip")
        if "val" in sides:
            return _parts(pictures, np.array(sides), "folders")
        pictures = pictures.some([i for i, side in enumerate(sides) if side == "train"], "folders")
    held_out = _by_hash(pictures.names, data.validation_fraction)
    if held_out.all() or not held_out.any():
        raise ValueError(
            f"{pictures.name} holds one picture only, so there is none to hold out as its"
            " validation split: give more"
        )
    return _parts(pictures, np.where(held_out, "val", "train"), data.validation_fraction)


def _parts(pictures: Pictures, sides: np.ndarray, why: str | float) -> dict[str, Pictures]:
    """Those on the sides train and val."""
    return {
        name: pictures.some(np.flatnonzero(sides == side), name, why)
        for name, side in (("train", "train"), ("validation", "val"))
    }


def _by_hash(names: Sequence[str], fraction: float) -> np.ndarray:
    """bool [names]: whether they are held out."""
    hashes = np.array([document_hash(name) for name in names], np.uint64)
    held_out = hashes < np.uint64(fraction * 2**64)
    # Few pictures may all have fallen on one side.
    if not held_out.any():
        held_out = hashes == hashes.min()
    if held_out.all():
        held_out = hashes != hashes.max()
    return held_out


def _pictures_in(folder: Path) -> list[Path]:
    """In linked folders too, each of which is visited once."""
    found, visited = [], set()
    for directory, folders, files in os.walk(folder, followlinks=True):
        folders.sort()
        if (place := os.path.realpath(directory)) in visited:
            folders.clear()
            continue
        visited.add(place)
        found += [Path(directory, name) for name in files if Path(name).suffix.lower() in SUFFIXES]
    return found


def _captions_beside(path: Path) -> Captions:
    beside = path.with_suffix(".txt")
    if not beside.is_file():
        return {}
    try:
        lines = beside.read_text("utf-8-sig").splitlines()
    except UnicodeDecodeError as error:
        raise ValueError(f"{beside} is not UTF-8: convert it (iconv -t UTF-8)") from error
    return by_language(("text", line) for line in lines)


def _entries(path: Path) -> dict[str, Captions]:
    """The captions of each picture that a file names; one may be named several times."""
    try:
        content = path.read_text("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8: convert it (iconv -t UTF-8)") from error
    except OSError as error:
        raise FileNotFoundError(f"cannot read the captions {path}: {error.strerror}") from error
    is_list = content.lstrip().startswith("[")
    where = f"{path}, entry" if is_list else f"{path}, line"
    texts = collections.defaultdict(list)
    for number, entry in enumerate(
        _json_list(content, path) if is_list else content.split("\n"), 1
    ):
        if isinstance(entry, str):
            if not entry.strip():
                continue
            try:
                entry = json.loads(entry)
            except json.JSONDecodeError as error:
                raise ValueError(
                    f"{where} {number} is not JSON ({error.msg}): expected one object"
                ) from error
        fields = entry if isinstance(entry, dict) else {}
        name = next((fields[key] for key in FILE_KEYS if key in fields), None)
        if not isinstance(name, str):
            raise ValueError(f"{where} {number} names no picture: expected one of {FILE_KEYS}")
        found = texts[Path(name).as_posix()]
        for key in CAPTION_KEYS:
            value = fields.get(key) or []
            value = [value] if isinstance(value, str) else value
            if not isinstance(value, list) or not all(isinstance(text, str) for text in value):
                raise ValueError(f"{where} {number} has no text under {key!r}")
            found += [(key, text) for text in value]
    return {name: by_language(found) for name, found in texts.items()}


def _json_list(content: str, path: Path) -> list:
    try:
        return json.loads(content)
    except json.JSONDecodeError as error:
        raise ValueError(
            f"{path} is not JSON ({error.msg} at line {error.lineno}): expected a list of objects,"
            " or one object per line"
        ) from error

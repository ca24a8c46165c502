"""Pictures and captions in prepared TFDS data sets, read without TensorFlow, at random access."""

import dataclasses
import functools
import hashlib
import json
import struct
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import tensorflow_datasets as tfds
from rich.progress import track

from lmjax.data import cache
from lmjax.data.pictures import CAPTION_KEYS, Pictures, by_language
from lmjax.data.sources import content_hash, digest, open_tfds, random_access

VALIDATION = ("validation", "val")
"""The first of these splits that a data set has is its validation part."""


def tfds_pictures(
    dataset: str, data_dir: str | None = None, download: bool = False
) -> dict[str, Pictures]:
    """The "train" pictures of a data set and, where it has them, the "validation" ones.

    The picture is the only image of an example, or "image"; its captions are texts, or sequences
    of texts or of {"text": ...}, under the names that `pictures.CAPTION_KEYS` lists. They are
    read once, and kept in the cache.

    Args:
      dataset: a name ("coco_captions") or the directory with dataset_info.json.
      data_dir: where prepared data sets lie; None is TFDS's own default.
      download: download and prepare it if it isn't there. Some builders need TensorFlow for that.

    Raises:
      FileNotFoundError: the data set isn't prepared here (and `download` is off).
      ValueError: it has no "train" split or no picture, it is stored in a way that can't be read
        at random, or can't be downloaded.
    """
    builder = open_tfds(dataset, data_dir, download)
    info = builder.info
    if "train" not in info.splits:
        raise ValueError(f"{dataset} has no train split, only {sorted(info.splits)}")
    images = [name for name, f in info.features.items() if isinstance(f, tfds.features.Image)]
    if len(images) != 1 and "image" not in images:
        raise ValueError(
            f"{dataset} has {len(images)} pictures in an example, {images}: expected one, or one"
            " that is called image"
        )
    image = "image" if "image" in images else images[0]
    names = {"train": "train"}
    if held_out := [name for name in VALIDATION if name in info.splits]:
        names["validation"] = held_out[0]
    return {
        split: _split(builder, own_name, image, f"{info.full_name}/{own_name}")
        for split, own_name in names.items()
    }


@dataclasses.dataclass(frozen=True)
class Records:
    """The examples of a split with what they hold as bytes, at random access. Pickles as where they
    are, so that worker processes open the same files."""

    directory: str
    split: str

    def __len__(self) -> int:
        return len(self._places) if self._is_tfrecord else len(self._source)

    def __getitem__(self, index: int) -> dict:
        if self._is_tfrecord:
            path, start, length = self._places[index]
            with open(path, "rb") as file:
                file.seek(start)
                record = file.read(length)
        else:
            record = self._source[index]
        features = self._builder.info.features
        skipped = {
            name: tfds.decode.SkipDecoding()
            for name, feature in features.items()
            if isinstance(feature, tfds.features.Image)
        }
        return features.deserialize_example_np(record, decoders=skipped)

    def __reduce__(self):
        return Records, (self.directory, self.split)

    @functools.cached_property
    def _builder(self):
        return open_tfds(self.directory, None, False)

    @property
    def files(self) -> list[str]:
        return [str(path) for path in self._builder.info.splits[self.split].filepaths]

    @property
    def _is_tfrecord(self) -> bool:
        return self._builder.info.file_format.value == "tfrecord"

    @functools.cached_property
    def _source(self):
        return random_access(self._builder, self.split, self.directory).data_source

    @functools.cached_property
    def _places(self) -> list[tuple[str, int, int]]:
        return [(path, *place) for path in self.files for place in tfrecord_places(Path(path))]


@dataclasses.dataclass(frozen=True)
class PictureFiles:
    """The encoded pictures of `records`."""

    records: Records
    image: str

    def __len__(self) -> int:
        return len(self.records)

    def __getitem__(self, index: int) -> bytes:
        return self.records[index][self.image]


def tfrecord_places(path: Path) -> Iterator[tuple[int, int]]:
    """Where the records of a TFRecord file start, and their lengths; only the lengths are read."""
    end = path.stat().st_size
    with open(path, "rb") as file:
        at = 0
        while at < end:
            file.seek(at)
            header = file.read(12)
            length = struct.unpack("<Q", header[:8])[0] if len(header) == 12 else 0
            if len(header) < 12 or at + 12 + length + 4 > end:
                raise ValueError(f"{path} ends in the middle of a record: copy or prepare it again")
            yield at + 12, length
            at += 12 + length + 4


def _split(builder, split: str, image: str, name: str) -> Pictures:
    """The fingerprint is of what the records hold: TFDS writes them with their features in another
    order each time it prepares them, so that their files have other hashes on each host."""
    records = Records(str(builder.data_path), split)
    keys = [key for key in CAPTION_KEYS if key in builder.info.features]
    files = digest("TFDS pictures 2", image, keys, content_hash(records.files))
    path = cache.cache_dir() / "captions" / f"{files[:32]}.json"
    with cache.lock(path):
        if not path.exists():
            contents, captions = hashlib.sha256(), []
            for i in track(range(len(records)), f"reading captions of {name}", transient=True):
                record = records[i]
                captions.append(by_language(_texts(record, keys)))
                contents.update(digest(captions[-1]).encode())
                contents.update(hashlib.sha256(record[image]).digest())
            found = {"contents": contents.hexdigest(), "captions": captions}
            cache.atomic_write(path, json.dumps(found).encode())
    found = json.loads(path.read_bytes())
    captions = [
        {language: tuple(texts) for language, texts in each.items()} for each in found["captions"]
    ]
    numbers = np.arange(len(captions))
    names = [str(number) for number in numbers]
    fingerprint = found["contents"]
    return Pictures(name, names, PictureFiles(records, image), numbers, captions, fingerprint)


def _texts(record: dict, keys: list[str]) -> Iterator[tuple[str, str]]:
    for key in keys:
        value = record[key]
        if isinstance(value, dict):
            value = value["text"]
        for text in [value] if isinstance(value, bytes) else value:
            yield key, text.decode("utf-8", "replace")

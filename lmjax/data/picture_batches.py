"""From pictures to batches: pixels or codes, with or without captions.

A batch has, of these arrays, those that are asked for, and the last:

    pictures          uint8 [B, R, R, 3]: a quarter of what floats would be, until on the device
    image_tokens      int32 [B, codes], instead, of a `CodeStore`
    captions          int32 [B, T], zeros behind the caption's tokens
    captions_lengths  int32 [B], how many those are
    loss_weights      float32 [B], 0 for rows that fill up the last batch of an evaluation
"""

import dataclasses
import itertools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

from lmjax.data.batches import Batch, Batches, IndexedBatches, evaluation_batches
from lmjax.data.captions import CaptionEncoder, caption_tokenizer, with_captions
from lmjax.data.code_store import CodeStore
from lmjax.data.pictures import (
    Captions,
    PictureData,
    Pictures,
    Unusable,
    none_readable,
    open_pictures,
    report,
)
from lmjax.data.pixels import Crop, UnreadablePicture, middle_crop, read_picture
from lmjax.data.tokenizers import Tokenizer, check_rows

KEPT_BYTES = 2**27
"""Of pictures that were read, so much is kept: small sets are read once."""


class Picture(NamedTuple):
    """What an objective makes an example of."""

    content: Image.Image | np.ndarray
    """An RGB picture, or the codes of its squares, [squares, codes]."""
    captions: Captions


@dataclasses.dataclass
class PictureRows:
    """A picture in each row, read when asked for.

    A file that cannot be read is refused or, as often as it is asked for, replaced by the next one
    that can; it is reported once by each process that reads it, with the number so far.

    Attributes:
        pictures: the pictures.
        size: the side of what will be cropped of them, see `read_picture`.
        unusable: what to do about files that cannot be read.
        unreadable: the places of those found so far.
        read: those kept in memory.
    """

    pictures: Pictures
    size: int
    unusable: Unusable = "skip"
    unreadable: dict[int, str] = dataclasses.field(default_factory=dict)
    read: dict[int, Image.Image] = dataclasses.field(default_factory=dict)

    @property
    def lengths(self) -> dict[str, int]:
        return {"pictures": self.size}

    def __len__(self) -> int:
        return len(self.pictures)

    def row(self, index: int) -> list[tuple[int, Picture]]:
        for other in itertools.chain(range(index, len(self)), range(index)):
            if other in self.unreadable:
                continue
            try:
                image = self.picture(other)
            except UnreadablePicture as error:
                place, count = self.pictures.place(other), len(self.unreadable) + 1
                report(f"{place} ({error}), {count:,} unreadable so far", self.unusable)
                self.unreadable[other] = place
                continue
            return [(index, Picture(image, self.pictures.captions[other]))]
        raise none_readable(self.pictures)

    def picture(self, index: int) -> Image.Image:
        """Read, or kept from the last time; raises UnreadablePicture."""
        if index in self.read:
            return self.read[index]
        image = read_picture(self.pictures.file(index), self.size)
        bytes_each = 3 * image.width * image.height
        if len(self) * bytes_each <= KEPT_BYTES:
            self.read[index] = image
        return image


class CodeRows:
    """The codes of a picture in each row, of those that could be read.

    Args:
        pictures: the pictures.
        store: their codes.

    Raises:
        ValueError: the store is not of these pictures.
    """

    def __init__(self, pictures: Pictures, store: CodeStore):
        if store.meta["pictures"] != pictures.fingerprint:
            raise ValueError(f"{store.directory} holds the codes of other pictures: build it again")
        self.pictures, self.store = pictures, store
        self.readable = np.flatnonzero(store.readable)

    @property
    def lengths(self) -> dict[str, int]:
        return {"image_tokens": self.store.codes.shape[-1]}

    def __len__(self) -> int:
        return len(self.readable)

    def row(self, index: int) -> list[tuple[int, Picture]]:
        place = self.readable[index]
        return [(index, Picture(self.store.codes[place], self.pictures.captions[place]))]


@dataclasses.dataclass(frozen=True)
class PictureExample:
    """The objective (picture, rng) -> example.

    Attributes:
        crop: how a square is chosen: `dvae_crop`, `transformer_crop` or `middle_crop`.
        size: R, the square's side; without meaning for codes.
        captions: None for pictures alone.
    """

    crop: Crop
    size: int
    captions: CaptionEncoder | None = None

    def __call__(self, picture: Picture, rng: np.random.Generator) -> dict[str, np.ndarray]:
        if isinstance(picture.content, Image.Image):
            example = {"pictures": self.crop(picture.content, self.size, rng)}
        else:
            example = {"image_tokens": picture.content[rng.integers(len(picture.content))]}
        if self.captions is not None:
            example["captions"] = self.captions(picture.captions, rng)
        return example

    def plain(self) -> "PictureExample":
        """Without randomness, but for the choice of a caption and of a square."""
        captions = self.captions and dataclasses.replace(self.captions, dropout=0.0)
        return dataclasses.replace(self, crop=middle_crop, captions=captions)


def stack(rows: Sequence[Sequence[Mapping[str, np.ndarray]]], lengths: Mapping[str, int]) -> Batch:
    """The batch of the module docstring, of rows with one example or none.

    Args:
        lengths: R of `pictures`, codes of `image_tokens` and T of `captions`, where there are such.
    """
    batch = {}
    for name, length in lengths.items():
        if name == "pictures":
            batch[name] = np.zeros((len(rows), length, length, 3), np.uint8)
        else:
            batch[name] = np.zeros((len(rows), length), np.int32)
        for place, row in enumerate(rows):
            for example in row:
                batch[name][place, : len(example[name])] = example[name]
    if "captions" in lengths:
        counts = [sum(len(example["captions"]) for example in row) for row in rows]
        batch["captions_lengths"] = np.array(counts, np.int32)
    batch["loss_weights"] = np.array([len(row) for row in rows], np.float32)
    return batch


class PictureBatches(NamedTuple):
    """All that an experiment takes from its pictures."""

    batches: Batches
    evaluation: list[Batch]
    tokenizer: Tokenizer | None
    """Of the captions."""
    identity: dict[str, Any]
    """Content hashes of pictures and tokenizer, and how these are used: what must be the same when
    a run is resumed."""
    summary: str


def read_pictures(
    data: PictureData,
    crop: Crop,
    size: int,
    *,
    batch: int,
    seed: int,
    workers: int = 0,
    eval_batches: int = 8,
    caption_length: int | None = None,
    ends: bool = False,
    tokenizer: Tokenizer | None = None,
    rows: tuple[str, int] | None = None,
    encode: Mapping[str, Callable[[Pictures], CodeStore]] | None = None,
    share: tuple[int, int] = (0, 1),
) -> PictureBatches:
    """Opens the pictures and batches them for this host.

    Args:
        data: the settings, a `CaptionedPictureData` if there shall be captions.
        crop: how a square of a picture is chosen in training, if `data.augment`.
        size: R.
        batch: rows of the global batch.
        seed: of order and noise.
        workers: processes that prepare batches.
        eval_batches: held-out batches, at most.
        caption_length: T, the most tokens of a caption; None for pictures alone.
        ends: captions begin with BOS and end with EOS.
        tokenizer: a checkpoint's, to use instead of training one.
        rows: of the model's embedding of captions, which must have one for every id: the option
            that sets their number, and the number.
        encode: makes codes of the pictures of each split, to train on these: `build_code_store`
            with its other arguments. There is no cropping then.
        share: which part of every batch, of how many, is this host's: `Layout.share`.

    Raises:
        ValueError, OSError: settings that contradict each other, or pictures, captions or tokenizer
            that cannot be used; one sentence says why.
    """
    splits = open_pictures(data)
    captions = None
    if caption_length is not None:
        splits = {name: with_captions(pictures, data) for name, pictures in splits.items()}
        tokenizer = caption_tokenizer(data, splits["train"], tokenizer)
        if rows is not None:
            check_rows(tokenizer, rows[1], rows[0])
        captions = CaptionEncoder(
            tokenizer, caption_length, data.language, data.dropout, data.truncate, ends
        )
        for pictures in splits.values():
            captions.check(pictures)
    if encode is None:
        train, held_out = (
            PictureRows(splits[name], size, data.unusable) for name in ("train", "validation")
        )
    else:
        train, held_out = (
            CodeRows(splits[name], encode[name](splits[name])) for name in ("train", "validation")
        )
    example = PictureExample(crop if data.augment else middle_crop, size, captions)
    common = {
        "lengths": train.lengths | ({"captions": caption_length} if captions else {}),
        "batch_size": batch,
        "process_index": share[0],
        "process_count": share[1],
        "collate": stack,
    }
    ids = {}
    if captions:
        ids |= {"tokenizer": tokenizer.sha256, "language": data.language}
        ids |= {"dropout": data.dropout, "truncate": data.truncate}
    if encode is None:
        ids["augment"] = data.augment
    else:  # the order of the rows depends on how many there are
        ids["readable"] = len(train)
    fingerprint = splits["train"].fingerprint
    words = f" {tokenizer.vocab_size:,} token ids;" if captions else ""
    return PictureBatches(
        IndexedBatches(train, example, seed=seed, workers=workers, **common),
        evaluation_batches(held_out, example.plain(), limit=eval_batches, **common),
        tokenizer if captions else None,
        {"pictures": fingerprint, **ids},
        f"{splits['train'].name}: {len(train):,} pictures, {len(held_out):,} held out;{words}"
        f" pictures {fingerprint[:12]}",
    )

"""Where text comes from: files of one's own, TFDS data sets, the built-in documentation.

A source is a frozen description that yields documents, strings without surrounding white space:

    source = TextFiles(("my/**/*.txt",))
    for document in source.documents("train"):
        ...

It names its content by a hash, which is what tokenizers and token stores are cached under, so an
edited file is noticed. Nothing here needs TensorFlow.

A source without a validation part of its own holds documents out by their hash: which ones does not
depend on their order or number, and equal documents fall on the same side.
"""

import contextlib
import dataclasses
import functools
import glob
import gzip
import hashlib
import itertools
import json
import logging
import os
import struct
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Protocol

# Blocks of plain text without a blank line are cut here, so that a book in one block still has
# a validation part.
BLOCK_CHARACTERS = 10_000
# Sources up to this many bytes are hashed whole (seconds), larger ones by samples of each file.
HASH_WHOLE_BYTES = 10 << 30
# Sources up to this many bytes are read once beforehand, so that neither split comes out empty.
SMALL_BYTES = 16 << 20


class Source(Protocol):
    """What tokenizers and token stores need of a source."""

    name: str
    splits: tuple[str, ...]

    def fingerprint(self, split: str) -> str:
        """A hash of the split's content, the same on every machine."""

    def documents(self, split: str, shard: int = 0, shards: int = 1) -> Iterator[str]:
        """The documents of one of `shards` disjoint parts, in a fixed order."""

    def num_documents(self, split: str) -> int | None:
        """How many there are in all, if that is known without reading them."""


@dataclasses.dataclass(frozen=True)
class TextData:
    """Which text to train on. With nothing set: the documentation installed on this machine."""

    files: tuple[str, ...] = ()
    """Your own text: paths or glob patterns ('my/**/*.txt'), UTF-8, any language.
    In .jsonl and .json files each line is one document {"text": ...};
    in all others blank lines separate documents. Any may be gzipped."""
    validation_files: tuple[str, ...] = ()
    """Files to evaluate on, left out of the training files where both match.
    Without them `validation_fraction` of the documents is held out."""
    tfds: str | None = None
    """A TensorFlow Datasets name ('c4/en', 'wiki40b/ko:1.3.0'),
    or the directory of a prepared one (with dataset_info.json).
    TensorFlow is not needed to read it."""
    tfds_data_dir: str | None = None
    """Where prepared data sets lie; else TFDS's own ~/tensorflow_datasets."""
    tfds_download: bool = False
    """Download and prepare a data set that isn't there yet, which else is an error."""
    text_key: str = "text"
    """The key (JSON lines) or feature (TFDS) that holds the text."""
    validation_fraction: float = 0.05
    """How much to hold out, by document hash, where no validation part is given."""


def open_source(data: TextData = TextData()) -> Source:  # noqa: B008 (frozen)
    """The source that the settings describe, checked as far as is possible without reading it.

    Raises:
      ValueError: settings contradict each other; one sentence says which.
      FileNotFoundError: no file matches, or the TFDS data set isn't prepared here.
    """
    if data.files and data.tfds:
        raise ValueError("data.files and data.tfds are both set: give one of them")
    if data.validation_files and not data.files:
        raise ValueError("data.validation_files is set without data.files: give the training files")
    if (data.tfds_download or data.tfds_data_dir) and not data.tfds:
        raise ValueError("data.tfds_download or data.tfds_data_dir is set without data.tfds")
    if data.files:
        source = TextFiles(
            data.files, data.validation_files, data.validation_fraction, data.text_key
        )
        for split in source.splits:
            source.files(split)
        return source
    if data.tfds:
        source = TFDS(
            data.tfds,
            data.text_key,
            data.tfds_data_dir,
            data.tfds_download,
            data.validation_fraction,
        )
        source.splits  # noqa: B018 (opens the data set)
        return source

    from lmjax.data.python_docs import python_docs

    return python_docs()


@dataclasses.dataclass(frozen=True)
class TextFiles:
    """Text files and JSON lines, gzipped or not.

    A document is one line of a .jsonl, .ndjson or .json file, under `text_key`. In any other file
    it is a block between blank lines, cut at a line end after every 10,000 characters or so. Where
    this gives a single document of which to hold something out, each of its lines is one. Files
    are read in the order of their paths. A file that matches both sets of patterns is validation.

    Attributes:
      patterns: paths or glob patterns, `**` for any depth.
      validation: patterns of the validation files; if empty, documents are held out by hash.
      validation_fraction: how much is held out; at least one document always is.
      text_key: the key of the text in JSON lines.
    """

    patterns: tuple[str, ...]
    validation: tuple[str, ...] = ()
    validation_fraction: float = 0.05
    text_key: str = "text"

    splits = ("train", "validation")

    def __post_init__(self):
        for field in ("patterns", "validation"):
            value = getattr(self, field) or ()
            value = (value,) if isinstance(value, str) else tuple(value)
            object.__setattr__(self, field, value)
        check_fraction(self.validation_fraction)

    @property
    def name(self) -> str:
        return " ".join(self.patterns)

    def files(self, split: str) -> list[Path]:
        """The files a split is read from, sorted.

        Raises:
          FileNotFoundError: a pattern matches no file.
          ValueError: every training file is a validation file too.
        """
        _check_split(split, self.splits, self.name)
        validation = _matching(self.validation)
        if split == "validation" and validation:
            return validation
        train = sorted(set(_matching(self.patterns)) - set(validation))
        if not train:
            raise ValueError(
                f"every file of {self.name} is a validation file too ({' '.join(self.validation)}):"
                " leave some to train on"
            )
        return train

    def fingerprint(self, split: str) -> str:
        return digest(
            "TextFiles 1",
            BLOCK_CHARACTERS,
            # Which files are JSON lines shows in their names only.
            [_is_json(path) and self.text_key for path in self.files(split)],
            content_hash(self.files(split)),
            self.validation or (split, self.validation_fraction),
        )

    def num_documents(self, split: str) -> None:
        return None

    def documents(self, split: str, shard: int = 0, shards: int = 1) -> Iterator[str]:
        """One of `shards` disjoint parts: every `shards`-th file, or document if files are few.

        Raises:
          ValueError: a file isn't UTF-8, isn't whole, or lacks the text key; the split is empty.
        """
        files = self.files(split)
        if shards <= len(files):
            documents = self._held(split, files[shard::shards])
        else:
            documents = itertools.islice(self._held(split, files), shard, None, shards)
        if shards == 1:
            documents = _not_empty(documents, split, self.name)
        return documents

    def _held(self, split: str, files: list[Path]) -> Iterator[str]:
        documents = self._read(files)
        if self.validation:
            return documents
        if self._is_single:
            documents = _nonempty_lines(documents)
        return _one_side(documents, split, self._cut)

    def _read(self, files: list[Path]) -> Iterator[str]:
        return itertools.chain.from_iterable(_read_documents(path, self.text_key) for path in files)

    @functools.cached_property
    def _is_single(self) -> bool:
        """Whether all documents are the same one; reads up to the first that differs."""
        documents = self._read(self.files("train"))
        first = next(documents, None)
        return all(document == first for document in documents)

    @functools.cached_property
    def _cut(self) -> int:
        files = self.files("train")
        small = sum(path.stat().st_size for path in files) <= SMALL_BYTES
        documents = self._read(files)
        if self._is_single:
            documents = _nonempty_lines(documents)
        return _cut_between(documents if small else None, self.validation_fraction, self.name)


@dataclasses.dataclass(frozen=True)
class TFDS:
    """A prepared TensorFlow Datasets data set, read without TensorFlow.

    ArrayRecord files are read through `as_data_source`, TFRecord files by the few lines below.

    Attributes:
      dataset: a name ("c4/en", "wiki40b/ko:1.3.0") or the directory with dataset_info.json.
      text_key: the feature that holds the text.
      data_dir: where prepared data sets lie; None is TFDS's own default.
      download: download and prepare it if it isn't there. Some builders need TensorFlow for that.
      validation_fraction: how much of "train" is held out if there is no "validation" split.
    """

    dataset: str
    text_key: str = "text"
    data_dir: str | None = None
    download: bool = False
    validation_fraction: float = 0.05

    def __post_init__(self):
        check_fraction(self.validation_fraction)

    @property
    def name(self) -> str:
        return self.builder.info.full_name

    @functools.cached_property
    def builder(self):
        """The opened `tfds.core.DatasetBuilder`.

        Raises:
          FileNotFoundError: the data set isn't prepared here (and `download` is off).
          ValueError: it has no "train" split or no such text feature, or can't be downloaded.
        """
        builder = open_tfds(self.dataset, self.data_dir, self.download)
        if "train" not in builder.info.splits:
            raise ValueError(
                f"{self.dataset} has no train split, only {sorted(builder.info.splits)}"
            )
        texts = [
            name
            for name, feature in builder.info.features.items()
            if feature.shape == () and feature.np_dtype in (object, str)
        ]
        if self.text_key not in texts:
            raise ValueError(
                f"{self.dataset} has no text feature {self.text_key!r}: "
                f"set text_key to one of {texts}"
            )
        return builder

    @property
    def splits(self) -> tuple[str, ...]:
        return tuple(sorted({*self.builder.info.splits, "validation"}))

    def fingerprint(self, split: str) -> str:
        held_out = self._held_out(split) and (split, self.validation_fraction)
        paths = self._split_info(split).filepaths
        return digest("TFDS 1", self.text_key, held_out, content_hash(paths))

    def num_documents(self, split: str) -> int | None:
        return None if self._held_out(split) else self._split_info(split).num_examples

    def documents(self, split: str, shard: int = 0, shards: int = 1) -> Iterator[str]:
        """One of `shards` disjoint parts.

        Raises:
          ValueError: the file format can't be read, a file isn't whole, or the split is empty.
        """
        documents = self._read(split, shard, shards)
        if self._held_out(split):
            documents = _one_side(documents, split, self._cut)
        if shards == 1:
            documents = _not_empty(documents, split, self.name)
        return documents

    def _held_out(self, split: str) -> bool:
        _check_split(split, self.splits, self.name)
        return "validation" not in self.builder.info.splits and split in ("train", "validation")

    def _split_info(self, split: str):
        return self.builder.info.splits["train" if self._held_out(split) else split]

    @functools.cached_property
    def _cut(self) -> int:
        small = self.builder.info.splits["train"].num_bytes <= SMALL_BYTES
        documents = self._read("train", 0, 1) if small else None
        return _cut_between(documents, self.validation_fraction, self.name)

    def _read(self, split: str, shard: int, shards: int) -> Iterator[str]:
        info, features = self._split_info(split), self.builder.info.features
        if self.builder.info.file_format.value == "tfrecord":
            # Whole files to a shard where there are enough of them, as for text files.
            by_file = shards <= len(info.filepaths)
            paths = info.filepaths[shard::shards] if by_file else info.filepaths
            records = (record for path in paths for record in tfrecords(Path(path)))
            if not by_file:
                records = itertools.islice(records, shard, None, shards)
            examples = map(features.deserialize_example_np, records)
        else:
            records = random_access(self.builder, info.name, self.dataset)
            examples = _in_chunks(records, shard, shards)
        for example in examples:
            if text := example[self.text_key].decode("utf-8", "replace").strip():
                yield text


def random_access(builder, split: str, name: str):
    """A split of a prepared `tfds.core.DatasetBuilder` as a sequence of examples.

    Raises:
      ValueError: the file format of the data set, `name`, has none; TFDS has it for ArrayRecord.
    """
    try:
        return builder.as_data_source(split)
    except NotImplementedError as error:
        raise ValueError(
            f"{name} is stored as {builder.info.file_format.value}: prepare it with"
            " file_format='array_record'"
        ) from error


def open_tfds(dataset: str, data_dir: str | None, download: bool):
    """The opened `tfds.core.DatasetBuilder` of a name or a prepared directory.

    Raises:
      FileNotFoundError: the data set isn't prepared here (and `download` is off).
      ValueError: it is remote, or can't be downloaded and prepared.
    """
    import tensorflow_datasets as tfds  # half a second: only who reads TFDS pays it

    if "://" in dataset:
        raise ValueError(f"{dataset} is remote: mount it (gcsfuse) or copy it, and give that path")
    if (Path(dataset).expanduser() / "dataset_info.json").exists():
        with quiet_tfds():
            return tfds.builder_from_directory(str(Path(dataset).expanduser()))
    # A builder made by name may look for the data on the network and retry for minutes; one found
    # among the files does not, and needs no code of the data set's own.
    try:
        with quiet_tfds():
            return tfds.core.read_only_builder.builder_from_files(dataset, data_dir=data_dir)
    except tfds.core.registered.DatasetNotFoundError as error:
        if not download:
            where = data_dir or tfds.core.constants.DATA_DIR
            raise FileNotFoundError(
                f"no prepared TFDS data set {dataset} in {where}: set tfds_data_dir to where it "
                "is, give the directory that holds dataset_info.json, or set tfds_download"
            ) from error
    try:
        builder = tfds.builder(dataset, data_dir=data_dir)
        builder.download_and_prepare(file_format="array_record")
    except Exception as error:  # whatever a builder's own code or the network can raise
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise ValueError(
            f"cannot download and prepare {dataset} ({reason}); if its builder needs TensorFlow, "
            "as c4's does: pip install 'lmjax[tensorflow]'"
        ) from error
    return builder


@contextlib.contextmanager
def quiet_tfds() -> Iterator[None]:
    """TFDS logs its every step through absl; only warnings and errors are for the user."""
    absl_logger = logging.getLogger("absl")
    level = absl_logger.level
    absl_logger.setLevel(logging.WARNING)
    try:
        yield
    finally:
        absl_logger.setLevel(level)


def _in_chunks(examples, shard: int, shards: int) -> Iterator[dict]:
    """A contiguous part of a random-access data set, some examples at a time."""
    start, stop = (len(examples) * i // shards for i in (shard, shard + 1))
    for begin in range(start, stop, 256):
        yield from examples.__getitems__(range(begin, min(begin + 256, stop)))


def tfrecords(path: Path) -> Iterator[bytes]:
    """The records of a TFRecord file, each between a uint64 length and two uint32 checksums."""
    with open(path, "rb") as file:
        while header := file.read(12):
            length = struct.unpack("<Q", header[:8])[0] if len(header) == 12 else 0
            record = file.read(length)
            if len(header) < 12 or len(record) < length or len(file.read(4)) < 4:
                raise ValueError(f"{path} ends in the middle of a record: copy or prepare it again")
            yield record


def _matching(patterns: tuple[str, ...]) -> list[Path]:
    """The files that match, sorted; each pattern must match some."""
    matched = set()
    for pattern in patterns:
        expanded = os.path.expanduser(pattern)
        found = [expanded] if os.path.isfile(expanded) else glob.glob(expanded, recursive=True)
        files = [Path(path) for path in found if os.path.isfile(path)]
        if not files:
            hint = f": it is a directory, write {pattern.rstrip('/')}/**" if found else ""
            raise FileNotFoundError(f"no file matches {pattern!r} in {os.getcwd()}{hint}")
        matched.update(files)
    return sorted(matched)


def _is_json(path: Path) -> bool:
    return path.name.lower().removesuffix(".gz").endswith((".jsonl", ".json", ".ndjson"))


def _read_documents(path: Path, text_key: str) -> Iterator[str]:
    lines = _lines(path)
    documents = _json_texts(lines, path, text_key) if _is_json(path) else _blocks(lines)
    return (stripped for document in documents if (stripped := document.strip()))


def _lines(path: Path) -> Iterator[str]:
    """Decoded lines with their ends; a byte order mark is dropped."""
    offset = 0
    try:
        with open(path, "rb") as file:
            gzipped = file.read(2) == b"\x1f\x8b"
            file.seek(0)
            for line in gzip.open(file) if gzipped else file:
                yield line.decode("utf-8-sig" if offset == 0 else "utf-8")
                offset += len(line)
    except UnicodeDecodeError as error:
        raise ValueError(
            f"{path} is not UTF-8 at byte {offset + error.start}: convert it (iconv -t UTF-8) "
            "or leave it out"
        ) from error
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise ValueError(f"{path} is a truncated or damaged gzip file: fetch it again") from error
    except OSError as error:
        raise OSError(error.errno, f"cannot read the text file: {error.strerror}", path) from error


def _blocks(lines: Iterator[str]) -> Iterator[str]:
    """Blocks between blank lines, cut at a line end once they exceed `BLOCK_CHARACTERS`.

    A single line longer than that is cut too, after a space where it has one.
    """
    block, size = [], 0
    for line in itertools.chain.from_iterable(map(_short, lines)):
        if line.isspace() or size >= BLOCK_CHARACTERS:
            yield "".join(block)
            block, size = [], 0
        block.append(line)
        size += len(line)
    yield "".join(block)


def _nonempty_lines(documents: Iterator[str]) -> Iterator[str]:
    for document in documents:
        yield from (stripped for line in document.splitlines() if (stripped := line.strip()))


def _short(line: str) -> Iterator[str]:
    start = 0
    while len(line) - start > BLOCK_CHARACTERS:
        end = line.rfind(" ", start, start + BLOCK_CHARACTERS) + 1 or start + BLOCK_CHARACTERS
        yield line[start:end]
        start = end
    yield line[start:]


def _json_texts(lines: Iterator[str], path: Path, text_key: str) -> Iterator[str]:
    for number, line in enumerate(lines, 1):
        if line.isspace():
            continue
        where = f"line {number} of {path}"
        try:
            fields = json.loads(line)
        except json.JSONDecodeError as error:
            raise ValueError(f"{where} is not JSON ({error.msg}): expected one object") from error
        if not isinstance(fields, dict):
            raise ValueError(f"{where} holds a {type(fields).__name__}: expected one JSON object")
        text = fields.get(text_key)
        if not isinstance(text, str):
            raise ValueError(
                f"{where} has no text under {text_key!r}: set text_key to one of {sorted(fields)}"
            )
        # JSON may spell half of a surrogate pair, which no UTF-8 text can hold.
        yield text.encode("utf-8", "replace").decode()


def document_hash(text: str) -> int:
    """64 uniform bits that decide on which side of a held-out split a document falls."""
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little")


def _one_side(documents: Iterator[str], split: str, cut: int) -> Iterator[str]:
    """Documents hashed below `cut` are validation, the others train."""
    validation = split == "validation"
    return (text for text in documents if (document_hash(text) < cut) == validation)


def _cut_between(documents: Iterator[str] | None, fraction: float, name: str) -> int:
    """The hash that holds out `fraction`; moved, given few documents, so that no side is empty."""
    cut = int(fraction * 2**64)
    if documents is None:
        return cut
    hashes = sorted({document_hash(text) for text in documents})
    if not hashes:
        raise ValueError(f"{name} holds no text: every file is empty")
    if len(hashes) == 1:
        raise ValueError(
            f"{name} holds one line or document only, so there is none to hold out as its "
            "validation split: give more text, or validation files"
        )
    return min(max(cut, hashes[0] + 1), hashes[-1])


def _not_empty(documents: Iterator[str], split: str, name: str) -> Iterator[str]:
    empty = True
    for text in documents:
        empty = False
        yield text
    if empty:
        raise ValueError(f"the {split} split of {name} holds no text")


def _check_split(split: str, splits: tuple[str, ...], name: str) -> None:
    if split not in splits:
        raise ValueError(f"{name} has no split {split!r}, only {list(splits)}")


def check_fraction(fraction: float) -> None:
    """Raises ValueError for a share of validation that leaves nothing on one side."""
    if not 0 < fraction < 1:
        raise ValueError(f"validation_fraction is {fraction}, not between 0 and 1")


def digest(*parts) -> str:
    """A hash of what JSON can say."""
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()


def content_hash(paths) -> str:
    """A hash of the files' contents in order, whatever their names; of huge ones, of samples."""
    return _content_hash(_stamps(paths))


def _stamps(paths) -> tuple[tuple[str, int, int], ...]:
    """Path, size and time of change: a content hash is computed once while these stay the same."""
    stats = [(os.fspath(path), os.stat(path)) for path in paths]
    return tuple((path, stat.st_size, stat.st_mtime_ns) for path, stat in stats)


@functools.lru_cache(maxsize=64)
def _content_hash(stamps: tuple[tuple[str, int, int], ...]) -> str:
    """Hashes contents in order, whatever the names: whole, or by 64 samples a file when huge."""
    whole = sum(size for _, size, _ in stamps) <= HASH_WHOLE_BYTES
    hashes = []
    for path, size, _ in stamps:
        with open(path, "rb") as file:
            hashes.append((size, _whole(file) if whole else _sampled(file, size)))
    return digest(hashes)


def _whole(file) -> str:
    return hashlib.file_digest(file, "sha256").hexdigest()


def _sampled(file, size: int, samples: int = 64, length: int = 1 << 16) -> str:
    sampled = hashlib.sha256()
    for i in range(samples):
        file.seek(max(0, size - length) * i // (samples - 1))
        sampled.update(file.read(length))
    return sampled.hexdigest()

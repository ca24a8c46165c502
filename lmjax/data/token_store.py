"""A corpus tokenized once: a directory of memory-mapped arrays, read at any place at no cost.

    tokens.bin    every document's ids one after the other, uint16 where the vocabulary fits
    offsets.bin   int64: document i is tokens[offsets[i] : offsets[i + 1]]
    meta.json     counts, dtype, what it was made from, SHA-256 of tokens.bin

Documents hold no EOS: objectives add it (T5 joins documents without a separator). The directory
appears whole or not at all, and processes that start at once on one machine build it once.
"""

import dataclasses
import hashlib
import json
import os
import shutil
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

from lmjax.data import cache

# Documents go to the tokenizer in groups of this many characters: enough to keep its threads busy,
# little enough that memory stays bounded however large the corpus is.
GROUP_CHARACTERS = 4_000_000
GROUP_DOCUMENTS = 4_096


class Tokenizer(Protocol):
    """What this package needs of a tokenizer."""

    vocab_size: int
    sha256: str

    def encode_batch(self, texts: list[str]) -> list[np.ndarray]: ...


@dataclasses.dataclass(frozen=True)
class Ended:
    """A tokenizer for a corpus whose documents shall end with EOS."""

    tokenizer: Any

    @property
    def vocab_size(self) -> int:
        return self.tokenizer.vocab_size

    @property
    def sha256(self) -> str:
        return hashlib.sha256(f"{self.tokenizer.sha256} ended".encode()).hexdigest()

    def encode_batch(self, texts: list[str]) -> list[np.ndarray]:
        encoded = self.tokenizer.encode_batch(texts)
        return [np.append(ids, np.int32(self.tokenizer.eos_id)) for ids in encoded]


class DamagedStore(ValueError):
    """A token store that can't be used as it is."""


class TokenizedDocuments:
    """Documents' tokens one after the other.

    Attributes:
        tokens: `[tokens]` integers.
        offsets: `[documents + 1]`: document i is `tokens[offsets[i] : offsets[i + 1]]`.
    """

    def __init__(self, tokens: np.ndarray, offsets: np.ndarray):
        self.tokens, self.offsets = tokens, offsets

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def document(self, index: int) -> np.ndarray:
        """The tokens of document `index`."""
        return self.tokens[self.offsets[index] : self.offsets[index + 1]]


class TokenStore(TokenizedDocuments):
    """An opened store. Pickles as its path, so worker processes map the same file.

    Attributes:
        directory: where it is.
        tokens: `[tokens]` uint16 or uint32, memory-mapped.
        offsets: `[documents + 1]` int64, memory-mapped.
        fingerprint: of the text it was made from, as given to `build_token_store`.
        tokenizer_sha256: of the tokenizer it was made with.

    Raises:
        FileNotFoundError: there is no store in `directory`.
        DamagedStore: the files are damaged or do not have the sizes that meta.json gives.
    """

    def __init__(self, directory: str | os.PathLike):
        self.directory = Path(directory)
        if not self.directory.is_dir():
            raise FileNotFoundError(f"no token store in {self.directory}: build it first")
        try:
            meta = json.loads((self.directory / "meta.json").read_text())
            self.fingerprint: str = meta["fingerprint"]
            self.tokenizer_sha256: str = meta["tokenizer_sha256"]
            self.tokens = _mapped(self.directory / "tokens.bin", meta["dtype"], meta["tokens"])
            self.offsets = _mapped(self.directory / "offsets.bin", "int64", meta["documents"] + 1)
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise DamagedStore(f"the token store {self.directory} is damaged: {error}") from error

    def __reduce__(self):
        return TokenStore, (self.directory,)


def store_directory(fingerprint: str, tokenizer: Tokenizer) -> Path:
    """Where the cache keeps the store of this text under this tokenizer."""
    name = hashlib.sha256(f"{fingerprint} {tokenizer.sha256}".encode()).hexdigest()[:24]
    return cache.cache_dir() / "token_stores" / name


def build_token_store(
    documents: Iterable[str],
    tokenizer: Tokenizer,
    directory: str | os.PathLike,
    fingerprint: str,
    *,
    total: int | None = None,
    progress: bool = True,
) -> TokenStore:
    """Open the store in `directory`, tokenizing `documents` into it where it is not there yet.

    A damaged store is reported and built again. A second process that asks for the same directory
    waits for the first and uses its result.

    Args:
        documents: read once, in order, and only if there is something to build.
        tokenizer: its `encode_batch` gets documents in groups of about four million characters.
        directory: usually `store_directory(fingerprint, tokenizer)`.
        fingerprint: a content hash of the documents.
        total: how many documents there are, if known, for the time left.
        progress: show a bar while it runs.

    Raises:
        ValueError: the documents hold no text at all, or `directory` holds a store of other text or
            of another tokenizer.
        OSError: no space is left; nothing is left behind.
    """
    directory = Path(directory)
    with cache.lock(directory):
        if directory.exists():
            try:
                return _matching(TokenStore(directory), tokenizer, fingerprint)
            except DamagedStore as error:
                print(f"{error}; building it again")
                shutil.rmtree(directory)
        with cache.atomic_directory(directory) as temporary:
            _write(documents, tokenizer, temporary, fingerprint, total, progress)
        return TokenStore(directory)


def first_documents(
    documents: Iterable[str], tokenizer: Tokenizer, tokens: int
) -> TokenizedDocuments:
    """As many documents as make up `tokens` tokens, or all there are, tokenized in memory."""
    encoded, count = [np.zeros(0, np.int32)], 0
    for group in document_groups(documents, GROUP_CHARACTERS // 20):
        encoded += tokenizer.encode_batch(group)
        count += sum(map(len, encoded[-len(group) :]))
        if count >= tokens:
            break
    return TokenizedDocuments(np.concatenate(encoded), np.cumsum([len(ids) for ids in encoded]))


def document_groups(
    documents: Iterable[str], characters: int = GROUP_CHARACTERS
) -> Iterator[list[str]]:
    """Documents in lists of about `characters` each, for `encode_batch`."""
    group, size = [], 0
    for document in documents:
        group.append(document)
        size += len(document)
        if size >= characters or len(group) == GROUP_DOCUMENTS:
            yield group
            group, size = [], 0
    if group:
        yield group


def _write(
    documents: Iterable[str],
    tokenizer: Tokenizer,
    directory: Path,
    fingerprint: str,
    total: int | None,
    progress: bool,
) -> None:
    dtype = np.dtype(np.uint16 if tokenizer.vocab_size <= 2**16 else np.uint32)
    count, tokens, digest = 0, 0, hashlib.sha256()
    columns = (
        TextColumn("tokenizing"),
        BarColumn(),
        TextColumn("{task.completed:,} documents, {task.fields[rate]:,.0f}/s,"),
        TextColumn("{task.fields[tokens]:,} tokens"),
        TimeRemainingColumn(),
    )
    began = time.monotonic()
    with (
        open(directory / "tokens.bin", "wb") as tokens_file,
        open(directory / "offsets.bin", "wb") as offsets_file,
        Progress(*columns, transient=True, disable=not progress) as bar,
    ):
        task = bar.add_task("", total=total, rate=0.0, tokens=0)
        offsets_file.write(np.zeros(1, np.int64).tobytes())
        for group in document_groups(documents):
            encoded = tokenizer.encode_batch(group)
            data = np.concatenate(encoded).astype(dtype).tobytes()
            tokens_file.write(data)
            digest.update(data)
            ends = tokens + np.cumsum([len(ids) for ids in encoded], dtype=np.int64)
            offsets_file.write(ends.tobytes())
            count, tokens = count + len(group), int(ends[-1])
            rate = count / (time.monotonic() - began)
            bar.update(task, completed=count, rate=rate, tokens=tokens)
    if tokens == 0:
        raise ValueError(
            f"there is nothing to train on: the source holds {count:,} documents without any "
            "text; check its paths and its split"
        )
    meta = {
        "fingerprint": fingerprint,
        "tokenizer_sha256": tokenizer.sha256,
        "dtype": dtype.name,
        "documents": count,
        "tokens": tokens,
        "tokens_sha256": digest.hexdigest(),
    }
    (directory / "meta.json").write_text(json.dumps(meta, indent=2))


def _mapped(path: Path, dtype: str, length: int) -> np.ndarray:
    """A plain array over the file: slicing `np.memmap` objects costs several times as much."""
    expected, found = length * np.dtype(dtype).itemsize, path.stat().st_size
    if found != expected:
        raise ValueError(f"{path.name} has {found:,} bytes, meta.json says {expected:,}")
    return np.memmap(path, dtype, "r").view(np.ndarray)


def _matching(store: TokenStore, tokenizer: Tokenizer, fingerprint: str) -> TokenStore:
    found = (store.fingerprint, store.tokenizer_sha256)
    if found != (fingerprint, tokenizer.sha256):
        raise ValueError(
            f"{store.directory} holds the tokens of another text or another tokenizer: choose "
            "another directory or delete this one"
        )
    return store

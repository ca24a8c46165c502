"""Batches from a source too large to tokenize first: positions in it instead of random access.

The source is read as a fixed number of logical shards. Every step takes the same number of rows
from each, whatever hosts there are, so the global batch is a function of (seed, step) here as well.
Within a shard documents are joined and cut into windows, and windows are shuffled within blocks
only: the order of the source shows at longer distances, so shuffle the source itself if it is
sorted. Epochs of a shard follow each other without a gap.

What it costs, against a token store: text is tokenized again every epoch, on the host that trains;
the first batch waits for one block of every shard (16 x 128 windows of 568 are 1.2 million tokens);
resuming reads, but does not tokenize, the documents of the current epoch up to the position, then
tokenizes up to one block per shard again.
"""

import dataclasses
import itertools
from collections.abc import Iterator, Mapping
from typing import Any, Protocol

import numpy as np

from lmjax.data.batches import (
    Batch,
    Objective,
    assemble,
    check_seed,
    host_rows,
    in_background,
    noise,
    shuffled,
)
from lmjax.data.token_store import Tokenizer, document_groups

# Little enough that the first batch does not wait long for text that it does not need.
GROUP_CHARACTERS = 200_000

BEGINNING = {"epoch": 0, "document": 0, "offset": 0}


class Source(Protocol):
    """Text in documents; each shard always yields the same ones in the same order."""

    def documents(self, split: str, shard: int = 0, shards: int = 1) -> Iterator[str]: ...


@dataclasses.dataclass(frozen=True)
class StreamingBatches:
    """Endless batches from `source`; the same contract as `IndexedBatches`.

    A position holds the step and, for each shard that this host reads, where its current block
    begins; `joined_positions` makes one of those of several hosts. A shard that is missing in it is
    read, and tokenized, from its start again, which gives the same batches later.

    Attributes:
        source, split: where the text comes from.
        tokenizer: its `encode_batch` may use threads of its own; there are no worker processes.
        window: tokens per example.
        objective, lengths, batch_size, seed, process_index, process_count: as `IndexedBatches`.
        shards: logical shards, part of what a run is. It must divide the batch; where the hosts
            divide it, no host reads another's text.
        shuffle_block: windows per shard among which order is shuffled; they are held in memory.

    Raises:
        ValueError: the batch does not divide over the hosts or the shards, or the seed is out of
            range. While running: a shard holds less than one window, or ends before a position.
    """

    source: Source
    split: str
    tokenizer: Tokenizer
    window: int
    objective: Objective
    lengths: Mapping[str, int]
    batch_size: int
    seed: int
    shards: int = 16
    shuffle_block: int = 128
    process_index: int = 0
    process_count: int = 1

    def __post_init__(self):
        host_rows(self.batch_size, self.process_index, self.process_count)
        check_seed(self.seed)
        if self.batch_size % self.shards:
            raise ValueError(
                f"a batch of {self.batch_size} rows does not divide over {self.shards} shards: "
                f"choose a multiple of {self.shards} or another number of shards"
            )

    def start(self, position: dict[str, Any] | None) -> Iterator[tuple[Batch, dict[str, Any]]]:
        """Yields (this host's rows, position after them), made ahead by a thread."""
        return in_background(self._batches(position or {"step": 0, "shards": {}}))

    def _batches(self, position: dict[str, Any]) -> Iterator[tuple[Batch, dict[str, Any]]]:
        mine = host_rows(self.batch_size, self.process_index, self.process_count)
        # Shard s fills rows s * per_shard ... (s + 1) * per_shard - 1 of every batch.
        per_shard = self.batch_size // self.shards
        readers = {
            shard: self._windows(
                shard, position["step"] * per_shard, position["shards"].get(str(shard))
            )
            for shard in range(mine[0] // per_shard, mine[-1] // per_shard + 1)
        }
        for step in itertools.count(position["step"] + 1):
            examples, places = [], {}
            for shard, windows in readers.items():
                for row in range(shard * per_shard, (shard + 1) * per_shard):
                    index, tokens, places[str(shard)] = next(windows)
                    if row in mine:
                        examples.append([self.objective(tokens, noise(self.seed, shard, index))])
            yield assemble(examples, self.lengths), {"step": step, "shards": places}

    def _windows(
        self, shard: int, first: int, place: dict[str, int] | None
    ) -> Iterator[tuple[int, np.ndarray, dict[str, int]]]:
        """Windows of a shard from number `first` on, whose block begins at `place`.

        Yields (number, tokens, the place where the block of the *next* window begins).
        """
        size = self.shuffle_block
        first_block = first // size if place else 0
        place = place or BEGINNING
        documents = self._documents(shard, place)
        epoch, document, ids = next(documents)
        offset = place["offset"]
        for block in itertools.count(first_block):
            tokens, filled = np.empty(size * self.window, np.int32), 0
            while True:
                part = ids[offset : offset + len(tokens) - filled]
                tokens[filled : filled + len(part)] = part
                filled, offset = filled + len(part), offset + len(part)
                if filled == len(tokens):
                    break
                (epoch, document, ids), offset = next(documents), 0
            next_place = {"epoch": epoch, "document": document, "offset": offset}
            windows = tokens.reshape(size, self.window)
            # Blocks before `first` are only passed through: there was no place to start from.
            for index in range(max(first, block * size), (block + 1) * size):
                window = windows[shuffled(index % size, size, self.seed, shard, block)]
                yield index, window, next_place if (index + 1) % size == 0 else place
            place = next_place

    def _documents(
        self, shard: int, place: dict[str, int]
    ) -> Iterator[tuple[int, int, np.ndarray]]:
        """Endless (epoch, document, tokens) from a place on; earlier ones are only read."""
        skip = place["document"]
        for epoch in itertools.count(place["epoch"]):
            texts = iter(self.source.documents(self.split, shard, self.shards))
            skipped = sum(1 for _ in itertools.islice(texts, skip))
            if skipped < skip:
                raise ValueError(
                    f"shard {shard} of {self.shards} ends after {skipped:,} documents and the run "
                    f"was at document {skip:,}: resume with the source that the run began with"
                )
            document, tokens = skip, 0
            for group in document_groups(texts, GROUP_CHARACTERS):
                for ids in self.tokenizer.encode_batch(group):
                    yield epoch, document, ids
                    document, tokens = document + 1, tokens + len(ids)
            if tokens < self.window and skip == 0:
                raise ValueError(
                    f"shard {shard} of {self.shards} of the {self.split} text has {tokens:,} "
                    f"tokens and one example takes {self.window:,}: add text, or choose fewer "
                    "shards or shorter inputs"
                )
            skip = 0

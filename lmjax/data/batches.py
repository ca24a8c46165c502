"""Deterministic batches over a token store: the global batch is a function of (seed, step).

Nothing else enters: not the number of hosts, of worker processes or of restarts. Row r of step n is
row number n * batch_size + r of an endless sequence in which each epoch is a permutation of all
rows, computed index by index, so that starting at step 1,000,000 costs what starting at 0 does; or
all rows in their order, where each goes on where the one `batch_size` before it ended. The noise of
an example is drawn from (seed, epoch, example).
"""

import collections
import contextlib
import dataclasses
import functools
import itertools
import signal
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from multiprocessing import resource_tracker
from typing import Any, Protocol

import grain
import numpy as np
from absl import flags

from lmjax.data.token_store import TokenizedDocuments

Batch = dict[str, np.ndarray]
Objective = Callable[[Any, np.random.Generator], Mapping[str, np.ndarray]]
Collate = Callable[[Sequence[Sequence[Mapping[str, np.ndarray]]], Mapping[str, int]], Batch]


class Batches(Protocol):
    """What a training loop needs of its data."""

    batch_size: int  # of the global batch, in rows

    def start(self, position: dict[str, Any] | None) -> Iterator[tuple[Batch, dict[str, Any]]]:
        """Yields this host's rows of each next batch and the JSON-able position *after* it.

        `position` is one that was yielded before, or None for the beginning.
        """
        ...


class Rows(Protocol):
    """Which stretches of a corpus share a row, at random access; picklable. A row may be empty."""

    def __len__(self) -> int: ...

    def row(self, index: int) -> list[tuple[int, np.ndarray]]:
        """The (example number, tokens or what else the objective reads) that make up row `index`;
        each will be one segment."""
        ...


class Windows:
    """T5's rows: documents joined end to end, cut every `window` tokens; window i is row i.

    At most `window` - 1 tokens at the end of the corpus are left over.

    Args:
        store: the corpus, usually a `TokenStore`.
        window: tokens of a row.
        split: the corpus's name in errors.

    Raises:
        ValueError: the store holds less than one window.
    """

    def __init__(self, store: TokenizedDocuments, window: int, split: str = "train"):
        self.store, self.window = store, window
        check_enough(len(store.tokens), window, split)

    def __len__(self) -> int:
        return len(self.store.tokens) // self.window

    def row(self, index: int) -> list[tuple[int, np.ndarray]]:
        start = index * self.window
        return [(index, self.store.tokens[start : start + self.window])]


@dataclasses.dataclass(frozen=True)
class IndexedBatches:
    """Noised, endless batches over `rows`, usually shuffled; see the module docstring.

    Attributes:
        rows: `Windows`, `PackedDocuments`, `FullSentences`, `SentencePairs` or `Lanes`.
        objective: (tokens, rng) -> 1-D `inputs` and `targets`; picklable, such as
            `functools.partial(span_corruption, sentinels=...)`.
        lengths: the fixed lengths of `inputs` and `targets` in a batch.
        batch_size: rows of the global batch.
        seed: of order and noise, from 0 to 2**63 - 1.
        static: an example's noise is the same in every epoch.
        ordered: the rows come in their order.
        workers: processes that prepare batches ahead (the calling script then needs the
            `if __name__ == "__main__"` guard); 0 is one thread of this process, which is enough
            until examples take longer to make than steps.
        process_index, process_count: which of how many hosts this is; each reads its own
            contiguous rows of the global batch.
        collate: (rows of examples, lengths) -> batch; None is `assemble`.

    Raises:
        ValueError: the batch does not divide over the hosts, or a number is out of range.
    """

    rows: Rows
    objective: Objective
    lengths: Mapping[str, int]
    batch_size: int
    seed: int
    static: bool = False
    ordered: bool = False
    workers: int = 0
    process_index: int = 0
    process_count: int = 1
    collate: Collate | None = None

    def __post_init__(self):
        host_rows(self.batch_size, self.process_index, self.process_count)
        check_seed(self.seed)
        if self.workers < 0:
            raise ValueError(f"workers must not be negative, got {self.workers}")

    def batch(self, step: int) -> Batch:
        """This host's rows of the batch of `step`, counted from 0."""
        mine = host_rows(self.batch_size, self.process_index, self.process_count)
        examples = []
        for row in mine:
            epoch, place = divmod(step * self.batch_size + row, len(self.rows))
            index = place
            if not self.ordered:
                index = shuffled(place, len(self.rows), self.seed, epoch)
            stream = 0 if self.static else epoch
            examples.append(_noised(self.rows, index, self.objective, self.seed, stream))
        return (self.collate or assemble)(examples, self.lengths)

    def start(self, position: dict[str, Any] | None) -> Iterator[tuple[Batch, dict[str, Any]]]:
        """Yields (this host's rows, position after them); a position is `{"step": n}`."""
        first = position["step"] if position else 0
        if self.workers:
            batches = self._from_workers(first)
        else:
            batches = in_background(map(self.batch, itertools.count(first)))
        for step, batch in enumerate(batches, first + 1):
            yield batch, {"step": step}

    def _from_workers(self, first: int) -> Iterator[Batch]:
        if not flags.FLAGS.is_parsed():  # Grain reads absl flags, which only absl scripts parse.
            flags.FLAGS.mark_as_parsed()
        # Worker i makes steps i, i + workers, ...; Grain hands them out in order.
        steps = grain.MapDataset.range(first, 2**60).map(self.batch)
        batches = steps.to_iter_dataset(grain.ReadOptions(num_threads=1, prefetch_buffer_size=2))
        with _interrupts_blocked():
            iterator = iter(batches.mp_prefetch(grain.MultiprocessingOptions(self.workers)))
        try:
            with _interrupts_blocked():  # asking for the first batch starts the processes
                first_batch = next(iterator)
            yield first_batch
            yield from iterator
        finally:
            iterator.close()


def evaluation_batches(
    rows: Rows,
    objective: Objective,
    lengths: Mapping[str, int],
    batch_size: int,
    *,
    limit: int | None = None,
    seed: int = 0,
    process_index: int = 0,
    process_count: int = 1,
    collate: Collate | None = None,
) -> list[Batch]:
    """All rows once, in order, with the same noise each time; this host's part of each batch.

    The last batch is filled up with empty rows, whose `loss_weights` are 0.

    Args:
        limit: make no more than this many batches.
        The others are as in `IndexedBatches`.

    Raises:
        ValueError: the batch does not divide over the hosts, or a number is out of range.
    """
    mine = host_rows(batch_size, process_index, process_count)
    check_seed(seed)
    if limit is not None and limit < 1:
        raise ValueError(f"{limit} evaluation batches are no evaluation: make 1 or more")
    batches = []
    for start in range(0, len(rows), batch_size)[:limit]:
        indices = [start + row for row in mine]
        examples = [
            _noised(rows, index, objective, seed, epoch=0) if index < len(rows) else []
            for index in indices
        ]
        batches.append((collate or assemble)(examples, lengths))
    return batches


def joined_positions(positions: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """The position of a run from those of its hosts after the same step."""
    joined: dict[str, Any] = {}
    for position in positions:
        for name, value in position.items():
            # What each host knows of its own shards is put together; the rest is the same.
            joined[name] = {**joined.get(name, {}), **value} if isinstance(value, dict) else value
    return joined


def assemble(
    rows: Sequence[Sequence[Mapping[str, np.ndarray]]], lengths: Mapping[str, int]
) -> Batch:
    """Rows of examples as arrays of fixed shape.

    Args:
        rows: per row its examples, which become segments 1, 2, ... with positions from 0 each, or
            with those that an example has as `targets_positions`.
        lengths: S of `inputs` and T of `targets`; of what belongs to each input, such as
            `inputs_order`, S again.

    Returns:
        `inputs`, `inputs_positions`, `inputs_segment_ids` [B, S], the same for `targets` [B, T],
        all int32 with 0 for padding, and float32 `loss_weights` [B, T], 1 where there is a target.
        Arrays that belong to each input have neither positions nor segments of their own.

    Raises:
        ValueError: the examples of a row do not fit into `lengths`.
    """
    batch = {}
    for name, length in lengths.items():
        ids, positions, segments = (np.zeros((len(rows), length), np.int32) for _ in range(3))
        counted = np.arange(length, dtype=np.int32)
        for row, examples in enumerate(rows):
            end = 0
            for segment, example in enumerate(examples, 1):
                start, end = end, end + len(example[name])
                if end > length:
                    raise ValueError(
                        f"a row of {length:,} {name} can't hold {end:,}: choose a shorter window "
                        f"or longer {name}"
                    )
                ids[row, start:end] = example[name]
                own = example.get(f"{name}_positions")
                positions[row, start:end] = counted[: end - start] if own is None else own
                segments[row, start:end] = segment
        batch[name] = ids
        if not any(name.startswith(f"{other}_") for other in lengths):
            batch[f"{name}_positions"] = positions
            batch[f"{name}_segment_ids"] = segments
    batch["loss_weights"] = (batch["targets_segment_ids"] > 0).astype(np.float32)
    return batch


def check_enough(tokens: int, window: int, split: str) -> None:
    """Raises ValueError for a text that makes no example."""
    if tokens < window:
        raise ValueError(
            f"the {split} text has {tokens:,} tokens and one example takes {window:,}: add text or"
            " choose shorter inputs"
        )


def check_seed(seed: int) -> None:
    """Raises ValueError for a seed that noise and shuffling cannot be drawn from."""
    if not 0 <= seed < 2**63:
        raise ValueError(f"the seed is {seed}: choose one from 0 to 2**63 - 1")


def host_rows(batch_size: int, process_index: int, process_count: int) -> range:
    """The rows of the global batch that one host reads: contiguous, in the order of the hosts.

    Raises:
        ValueError: the batch does not divide over the hosts.
    """
    if batch_size < 1 or batch_size % process_count:
        raise ValueError(
            f"a batch of {batch_size} rows does not divide over {process_count} hosts: choose a "
            f"multiple of {process_count}"
        )
    count = batch_size // process_count
    return range(process_index * count, (process_index + 1) * count)


def shuffled(index: int, count: int, *seed: int) -> int:
    """Where `index` goes in the permutation of `count` things that belongs to `seed`.

    Grain computes it index by index, in about 3 microseconds; it takes milliseconds for the
    smallest counts, where a permutation is soon made whole.
    """
    if count < 2**14:
        return int(_permutation(count, seed)[index])
    return grain.experimental.index_shuffle(index, count - 1, _shuffle_seed(seed), rounds=4)


@functools.lru_cache(maxsize=64)
def _permutation(count: int, seed: tuple[int, ...]) -> np.ndarray:
    return np.random.default_rng(seed).permutation(count)


@functools.lru_cache(maxsize=64)
def _shuffle_seed(seed: tuple[int, ...]) -> int:
    return int(np.random.SeedSequence(seed).generate_state(1)[0])


def noise(seed: int, stream: int, example: int) -> np.random.Generator:
    """The randomness of one example, independent of that of every other (stream: the epoch).

    Philox's counter starts at a place of the example's own, 2**128 draws away from the next: no
    seeding by hashing, which would cost more than the noise itself.
    """
    key = np.array([seed, stream], np.uint64)
    counter = np.array([0, 0, example, 0], np.uint64)
    return np.random.Generator(np.random.Philox(key=key, counter=counter))


def _noised(
    rows: Rows, index: int, objective: Objective, seed: int, epoch: int
) -> list[Mapping[str, np.ndarray]]:
    return [objective(tokens, noise(seed, epoch, example)) for example, tokens in rows.row(index)]


@contextlib.contextmanager
def _interrupts_blocked() -> Iterator[None]:
    """Processes started here never see SIGINT, which Ctrl-C sends to all of a terminal's processes.

    They inherit the blocked signal, so that they are safe from their first instruction on. In this
    process an interrupt meanwhile is not lost: other threads take it, or it waits for the end.
    """
    resource_tracker.ensure_running()  # when Python starts it, it unblocks the signal
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def in_background(items: Iterator, ahead: int = 2) -> Iterator:
    """The endless `items`, each made up to `ahead` items early by a thread.

    What the thread raises is raised here; closing this iterator ends the thread.
    """
    pool = ThreadPoolExecutor(1, "batches")
    try:
        pending = collections.deque(pool.submit(next, items) for _ in range(ahead))
        while True:
            pending.append(pool.submit(next, items))
            yield pending.popleft().result()
    finally:
        pool.shutdown(cancel_futures=True)

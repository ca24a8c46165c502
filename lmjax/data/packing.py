"""Rows that hold several short documents, each a segment of its own.

`Windows` joins documents, as T5's pretraining does; here they stay apart: attention and positions
are per segment, so that no token sees another document.
"""

from collections.abc import Callable, Mapping

import numpy as np

from lmjax.data.token_store import TokenStore


class PackedDocuments:
    """Rows for `IndexedBatches`: pieces of documents, packed once by first fit.

    A document is cut every `window` tokens. Packing reads only the offsets, takes about two seconds
    and 24 MB per million pieces, and depends on nothing but the arguments; the rows are then
    permuted every epoch like any others.

    Args:
        store: the corpus.
        window: the longest piece in tokens.
        sizes: piece length -> lengths of its (inputs, targets), or upper bounds where they are
            random; `span_corruption_lengths` and its like. They must be those of the objective.
        lengths: of a row, `{"inputs": S, "targets": T}`.
        open_rows: how many unfinished rows a piece may choose from; more fills rows better.

    Raises:
        ValueError: one piece alone does not fit into a row.
    """

    def __init__(
        self,
        store: TokenStore,
        window: int,
        sizes: Callable[[int], tuple[int, int]],
        lengths: Mapping[str, int],
        open_rows: int = 32,
    ):
        self.store = store
        self.starts, self.piece_lengths = _pieces(np.asarray(store.offsets), window)
        capacity = (lengths["inputs"], lengths["targets"])
        # Lengths repeat: ask for the sizes of each once.
        distinct, inverse = np.unique(self.piece_lengths, return_inverse=True)
        table = np.array([sizes(int(length)) for length in distinct])
        for length, size in zip(distinct, table, strict=True):
            if (size > capacity).any():
                raise ValueError(
                    f"a piece of {length:,} tokens makes {size[0]:,} inputs and {size[1]:,} "
                    f"targets and a row holds {capacity[0]:,} and {capacity[1]:,}: choose a "
                    "shorter window or longer rows"
                )
        rows = first_fit(table[inverse], capacity, open_rows)
        # Row i holds the pieces members[ends[i - 1] : ends[i]], in the order of the corpus.
        self.members = np.argsort(rows, kind="stable")
        self.ends = np.cumsum(np.bincount(rows))

    def __len__(self) -> int:
        return len(self.ends)

    def row(self, index: int) -> list[tuple[int, np.ndarray]]:
        first = self.ends[index - 1] if index else 0
        return [
            (int(piece), self.store.tokens[start : start + length])
            for piece in self.members[first : self.ends[index]]
            for start, length in [(self.starts[piece], self.piece_lengths[piece])]
        ]


def first_fit(sizes: np.ndarray, capacity: tuple[int, int], open_rows: int) -> np.ndarray:
    """The row of each piece, `[pieces]` counted from 0: the first open one with room for it.

    Args:
        sizes: `[pieces, 2]`, the room a piece takes of a row's inputs and targets.
        capacity: the room in a row.
        open_rows: a new row closes the oldest open one beyond this number.
    """
    rows = np.empty(len(sizes), np.int64)
    least_inputs, least_targets = sizes.min(axis=0).tolist()
    open_ = []  # [free inputs, free targets, row], oldest first
    count = 0
    for piece, (inputs, targets) in enumerate(sizes.tolist()):
        for slot in open_:
            if inputs <= slot[0] and targets <= slot[1]:
                break
        else:
            slot = [*capacity, count]
            count += 1
            open_.append(slot)
            if len(open_) > open_rows:
                del open_[0]
        rows[piece] = slot[2]
        slot[0] -= inputs
        slot[1] -= targets
        if slot[0] < least_inputs or slot[1] < least_targets:
            open_.remove(slot)
    return rows


def _pieces(offsets: np.ndarray, window: int) -> tuple[np.ndarray, np.ndarray]:
    """Start in the corpus and length of every piece of every document."""
    lengths = np.diff(offsets)
    per_document = -(-lengths // window)
    first_piece = np.cumsum(per_document) - per_document
    document = np.repeat(np.arange(len(lengths)), per_document)
    within = (np.arange(len(document)) - first_piece[document]) * window
    return offsets[document] + within, np.minimum(lengths[document] - within, window)

"""XLNet's rows: the text in parallel lanes, each read in order, so that a memory can follow it.

Paper: Yang et al. 2019, "XLNet", section 2.5 and appendix A.3. Reference: zihangdai/xlnet,
data_utils.py (`create_tfrecords`, `_create_data`). The corpus has an end mark after each sentence
(`sentence_pairs.Sentences`); only those that end documents are read as words.
"""

import dataclasses

import numpy as np

from lmjax.data.sentence_pairs import places_of
from lmjax.data.token_store import TokenizedDocuments
from lmjax.objectives.permutation_lm import LaneRow, PermutationLM


class Sentences:
    """A corpus as words: without the marks that end sentences, but for the last of each document.

    Args:
        store: the corpus, with `end` after each sentence.
        end: that id.

    Attributes:
        boundaries: where sentences begin and end, counted in words; documents' end marks are
            sentences of their own.
        document_ends: where these marks are.
    """

    def __init__(self, store: TokenizedDocuments, end: int):
        self._tokens = store.tokens
        marks = places_of(store.tokens, end)
        last = np.isin(marks, np.asarray(store.offsets[1:]) - 1)
        self._left_out = marks[~last]
        # How many words lie before each mark that is left out.
        self._before = self._left_out - np.arange(len(self._left_out))
        self.document_ends = ends = marks[last] - np.searchsorted(self._left_out, marks[last])
        self.boundaries = np.unique(np.concatenate([[0], self._before, ends, ends + 1]))

    def __len__(self) -> int:
        return len(self._tokens) - len(self._left_out)

    def read(self, start: int, stop: int) -> np.ndarray:
        """Words `start` to `stop`, without the latter."""
        first, end = np.searchsorted(self._before, (start, stop - 1), side="right")
        begin = start + first
        tokens = self._tokens[begin : stop + end]
        return np.delete(tokens, self._left_out[first:end] - begin)


@dataclasses.dataclass(frozen=True)
class Lane:
    """A stretch of text, read from its beginning to its end or from its end to its beginning."""

    text: Sentences
    start: int
    length: int
    backward: bool

    def __len__(self) -> int:
        return self.length

    def read(self, start: int, stop: int) -> np.ndarray:
        """Words `start` to `stop` of the lane, in the order in which it is read."""
        if self.backward:
            start, stop = self.length - stop, self.length - start
        words = self.text.read(self.start + start, self.start + stop)
        return words[::-1] if self.backward else words

    def boundaries(self, start: int, stop: int) -> np.ndarray:
        """Where in the lane sentences part between `start` and `stop`, ascending; the former and
        the latter are not among them."""
        if self.backward:
            return self.length - self._inner(self.length - stop, self.length - start)[::-1]
        return self._inner(start, stop)

    def boundary_from(self, place: int) -> int:
        """The first such place at or behind this one, or the lane's end."""
        if self.backward:
            return self.length - self._at_or_before(self.length - place)
        return self._at_or_behind(place)

    def boundary_up_to(self, place: int) -> int:
        """The last such place at or before this one, or the lane's beginning."""
        if self.backward:
            return self.length - self._at_or_behind(self.length - place)
        return self._at_or_before(place)

    def _inner(self, start: int, stop: int) -> np.ndarray:
        all = self.text.boundaries
        first = np.searchsorted(all, self.start + start, side="right")
        end = np.searchsorted(all, self.start + stop, side="left")
        return all[first:end] - self.start

    def _at_or_behind(self, place: int) -> int:
        all = self.text.boundaries
        found = np.searchsorted(all, self.start + place, side="left")
        return min(int(all[found]) - self.start if found < len(all) else self.length, self.length)

    def _at_or_before(self, place: int) -> int:
        all = self.text.boundaries
        found = np.searchsorted(all, self.start + place, side="right") - 1
        return max(int(all[found]) - self.start, 0)


class Lanes:
    """Rows for `IndexedBatches(ordered=True)`: row r of step n is row n of lane r.

    Each row begins where the reused part of the one before it in its lane ends. With
    `settings.backward` lanes come in pairs over the same text, one of which is read from the end.

    Args:
        store: the corpus, with `end` after each sentence.
        end: that id.
        settings: of the objective.
        lanes: rows of a batch.
        split: the corpus's name in errors. Held-out text (not "train") may have too little for all
            lanes: those left over stay empty.

    Attributes:
        length: words of each lane.

    Raises:
        ValueError: the text does not fill the lanes, or they do not come in pairs.
    """

    def __init__(
        self,
        store: TokenizedDocuments,
        end: int,
        settings: PermutationLM,
        lanes: int,
        split: str = "train",
    ):
        directions = 2 if settings.backward else 1
        if lanes % directions:
            raise ValueError(
                f"a batch of {lanes} rows cannot be half forward and half backward: choose an even"
                " --batch, or --objective.no-backward"
            )
        text = Sentences(store, end)
        least = settings.window + 1
        parts = lanes // directions
        filled = min(parts, len(text) // least)
        if filled < (parts if split == "train" else 1):
            raise ValueError(
                f"the {split} text has {len(text):,} tokens, which do not fill {parts} lanes of"
                f" {least:,} or more: add text, or choose a smaller --batch or --objective.length"
            )
        self.length = length = len(text) // filled
        self._lanes = [
            Lane(text, part * length, length, backward)
            for part in range(filled)
            for backward in (False, True)[:directions]
        ]
        self._settings, self._rows = settings, lanes
        self._steps = 1 + (length - least) // settings.reuse

    def __len__(self) -> int:
        return self._steps * self._rows

    def row(self, index: int) -> list[tuple[int, LaneRow]]:
        step, lane = divmod(index, self._rows)
        if lane >= len(self._lanes):
            return []
        return [(index, LaneRow(self._lanes[lane], step * self._settings.reuse))]

"""RoBERTa's rows: as many whole sentences as fit, one after the other, across documents.

Paper: Liu et al. 2019, "RoBERTa", section 4.2, FULL-SENTENCES. Reference: fairseq,
data/token_block_dataset.py (`break_mode="complete"`). The corpus has an end mark after each
sentence (`sentence_pairs.Sentences`); only those that end documents are read, as the extra
separator.
"""

import numpy as np

from lmjax.data.batches import check_enough
from lmjax.data.lanes import Sentences
from lmjax.data.token_store import TokenizedDocuments


class FullSentences:
    """Rows for `IndexedBatches`, none longer than `window` tokens; documents in their order.

    A sentence that is longer than a row is cut. The mark between two documents is left out where a
    row begins or ends. Choosing takes about three microseconds a row.

    Args:
        store: the corpus, with `end` after each sentence.
        end: that id.
        window: the most tokens in a row.
        split: the corpus's name in errors. Held-out text (not "train") may be shorter than a row.

    Raises:
        ValueError: the text has less than one row.
    """

    def __init__(self, store: TokenizedDocuments, end: int, window: int, split: str = "train"):
        self.text, self.end = Sentences(store, end), end
        check_enough(len(self.text), window if split == "train" else 2, split)
        # The mark at the end of a document goes with its last sentence.
        ends = np.setdiff1d(self.text.boundaries, self.text.document_ends)
        self.starts = row_starts(ends, window)

    def __len__(self) -> int:
        return len(self.starts) - 1

    def row(self, index: int) -> list[tuple[int, np.ndarray]]:
        tokens = self.text.read(*self.starts[index : index + 2])
        first = int(tokens[0] == self.end)
        last = len(tokens) - int(tokens[-1] == self.end)
        return [(index, tokens[first:last])] if first < last else []


def row_starts(boundaries: np.ndarray, window: int) -> np.ndarray:
    """Where rows begin, and where the last one ends.

    Args:
        boundaries: where sentences begin, and where the last one ends, ascending from 0.
        window: the most tokens in a row.
    """
    starts = [0]
    while starts[-1] < boundaries[-1]:
        start = starts[-1]
        last = int(boundaries[np.searchsorted(boundaries, start + window, side="right") - 1])
        starts.append(last if last > start else start + window)
    return np.array(starts)

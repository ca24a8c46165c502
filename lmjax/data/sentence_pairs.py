"""BERT's rows: a stretch of sentences and what follows it, or what comes from another document.

Paper: Devlin et al. 2019, section 3.1, task 2. Reference: google-research/bert,
create_pretraining_data.py. The corpus has an end mark after each sentence (`Sentences`), by which
`SentencePairs` finds them again.
"""

import dataclasses
import hashlib
import itertools
import re
from typing import Any

import numpy as np
from rich.progress import track

from lmjax.data.token_store import TokenizedDocuments
from lmjax.objectives.masked_pairs import MaskedPairs, Pair

TRIES = 10
"""Documents drawn in search of another one than the pair's own."""
_END = re.compile(r"""[.?!。？！…]["'”’»)\]]*\s+|\s*\n\s*\n\s*""")


def split_sentences(text: str, lines: bool = False, spaced: bool = False) -> list[str]:
    """Sentences without the white space between them; `spaced`: each with the space before it.

    They end after a full stop, question or exclamation mark (closing quotes and brackets included)
    that white space follows, and before blank lines; with `lines`, at line ends and nowhere else.
    """
    if lines:
        parts = text.splitlines(keepends=True)
    else:
        ends = [match.end() for match in _END.finditer(text)]
        parts = [text[i:j] for i, j in itertools.pairwise([0, *ends, len(text)])]
    if not spaced:
        return [part.strip() for part in parts if part.strip()]
    sentences, before = [], ""
    for part in parts:
        if sentence := part.rstrip():
            sentences.append(before + sentence)
            before = ""
        before += part[len(sentence) :]
    return sentences


@dataclasses.dataclass(frozen=True)
class Sentences:
    """A tokenizer for a corpus whose sentences shall end with EOS, BERT's [SEP]."""

    tokenizer: Any
    lines: bool = False
    """Each line is a sentence."""
    spaced: bool = False
    """White space belongs to the sentence after it, so that it becomes the tokens that it does
    within its document; byte-level BPE has other tokens for words that a space precedes."""

    @property
    def vocab_size(self) -> int:
        return self.tokenizer.vocab_size

    @property
    def sha256(self) -> str:
        name = f"{self.tokenizer.sha256} {'lines' if self.lines else 'sentences'}"
        name += " spaced" * self.spaced
        return hashlib.sha256(name.encode()).hexdigest()

    def encode_batch(self, texts: list[str]) -> list[np.ndarray]:
        split = [split_sentences(text, self.lines, self.spaced) for text in texts]
        encoded = iter(self.tokenizer.encode_batch(list(itertools.chain(*split))))
        end = np.array([self.tokenizer.eos_id], np.int32)
        documents = []
        for sentences in split:
            kept = [ids for ids in itertools.islice(encoded, len(sentences)) if len(ids)]
            documents.append(np.concatenate([end[:0], *(x for ids in kept for x in (ids, end))]))
        return documents


class SentencePairs:
    """Rows for `IndexedBatches`: pairs of stretches of sentences, chosen once.

    A document is read from its first sentence to its last, several times over (`copies`), always
    with other pairs. Sentences are collected up to the length of a row, or, for a share `short` of
    the readings, a random smaller one; they are cut in two at random; half of the second parts are
    put back, and a stretch of another document taken for them.

    Choosing takes less than 10 microseconds a pair and keeps 33 bytes of it.

    Args:
        store: the corpus, with `end` after each sentence.
        end: that id.
        settings: of the objective.
        seed: of the choice.

    Raises:
        ValueError: the corpus has no sentences.
    """

    def __init__(self, store: TokenizedDocuments, end: int, settings: MaskedPairs, seed: int):
        self.store, self.end = store, end
        self.ends = places_of(store.tokens, end)
        self.starts = np.concatenate([[0], self.ends[:-1] + 1])
        self.documents = np.searchsorted(self.ends, store.offsets)
        if len(self.ends) == 0:
            raise ValueError(
                "the text has no sentences to make pairs of: give more text, or, where each line"
                " is a sentence, set --objective.lines"
            )
        lengths = self.ends - self.starts
        found = []
        readings = itertools.product(
            range(settings.copies), np.flatnonzero(np.diff(self.documents))
        )
        rngs = [np.random.default_rng([seed, copy]) for copy in range(settings.copies)]
        total = settings.copies * len(store)
        for copy, document in track(readings, "choosing sentence pairs", total, transient=True):
            found += choose_pairs(lengths, self.documents, document, settings, rngs[copy])
        self.stretches = np.array([pair[:4] for pair in found])
        self.elsewhere = np.array([pair[4] for pair in found])

    def __len__(self) -> int:
        return len(self.elsewhere)

    def row(self, index: int) -> list[tuple[int, Pair]]:
        first, first_end, second, second_end = self.stretches[index]
        parts = self._words(first, first_end), self._words(second, second_end)
        return [(index, Pair(*parts, bool(self.elsewhere[index])))]

    def _words(self, first: int, end: int) -> np.ndarray:
        tokens = self.store.tokens[self.starts[first] : self.ends[end - 1]]
        return tokens[tokens != self.end]


def choose_pairs(
    lengths: np.ndarray,
    documents: np.ndarray,
    document: int,
    settings: MaskedPairs,
    rng: np.random.Generator,
) -> list[tuple[int, int, int, int, bool]]:
    """One reading of a document.

    Args:
        lengths: of all sentences of the corpus, in tokens.
        documents: `[documents + 1]`, the first sentence of each.
        document: which one, not an empty one.

    Returns:
        For each pair the first sentence of its first part and the one after its last, the same of
        its second part, and whether that is from elsewhere.
    """
    first, end = int(documents[document]), int(documents[document + 1])
    target = settings.window
    if rng.random() < settings.short:
        target = int(rng.integers(2, settings.window + 1))
    pairs, start, size = [], first, 0
    at = first
    while at < end:
        size += int(lengths[at])
        at += 1
        if at < end and size < target:
            continue
        count = at - start
        middle = start + (1 if count == 1 else int(rng.integers(1, count)))
        if count == 1 or rng.random() < 0.5:
            room = target - int(lengths[start:middle].sum())
            pairs.append(
                (start, middle, *_elsewhere(lengths, documents, document, room, rng), True)
            )
            at = middle  # what was to be the second part is read again
        else:
            pairs.append((start, middle, middle, at, False))
        start, size = at, 0
    return pairs


def _elsewhere(
    lengths: np.ndarray,
    documents: np.ndarray,
    document: int,
    room: int,
    rng: np.random.Generator,
) -> tuple[int, int]:
    """A stretch of another document, from a random sentence on until it fills `room` tokens."""
    for _ in range(TRIES):
        other = int(rng.integers(len(documents) - 1))
        if other != document and documents[other] < documents[other + 1]:
            break
    else:
        other = document
    first, end = int(documents[other]), int(documents[other + 1])
    start = stop = int(rng.integers(first, end))
    taken = 0
    while stop == start or (stop < end and taken < room):
        taken += int(lengths[stop])
        stop += 1
    return start, stop


def places_of(tokens: np.ndarray, id: int, chunk: int = 1 << 26) -> np.ndarray:
    """Where `id` stands, read piece by piece."""
    found = [
        start + np.flatnonzero(tokens[start : start + chunk] == id)
        for start in range(0, len(tokens), chunk)
    ]
    return np.concatenate([np.zeros(0, np.int64), *found])

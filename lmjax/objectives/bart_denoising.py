"""BART's denoising: damage a text in one or several ways, ask for the text as it was.

    tokens    <s> It rains. The list is empty. </s>
    inputs    <s> The list <mask>. It <mask> rains. </s>
    targets   <s> It rains. The list is empty. </s>

Paper: Lewis et al. 2020, section 2.2 and figure 2. Reference: fairseq, data/denoising_dataset.py
(`DenoisingDataset`), whose order it is: sentences are permuted, then words hidden, then masks
inserted, then the text rotated.

Departure: where spans of no words at all would make a text longer than it was, as many masks are
inserted as make up for what was taken out.
"""

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import ClassVar

import numpy as np

STOPS = (".", "?", "!", "。")


def permute_sentences(
    tokens: np.ndarray, ends: np.ndarray, share: float, rng: np.random.Generator
) -> np.ndarray:
    """The sentences of `tokens` in another order, the first token (<s>) where it is.

    Args:
        tokens: `[length]`, with <s> in front and </s> behind.
        ends: bool `[ids]`: which ids end a sentence. Of several in a row, the first does; and the
            last token before </s> does in any case.
        share: of the sentences that change places among themselves, chosen at random.
    """
    ending = ends[tokens]
    ending[1:] &= ~ends[tokens[:-1]]
    ending[0], ending[-1] = False, False
    ending[-2] = len(tokens) > 2
    last = np.flatnonzero(ending)
    pieces = np.split(tokens[1:-1], last[:-1])
    chosen = rng.permutation(len(pieces))[: math.ceil(share * len(pieces))]
    order = np.arange(len(pieces))
    order[np.sort(chosen)] = chosen
    return np.concatenate([tokens[:1], *(pieces[i] for i in order), tokens[-1:]])


def hide_words(
    tokens: np.ndarray,
    starts: np.ndarray,
    share: float,
    rng: np.random.Generator,
    *,
    mask: int,
    mean_span: float | None = None,
    delete: bool = False,
    substitute: float = 0.0,
    words: np.ndarray | None = None,
) -> np.ndarray:
    """Hides a share of the words of `tokens`, each span of them behind one mask.

    Args:
        tokens: `[length]`, with <s> in front and </s> behind, which stay.
        starts: bool `[length]`: where words start; everywhere, to hide single tokens.
        share: of the words, rounded up.
        mean_span: lengths in words are drawn from a Poisson distribution of this mean until they
            make up the share (a span without words is a mask that is inserted); None for spans of
            one word.
        delete: leave no mask.
        substitute: the share of masks in whose place stands one of the ids `words`.
    """
    starts = starts.copy()
    starts[0] = starts[-1] = False
    firsts = np.flatnonzero(starts)
    budget = math.ceil(share * len(firsts))
    if budget == 0:
        return tokens
    lengths = np.ones(budget, int) if mean_span is None else spans(budget, mean_span, rng)
    inserted = np.count_nonzero(lengths == 0)
    lengths = lengths[lengths > 0]
    chosen = rng.permutation(len(firsts))[: len(lengths)]
    # Span s covers its words' tokens from begin[s] to end[s]; a mask stands for the first of them.
    ends = np.append(firsts, len(tokens) - 1)
    begin, end = firsts[chosen], ends[np.minimum(chosen + lengths, len(firsts))]
    out = tokens.copy()
    out[begin] = mask
    if substitute:
        other = begin[rng.random(len(begin)) < substitute]
        out[other] = words[rng.integers(len(words), size=len(other))]
    covered = np.zeros(len(tokens), int)
    np.add.at(covered, begin if delete else begin + 1, 1)
    np.add.at(covered, end, -1)
    out = out[np.cumsum(covered) == 0]
    inserted = min(inserted, len(tokens) - len(out))
    return insert(out, inserted, rng, mask=mask, substitute=substitute, words=words)


def spans(budget: int, mean: float, rng: np.random.Generator) -> np.ndarray:
    """Lengths of spans, 0 among them, that sum up to `budget`: the last one is cut to fit."""
    lengths = rng.poisson(mean, budget)
    while lengths.sum() < budget:
        lengths = np.concatenate([lengths, rng.poisson(mean, budget)])
    totals = np.cumsum(lengths)
    last = int(np.searchsorted(totals, budget))
    lengths = lengths[: last + 1]
    lengths[last] -= totals[last] - budget
    return lengths


def insert(
    tokens: np.ndarray,
    count: int,
    rng: np.random.Generator,
    *,
    mask: int,
    substitute: float = 0.0,
    words: np.ndarray | None = None,
) -> np.ndarray:
    """`tokens` with `count` masks between the first and the last, a share `substitute` of them
    (rounded up) some other of the ids `words`."""
    if count == 0:
        return tokens
    places = 1 + rng.permutation(len(tokens) + count - 2)[:count]
    out = np.empty(len(tokens) + count, tokens.dtype)
    old = np.ones(len(out), bool)
    old[places] = False
    out[old], out[places] = tokens, mask
    others = math.ceil(substitute * count)
    if others:
        out[places[:others]] = words[rng.integers(len(words), size=others)]
    return out


def rotate(tokens: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """The text begun at one of its tokens; <s> and </s> stay."""
    offset = int(rng.integers(1, max(1, len(tokens) - 2) + 1))
    return np.concatenate([tokens[:1], tokens[offset:-1], tokens[1:offset], tokens[-1:]])


def bart_denoising(
    tokens: np.ndarray,
    rng: np.random.Generator,
    *,
    settings: "BartDenoising",
    bos: int,
    eos: int,
    mask: int,
    words: np.ndarray,
    word_starts: np.ndarray,
    sentence_ends: np.ndarray,
) -> dict[str, np.ndarray]:
    """int32 `inputs`, damaged as `settings` say, and `targets`, both with `bos` and `eos`.

    Args:
        words: ids that may stand in another's place.
        word_starts, sentence_ends: bool `[ids]`.
    """
    truth = np.empty(len(tokens) + 2, np.int32)
    truth[0], truth[1:-1], truth[-1] = bos, tokens, eos
    s, inputs, substitutes = settings, truth, {"substitute": settings.substitute, "words": words}
    if s.permute:
        inputs = permute_sentences(inputs, sentence_ends, s.permute, rng)
    if s.infill:
        inputs = hide_words(
            inputs,
            word_starts[inputs],
            s.infill,
            rng,
            mask=mask,
            mean_span=s.mean_span,
            **substitutes,
        )
    for share, delete in ((s.mask, False), (s.delete, True)):
        if share:
            every = np.ones(len(inputs), bool)
            inputs = hide_words(inputs, every, share, rng, mask=mask, delete=delete, **substitutes)
    if s.rotate and rng.random() < s.rotate:
        inputs = rotate(inputs, rng)
    return {"inputs": inputs, "targets": truth}


def sentence_ends(tokenizer) -> np.ndarray:
    """Of each id, whether it ends a sentence."""
    # Not by encoding: SentencePiece's full stop has other ids within a text than by itself.
    return np.array([tokenizer.decode([id]) in STOPS for id in range(tokenizer.vocab_size)])


@dataclasses.dataclass(frozen=True)
class BartDenoising:
    """Restore a damaged text; the defaults are those of the released models."""

    length: int = 512
    """Tokens of a row, start and end included."""
    infill: float = 0.3
    """Share of the words to hide in spans behind one mask each (text infilling)."""
    mean_span: float = 3.5
    """Mean length of such a span, in words; the paper says 3."""
    substitute: float = 0.1
    """Share of the masks in whose place stands some other token."""
    permute: float = 1.0
    """Share of the sentences that change places (sentence permutation)."""
    mask: float = 0.0
    """Share of the tokens to mask one by one (token masking)."""
    delete: float = 0.0
    """Share of the tokens to leave out (token deletion)."""
    rotate: float = 0.0
    """Share of the texts that begin at another token (document rotation)."""

    corpus: ClassVar = "joined"

    def __post_init__(self):
        if self.length < 3:
            raise ValueError(f"denoising needs length >= 3, got {self.length}")
        for name in ("infill", "substitute", "permute", "mask", "delete", "rotate"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name} is {getattr(self, name)}, not a share from 0 to 1")
        if not self.mean_span > 0:
            raise ValueError(f"mean_span is {self.mean_span}, not a positive number of words")

    @property
    def window(self) -> int:
        """Tokens of text that make one example."""
        return self.length - 2

    @property
    def lengths(self) -> dict[str, int]:
        return {"inputs": self.length, "targets": self.length}

    def sizes(self, window: int) -> tuple[int, int]:
        """The most inputs, and the targets, that `window` tokens give."""
        return window + 2, window + 2

    def bind(self, tokenizer) -> Callable:
        """The objective (tokens, rng) -> example for a tokenizer.

        Raises:
            ValueError: the tokenizer has no token that starts a text or hides a word, or, to
                permute sentences, none that is a full stop.
        """
        if tokenizer.bos_id is None or tokenizer.mask_id is None:
            raise ValueError(
                "denoising needs tokens that start a text and that hide words, and the tokenizer"
                " lacks them: take one of BART's kind (--data.subwords byte_bpe or wordpiece)"
            )
        ends = sentence_ends(tokenizer)
        if self.permute and not ends.any():
            raise ValueError(
                "the tokenizer has no token for a full stop, so that sentences cannot be told"
                " apart: set --objective.permute 0"
            )
        return functools.partial(
            bart_denoising,
            settings=self,
            bos=tokenizer.bos_id,
            eos=tokenizer.eos_id,
            mask=tokenizer.mask_id,
            words=np.setdiff1d(np.arange(tokenizer.vocab_size), tokenizer.special_ids),
            word_starts=tokenizer.starts_word(),
            sentence_ends=ends,
        )

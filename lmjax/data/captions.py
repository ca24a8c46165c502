"""Captions as tokens: lower-cased byte-pair encoding, with dropout in training.

Paper: Ramesh et al. 2021, section 2.2: at most 256 tokens of a vocabulary of 16,384, BPE dropout of
10 percent. Bytes are the smallest pieces, so that no Korean syllable, or anything, is unknown.
"""

import dataclasses
import functools
import itertools
import unicodedata
from collections.abc import Iterator
from typing import Literal

import numpy as np

from lmjax.data.fast_tokenizers import FastTokenizer
from lmjax.data.pictures import Captions, PictureData, Pictures, report
from lmjax.data.sources import digest
from lmjax.data.tokenizers import Tokenizer, cached_tokenizer, named_tokenizer
from lmjax.objectives.bpe_dropout import Merges, bpe_dropout

Language = Literal["en", "ko", "both"]
SHOWN = 60
"""Characters of a caption in a message."""
WANTED = {"en": "English captions", "ko": "Korean captions", "both": "captions"}


@dataclasses.dataclass(frozen=True)
class CaptionedPictureData(PictureData):
    """Which pictures and captions to train on, and how these become tokens. With nothing set:
    emoji, with their names in English and Korean."""

    language: Language = "both"
    """Of the captions: en, ko or both. Of a picture's, one is drawn each time: first its language,
    then one in it."""
    tokenizer: str | None = None
    """A tokenizer.json of byte-level BPE, or a directory with vocab.json and merges.txt; it reads
    captions in lower case. Without one, a vocabulary is trained on the captions, once."""
    vocab_size: int = 16_384
    """Pieces of a vocabulary to train, fewer if the captions support no more."""
    dropout: float = 0.1
    """Probability of leaving out a merge in training, so that a caption is cut in many ways."""
    truncate: bool = False
    """Cut captions that are longer than the model reads, which are else an error."""

    def __post_init__(self):
        if not 0 <= self.dropout < 1:
            raise ValueError(f"data.dropout is {self.dropout}, not in [0, 1)")


@dataclasses.dataclass(frozen=True)
class CaptionEncoder:
    """Draws one of a picture's captions and makes tokens of it.

    Attributes:
      tokenizer: of byte-level BPE, unless dropout is 0.
      length: the most tokens of a caption.
      language: of the captions.
      dropout: the probability of leaving out a merge.
      truncate: cut longer captions, rather than refuse them.
      ends: put the tokenizer's BOS before and its EOS behind, as CLIP reads texts.

    Raises:
      ValueError: the tokenizer has no merges to leave out, or no ends.
    """

    tokenizer: Tokenizer
    length: int
    language: Language = "both"
    dropout: float = 0.0
    truncate: bool = False
    ends: bool = False

    def __post_init__(self):
        if self.dropout:
            self._merges  # noqa: B018 (reads them)
        if self.ends and None in (self.tokenizer.bos_id, self.tokenizer.eos_id):
            raise ValueError(
                "the captions' tokenizer has no tokens that begin and end a text, which CLIP reads:"
                " choose another --data.tokenizer"
            )

    def __call__(self, captions: Captions, rng: np.random.Generator) -> np.ndarray:
        """int32 tokens, at most `length`, the ends included.

        A caption that only dropout makes too long is encoded without.

        Raises:
          ValueError: the caption is too long, or there is none.
        """
        return self.encode(self.draw(captions, rng), rng)

    def draw(self, captions: Captions, rng: np.random.Generator) -> str:
        """One of the captions."""
        chosen = list(in_language(captions, self.language).values())
        if not chosen:
            raise ValueError(f"a picture has no {WANTED[self.language]} to learn from")
        texts = chosen[rng.integers(len(chosen))] if len(chosen) > 1 else chosen[0]
        return texts[rng.integers(len(texts))] if len(texts) > 1 else texts[0]

    def encode(self, text: str, rng: np.random.Generator | None = None) -> np.ndarray:
        """int32 tokens of a text, with dropout if there is an `rng` to draw it from.

        Raises:
          ValueError: they are too many.
        """
        room, text = self.length - 2 * self.ends, normalized(text)
        if self.dropout and rng is not None:
            ids = bpe_dropout(self.tokenizer.words(text), self._merges, self.dropout, rng)
            if len(ids) <= room or self.truncate:
                return self._between_ends(ids[:room])
        [ids] = self.tokenizer.encode_batch([text])
        if len(ids) > room and not self.truncate:
            shown = text if len(text) <= SHOWN else text[:SHOWN] + "..."
            raise ValueError(
                f"the caption {shown!r} has {len(ids)} tokens and the model reads {room}: shorten"
                " it, set the option truncate to have it cut, or choose a model that reads more"
            )
        return self._between_ends(ids[:room])

    def _between_ends(self, ids: np.ndarray) -> np.ndarray:
        if not self.ends:
            return ids
        return np.array([self.tokenizer.bos_id, *ids, self.tokenizer.eos_id], np.int32)

    def check(self, pictures: Pictures) -> None:
        """Raises ValueError for the first caption that is too long."""
        if self.truncate:
            return
        for text in texts_of(pictures, self.language):
            # A token is a byte at least; composing and lowering case hardly add any.
            if 2 * len(text.encode()) > self.length - 2 * self.ends:
                self.encode(text)

    @functools.cached_property
    def _merges(self) -> Merges:
        if not isinstance(self.tokenizer, FastTokenizer):
            raise ValueError(
                "the captions' tokenizer is of SentencePiece, which has no merges to leave out: set"
                " data.dropout 0"
            )
        return self.tokenizer.merges()


@dataclasses.dataclass(frozen=True)
class CaptionTexts:
    """Captions as the documents of a `sources.Source`, to train a tokenizer on."""

    pictures: Pictures
    language: Language

    splits = ("train",)

    @property
    def name(self) -> str:
        return f"the captions of {self.pictures.name}"

    def fingerprint(self, split: str) -> str:
        return digest(self.pictures.fingerprint, self.language)

    def documents(self, split: str, shard: int = 0, shards: int = 1) -> Iterator[str]:
        return itertools.islice(texts_of(self.pictures, self.language), shard, None, shards)

    def num_documents(self, split: str) -> None:
        return None


def caption_tokenizer(
    data: CaptionedPictureData, pictures: Pictures, given: Tokenizer | None = None
) -> Tokenizer:
    """The one `given` with a checkpoint, the one that the settings name, or one trained now.

    Raises:
      ValueError: the settings name another one than is given, or one that cannot be read; or there
        are no captions to train one on.
    """
    if data.tokenizer is not None:
        return named_tokenizer(data.tokenizer, given)
    if given is not None:
        return given
    texts = CaptionTexts(pictures, data.language)
    return cached_tokenizer(texts, data.vocab_size, subwords="byte_bpe", lower_case=True)


def with_captions(pictures: Pictures, data: CaptionedPictureData) -> Pictures:
    """Those that have a caption in the language; the others are left out or refused.

    Raises:
      ValueError: some have none, if those are refused; or all have none.
    """
    having = [i for i, all in enumerate(pictures.captions) if in_language(all, data.language)]
    if len(having) == len(pictures):
        return pictures
    first = min(set(range(len(pictures))) - set(having))
    what = (
        f"{len(pictures) - len(having):,} of {len(pictures):,} {pictures.split} pictures without"
        f" {WANTED[data.language]}, the first of them {pictures.place(first)}"
    )
    if not having:
        raise ValueError(
            f"there is nothing to learn from: {what}; give each a .txt file of its name, with a"
            " caption in each line, or name a file of captions (--data.captions)"
        )
    report(what, data.unusable)
    return pictures.some(having, data.language)


def normalized(text: str) -> str:
    """As captions are read, by any tokenizer: composed, in lower case, with single spaces."""
    return " ".join(unicodedata.normalize("NFC", text).lower().split())


def in_language(captions: Captions, language: Language) -> Captions:
    """Those of one language, or all."""
    return {name: texts for name, texts in captions.items() if language in (name, "both")}


def texts_of(pictures: Pictures, language: Language) -> Iterator[str]:
    for captions in pictures.captions:
        yield from itertools.chain(*in_language(captions, language).values())

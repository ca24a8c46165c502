"""SentencePiece tokenizers of T5's kind and of XLNet's: load one, or train one on a source.

T5's spiece.model has 32,000 pieces and knows nothing of sentinels: 100 of them are appended, in
descending order, so that <extra_id_0> is 32,099 and <extra_id_99> 32,000. mT5's model has its own
pieces for them, which are used where they are. XLNet's has <cls>, <sep>, <pad>, <mask> and <eod>,
which ends a document, and no sentinels. A model in the common layout has sentinels and all special
tokens that any objective asks for, so that different models can be trained on the same tokens.

Only text given to `encode` may name sentinels. `encode_batch`, for corpora, takes text as it is.
Departures from transformers' T5Tokenizer: no EOS is added, "</s>" and "<pad>" in a text are text,
and a word after a sentinel starts a new word exactly if white space separates the two, so that
"un<extra_id_0>able" is possible and "<extra_id_0> fox" has the ids it has in training.
"""

import collections
import hashlib
import io
import itertools
import json
import os
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any, Literal

import numpy as np
import sentencepiece
from rich.console import Console

from lmjax.data import cache, fast_tokenizers
from lmjax.data.fast_tokenizers import FastTokenizer
from lmjax.data.sources import Source, document_hash

LEAST_COVERAGE = 0.98
"""SentencePiece trains with no smaller character_coverage."""

PIECES, SETTINGS = "spiece.model", "tokenizer_config.json"
"""In a Hugging Face directory."""
_SENTINEL = re.compile(r"<extra_id_(\d+)>")
# Serialized protocol buffers merge when concatenated. These bytes set ModelProto.normalizer_spec
# (field 3) .add_dummy_prefix (field 3) to false: text then continues a word unless it says not to.
_NO_DUMMY_PREFIX = b"\x1a\x02\x18\x00"


class SentencePieceTokenizer:
    """Text to ids and back.

    Attributes:
      model: the bytes of the .model file.
      vocab_size: ids in use, sentinels included (32,100 for T5; a model may have more rows).
      pad_id, eos_id, unk_id: 0, 1 and 2 in T5's layout and the common one; 5, 7 and 0 in XLNet's.
      bos_id: 1 in XLNet's, 3 in the common one; None in T5's.
      cls_id, sep_id, mask_id: 3, 4 and 6 in XLNet's, 4, 5 and 6 in the common one; None in T5's.
      sentinels: int32; `sentinels[k]` is the id of <extra_id_k>. XLNet's has none.
      special_ids: int32, of all these and any other control tokens, ascending.
      sha256: names the model and its sentinels.
    """

    def __init__(self, model: bytes, extra_ids: int = 100, name: str = "the SentencePiece model"):
        """`extra_ids` sentinels are appended unless the model has its own; `name` is for errors.

        Raises:
          ValueError: the bytes are no SentencePiece model, or one without a pad or EOS id.
        """
        self.model = model
        self.extra_ids = extra_ids
        self._pieces = _processor(model, name)
        self._continuing = _processor(model + _NO_DUMMY_PREFIX, name)
        self.cls_id, self.sep_id, self.mask_id = map(self._id, ("<cls>", "<sep>", "<mask>"))
        pad, end = self._id("<pad>"), self._id("<eod>")
        self.pad_id = self._pieces.pad_id() if pad is None else pad
        self.eos_id = self._pieces.eos_id() if end is None else end
        self.unk_id = self._pieces.unk_id()
        start = self._pieces.bos_id()
        self.bos_id = None if start < 0 else start
        for token in ("pad", "eos"):
            if getattr(self, f"{token}_id") < 0:
                raise ValueError(
                    f"{name} has no {token} id: train it with pad_id=0, eos_id=1, unk_id=2, "
                    "bos_id=-1, as T5's, or let lmjax train one"
                )

        size = self._pieces.get_piece_size()
        if self.cls_id is not None:
            extra_ids = 0
        own = list(iter(map(self._own, itertools.count()).__next__, None))
        appended = range(size + extra_ids - 1, size - 1, -1)
        self.vocab_size = size if own else size + extra_ids
        self.sentinels = np.array(own or appended, np.int32)
        self._sentinel_number = {int(id): k for k, id in enumerate(self.sentinels)}
        control = [id for id in range(size) if self._pieces.is_control(id)]
        self.special_ids = np.unique([self.unk_id, *control, *self.sentinels]).astype(np.int32)
        self.sha256 = hashlib.sha256(model + str(self.sentinels.tolist()).encode()).hexdigest()

    @classmethod
    def load(cls, path: str | os.PathLike, extra_ids: int = 100) -> "SentencePieceTokenizer":
        """Reads a .model file.

        Raises:
          ValueError: there is no such file, or it is damaged or lacks a pad or EOS id.
        """
        try:
            model = Path(path).expanduser().read_bytes()
        except OSError as error:
            raise ValueError(
                f"cannot read the SentencePiece model {path}: {error.strerror}"
            ) from error
        return cls(model, extra_ids, str(path))

    @classmethod
    def find(cls, directory: Path) -> "SentencePieceTokenizer | None":
        """The tokenizer in a directory of Hugging Face's, if it has such a one.

        Raises:
          ValueError: the model is damaged.
        """
        if not (directory / PIECES).is_file():
            return None
        settings = directory / SETTINGS
        settings = json.loads(settings.read_text()) if settings.is_file() else {}
        return cls.load(directory / PIECES, settings.get("extra_ids", 100))

    def files(self) -> dict[str, bytes]:
        """What a Hugging Face directory holds of it."""
        size, special = self._pieces.get_piece_size(), {}
        for name in ("pad", "bos", "eos", "unk", "cls", "sep", "mask"):
            id = getattr(self, f"{name}_id")
            if id is not None:
                special[f"{name}_token"] = self._pieces.id_to_piece(id)
        if self.cls_id is None:
            # Those that the model has no pieces for (mT5's has all of its own).
            kind = {"tokenizer_class": "T5Tokenizer", "extra_ids": self.vocab_size - size}
        else:
            kind = {"tokenizer_class": "XLNetTokenizer"}
        settings = json.dumps({**kind, **special}, indent=2) + "\n"
        return {PIECES: self.model, SETTINGS: settings.encode()}

    def save(self, path: str | os.PathLike) -> None:
        """Writes the .model file, which, as T5's, does not say how many sentinels were appended."""
        cache.atomic_write(path, self.model)

    def __reduce__(self):
        return SentencePieceTokenizer, (self.model, self.extra_ids)

    def encode(self, text: str) -> list[int]:
        """Ids without EOS; "<extra_id_3>" in the text becomes that sentinel."""
        ids, start = [], 0
        for match in _SENTINEL.finditer(text):
            if int(match[1]) < len(self.sentinels):
                ids += self._encode_part(text, start, match.start())
                ids.append(int(self.sentinels[int(match[1])]))
                start = match.end()
        return ids + self._encode_part(text, start, len(text))

    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        """Ids (int32, without EOS) of each text taken literally, on all processor cores."""
        encoded = self._pieces.encode(list(texts), num_threads=os.cpu_count() or 1)
        return [np.array(ids, np.int32) for ids in encoded]

    def decode(self, ids: Iterable[int]) -> str:
        """Readable text up to the first EOS: pads dropped, sentinels as "<extra_id_k>".

        Ids beyond the vocabulary (rows that only round up a model's matrix) read as unknown.
        """
        parts, ordinary = [], []

        def flush() -> None:
            if ordinary:
                new_word = self._pieces.id_to_piece(ordinary[0]).startswith("\u2581")
                parts.append(" " * (new_word and bool(parts)) + self._pieces.decode(ordinary))
                ordinary.clear()

        for id in map(int, ids):
            if id == self.eos_id:
                break
            if id in self._sentinel_number:
                flush()
                parts.append(" " * bool(parts) + f"<extra_id_{self._sentinel_number[id]}>")
            elif id != self.pad_id:
                ordinary.append(id if 0 <= id < self._pieces.get_piece_size() else self.unk_id)
        flush()
        return "".join(parts)

    def starts_word(self) -> np.ndarray:
        """bool [vocab_size]: whether a piece begins a word; special ones do."""
        size = self._pieces.get_piece_size()
        starts = [
            self._pieces.id_to_piece(id).startswith("\u2581") or self._pieces.is_control(id)
            for id in range(size)
        ]
        return np.array(starts + [True] * (self.vocab_size - size))

    def _encode_part(self, text: str, start: int, end: int) -> list[int]:
        part = text[start:end]
        new_word = start == 0 or part[:1].isspace()
        return (self._pieces if new_word else self._continuing).encode(part)

    def _own(self, k: int) -> int | None:
        """The id of <extra_id_k> if the model has a piece for it."""
        ids = map(self._id, (f"<extra_id_{k}>", f"\u2581<extra_id_{k}>"))
        return next((id for id in ids if id is not None), None)

    def _id(self, piece: str) -> int | None:
        id = self._pieces.piece_to_id(piece)
        # A piece that is not there has the unknown's id.
        return id if self._pieces.id_to_piece(id) == piece else None


T5_LAYOUT = dict(pad_id=0, eos_id=1, unk_id=2, bos_id=-1)
XLNET_LAYOUT = dict(
    unk_id=0,
    bos_id=1,
    eos_id=2,
    pad_id=-1,  # <pad> is one of the others
    control_symbols=["<cls>", "<sep>", "<pad>", "<mask>", "<eod>"],
    user_defined_symbols=["<eop>"],
)
COMMON_LAYOUT = T5_LAYOUT | dict(
    bos_id=3,
    control_symbols=["<cls>", "<sep>", "<mask>", *(f"<extra_id_{k}>" for k in range(100))],
)
LAYOUTS = dict(unigram=T5_LAYOUT, xlnet_unigram=XLNET_LAYOUT, common_unigram=COMMON_LAYOUT)


def train_tokenizer(
    texts: Iterable[str],
    vocab_size: int,
    *,
    layout: Mapping[str, Any] = MappingProxyType(T5_LAYOUT),
    character_coverage: float | None = None,
    max_characters: int = 8_000_000,
    extra_ids: int = 100,
) -> SentencePieceTokenizer:
    """Trains a unigram model, by default in T5's layout: pad 0, EOS 1, unknown 2, no BOS; NFKC.

    The same texts give the same model. They are sampled by their hash, evenly, from as many as
    make up 100 times `max_characters`.

    Args:
      texts: documents.
      vocab_size: pieces, without the `extra_ids` sentinels that are appended; fewer where the
        text is too short for so many.
      layout: the trainer's settings for special tokens, one of LAYOUTS.
      character_coverage: the share of the text whose characters get a piece, 0.98 to 1. None: all
        of it, unless the text has so many different characters that the rare ones would fill the
        vocabulary, as in Korean, Chinese and Japanese (see `default_coverage`).
      max_characters: how much text to train on.

    Raises:
      ValueError: the texts are empty, or the vocabulary is too small for their characters; one
        sentence gives the smallest size possible.
    """
    if character_coverage is not None and not LEAST_COVERAGE <= character_coverage <= 1:
        raise ValueError(
            f"character_coverage is {character_coverage}, not between {LEAST_COVERAGE} and 1"
        )
    sample = [text for text in _sample(texts, max_characters) if text.strip()]
    if not sample:
        raise ValueError("there is no text to train a tokenizer on: every document is empty")
    if character_coverage is None:
        character_coverage = default_coverage(sample, vocab_size)
        if character_coverage < 1:
            Console(stderr=True).print(
                f"the text has more different characters than a vocabulary of {vocab_size:,} "
                f"should hold: training it with character_coverage {character_coverage:.4f}, "
                "so that the rarest read as unknown"
            )
    model = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=_sentences(sample),
            model_writer=model,
            model_type="unigram",
            vocab_size=vocab_size,
            hard_vocab_limit=False,  # a short text gives a smaller vocabulary, not an error
            character_coverage=character_coverage,
            normalization_rule_name="nmt_nfkc",
            **layout,
            num_threads=16,  # sums over threads are rounded: not the machine's own number
            minloglevel=2,
        )
    except RuntimeError as error:
        raise ValueError(_explained(str(error), vocab_size, character_coverage)) from error
    return SentencePieceTokenizer(model.getvalue(), extra_ids)


def default_coverage(texts: Sequence[str], vocab_size: int) -> float:
    """The share of the text whose characters get a piece each.

    1 where the different characters are at most a quarter of the vocabulary. Else 0.9995, or less
    where that share still has more characters than half of the vocabulary.
    """
    counts = collections.Counter()
    for text in texts:
        counts.update(text)
    if len(counts) <= vocab_size // 4:
        return 1.0
    most_frequent = sum(count for _, count in counts.most_common(vocab_size // 2))
    return min(max(most_frequent / counts.total(), LEAST_COVERAGE), 0.9995)


Tokenizer = SentencePieceTokenizer | FastTokenizer
Subwords = Literal["unigram", "xlnet_unigram", "common_unigram", "byte_bpe", "wordpiece"]


def load_tokenizer(path: str | os.PathLike, extra_ids: int = 100) -> Tokenizer:
    """Reads a SentencePiece .model, a tokenizer.json, a vocab.txt of WordPiece, or a directory that
    holds a tokenizer of the last two kinds or of GPT-2's (vocab.json, merges.txt).

    Args:
      extra_ids: sentinels to append to a SentencePiece model that has none.

    Raises:
      ValueError: there is no such file, or it is damaged or lacks a token that ends a text.
    """
    path = Path(path).expanduser()
    if path.is_dir() or path.suffix in (".json", ".txt") or _is_json(path):
        return FastTokenizer.load(path)
    return SentencePieceTokenizer.load(path, extra_ids)


def named_tokenizer(path: str | os.PathLike, given: Tokenizer | None = None) -> Tokenizer:
    """The tokenizer that the settings name by `path`, which must be the checkpoint's, if one is
    `given` with it.

    Raises:
      ValueError: it is another one, or cannot be read.
    """
    if given is None:
        return load_tokenizer(path)
    named = load_tokenizer(path, given.extra_ids)
    if named.sha256 != given.sha256:
        raise ValueError(
            f"data.tokenizer {path} is not the tokenizer that the checkpoint was trained with: drop"
            " it to use the checkpoint's own"
        )
    return named


def check_rows(tokenizer: Tokenizer, rows: int | None, option: str = "--model.vocab") -> None:
    """Raises ValueError if a model's embedding has fewer `rows`, set by `option`, than ids."""
    if rows is not None and tokenizer.vocab_size > rows:
        raise ValueError(
            f"the tokenizer has {tokenizer.vocab_size:,} ids and the model's embedding {rows:,}"
            f" rows: set {option} to that many or more, or a smaller --data.vocab-size"
        )


def _is_json(path: Path) -> bool:
    """A run keeps its tokenizer under one name, whatever it is."""
    if not path.is_file():
        return False
    with open(path, "rb") as file:
        return file.read(1) == b"{"


def cached_tokenizer(
    source: Source,
    vocab_size: int,
    *,
    subwords: Subwords = "unigram",
    split: str = "train",
    character_coverage: float | None = None,
    max_characters: int = 8_000_000,
    extra_ids: int = 100,
    lower_case: bool = False,
) -> Tokenizer:
    """A tokenizer trained on a source, once, and kept in the cache.

    Of several processes that ask at once, one trains and the others wait for it.

    Args:
      subwords: one of LAYOUTS, by SentencePiece (see `train_tokenizer`, whose settings are those
        below), or one of `fast_tokenizers`.
      lower_case: for byte-level BPE.
    """
    kind = f"{subwords} of lower case" if lower_case else subwords
    settings = [f"{kind} 2", source.fingerprint(split), vocab_size, character_coverage]
    key = json.dumps([*settings, max_characters])
    name = hashlib.sha256(key.encode()).hexdigest()[:32]
    path = cache.cache_dir() / "tokenizers" / f"{name}.model"
    with cache.lock(path):
        if not path.exists():
            message = f"training a tokenizer of {vocab_size:,} pieces on {source.name}"
            with Console(stderr=True).status(message):
                if subwords in LAYOUTS:
                    train_tokenizer(
                        source.documents(split),
                        vocab_size,
                        layout=LAYOUTS[subwords],
                        character_coverage=character_coverage,
                        max_characters=max_characters,
                    ).save(path)
                else:
                    sample = _sample(source.documents(split), max_characters)
                    fast_tokenizers.train(subwords, sample, vocab_size, lower_case).save(path)
    return load_tokenizer(path, extra_ids)


def _processor(model: bytes, name: str) -> sentencepiece.SentencePieceProcessor:
    try:
        return sentencepiece.SentencePieceProcessor(model_proto=model)
    except (RuntimeError, ValueError) as error:
        raise ValueError(f"{name} is not a SentencePiece model, or is damaged") from error


def _sample(texts: Iterable[str], max_characters: int) -> list[str]:
    """The documents of smallest hash, `max_characters` in all, in one pass and bounded memory."""
    kept, characters, read, limit = [], 0, 0, 2**64
    for text in texts:
        if (hash := document_hash(text)) < limit:
            kept.append((hash, text))
            characters += len(text)
        if characters > 2 * max_characters:
            kept = _smallest(kept, max_characters)
            characters = sum(len(text) for _, text in kept)
            limit = kept[-1][0]
        read += len(text)
        if read > 100 * max_characters:
            break
    return [text for _, text in _smallest(kept, max_characters)]


def _smallest(hashed: list[tuple[int, str]], characters: int) -> list[tuple[int, str]]:
    """Those of smallest hash until they hold so many characters, but one at least."""
    hashed = sorted(hashed)
    totals = itertools.accumulate(len(text) for _, text in hashed)
    count = sum(1 for _ in itertools.takewhile(lambda total: total <= characters, totals))
    return hashed[: max(count, 1)]


def _sentences(texts: list[str]) -> Iterator[str]:
    """Lines of at most 1,000 characters: the trainer ignores those above 4,192 bytes."""
    for text in texts:
        for line in text.splitlines():
            yield from (line[start : start + 1_000] for start in range(0, len(line), 1_000))


def _explained(error: str, vocab_size: int, character_coverage: float) -> str:
    """The trainer's failed assertion, as a sentence with the size to choose."""
    if smallest := re.search(r"smaller than required_chars\. \d+ vs (\d+)", error):
        return (
            f"a vocabulary of {vocab_size:,} pieces is too small for the text's characters at "
            f"character_coverage {character_coverage:.4f}: set at least {int(smallest[1]):,}, or a "
            f"smaller character_coverage (no less than {LEAST_COVERAGE})"
        )
    return f"SentencePiece could not train a vocabulary of {vocab_size:,} pieces: {error}"

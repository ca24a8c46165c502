"""WordPiece and byte-level BPE, through Hugging Face's `tokenizers`: load published ones, or train.

BERT has WordPiece (vocab.txt); GPT-2, RoBERTa and BART byte-level BPE (vocab.json and merges.txt);
newer releases of all of them, and KoGPT2, a tokenizer.json. Of those trained here, WordPiece has
BERT's special tokens and byte-level BPE has RoBERTa's, all in front (RoBERTa has <mask> last).
"""

import collections
import hashlib
import json
import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Literal

import numpy as np
import tokenizers
from tokenizers import decoders, models, normalizers, pre_tokenizers, trainers

from lmjax.data import cache
from lmjax.objectives.bpe_dropout import Merges

WHOLE = "tokenizer.json"
Kind = Literal["byte_bpe", "wordpiece"]
SPECIAL = {
    "byte_bpe": ["<s>", "<pad>", "</s>", "<unk>", "<mask>"],
    "wordpiece": ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"],
}
ROLES = {
    "pad": ("<pad>", "[PAD]"),
    "bos": ("<s>", "[CLS]", "<|startoftext|>", "<|endoftext|>"),
    "eos": ("<eod>", "</s>", "[SEP]", "<|endoftext|>"),
    "cls": ("<cls>", "<s>", "[CLS]", "<|endoftext|>"),
    "sep": ("<sep>", "</s>", "[SEP]", "<|endoftext|>"),
    "unk": ("<unk>", "[UNK]"),
    "mask": ("<mask>", "[MASK]"),
}
"""The first of these that a tokenizer has plays the role."""


class FastTokenizer:
    """Text to ids and back.

    Attributes:
      model: the bytes of a tokenizer.json.
      vocab_size: ids in use.
      pad_id, bos_id, eos_id, unk_id, mask_id: None where the tokenizer has no such token; BERT's
        [CLS] counts as bos and [SEP] as eos.
      cls_id, sep_id: what stands for a text and what parts it; bos and eos, but for XLNet's.
      special_ids: those of the special tokens, int32.
      sentinels: none.
      sha256: names the model.
    """

    extra_ids = 0

    def __init__(self, model: bytes, name: str = "the tokenizer"):
        """`name` is for errors.

        Raises:
          ValueError: the bytes are no tokenizer.json, or one without a token that ends a text.
        """
        try:
            self._tokenizer = tokenizers.Tokenizer.from_buffer(model)
        except Exception as error:  # the library raises Exception itself
            raise ValueError(f"{name} is no tokenizer.json, or is damaged ({error})") from error
        self._tokenizer.no_padding()
        self._tokenizer.no_truncation()
        self.model = model
        self.vocab_size = max(self._tokenizer.get_vocab(with_added_tokens=True).values()) + 1
        ids = {role: self._first(names) for role, names in ROLES.items()}
        self.pad_id, self.bos_id, self.unk_id = ids["pad"], ids["bos"], ids["unk"]
        self.eos_id, self.mask_id = ids["eos"], ids["mask"]
        self.cls_id, self.sep_id = ids["cls"], ids["sep"]
        if self.eos_id is None:
            raise ValueError(f"{name} has no token that ends a text, none of {ROLES['eos']}")
        added = self._tokenizer.get_added_tokens_decoder()
        self.special_ids = np.array(sorted(i for i, t in added.items() if t.special), np.int32)
        self.sentinels = np.zeros(0, np.int32)
        self.sha256 = hashlib.sha256(model).hexdigest()

    @classmethod
    def load(cls, path: str | os.PathLike) -> "FastTokenizer":
        """Reads a tokenizer.json, a vocab.txt of WordPiece, or a directory that holds either of
        them, or vocab.json and merges.txt.

        Raises:
          ValueError: there is no such file, or it is damaged.
        """
        path = Path(path).expanduser()
        found = cls.find(path) if path.is_dir() else None
        if found is not None:
            return found
        try:
            content = path.read_bytes()
        except OSError as error:
            raise ValueError(f"cannot read the tokenizer {path}: {error.strerror}") from error
        if content.lstrip()[:1] != b"{":
            content = _word_piece(path, True).to_str().encode()
        return cls(content, str(path))

    @classmethod
    def find(cls, directory: Path) -> "FastTokenizer | None":
        """The tokenizer in a directory of Hugging Face's, if there is one."""
        if (directory / WHOLE).is_file():
            return cls((directory / WHOLE).read_bytes(), str(directory / WHOLE))
        try:
            if (directory / "merges.txt").is_file():
                files = [str(directory / name) for name in ("vocab.json", "merges.txt")]
                vocabulary, merges = models.BPE.read_file(*files)
                model = tokenizers.Tokenizer(models.BPE(vocabulary, merges))
                _be_byte_level(model)
                names = {name for names in ROLES.values() for name in names}
                model.add_special_tokens(sorted(names & set(vocabulary), key=vocabulary.get))
            elif (directory / "vocab.txt").is_file():
                settings = directory / "tokenizer_config.json"
                settings = json.loads(settings.read_text()) if settings.is_file() else {}
                model = _word_piece(directory / "vocab.txt", settings.get("do_lower_case", True))
            else:
                return None
        except ValueError:
            raise
        except Exception as error:  # the library raises Exception itself
            raise ValueError(
                f"the tokenizer in {directory} is damaged or incomplete ({error})"
            ) from error
        return cls(model.to_str().encode(), str(directory))

    def save(self, path: str | os.PathLike) -> None:
        """Writes a tokenizer.json."""
        cache.atomic_write(path, self.model)

    def files(self) -> dict[str, bytes]:
        """What a Hugging Face directory holds of it."""
        names = ("pad", "bos", "eos", "unk", "mask")
        ids = {f"{name}_token": getattr(self, f"{name}_id") for name in names}
        tokens = {k: self._tokenizer.id_to_token(i) for k, i in ids.items() if i is not None}
        settings = {"tokenizer_class": "PreTrainedTokenizerFast", **tokens}
        return {
            WHOLE: self.model,
            "tokenizer_config.json": (json.dumps(settings, indent=2) + "\n").encode(),
        }

    def __reduce__(self):
        return FastTokenizer, (self.model,)

    def encode(self, text: str) -> list[int]:
        """Ids, none added at the ends; "<mask>" in the text becomes that token."""
        self._tokenizer.encode_special_tokens = False
        return self._tokenizer.encode(text, add_special_tokens=False).ids

    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        """Ids (int32) of each text taken literally, on all processor cores."""
        self._tokenizer.encode_special_tokens = True
        encoded = self._tokenizer.encode_batch_fast(list(texts), add_special_tokens=False)
        return [np.array(one.ids, np.int32) for one in encoded]

    def decode(self, ids: Iterable[int]) -> str:
        """Readable text up to the first EOS; of special tokens, mask and unknown are shown."""
        kept = []
        hidden = set(self.special_ids.tolist()) - {self.mask_id, self.unk_id}
        for id in map(int, ids):
            if id == self.eos_id:
                break
            if id not in hidden:
                kept.append(id)
        return self._tokenizer.decode(kept, skip_special_tokens=False)

    def merges(self) -> Merges:
        """The table of byte-level BPE.

        Raises:
          ValueError: the tokenizer is of another kind.
        """
        settings = json.loads(self.model)
        model, first = settings["model"], (settings["pre_tokenizer"] or {}).get("type")
        if (model["type"], first) != ("BPE", "ByteLevel"):
            raise ValueError(
                f"the tokenizer is {model['type']} after {first}, which has no merges of bytes to"
                " leave out: take one of byte-level BPE, or set data.dropout 0"
            )
        pairs = (pair.split(" ") if isinstance(pair, str) else pair for pair in model["merges"])
        ids = model["vocab"]
        return {
            (ids[left], ids[right]): (rank, ids[left + right])
            for rank, (left, right) in enumerate(pairs)
        }

    def words(self, text: str) -> list[list[int]]:
        """What byte-level BPE merges in a text that is taken literally: words, byte by byte."""
        normalizer = self._tokenizer.normalizer
        text = normalizer.normalize_str(text) if normalizer else text
        words = self._tokenizer.pre_tokenizer.pre_tokenize_str(text)
        return [[self._tokenizer.token_to_id(byte) for byte in word] for word, _ in words]

    def starts_word(self) -> np.ndarray:
        """bool [vocab_size]: whether a token begins a word, rather than continue one."""
        tokens = [self._tokenizer.id_to_token(id) or "" for id in range(self.vocab_size)]
        if any(token.startswith("##") for token in tokens):
            return np.array([not token.startswith("##") for token in tokens])
        special = set(self.special_ids.tolist())
        return np.array([t[:1] in "ĠĊĉ\u2581" or i in special for i, t in enumerate(tokens)])

    def _first(self, names: Sequence[str]) -> int | None:
        ids = (self._tokenizer.token_to_id(name) for name in names)
        return next((id for id in ids if id is not None), None)


def train(
    kind: Kind, texts: Iterable[str], vocab_size: int, lower_case: bool = False
) -> FastTokenizer:
    """A tokenizer of at most `vocab_size` ids. The same texts give the same one.

    Args:
      lower_case: for byte-level BPE, which else takes text as it is; WordPiece always lowers case.

    Raises:
      ValueError: the vocabulary is too small for the alphabet.
    """
    special = SPECIAL[kind]
    least = 256 + len(special)
    if vocab_size < least:
        raise ValueError(
            f"a vocabulary of {vocab_size:,} ids is too small for {kind}: set at least {least}"
        )
    if kind == "wordpiece":
        model = _trained_word_piece(list(texts), vocab_size)
    else:
        model = tokenizers.Tokenizer(models.BPE())
        _be_byte_level(model)
        if lower_case:
            # Composed, because Hangul may come letter by letter, as from file names.
            model.normalizer = normalizers.Sequence([normalizers.NFC(), normalizers.Lowercase()])
        trainer = trainers.BpeTrainer(
            vocab_size=vocab_size,
            min_frequency=2,
            special_tokens=special,
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        )
        model.train_from_iterator(texts, trainer)
    return FastTokenizer(model.to_str().encode())


def _trained_word_piece(texts: list[str], vocab_size: int) -> tokenizers.Tokenizer:
    """Pieces that BPE makes of the words, with ## where they continue one.

    The library's own trainer numbers these in the order of a hash table, another one each time.
    """
    bpe = tokenizers.Tokenizer(models.BPE(unk_token="[UNK]"))
    _be_word_piece(bpe, lower_case=True, strip_accents=False)
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        min_frequency=2,
        special_tokens=["[UNK]"],
        limit_alphabet=vocab_size // 4,  # of Korean and Chinese, the rarest characters are unknown
        show_progress=False,
    )
    bpe.train_from_iterator(texts, trainer)
    counts = collections.Counter()
    for start in range(0, len(texts), 1_000):
        for one in bpe.encode_batch(texts[start : start + 1_000]):
            before = None
            for token, word in zip(one.tokens, one.word_ids, strict=True):
                counts[token if word != before else f"##{token}"] += 1
                before = word
    letters = sorted(token for token in bpe.get_vocab() if len(token) == 1)
    pieces = [*SPECIAL["wordpiece"], *letters, *(f"##{letter}" for letter in letters)]
    known = {*pieces, "##[UNK]"}
    frequent = sorted(
        (piece for piece in counts if piece not in known), key=lambda p: (-counts[p], p)
    )
    pieces += frequent[: max(0, vocab_size - len(pieces))]
    vocabulary = {piece: id for id, piece in enumerate(pieces)}
    model = tokenizers.Tokenizer(models.WordPiece(vocabulary, unk_token="[UNK]"))
    _be_word_piece(model, lower_case=True, strip_accents=False)
    model.add_special_tokens(SPECIAL["wordpiece"])
    return model


def _be_byte_level(model: tokenizers.Tokenizer) -> None:
    model.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    model.decoder = decoders.ByteLevel()


def _be_word_piece(
    model: tokenizers.Tokenizer, lower_case: bool, strip_accents: bool | None = None
) -> None:
    """BERT strips accents where it lowers case, which takes Hangul apart."""
    model.normalizer = normalizers.BertNormalizer(lowercase=lower_case, strip_accents=strip_accents)
    model.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    model.decoder = decoders.WordPiece()


def _word_piece(path: Path, lower_case: bool) -> tokenizers.Tokenizer:
    """The tokenizer of a vocab.txt."""
    lines = path.read_text(encoding="utf-8").splitlines()
    vocabulary = {line: id for id, line in enumerate(lines)}
    if "[UNK]" not in vocabulary:
        raise ValueError(f"{path} is no vocab.txt of WordPiece: it has no [UNK]")
    model = tokenizers.Tokenizer(models.WordPiece(vocabulary, unk_token="[UNK]"))
    _be_word_piece(model, lower_case)
    model.add_special_tokens([t for t in SPECIAL["wordpiece"] if t in vocabulary])
    return model

"""From settings to batches of text: source -> tokenizer -> token store -> objective -> batches."""

import dataclasses
import itertools
from typing import Any, NamedTuple

import jax
import numpy as np

from lmjax.data.batches import Batches, IndexedBatches, Rows, Windows, evaluation_batches
from lmjax.data.packing import PackedDocuments
from lmjax.data.sources import Source, TextData, open_source
from lmjax.data.streaming import StreamingBatches
from lmjax.data.token_store import TokenStore, build_token_store, store_directory
from lmjax.data.tokenizers import SentencePieceTokenizer, cached_tokenizer
from lmjax.objectives.denoising import Denoising


@dataclasses.dataclass(frozen=True)
class TokenizedText(TextData):
    """Which text to train on, and how it becomes tokens. With nothing set: the documentation
    installed on this machine, and a SentencePiece vocabulary trained on it."""

    tokenizer: str | None = None
    """A SentencePiece .model file (T5's or mT5's spiece.model, or your own). Without one, a
    vocabulary is trained on the text, once."""
    vocab_size: int = 32_000
    """Pieces of a vocabulary to train, fewer if the text is too short for so many; 100 sentinels
    are added."""
    character_coverage: float = 1.0
    """Share of the characters that get a piece of their own; 0.9995 suits Korean."""
    pack: bool = False
    """Keep documents apart: pack short ones into one row, each blind to the others. Otherwise they
    are joined end to end, as in T5's pretraining."""
    stream: bool = False
    """Tokenize while training instead of once before: for text too large to tokenize first."""
    shards: int = 16
    """With stream: logical parts that are read side by side; must divide by the hosts."""

    def __post_init__(self):
        if self.pack and self.stream:
            raise ValueError("data.pack and data.stream are both set: choose one of them")


class Text(NamedTuple):
    """All that an experiment takes from its text."""

    tokenizer: SentencePieceTokenizer
    batches: Batches
    evaluation: list[dict[str, np.ndarray]]
    samples: list[np.ndarray]
    """A few held-out documents as tokens, to show what a model makes of them."""
    identity: dict[str, Any]
    """Content hashes of text and tokenizer: what must be the same when a run is resumed."""
    summary: str


def read_text(
    data: TokenizedText,
    objective: Denoising,
    *,
    batch: int,
    seed: int,
    workers: int = 0,
    eval_batches: int = 8,
    tokenizer: SentencePieceTokenizer | None = None,
) -> Text:
    """Opens, tokenizes (or finds tokenized) and batches the text for this host.

    `tokenizer` is the one to use where the settings name none, instead of training one.

    Raises:
        ValueError, OSError: settings that contradict each other, or text, tokenizer or tokens that
            cannot be used; one sentence says why.
    """
    source = open_source(data)
    if tokenizer is None or data.tokenizer is not None:
        tokenizer = open_tokenizer(data, source)
    bound = objective.bind(tokenizer.sentinels, tokenizer.eos_id)
    host = {"process_index": jax.process_index(), "process_count": jax.process_count()}
    common = {"objective": bound, "lengths": objective.lengths, "batch_size": batch}
    identity = {
        "text": source.fingerprint("train"),
        "tokenizer": tokenizer.sha256,
        "pack": data.pack,
        "stream_shards": data.shards if data.stream else None,
    }

    if data.stream:
        settings = {"source": source, "tokenizer": tokenizer, "window": objective.window}
        settings |= {"shards": data.shards, **common, **host}
        batches = StreamingBatches(split="train", seed=seed, **settings)
        held_out = StreamingBatches(split="validation", seed=0, **settings).start(None)
        evaluation = [rows for rows, _ in itertools.islice(held_out, eval_batches)]
        held_out.close()
        documents = itertools.islice(source.documents("validation"), 200)
        samples = pick_samples(tokenizer.encode_batch(list(documents)))
        summary = f"{source.name}, tokenized while training"
    else:
        stores = {split: open_store(source, split, tokenizer) for split in ("train", "validation")}
        rows = {split: open_rows(store, data, objective) for split, store in stores.items()}
        batches = IndexedBatches(rows["train"], seed=seed, workers=workers, **common, **host)
        evaluation = evaluation_batches(rows["validation"], limit=eval_batches, **common, **host)
        documents = stores["validation"]
        samples = pick_samples([documents.document(i) for i in range(min(200, len(documents)))])
        tokens = len(stores["train"].tokens)
        summary = (
            f"{source.name}: {len(stores['train']):,} documents, {tokens:,} tokens,"
            f" {len(rows['train']):,} rows an epoch; {len(rows['validation']):,} rows held out"
        )
    summary += f"; {tokenizer.vocab_size:,} token ids; text {identity['text'][:12]}"
    return Text(tokenizer, batches, evaluation, samples, identity, summary)


def open_tokenizer(data: TokenizedText, source: Source) -> SentencePieceTokenizer:
    """The tokenizer named by the settings, or one trained on the source."""
    if data.tokenizer is not None:
        return SentencePieceTokenizer.load(data.tokenizer)
    return cached_tokenizer(source, data.vocab_size, character_coverage=data.character_coverage)


def open_store(source: Source, split: str, tokenizer: SentencePieceTokenizer) -> TokenStore:
    """The source's tokens, found in the cache or made now."""
    fingerprint = source.fingerprint(split)
    directory = store_directory(fingerprint, tokenizer)
    return build_token_store(source.documents(split), tokenizer, directory, fingerprint)


def open_rows(store: TokenStore, data: TokenizedText, objective: Denoising) -> Rows:
    if data.pack:
        return PackedDocuments(store, objective.window, objective.sizes, objective.lengths)
    return Windows(store, objective.window)


def pick_samples(
    documents: list[np.ndarray], count: int = 3, tokens: tuple[int, int] = (24, 64)
) -> list[np.ndarray]:
    """The first few documents of a readable length, longer ones cut, none shorter than needed."""
    shortest, longest = tokens
    readable = [d for d in documents if shortest <= len(d) <= longest] or documents
    return [document[:longest] for document in readable[:count] if len(document) > 1]

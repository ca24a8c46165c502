"""From settings to batches of text: source -> tokenizer -> token store -> objective -> batches."""

import dataclasses
from typing import Any, NamedTuple

import numpy as np

from lmjax.data.batches import Batches, IndexedBatches, Rows, Windows, evaluation_batches
from lmjax.data.full_sentences import FullSentences
from lmjax.data.lanes import Lanes
from lmjax.data.packing import PackedDocuments
from lmjax.data.sentence_pairs import SentencePairs, Sentences
from lmjax.data.sources import Source, TextData, open_source
from lmjax.data.streaming import StreamingBatches
from lmjax.data.token_store import (
    Ended,
    TokenizedDocuments,
    TokenStore,
    build_token_store,
    first_documents,
    store_directory,
)
from lmjax.data.tokenizers import (
    Subwords,
    Tokenizer,
    cached_tokenizer,
    check_rows,
    named_tokenizer,
)
from lmjax.objectives.objective import Objective


@dataclasses.dataclass(frozen=True)
class TokenizedText(TextData):
    """Which text to train on, and how it becomes tokens. With nothing set: the documentation
    installed on this machine, and a SentencePiece vocabulary trained on it."""

    tokenizer: str | None = None
    """A SentencePiece .model file (T5's or mT5's spiece.model, or your own), a tokenizer.json, a
    vocab.txt, or a directory with vocab.json and merges.txt. Without one, a vocabulary is trained
    on the text, once."""
    subwords: Subwords = "unigram"
    """What to train: unigram (SentencePiece, with T5's sentinels), xlnet_unigram (the same, with
    XLNet's special tokens in their place), common_unigram (with all that T5, XLNet, BERT, RoBERTa
    and BART have, for `experiments.compare`), byte_bpe (as GPT-2, RoBERTa and BART have) or
    wordpiece (as BERT has)."""
    vocab_size: int = 32_000
    """Pieces of a vocabulary to train, fewer if the text is too short for so many; to those of
    unigram 100 sentinels are added."""
    character_coverage: float | None = None
    """Share of the text whose characters get a piece of their own. By default all of it, or 0.9995
    where the rare ones would fill the vocabulary, as in Korean."""
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

    tokenizer: Tokenizer
    batches: Batches
    evaluation: list[dict[str, np.ndarray]]
    samples: list[np.ndarray]
    """A few held-out documents as tokens, to show what a model makes of them."""
    identity: dict[str, Any]
    """Content hashes of text and tokenizer: what must be the same when a run is resumed."""
    summary: str


def read_text(
    data: TokenizedText,
    objective: Objective,
    *,
    batch: int,
    seed: int,
    workers: int = 0,
    eval_batches: int = 8,
    tokenizer: Tokenizer | None = None,
    rows: int | None = None,
    share: tuple[int, int] = (0, 1),
) -> Text:
    """Opens, tokenizes (or finds tokenized) and batches the text for this host.

    Args:
        data: the settings.
        objective: what becomes of a stretch of tokens.
        batch: rows of the global batch.
        seed: of order and noise.
        workers: processes that prepare batches; none with `data.stream`.
        eval_batches: held-out batches, at most.
        tokenizer: a checkpoint's, to use instead of training one.
        rows: of the model's embedding, which must have one for every id.
        share: which part of every batch, of how many, is this host's: `Layout.share`.

    Held-out text is evaluated alike with and without `data.stream`: each host tokenizes as much of
    its beginning as `eval_batches` take, or all of it.

    Raises:
        ValueError, OSError: settings that contradict each other, or text, tokenizer or tokens that
            cannot be used; one sentence says why, before the text is tokenized where possible.
    """
    if data.stream and workers:
        raise ValueError("data.stream reads in one thread: drop --workers")
    if objective.corpus not in ("joined", "ended") and (data.stream or data.pack):
        raise ValueError(
            "data.stream and data.pack are not for rows that are chosen from the whole text (of"
            " whole sentences, pairs of them, or lanes): drop them, or, of full sentences, set"
            " --objective.no-full-sentences"
        )
    source = open_source(data)
    tokenizer = choose_tokenizer(data, source, tokenizer)
    check_rows(tokenizer, rows)
    corpus = corpus_of(tokenizer, objective)
    common = {
        "objective": objective.bind(tokenizer),
        "lengths": objective.lengths,
        "batch_size": batch,
        "process_index": share[0],
        "process_count": share[1],
    }
    if data.stream:
        batches = StreamingBatches(
            source,
            "train",
            corpus,
            objective.window,
            seed=seed,
            shards=data.shards,
            **common,
        )
        needed = eval_batches * batch * objective.window
        validation = first_documents(source.documents("validation"), corpus, needed)
        size = "tokenized while training"
    else:
        train = open_store(source, "train", corpus)
        validation = open_store(source, "validation", corpus)
        train_rows = rows_of(train, data, objective, tokenizer, batch, seed)
        batches = IndexedBatches(
            train_rows,
            seed=seed,
            workers=workers,
            static=objective.corpus == "pairs",
            ordered=objective.corpus == "lanes",
            **common,
        )
        size = (
            f"{len(train):,} documents, {len(train.tokens):,} tokens, {len(train_rows):,} rows an"
            " epoch"
        )
    held_out = held_out_rows_of(validation, data, objective, tokenizer, batch)
    identity = {
        "text": source.fingerprint("train"),
        "tokenizer": tokenizer.sha256,
        "extra_ids": tokenizer.extra_ids,
        "pack": data.pack,
        "stream_shards": data.shards if data.stream else None,
    }
    return Text(
        tokenizer,
        batches,
        evaluation_batches(held_out, limit=eval_batches, **common),
        pick_samples([validation.document(i) for i in range(min(200, len(validation)))]),
        identity,
        f"{source.name}: {size}; {len(held_out):,} rows held out;"
        f" {tokenizer.vocab_size:,} token ids; text {identity['text'][:12]}",
    )


def choose_tokenizer(
    data: TokenizedText, source: Source, given: Tokenizer | None = None
) -> Tokenizer:
    """The one `given` with a checkpoint, the one that the settings name, or one trained now.

    Raises:
        ValueError: the settings name another one than is given, or one that cannot be read; or the
            text cannot train one.
    """
    if data.tokenizer is None:
        return given or cached_tokenizer(
            source,
            data.vocab_size,
            subwords=data.subwords,
            character_coverage=data.character_coverage,
        )
    return named_tokenizer(data.tokenizer, given)


def corpus_of(tokenizer: Tokenizer, objective: Objective) -> Tokenizer | Ended | Sentences:
    """What makes tokens of documents as the objective reads them."""
    match objective.corpus:
        case "joined":
            return tokenizer
        case "ended":
            return Ended(tokenizer)
        case "sentences":
            return Sentences(tokenizer, objective.lines, spaced=True)
        case "pairs" | "lanes":
            return Sentences(tokenizer, objective.lines)


def open_store(source: Source, split: str, tokenizer: Tokenizer | Ended | Sentences) -> TokenStore:
    """The source's tokens, found in the cache or made now."""
    fingerprint = source.fingerprint(split)
    return build_token_store(
        source.documents(split),
        tokenizer,
        store_directory(fingerprint, tokenizer),
        fingerprint,
        total=source.num_documents(split),
    )


def rows_of(
    store: TokenizedDocuments,
    data: TokenizedText,
    objective: Objective,
    tokenizer: Tokenizer,
    batch: int,
    seed: int,
) -> Rows:
    """The rows to train on."""
    if objective.corpus == "pairs":
        return SentencePairs(store, tokenizer.eos_id, objective, seed)
    if objective.corpus == "lanes":
        return Lanes(store, tokenizer.eos_id, objective, batch)
    if objective.corpus == "sentences":
        return FullSentences(store, tokenizer.eos_id, objective.window)
    if data.pack:
        return PackedDocuments(store, objective.window, objective.sizes, objective.lengths)
    return Windows(store, objective.window)


def held_out_rows_of(
    documents: TokenizedDocuments,
    data: TokenizedText,
    objective: Objective,
    tokenizer: Tokenizer,
    batch: int,
) -> Rows:
    """The rows to evaluate on; of text shorter than one example, a single shorter one."""
    if objective.corpus == "lanes":
        return Lanes(documents, tokenizer.eos_id, objective, batch, "validation")
    if objective.corpus == "sentences":
        return FullSentences(documents, tokenizer.eos_id, objective.window, "validation")
    if objective.corpus == "pairs":
        objective = dataclasses.replace(objective, copies=1)
    if data.pack or objective.corpus == "pairs":
        return rows_of(documents, data, objective, tokenizer, batch, seed=0)
    # A single token has nothing to predict it from.
    window = max(min(objective.window, len(documents.tokens)), 2)
    return Windows(documents, window, "validation")


def pick_samples(
    documents: list[np.ndarray], count: int = 3, tokens: tuple[int, int] = (24, 64)
) -> list[np.ndarray]:
    """The first few documents of a readable length, longer ones cut, none shorter than needed."""
    shortest, longest = tokens
    readable = [d for d in documents if shortest <= len(d) <= longest] or documents
    return [document[:longest] for document in readable[:count] if len(document) > 1]

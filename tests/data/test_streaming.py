import functools
import itertools
import json

import numpy as np
import pytest

from lmjax.data import streaming
from lmjax.data.batches import joined_positions
from lmjax.data.streaming import StreamingBatches
from lmjax.objectives.span_corruption import span_corruption, span_corruption_lengths

WINDOW = 20
OBJECTIVE = functools.partial(span_corruption, sentinels=np.arange(60_000, 59_900, -1))
LENGTHS = dict(zip(("inputs", "targets"), span_corruption_lengths(WINDOW), strict=True))


class Letters:
    """A fake tokenizer: one id per character, counting what it is given."""

    vocab_size, sha256 = 65_536, "letters"

    def __init__(self):
        self.documents = 0

    def encode_batch(self, texts):
        self.documents += len(texts)
        return [np.array([ord(c) for c in text], np.int32) for text in texts]


class Documents:
    """A source in memory: document i belongs to shard i % shards."""

    def __init__(self, documents):
        self.all = documents

    def documents(self, split, shard=0, shards=1):
        assert split == "train"
        return itertools.islice(self.all, shard, None, shards)


def corpus(documents=120, longest=90):
    """Every token a different character, so that it is known wherever it appears."""
    rng = np.random.default_rng(0)
    lengths = rng.integers(0, longest, documents)
    ends = 2 + np.cumsum(lengths)
    return ["".join(map(chr, range(end - n, end))) for end, n in zip(ends, lengths, strict=True)]


def identity(tokens, rng):
    return {"inputs": tokens, "targets": tokens}


def make(texts=None, **settings):
    defaults = {
        "source": Documents(texts or corpus()),
        "split": "train",
        "tokenizer": Letters(),
        "window": WINDOW,
        "objective": OBJECTIVE,
        "lengths": LENGTHS,
        "batch_size": 8,
        "seed": 3,
        "shards": 4,
        "shuffle_block": 6,
    }
    return StreamingBatches(**defaults | settings)


def take(batches, count, position=None):
    return list(itertools.islice(batches.start(position), count))


def assert_same(first, second):
    assert first.keys() == second.keys()
    for name in first:
        np.testing.assert_array_equal(first[name], second[name], err_msg=name)


@pytest.mark.parametrize("stop", [1, 2, 3, 7, 30, 41])
def test_resuming_gives_what_would_have_come(stop):
    whole = take(make(), 50)  # an epoch of a shard is about 33 steps
    position = json.loads(json.dumps(whole[stop - 1][1]))
    assert position["step"] == stop and len(json.dumps(position)) < 300
    for (batch, after), (expected, later) in zip(
        take(make(), 50 - stop, position), whole[stop:], strict=True
    ):
        assert_same(batch, expected)
        assert after == later


@pytest.mark.parametrize("hosts", [2, 4, 8])
def test_hosts_read_the_rows_of_one_global_batch(hosts):
    whole = take(make(), 12)
    parts = [take(make(process_index=i, process_count=hosts), 12) for i in range(hosts)]
    for (batch, position), *host_batches in zip(whole, *parts, strict=True):
        assert_same({k: np.concatenate([b[k] for b, _ in host_batches]) for k in batch}, batch)
        assert joined_positions([own for _, own in host_batches]) == position


def test_a_position_of_fewer_shards_resumes_alike():
    whole = take(make(), 9)
    position = whole[4][1]
    position = position | {"shards": {"1": position["shards"]["1"]}}
    for (batch, after), (expected, later) in zip(take(make(), 4, position), whole[5:], strict=True):
        assert_same(batch, expected)
        assert after == later


def test_a_shard_is_cut_end_to_end_and_shuffled_within_blocks():
    texts = corpus()
    lengths = {"inputs": WINDOW, "targets": WINDOW}
    batches = make(texts, objective=identity, lengths=lengths)
    rows = np.stack([batch["inputs"] for batch, _ in take(batches, 60)])
    for shard in range(4):
        windows = rows[:, 2 * shard : 2 * shard + 2].reshape(-1, 6, WINDOW)
        stream = np.array([ord(c) for c in "".join(texts[shard::4])])
        stream = np.concatenate([stream] * 5)[: windows.size].reshape(windows.shape)
        for block, expected in zip(windows, stream, strict=True):
            assert sorted(map(tuple, block.tolist())) == sorted(map(tuple, expected.tolist()))
        assert (windows != stream).any()


def test_resuming_reads_over_documents_without_tokenizing_them(monkeypatch):
    monkeypatch.setattr(streaming, "GROUP_CHARACTERS", 5 * WINDOW)
    texts = ["".join(map(chr, range(i, i + WINDOW))) for i in range(2, 3_002)]  # a window each
    settings = {"shards": 1, "batch_size": 2, "shuffle_block": 10}
    position = take(make(texts, **settings), 500)[-1][1]
    resumed = make(texts, **settings)
    take(resumed, 1, position)
    assert resumed.tokenizer.documents < 50  # of the 1,000 that come before


@pytest.mark.parametrize("documents", [["", ""], ["ab", "cd", "ef", "gh"]])
def test_a_shard_without_a_window_is_named(documents):
    with pytest.raises(ValueError, match="shard 0 of 4 of the train text has . tokens"):
        next(make(documents).start(None))


def test_a_source_that_shrank_is_named():
    position = take(make(), 20)[-1][1]
    with pytest.raises(ValueError, match="resume with the source that the run began with"):
        take(make(corpus(documents=20)), 20, position)


def test_seeds_are_those_that_noise_can_be_drawn_from():
    take(make(seed=2**63 - 1), 1)
    for seed in (-1, 2**63):
        with pytest.raises(ValueError, match=f"the seed is {seed}: choose one from 0"):
            make(seed=seed)


def test_batches_must_divide():
    with pytest.raises(ValueError, match="8 rows does not divide over 3 shards"):
        make(shards=3)
    with pytest.raises(ValueError, match="8 rows does not divide over 3 hosts"):
        make(process_count=3)

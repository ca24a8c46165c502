import functools
import itertools
import multiprocessing
import os
import signal

import numpy as np
import pytest

from lmjax.data.batches import (
    IndexedBatches,
    Windows,
    assemble,
    evaluation_batches,
    host_rows,
    noise,
    shuffled,
)
from lmjax.data.token_store import build_token_store
from lmjax.objectives.prefix_lm import prefix_lm
from lmjax.objectives.span_corruption import span_corruption, span_corruption_lengths

WINDOW = 20
INPUTS, TARGETS = span_corruption_lengths(WINDOW)
LENGTHS = {"inputs": INPUTS, "targets": TARGETS}
OBJECTIVE = functools.partial(span_corruption, sentinels=np.arange(2_000, 1_900, -1))
NAMES = {
    f"{side}{suffix}"
    for side in ("inputs", "targets")
    for suffix in ("", "_positions", "_segment_ids")
} | {"loss_weights"}


class Numbers:
    """A fake tokenizer: a document is a string of numbers."""

    vocab_size, sha256 = 2_000, "numbers"

    def encode_batch(self, texts):
        return [np.array(text.split(), np.int32) for text in texts]


def identity(tokens, rng):
    """An objective without noise, to follow tokens through a batch."""
    return {"inputs": tokens, "targets": tokens}


def make_store(directory, tokens, documents=7):
    """Ids 2, 3, ... so that a window is known by its first token."""
    parts = np.array_split(np.arange(2, 2 + tokens), documents)
    texts = (" ".join(map(str, part)) for part in parts)
    return build_token_store(texts, Numbers(), directory / "store", "numbers", progress=False)


@pytest.fixture
def store(tmp_path):
    return make_store(tmp_path, 1_010)


def make(store, **settings):
    settings = {"objective": OBJECTIVE, "lengths": LENGTHS, "batch_size": 8, "seed": 3, **settings}
    return IndexedBatches(Windows(store, WINDOW), **settings)


def take(batches, count, position=None):
    return list(itertools.islice(batches.start(position), count))


def assert_same(first, second):
    assert first.keys() == second.keys()
    for name in first:
        assert first[name].dtype == second[name].dtype
        np.testing.assert_array_equal(first[name], second[name], err_msg=name)


def test_a_batch_has_all_names_and_what_the_objective_made(store):
    batches = make(store)
    (batch, position), *_ = take(batches, 1)
    assert set(batch) == NAMES and position == {"step": 1}
    assert batch["inputs"].shape == (8, INPUTS) and batch["targets"].shape == (8, TARGETS)
    assert {v.dtype for k, v in batch.items() if k != "loss_weights"} == {np.dtype(np.int32)}
    assert batch["loss_weights"].dtype == np.float32 and batch["loss_weights"].all()
    for row in range(8):
        # The first token is never hidden: it names the window, hence the example.
        index = (batch["inputs"][row, 0] - 2) // WINDOW
        tokens = store.tokens[index * WINDOW : (index + 1) * WINDOW]
        expected = OBJECTIVE(tokens, noise(3, 0, int(index)))
        np.testing.assert_array_equal(batch["inputs"][row], expected["inputs"])
        np.testing.assert_array_equal(batch["targets"][row], expected["targets"])
        np.testing.assert_array_equal(batch["inputs_positions"][row], np.arange(INPUTS))
    assert (batch["inputs_segment_ids"] == 1).all() and (batch["targets_segment_ids"] == 1).all()


def test_every_epoch_holds_every_window_once_in_another_order(store):
    windows = len(Windows(store, WINDOW))
    assert windows == 50  # and 10 tokens left over
    lengths = {"inputs": WINDOW, "targets": WINDOW}
    batches = make(store, objective=identity, lengths=lengths, batch_size=5)
    firsts = np.concatenate([batch["inputs"][:, 0] for batch, _ in take(batches, 30)])
    epochs = (firsts.reshape(3, windows) - 2) // WINDOW
    for epoch in epochs:
        assert sorted(epoch) == list(range(windows))
    assert len({tuple(epoch) for epoch in epochs}) == 3


def test_noise_differs_between_epochs_seeds_and_windows(store):
    def draw(tokens, rng):
        return {"inputs": tokens[:1], "targets": rng.integers(2**31, size=1)}

    def draws(seed, steps):
        lengths = {"inputs": 1, "targets": 1}
        batches = make(store, objective=draw, lengths=lengths, batch_size=50, seed=seed)
        return {int(row[0]) for step in steps for row in batches.batch(step)["targets"]}

    assert len(draws(3, [0, 1])) == 100
    assert not draws(3, [0, 1]) & draws(4, [0, 1])


@pytest.mark.parametrize("hosts", [2, 4])
def test_hosts_read_the_rows_of_one_global_batch(store, hosts):
    whole = take(make(store), 9)  # past the end of an epoch, in the middle of a batch
    parts = [take(make(store, process_index=i, process_count=hosts), 9) for i in range(hosts)]
    for (batch, position), *host_batches in zip(whole, *parts, strict=True):
        assert all(host_position == position for _, host_position in host_batches)
        joined = {k: np.concatenate([b[k] for b, _ in host_batches]) for k in batch}
        assert_same(joined, batch)


def test_resuming_gives_what_would_have_come(store):
    whole = take(make(store), 12)
    for (batch, position), (expected, later) in zip(
        take(make(store), 5, whole[6][1]), whole[7:], strict=True
    ):
        assert_same(batch, expected)
        assert position == later


def test_worker_processes_change_nothing(store):
    plain = take(make(store), 10)
    for (batch, position), (expected, later) in zip(
        take(make(store, workers=2), 7, {"step": 3}), plain[3:], strict=True
    ):
        assert_same(batch, expected)
        assert position == later


def test_worker_processes_leave_interrupts_to_the_main_one_and_end_with_the_iterator(store):
    before = set(multiprocessing.active_children())
    stream = make(store, workers=2).start(None)
    next(stream)
    workers = set(multiprocessing.active_children()) - before
    for worker in workers:
        os.kill(worker.pid, signal.SIGINT)
    for step in range(2, 20):  # more than were prepared before
        assert next(stream)[1] == {"step": step}
    assert len(workers) == 2 and all(worker.is_alive() for worker in workers)
    stream.close()
    assert not workers & set(multiprocessing.active_children())


def test_short_examples_are_padded(store):
    batches = make(store, objective=prefix_lm, lengths={"inputs": WINDOW, "targets": WINDOW + 4})
    batch = batches.batch(0)
    inputs, targets = (batch["inputs_segment_ids"] > 0), (batch["targets_segment_ids"] > 0)
    assert (inputs.sum(1) + targets.sum(1) == WINDOW + 2).all()
    assert (batch["inputs"][~inputs] == 0).all() and (batch["inputs"][inputs] > 0).all()
    np.testing.assert_array_equal(batch["loss_weights"], targets)
    for row, length in enumerate(targets.sum(1)):
        assert batch["targets_positions"][row, :length].tolist() == list(range(length))
        assert not batch["targets_positions"][row, length:].any()


def test_evaluation_batches_are_fixed_and_fill_up_with_weightless_rows(store):
    rows = Windows(store, WINDOW)
    make_batches = functools.partial(evaluation_batches, rows, OBJECTIVE, LENGTHS, 16)
    batches = make_batches()
    assert [batch["inputs"].shape for batch in batches] == [(16, INPUTS)] * 4
    weights = np.concatenate([batch["loss_weights"].any(axis=1) for batch in batches])
    assert weights.tolist() == [True] * 50 + [False] * 14
    assert not batches[-1]["inputs"][2:].any() and not batches[-1]["inputs_segment_ids"][2:].any()
    firsts = np.concatenate([batch["inputs"][:, 0] for batch in batches])[:50]
    assert firsts.tolist() == list(range(2, 1_002, WINDOW))
    for again, batch in zip(make_batches(), batches, strict=True):
        assert_same(again, batch)
    assert len(make_batches(limit=2)) == 2
    hosts = [make_batches(process_index=i, process_count=4)[3] for i in range(4)]
    assert_same({k: np.concatenate([b[k] for b in hosts]) for k in NAMES}, batches[3])


def test_errors_of_the_background_thread_reach_the_caller(store):
    batches = make(store, lengths={"inputs": INPUTS, "targets": TARGETS - 1})
    with pytest.raises(ValueError, match=f"a row of {TARGETS - 1} targets can't hold {TARGETS}"):
        next(batches.start(None))


def test_bad_settings_are_named(tmp_path, store):
    with pytest.raises(ValueError, match="the train text has 15 tokens and one example takes 20"):
        Windows(make_store(tmp_path / "short", 15), WINDOW)
    with pytest.raises(ValueError, match="8 rows does not divide over 3 hosts"):
        make(store, process_count=3)
    with pytest.raises(ValueError, match="workers must not be negative, got -1"):
        make(store, workers=-1)
    for limit in (0, -1):
        with pytest.raises(ValueError, match=f"{limit} evaluation batches are no evaluation"):
            evaluation_batches(Windows(store, WINDOW), OBJECTIVE, LENGTHS, 8, limit=limit)


def test_seeds_are_those_that_noise_can_be_drawn_from(store):
    make(store, seed=2**63 - 1).batch(0)
    for seed in (-1, 2**63):
        with pytest.raises(ValueError, match=f"the seed is {seed}: choose one from 0"):
            make(store, seed=seed)


@pytest.mark.parametrize("count", [1, 2, 1_000, 20_000])  # made whole, and index by index
def test_shuffling_is_a_permutation_of_its_own_for_each_seed(count):
    orders = [[shuffled(i, count, 3, epoch) for i in range(count)] for epoch in range(2)]
    for order in orders:
        assert sorted(order) == list(range(count))
    assert count < 3 or orders[0] != orders[1]


def test_rows_of_hosts_are_contiguous():
    assert [list(host_rows(6, i, 3)) for i in range(3)] == [[0, 1], [2, 3], [4, 5]]


def test_assemble_restarts_positions_in_each_segment():
    first = {"inputs": np.array([5, 6, 7]), "targets": np.array([8])}
    second = {"inputs": np.array([9]), "targets": np.array([10, 11])}
    batch = assemble([[first, second], []], {"inputs": 5, "targets": 4})
    assert {name: array[0].tolist() for name, array in batch.items()} == {
        "inputs": [5, 6, 7, 9, 0],
        "inputs_positions": [0, 1, 2, 0, 0],
        "inputs_segment_ids": [1, 1, 1, 2, 0],
        "targets": [8, 10, 11, 0],
        "targets_positions": [0, 0, 1, 0],
        "targets_segment_ids": [1, 2, 2, 0],
        "loss_weights": [1, 1, 1, 0],
    }
    assert not any(array[1].any() for array in batch.values())

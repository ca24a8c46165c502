import functools

import numpy as np
import pytest

from lmjax.data.batches import IndexedBatches, noise
from lmjax.data.packing import PackedDocuments, first_fit
from lmjax.data.token_store import build_token_store
from lmjax.objectives.prefix_lm import prefix_lm, prefix_lm_lengths
from lmjax.objectives.span_corruption import span_corruption, span_corruption_lengths

WINDOW, LENGTHS = 40, {"inputs": 48, "targets": 24}
SPAN_CORRUPTION = functools.partial(span_corruption, sentinels=np.arange(60_000, 59_900, -1))


class Letters:
    vocab_size, sha256 = 65_536, "letters"

    def encode_batch(self, texts):
        return [np.array([ord(c) for c in text], np.int32) for text in texts]


@pytest.fixture
def documents():
    rng = np.random.default_rng(0)
    lengths = [0, 1, 2, 40, 41, 80, 100, *rng.integers(0, 90, 60)]
    return [rng.integers(2, 50_000, length) for length in lengths]


@pytest.fixture
def store(tmp_path, documents):
    texts = ["".join(map(chr, ids)) for ids in documents]
    return build_token_store(texts, Letters(), tmp_path / "store", "letters", progress=False)


def pieces_of(documents):
    return [
        ids[start : start + WINDOW] for ids in documents for start in range(0, len(ids), WINDOW)
    ]


def segments(batch):
    """Every (inputs, targets) of a batch, cut at the segment ids; checks positions on the way."""
    found = []
    for row in range(len(batch["inputs"])):
        for segment in range(1, batch["inputs_segment_ids"][row].max() + 1):
            example = []
            for name in ("inputs", "targets"):
                mine = batch[f"{name}_segment_ids"][row] == segment
                positions = batch[f"{name}_positions"][row][mine]
                assert positions.tolist() == list(range(len(positions)))
                example.append(tuple(batch[name][row][mine].tolist()))
            found.append(tuple(example))
    return found


@pytest.mark.parametrize(
    ("objective", "sizes", "lengths"),
    [
        (SPAN_CORRUPTION, span_corruption_lengths, LENGTHS),
        (prefix_lm, prefix_lm_lengths, {"inputs": 60, "targets": 70}),
    ],
)
def test_packed_examples_are_the_unpacked_ones(store, documents, objective, sizes, lengths):
    rows = PackedDocuments(store, WINDOW, sizes, lengths)
    pieces = pieces_of(documents)
    assert len(rows) < 0.8 * len(pieces)
    epoch = IndexedBatches(rows, objective, lengths, batch_size=len(rows), seed=5)
    for step in range(2):
        batch = epoch.batch(step)
        unpacked = [
            tuple(tuple(side.tolist()) for side in objective(piece, noise(5, step, i)).values())
            for i, piece in enumerate(pieces)
        ]
        assert sorted(segments(batch)) == sorted(unpacked)
        np.testing.assert_array_equal(batch["loss_weights"], batch["targets_segment_ids"] > 0)
        assert batch["loss_weights"].sum() == sum(len(targets) for _, targets in unpacked)


def test_packing_is_the_same_each_time(store):
    first, second = (
        PackedDocuments(store, WINDOW, span_corruption_lengths, LENGTHS) for _ in range(2)
    )
    for index in range(len(first)):
        assert [i for i, _ in first.row(index)] == [i for i, _ in second.row(index)]


def test_first_fit_by_hand():
    sizes = np.array([[6, 1], [5, 1], [4, 1], [3, 9], [2, 1], [10, 10]])
    # The fourth has no room in row 1 for its targets; the fifth goes back to row 1.
    assert first_fit(sizes, (10, 9), open_rows=8).tolist()[:5] == [0, 1, 0, 2, 1]
    # With one open row, a new row closes the one before.
    assert first_fit(sizes[:5], (10, 9), open_rows=1).tolist() == [0, 1, 1, 2, 3]


def test_rows_are_well_filled():
    rng = np.random.default_rng(0)
    lengths = rng.integers(1, 568, 20_000)
    sizes = np.array([span_corruption_lengths(length) for length in lengths])
    rows = first_fit(sizes, (512, 114), open_rows=32)
    filled = np.zeros((rows.max() + 1, 2), int)
    np.add.at(filled, rows, sizes)
    assert (filled <= (512, 114)).all()
    assert filled[:, 0].mean() > 0.93 * 512


def test_a_piece_larger_than_a_row_is_named(store):
    with pytest.raises(ValueError, match="piece of .* tokens makes .* a row holds 48 and 7"):
        PackedDocuments(store, WINDOW, span_corruption_lengths, {"inputs": 48, "targets": 7})

import itertools
import pickle

import numpy as np
import pytest

from lmjax.data.batches import IndexedBatches, evaluation_batches
from lmjax.data.lanes import Lanes, Sentences
from lmjax.data.token_store import TokenizedDocuments
from lmjax.objectives.permutation_lm import PermutationLM
from tests.data.test_sentence_pairs import END, STORE

SETTINGS = PermutationLM(length=24, reuse=10, targets=4)


def words_of(store):
    """The corpus told again: its words, and where its sentences part."""
    words, boundaries = [], {0}
    for document in range(len(store)):
        tokens = store.document(document).tolist()
        for place, token in enumerate(tokens):
            last = place == len(tokens) - 1
            if token != END or last:
                words.append(token)
            if token == END:
                boundaries |= {len(words) - last, len(words)}
    return np.array(words), np.array(sorted(boundaries))


WORDS, BOUNDARIES = words_of(STORE)


def test_documents_end_with_a_mark_and_sentences_without():
    text = Sentences(STORE, END)
    assert len(text) == len(WORDS)
    np.testing.assert_array_equal(text.boundaries, BOUNDARIES)
    draw = np.random.default_rng(0)
    for _ in range(300):
        start, stop = sorted(draw.integers(len(WORDS) + 1, size=2))
        if start < stop:
            np.testing.assert_array_equal(text.read(start, stop), WORDS[start:stop])


def test_a_lane_read_backward_is_the_text_from_its_end():
    rows = Lanes(STORE, END, SETTINGS, 6)
    lanes = [rows.row(lane)[0][1].lane for lane in range(6)]
    assert [lane.backward for lane in lanes] == [False, True] * 3
    length = len(WORDS) // 3
    for lane, part in zip(lanes, (0, 0, 1, 1, 2, 2), strict=True):
        assert len(lane) == length
        begin = part * length
        words = WORDS[begin : begin + length]
        within = BOUNDARIES[(BOUNDARIES >= begin) & (BOUNDARIES <= begin + length)] - begin
        if lane.backward:
            words, within = words[::-1], length - within[::-1]
        inner = within[(within > 0) & (within < length)]
        np.testing.assert_array_equal(lane.read(0, length), words)
        np.testing.assert_array_equal(lane.read(7, 20), words[7:20])
        np.testing.assert_array_equal(lane.boundaries(0, length), inner)
        for place in range(length + 1):
            assert lane.boundary_from(place) == min([b for b in within if b >= place] + [length])
            assert lane.boundary_up_to(place) == max([b for b in within if b <= place] + [0])
        found = lane.boundaries(5, 30)
        np.testing.assert_array_equal(found, inner[(inner > 5) & (inner < 30)])


def reused(row, rng):
    return {"inputs": row.lane.read(row.start, row.start + 10), "targets": np.array([1])}


def test_each_row_goes_on_where_the_one_before_it_ended():
    batches = IndexedBatches(
        pickle.loads(pickle.dumps(Lanes(STORE, END, SETTINGS, 6))),
        reused,
        {"inputs": 10, "targets": 1},
        6,
        seed=0,
        ordered=True,
    )
    steps = len(batches.rows) // 6
    length = len(WORDS) // 3
    read = np.stack([batches.batch(step)["inputs"] for step in range(steps)], 1)
    for lane, tokens in enumerate(read.reshape(6, -1)):
        own = WORDS[lane // 2 * length :][:length]
        own = own[::-1] if lane % 2 else own
        np.testing.assert_array_equal(tokens, own[: len(tokens)])
        assert length - len(tokens) < SETTINGS.length + 10
    # The next epoch begins where the first one began.
    again = next(itertools.islice(batches.start({"step": steps}), 1))[0]
    np.testing.assert_array_equal(again["inputs"], read[:, 0])


def test_held_out_text_may_leave_lanes_empty():
    short = TokenizedDocuments(STORE.tokens[:60], np.array([0, 60]))
    with pytest.raises(ValueError, match="the train text has .* do not fill 3 lanes of 22 or more"):
        Lanes(short, END, SETTINGS, 6)
    rows = Lanes(short, END, SETTINGS, 6, "validation")
    assert [len(rows.row(lane)) for lane in range(6)] == [1, 1, 1, 1, 0, 0]
    (batch, *_) = evaluation_batches(rows, reused, {"inputs": 10, "targets": 1}, 6)
    assert batch["loss_weights"].sum() == 4
    with pytest.raises(ValueError, match="the validation text has 12 tokens, which do not fill"):
        few = TokenizedDocuments(np.full(12, 9), np.array([0, 12]))
        Lanes(few, END, SETTINGS, 6, "validation")


def test_directions_need_pairs_of_lanes():
    with pytest.raises(ValueError, match="a batch of 5 rows cannot be half forward"):
        Lanes(STORE, END, SETTINGS, 5)
    forward = Lanes(STORE, END, PermutationLM(24, 10, 4, backward=False), 5)
    assert not any(forward.row(lane)[0][1].lane.backward for lane in range(5))

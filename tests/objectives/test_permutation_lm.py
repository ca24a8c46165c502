"""Against the rules of zihangdai/xlnet's data_utils.py, told again token by token."""

import functools

import numpy as np
import pytest

from lmjax.data.batches import assemble
from lmjax.objectives.permutation_lm import (
    SPANS,
    LaneRow,
    PermutationLM,
    choose_spans,
    permutation_lm,
    two_parts,
)

SEP, CLS, VOCAB = 4, 3, 400
STARTS = np.arange(VOCAB) % 3 > 0  # two of three ids begin a word
REUSED = np.arange(10, 74)
FIRST, SECOND = np.arange(74, 104), np.arange(104, 135)
permute = functools.partial(permutation_lm, sep=SEP, cls=CLS, word_starts=STARTS, targets=21)


def examples(count, **settings):
    return [
        permute(REUSED, FIRST, SECOND, np.random.default_rng(seed), **settings)
        for seed in range(count)
    ]


def test_layout():
    truth = np.array([*REUSED, *FIRST, SEP, *SECOND, SEP, CLS])
    for example in examples(30):
        np.testing.assert_array_equal(example["inputs"], truth)  # nothing is hidden in the text
        places = example["targets_positions"]
        np.testing.assert_array_equal(example["targets"], truth[places])
        assert (np.diff(places) > 0).all()
        assert not np.isin(truth[places], (SEP, CLS)).any()
        assert (places < 64).sum() == 11 and 8 <= (places >= 64).sum() <= 10
        types = [0] * (64 + 31) + [1] * 32 + [2]
        assert example["token_types"].tolist() == types
        assert {array.dtype for array in example.values()} == {np.dtype("int32")}


def perm_mask(inputs, is_masked, index):
    """`_local_perm` of one half: [i, j] is 1 where i must not read j; and which are targets."""
    functional = np.isin(inputs, (SEP, CLS))
    hidden = is_masked | functional
    target = is_masked & ~functional
    rev_index = np.where(hidden, index, -1)
    self_rev_index = np.where(target, rev_index, rev_index + 1)
    return (self_rev_index[:, None] <= rev_index[None, :]) & hidden, target


def test_order_says_what_the_references_mask_says():
    """Both streams, both halves; the content stream reads its own token besides."""
    for example in examples(30):
        order, inputs = example["order"], example["inputs"]
        target = np.isin(np.arange(128), example["targets_positions"])
        blocked, targets = np.ones((128, 128), bool), np.zeros(128, bool)
        for half, least in ((slice(0, 64), -1), (slice(64, 128), 64)):
            own = order[half] - least - 1  # -1 for what everyone reads
            hidden = own >= 0
            blocked[half, half], targets[half] = perm_mask(inputs[half], hidden, own)
            # A target that fell on SEP or CLS is as if it had not been chosen.
            assert (target[half] <= targets[half]).all()
            assert len(set(own[hidden].tolist())) == hidden.sum() and own.max() < 64
        blocked[64:, :64] = False
        np.testing.assert_array_equal(targets, target)
        query = order[None, :] < order[:, None]
        content = order[None, :] <= order[:, None]
        np.testing.assert_array_equal(query[target], ~blocked[target])
        np.testing.assert_array_equal(content, ~blocked | np.eye(128, dtype=bool))


def sample_mask(starts, goal, rng, alpha=6, beta=1):
    """`_sample_mask`, its quirk included."""
    length, masked, done = len(starts), np.zeros(len(starts), bool), 0
    chances = (1 / SPANS) / (1 / SPANS).sum()
    place = 0
    while place < length and done < goal:
        n = min(rng.choice(SPANS, p=chances), goal - done)
        context = n * alpha // beta
        left = rng.integers(context)
        begin = place + left
        while begin < length and not starts[begin]:
            begin += 1
        if begin >= length:
            break
        end, words = begin + 1, 1
        while end < length:
            if starts[begin]:
                words += 1
                if words > n:
                    break
            end += 1
        if end >= length:
            break
        masked[begin:end] = True
        done += end - begin
        place = end + context - left
    while done < goal:
        place = rng.integers(length)
        if not masked[place]:
            masked[place] = True
            done += 1
    return masked


@pytest.mark.parametrize("goal", [2, 9, 14])
def test_spans_are_distributed_as_the_references(goal):
    """How often each place is chosen, and each number of spans; five standard deviations."""
    starts, draws = STARTS[REUSED], 6_000
    found = []
    for seed, choose in ((0, lambda rng: choose_spans(starts, goal, 6, rng)),
                         (1, lambda rng: sample_mask(starts, goal, rng))):  # fmt: skip
        rng = np.random.default_rng(seed)
        found.append(np.stack([choose(rng) for _ in range(draws)]))
    for masked in found:
        assert (masked.sum(1) == goal).all()
    bound = 5 * (2 * 0.25 / draws) ** 0.5
    ours, theirs = (masked.mean(0) for masked in found)
    assert np.abs(ours - theirs).max() < bound
    spans = [
        np.bincount((np.diff(masked.astype(int), prepend=0) == 1).sum(1), minlength=20) / draws
        for masked in found
    ]
    assert np.abs(spans[0] - spans[1]).max() < bound


def test_backward_rows_are_chosen_as_if_read_forward():
    """Spans begin at words in the direction of reading: at the right end of a backward row."""
    starts = np.zeros(VOCAB, bool)
    starts[10:134:4] = True
    backward = permute(
        REUSED[::-1], SECOND[::-1], FIRST[::-1], np.random.default_rng(0),
        word_starts=starts, targets=2, backward=True,
    )  # fmt: skip
    forward = permute(
        REUSED, FIRST, SECOND, np.random.default_rng(0), word_starts=starts, targets=2
    )
    ours, theirs = ({int(t) for t in e["targets"] if t in REUSED} for e in (backward, forward))
    assert ours == theirs and len(ours) == 1 and starts[list(ours)].all()


def test_all_orders_are_alike():
    """Of two targets of the reused part, each comes first half of the time."""
    firsts = []
    for example in examples(2_000):
        places = example["targets_positions"][:2]
        firsts.append(example["order"][places[0]] < example["order"][places[1]])
    assert abs(np.mean(firsts) - 0.5) < 5 * (0.25 / 2_000) ** 0.5


def test_too_many_targets_are_refused():
    with pytest.raises(ValueError, match="70 words to guess do not fit into 64 tokens"):
        permute(REUSED, FIRST, SECOND, np.random.default_rng(0), targets=140)


# --- the two parts of a row, and the row


def split_a_and_b(data, sentence_ids, begin, length, rng):
    """`_split_a_and_b` told again, but for the label that nobody reads."""
    end, cuts = begin + 1, []
    while end < len(data):
        if sentence_ids[end] != sentence_ids[end - 1]:
            if end - begin >= length:
                break
            cuts.append(end)
        end += 1
    if not cuts or rng.random() >= 0.5:
        a_end = cuts[rng.integers(len(cuts))] if cuts else end
        count = max(1, length - (a_end - begin))
        b_begin = rng.integers(len(data) - count)
        b_end = b_begin + count
        while b_begin > 0 and sentence_ids[b_begin - 1] == sentence_ids[b_begin]:
            b_begin -= 1
        while b_end < len(data) and sentence_ids[b_end - 1] == sentence_ids[b_end]:
            b_end += 1
    else:
        a_end = cuts[rng.integers(len(cuts))]
        b_begin, b_end = a_end, end
    while (a_end - begin) + (b_end - b_begin) > length:
        if a_end - begin > b_end - b_begin:
            a_end -= 1
        else:
            b_end -= 1
    return data[begin:a_end], data[b_begin:b_end]


class Told:
    """A lane made of lists: sentences of random lengths."""

    def __init__(self, longest, backward=False):
        draw, self.backward = np.random.default_rng(longest), backward
        lengths = draw.integers(1, longest, 40)
        self.words = np.arange(10, 10 + lengths.sum())
        self.sentence_ids = np.repeat(np.arange(40), lengths)
        self.ends = np.concatenate([[0], np.cumsum(lengths)])

    def __len__(self):
        return len(self.words)

    def read(self, start, stop):
        return self.words[start:stop]

    def boundaries(self, start, stop):
        return self.ends[(self.ends > start) & (self.ends < stop)]

    def boundary_from(self, place):
        return int(self.ends[self.ends >= place][0])

    def boundary_up_to(self, place):
        return int(self.ends[self.ends <= place][-1])


@pytest.mark.parametrize("longest", [4, 15, 90])
def test_parts_are_cut_as_the_references(longest):
    lane = Told(longest)
    continued = 0
    for seed in range(300):
        start = seed % (len(lane) - 30)
        first, second = two_parts(lane, start, 29, np.random.default_rng(seed))
        theirs = split_a_and_b(
            lane.words, lane.sentence_ids, start, 29, np.random.default_rng(seed)
        )
        np.testing.assert_array_equal(first, theirs[0])
        np.testing.assert_array_equal(second, theirs[1])
        assert len(first) + len(second) == 29 and len(first) and len(second)
        continued += second[0] == first[-1] + 1
    assert continued


class Pieces:
    sep_id, cls_id = SEP, CLS

    def starts_word(self):
        return np.arange(600) % 3 > 0


def test_a_row_of_a_lane():
    settings = PermutationLM(length=32, reuse=12, targets=6)
    make = settings.bind(Pieces())
    for backward in (False, True):
        lane = Told(6, backward)
        example = make(LaneRow(lane, 24), np.random.default_rng(3))
        assert example["lane"] == [backward] and example["lane_positions"] == [24]
        np.testing.assert_array_equal(example["inputs"][:12], lane.words[24:36])
        assert (example["inputs"] == SEP).sum() == 2 and example["inputs"][-1] == CLS
        batch = assemble([[example], []], settings.lengths)
        assert sorted(batch) == sorted([
            "inputs", "inputs_positions", "inputs_segment_ids", "inputs_order",
            "inputs_token_types", "targets", "targets_positions", "targets_segment_ids",
            "lane", "lane_positions", "lane_segment_ids", "loss_weights",
        ])  # fmt: skip
        np.testing.assert_array_equal(batch["inputs_order"][0], example["inputs_order"])
        assert batch["loss_weights"][0].sum() == len(example["targets"])
        assert batch["loss_weights"][1].sum() == 0


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"length": 20, "reuse": 16}, "length is 20 and reuse 16"),
        ({"reuse": 0}, "reuse 0"),
        (
            {"length": 40, "reuse": 5, "targets": 12},
            "12 targets do not fit into halves of 5 and 35",
        ),
        ({"context": 0}, "context is 0"),
    ],
)
def test_bad_settings(settings, message):
    with pytest.raises(ValueError, match=message):
        PermutationLM(**settings)


def test_a_tokenizer_without_its_tokens():
    class Bare(Pieces):
        sep_id = None

    with pytest.raises(ValueError, match="--data.subwords xlnet_unigram"):
        PermutationLM().bind(Bare())

"""Against the rules of google-research/bert's create_pretraining_data.py, told again."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lmjax.data.batches import assemble
from lmjax.data.fast_tokenizers import train
from lmjax.data.tokenizers import train_tokenizer
from lmjax.models.bert import Bert, BertConfig
from lmjax.objectives.masked_pairs import MaskedPairs, Pair, choose_words, masked_pair, truncate
from lmjax.tasks.masked import Masked, token_types

CLS, SEP, MASK, VOCAB = 2, 3, 4, 105
STARTS = np.arange(VOCAB) % 3 > 0  # two of three ids begin a word
PAIR = Pair(np.arange(5, 55, dtype=np.uint16), np.arange(55, 105, dtype=np.uint16), True)
MODEL = Bert(
    BertConfig(vocab=VOCAB, positions=64, layers=2, width=16, heads=2, feed_forward=32, dropout=0.0)
)


def hide(pair, seed, **settings):
    return masked_pair(
        pair,
        np.random.default_rng(seed),
        settings=MaskedPairs(**settings),
        cls=CLS,
        sep=SEP,
        mask=MASK,
        vocab_size=VOCAB,
        word_starts=STARTS,
    )


def test_layout_and_count():
    """103 tokens with the special ones, 15.45 are 15; at most 20; at least one."""
    truth = np.array([CLS, *PAIR.first, SEP, *PAIR.second, SEP])
    for seed in range(50):
        example = hide(PAIR, seed)
        where = example["targets_positions"]
        assert len(where) == 15 and (np.diff(where) > 0).all()
        assert not {0, 51, 102} & set(where.tolist())
        np.testing.assert_array_equal(example["targets"], truth[where])
        untouched = np.delete(np.arange(103), where)
        np.testing.assert_array_equal(example["inputs"][untouched], truth[untouched])
        assert example["pairs"].tolist() == [1] and example["pairs_positions"].tolist() == [52]
        assert {array.dtype for array in example.values()} == {np.dtype("int32")}
    assert len(hide(PAIR, 0, rate=0.5)["targets"]) == 20
    tiny = Pair(PAIR.first[:1], PAIR.second[:1], False)
    assert len(hide(tiny, 0)["targets"]) == 1 and hide(tiny, 0)["pairs"].tolist() == [0]


def test_shares_are_those_of_the_paper():
    """80 % masks, 10 % as they were, 10 % any id; bounds are five standard deviations."""
    found = [hide(PAIR, seed) for seed in range(3_000)]
    seen = np.concatenate([example["inputs"][example["targets_positions"]] for example in found])
    truth = np.concatenate([example["targets"] for example in found])
    for share, expected in [
        ((seen == MASK).mean(), 0.8 + 0.1 / VOCAB),
        ((seen == truth).mean(), 0.1 + 0.1 / VOCAB),
    ]:
        assert abs(share - expected) < 5 * (expected * (1 - expected) / len(seen)) ** 0.5
    assert len(np.unique(seen[seen != truth])) == VOCAB
    places = np.concatenate([example["targets_positions"] for example in found])
    counts = np.bincount(places, minlength=103)[[*range(1, 51), *range(52, 102)]]
    assert abs(counts - 450).max() < 5 * 450**0.5


def test_whole_words():
    truth = np.array([CLS, *PAIR.first, SEP, *PAIR.second, SEP])
    for seed in range(50):
        where = hide(PAIR, seed, whole_words=True)["targets_positions"]
        assert 14 <= len(where) <= 15
        chosen = set(where.tolist())
        for place in range(1, 102):
            joined = not STARTS[truth[place]] and place not in (51, 52) and place > 1
            if joined:  # with the one before
                assert (place in chosen) == (place - 1 in chosen)


def test_a_word_that_is_too_long_is_passed_over():
    candidates = np.array([False] + [True] * 9)
    starts = np.array([True, True, False, False, False, True, False, False, False, True])
    for seed in range(20):  # words 1-4, 5-8 and 9; three places are to be had
        places = choose_words(candidates, starts, 3, np.random.default_rng(seed))
        assert places.tolist() == [9]


def popped(first, second, length, rng):
    """`truncate_seq_pair`, token by token."""
    first, second = list(first), list(second)
    while len(first) + len(second) > length:
        longer = first if len(first) > len(second) else second
        longer.pop(0 if rng.random() < 0.5 else -1)
    return first, second


@pytest.mark.parametrize(("sizes", "length"), [((9, 4), 8), ((3, 9), 7), ((5, 5), 5), ((2, 2), 9)])
def test_truncation_is_as_if_token_by_token(sizes, length):
    first, second = (np.arange(size) for size in sizes)
    draws = 4_000
    shares = []
    for cut, rng in ((truncate, np.random.default_rng(0)), (popped, np.random.default_rng(1))):
        outcomes = [
            tuple(tuple(np.asarray(part).tolist()) for part in cut(first, second, length, rng))
            for _ in range(draws)
        ]
        names, counts = np.unique([repr(outcome) for outcome in outcomes], return_counts=True)
        shares.append(dict(zip(names.tolist(), counts / draws, strict=True)))
    ours, theirs = shares
    for name in ours | theirs:
        assert abs(ours.get(name, 0) - theirs.get(name, 0)) < 5 * (0.5 / draws) ** 0.5, name


def batch_of(examples):
    lengths = MaskedPairs(length=24, predictions=4).lengths
    return assemble([[example] for example in examples], lengths)


def small_pairs(count):
    draw = np.random.default_rng(5)
    for number in range(count):
        first, second = (draw.integers(5, VOCAB, draw.integers(4, 9)) for _ in range(2))
        yield hide(Pair(first, second, number % 2 == 1), number, length=24, predictions=4)


def test_token_types_tell_the_parts_apart():
    batch = batch_of(small_pairs(3))
    for row, types in enumerate(np.asarray(token_types(batch))):
        inputs = batch["inputs"][row]
        first_end, second_end = np.flatnonzero(inputs == SEP)[[0, -1]]
        expected = np.zeros(24)
        expected[first_end + 1 : second_end + 1] = 1
        np.testing.assert_array_equal(types, expected)


def test_losses_of_parts_add_up_and_empty_rows_count_nothing():
    task = Masked(MODEL)
    params = task.init(jax.random.key(0)).params
    examples = list(small_pairs(6))
    whole = batch_of(examples)

    found = jax.jit(lambda *args: task.loss(params, {}, *args, {}, 0))

    def loss(batch, normalizers):
        value, (metrics, _) = found(batch, normalizers)
        return float(value), metrics

    normalizers = task.normalizers(whole)
    assert float(normalizers["pairs"]) == 6
    expected, metrics = loss(whole, normalizers)
    assert expected == pytest.approx(float(metrics["nll"] + metrics["pair_nll"]), rel=1e-6)
    pieces = [batch_of(examples[:2]), batch_of(examples[2:])]
    assert sum(loss(p, normalizers)[0] for p in pieces) == pytest.approx(expected, rel=1e-5)
    filled = assemble([[e] for e in examples] + [[]], MaskedPairs(length=24, predictions=4).lengths)
    assert loss(filled, task.normalizers(filled))[0] == pytest.approx(expected, rel=1e-5)


def test_pair_loss_is_that_of_the_formula():
    task = Masked(MODEL)
    params = task.init(jax.random.key(0)).params
    params = jax.tree.map(lambda x: x + 0.1, params)
    batch = batch_of(small_pairs(4))
    encoded = MODEL.apply(
        {"params": params},
        batch["inputs"],
        token_types(batch),
        batch["inputs_positions"],
        batch["inputs_segment_ids"],
        method="encode",
    )
    verdicts = np.asarray(MODEL.apply({"params": params}, encoded, method="judge"), np.float64)
    log_p = verdicts - np.log(np.exp(verdicts).sum(-1, keepdims=True))
    expected = -log_p[np.arange(4), [0, 1, 0, 1]].mean()
    _, (metrics, _) = task.loss(params, {}, batch, task.normalizers(batch), {}, 0)
    assert float(metrics["pair_nll"]) == pytest.approx(expected, rel=1e-5)


def test_a_hidden_word_never_reaches_its_own_prediction():
    """Two texts that differ in a hidden word alone have the same inputs, and the same guesses."""
    example = hide(PAIR, 3, length=63)
    hidden = example["inputs"][example["targets_positions"]] == MASK
    place = int(example["targets_positions"][hidden][0])
    first, second = truncate(PAIR.first, PAIR.second, 60, np.random.default_rng(3))
    other = Pair(first.copy(), second.copy(), True)
    part, at = (0, place - 1) if place < len(first) + 1 else (1, place - len(first) - 2)
    other[part][at] = 5 if other[part][at] != 5 else 6
    again = hide(other, 3, length=63)
    same = hide(Pair(first, second, True), 3, length=63)
    assert (again["targets"] != same["targets"]).sum() == 1
    np.testing.assert_array_equal(again["inputs"], same["inputs"])


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"length": 4}, "length >= 5, got 4"),
        ({"rate": 0.0}, "rate is 0.0"),
        ({"short": 1.5}, "short 1.5"),
        ({"copies": 0}, "copies 0"),
        ({"predictions": 0}, "predictions is 0"),
    ],
)
def test_bad_settings(settings, words):
    with pytest.raises(ValueError, match=words):
        MaskedPairs(**settings)


def test_needs_a_tokenizer_with_its_special_tokens():
    texts = ["a few words of text to learn from, again and again"] * 50
    tokenizer = train("wordpiece", texts, 300)
    bound = MaskedPairs(length=40).bind(tokenizer)
    ids = np.array(tokenizer.encode("words of text"), np.int32)
    example = bound(Pair(ids, ids, False), np.random.default_rng(0))
    assert example["inputs"][0] == tokenizer.bos_id and example["inputs"][-1] == tokenizer.eos_id
    with pytest.raises(ValueError, match="--data.subwords wordpiece"):
        MaskedPairs().bind(train_tokenizer(texts, 40))


def test_settings_are_what_an_example_holds():
    settings = dataclasses.replace(MaskedPairs(), length=24, predictions=4)
    assert settings.lengths == {"inputs": 24, "targets": 4, "pairs": 1} and settings.window == 21
    batch = batch_of(small_pairs(2))
    assert batch["pairs"].shape == (2, 1) and jnp.asarray(batch["loss_weights"]).shape == (2, 4)

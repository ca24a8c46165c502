import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lmjax.data.batches import assemble
from lmjax.data.fast_tokenizers import train
from lmjax.models.bert import Bert, BertConfig
from lmjax.objectives.masked_lm import MaskedLM, masked_lm, masked_lm_lengths
from lmjax.tasks.masked import Masked, places

BOS, EOS, MASK, WORDS = 0, 2, 4, np.arange(5, 105)
hide = functools.partial(masked_lm, bos=BOS, eos=EOS, mask=MASK, words=WORDS)
TOKENS = np.arange(5, 105, dtype=np.uint16)
MODEL = Bert(
    BertConfig(
        vocab=105,
        positions=64,
        token_types=1,
        layers=2,
        width=16,
        heads=2,
        feed_forward=32,
        kind="masked_lm",
        dropout=0.0,
    )
)


def examples(count, **settings):
    return [hide(TOKENS, np.random.default_rng(seed), **settings) for seed in range(count)]


def test_targets_are_what_stood_there_and_nothing_else_changes():
    truth = np.array([BOS, *TOKENS, EOS])
    for example in examples(50):
        where = example["targets_positions"]
        assert (np.diff(where) > 0).all()
        np.testing.assert_array_equal(example["targets"], truth[where])
        untouched = np.delete(np.arange(102), where)
        np.testing.assert_array_equal(example["inputs"][untouched], truth[untouched])
        assert {array.dtype for array in example.values()} == {np.dtype("int32")}


def test_shares_are_those_of_the_paper():
    """15 % of 102 are 15.3: 15 or 16 in each text. Bounds are five standard deviations."""
    found = examples(4_000)
    counts = np.array([len(example["targets"]) for example in found])
    assert set(counts) == {15, 16} and abs(counts.mean() - 15.3) < 5 * (0.3 * 0.7 / 4_000) ** 0.5
    seen = np.concatenate([example["inputs"][example["targets_positions"]] for example in found])
    truth = np.concatenate([example["targets"] for example in found])
    for share, expected in [
        ((seen == MASK).mean(), 0.8),
        (((seen == truth) & (seen != MASK)).mean(), 0.1 + 0.1 / 100 * 100 / 102),
    ]:
        assert abs(share - expected) < 5 * (expected * (1 - expected) / len(seen)) ** 0.5
    replaced = seen[(seen != MASK) & (seen != truth)]
    assert replaced.min() >= WORDS[0] and len(np.unique(replaced)) == len(WORDS)
    # Every place is chosen alike often, the ends too.
    where = np.bincount(np.concatenate([e["targets_positions"] for e in found]), minlength=102)
    assert (abs(where - 4_000 * 0.15) < 5 * (4_000 * 0.15 * 0.85) ** 0.5).all()


def test_a_hidden_word_never_reaches_its_own_guess():
    """Whatever stood in a place that is hidden or replaced, the model reads the same."""
    for seed in range(20):
        example = hide(TOKENS, np.random.default_rng(seed), keep=0.0)
        other = TOKENS.copy()
        inner = example["targets_positions"]
        inner = inner[(inner > 0) & (inner < 101)] - 1
        other[inner] = 7
        again = hide(other, np.random.default_rng(seed), keep=0.0)
        np.testing.assert_array_equal(again["inputs"], example["inputs"])
        assert (again["targets"] != example["targets"]).any()


@pytest.mark.parametrize("window", [1, 2, 5, 126, 510])
def test_lengths_bound_the_examples(window):
    found = [hide(np.full(window, 9), np.random.default_rng(seed), rate=0.5) for seed in range(300)]
    inputs, targets = masked_lm_lengths(window, 0.5)
    assert {len(example["inputs"]) for example in found} == {inputs}
    counts = {len(example["targets"]) for example in found}
    assert max(counts) <= targets and min(counts) >= targets - 1
    assert masked_lm_lengths(510) == (512, 77)


def test_guesses_in_packed_rows_are_those_of_the_texts_alone():
    texts = [hide(TOKENS[:n], np.random.default_rng(n), rate=0.3) for n in (20, 9, 11)]
    packed = assemble([texts[:2], texts[2:]], {"inputs": 40, "targets": 16})
    task = Masked(MODEL)
    params = task.init(jax.random.key(0)).params
    totals = {"tokens": jnp.ones(())}
    rows = {name: jnp.asarray(array) for name, array in packed.items()}
    loss = jax.jit(lambda rows: task.loss(params, {}, rows, totals, {}, 0)[0])
    whole, alone = loss(rows), 0.0
    for text in texts:
        row = assemble([[text]], {"inputs": 40, "targets": 16})
        alone += loss(row)
    np.testing.assert_allclose(whole, alone, rtol=1e-5)
    # And both are what all logits at these places say.
    at = np.asarray(places(rows))
    logits = MODEL.apply(
        {"params": params},
        rows["inputs"],
        None,
        rows["inputs_positions"],
        rows["inputs_segment_ids"],
    )
    log_p = jax.nn.log_softmax(logits)[np.arange(2)[:, None], at, packed["targets"]]
    np.testing.assert_allclose(whole, -(log_p * packed["loss_weights"]).sum(), rtol=1e-5)


def test_needs_a_mask():
    wordpiece = train("wordpiece", ["some words"], 300)
    bound = MaskedLM(length=8).bind(wordpiece)
    assert bound.keywords["mask"] == wordpiece.mask_id
    assert not np.isin(wordpiece.special_ids, bound.keywords["words"]).any()

    class Unigram:
        bos_id = mask_id = None
        eos_id = 1

    with pytest.raises(ValueError, match=r"\['a start', 'a mask'\]"):
        MaskedLM().bind(Unigram())


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"length": 2}, "length >= 3, got 2"),
        ({"rate": 1.0}, "between 0 and 1, got 1.0"),
        ({"keep": 0.6, "replace": 0.5}, "0.6 are kept and 0.5 replaced"),
    ],
)
def test_bad_settings(settings, words):
    with pytest.raises(ValueError, match=words):
        MaskedLM(**settings)

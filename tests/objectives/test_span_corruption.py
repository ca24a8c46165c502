import collections
import functools
import itertools

import numpy as np
import pytest

from lmjax.objectives.span_corruption import (
    corrupt,
    iid_denoising,
    iid_denoising_lengths,
    random_segmentation,
    random_spans_mask,
    span_corruption,
    span_corruption_lengths,
    span_corruption_window,
)

SENTINELS = np.arange(32_099, 31_999, -1, dtype=np.int32)
EOS = 1
DENSITIES = (0.01, 0.1, 0.15, 0.25, 0.5, 0.75, 0.9, 0.99)


def test_a_fixed_mask_gives_the_papers_example():
    # "Thank you for inviting me to your party last week" with "for inviting" and "last" hidden,
    # numbered 10 ... 19.
    mask = np.array([0, 0, 1, 1, 0, 0, 0, 0, 1, 0], bool)
    example = corrupt(np.arange(10, 20), mask, SENTINELS, EOS)
    # The reference: "week" is a visible run too, so the targets end with a sentinel for it.
    assert example["inputs"].tolist() == [10, 11, 32099, 14, 15, 16, 17, 32098, 19, EOS]
    assert example["targets"].tolist() == [32099, 12, 13, 32098, 18, 32097, EOS]
    assert example["inputs"].dtype == example["targets"].dtype == np.int32


def test_a_mask_that_ends_hidden_gives_no_trailing_sentinel():
    mask = np.array([0, 1, 1, 0, 0, 1], bool)
    example = corrupt(np.array([5, 6, 7, 8, 9, 10], np.uint16), mask, SENTINELS, EOS)
    assert example["inputs"].tolist() == [5, 32099, 8, 9, 32098, EOS]
    assert example["targets"].tolist() == [32099, 6, 7, 32098, 10, EOS]


def test_published_windows_and_lengths():
    assert span_corruption_window(512) == 568
    assert span_corruption_lengths(568) == (512, 114)
    assert span_corruption_window(1_024) == 1_137
    assert span_corruption_lengths(1_137) == (1_024, 229)


def test_half_density_makes_targets_as_short_as_inputs():
    window = span_corruption_window(512, noise_density=0.5)
    assert span_corruption_lengths(window, noise_density=0.5) == (512, 512)


@pytest.mark.parametrize("mean_span", [1, 1.5, 3, 10])
@pytest.mark.parametrize("noise_density", DENSITIES)
def test_window_is_the_largest_that_fits(noise_density, mean_span):
    lengths = functools.partial(
        span_corruption_lengths, noise_density=noise_density, mean_span=mean_span
    )
    for inputs_length in (3, 4, 17, 128):
        window = span_corruption_window(inputs_length, noise_density, mean_span)
        assert lengths(window)[0] <= inputs_length
        if noise_density != 0.5:
            assert lengths(window + 1)[0] > inputs_length


@pytest.mark.parametrize("mean_span", [1, 2, 3, 5.5, 10])
@pytest.mark.parametrize("noise_density", DENSITIES)
def test_examples_have_the_announced_lengths_and_hold_every_token(noise_density, mean_span):
    rng = np.random.default_rng(0)
    sentinels = np.arange(2_000, 1_000, -1, dtype=np.int32)
    for length in (1, 2, 3, 7, 64, 200):
        tokens = rng.integers(2, 1_000, length).astype(np.uint16)
        example = span_corruption(
            tokens,
            rng,
            sentinels=sentinels,
            noise_density=noise_density,
            mean_span=mean_span,
        )
        expected = span_corruption_lengths(length, noise_density, mean_span)
        assert (len(example["inputs"]), len(example["targets"])) == expected
        assert restore(example, sentinels) == tokens.tolist()


def restore(example, sentinels):
    """The text again: each sentinel of the inputs replaced by what follows it in the targets."""
    sentinels = set(sentinels.tolist())
    spans, current = {}, None
    assert example["inputs"][-1] == example["targets"][-1] == EOS
    for token in example["targets"][:-1].tolist():
        if token in sentinels:
            current = spans.setdefault(token, [])
        else:
            current.append(token)
    text = []
    for token in example["inputs"][:-1].tolist():
        text.extend(spans[token] if token in sentinels else [token])
    return text


def test_masks_start_visible_end_hidden_and_hide_exactly_the_noise():
    rng = np.random.default_rng(0)
    for _ in range(50):
        mask = random_spans_mask(568, 85, 28, rng)
        assert mask.shape == (568,) and mask.sum() == 85
        assert not mask[0] and mask[-1]
        assert np.count_nonzero(mask[1:] & ~mask[:-1]) == 28


def test_segmentation_is_uniform_over_compositions():
    items, segments, draws = 7, 3, 15_000
    parts = range(1, items)
    compositions = [c for c in itertools.product(parts, repeat=segments) if sum(c) == items]
    rng = np.random.default_rng(0)
    counts = collections.Counter(
        tuple(random_segmentation(items, segments, rng).tolist()) for _ in range(draws)
    )
    assert set(counts) == set(compositions)
    expected = draws / len(compositions)
    chi_squared = sum((counts[c] - expected) ** 2 / expected for c in compositions)
    assert chi_squared < 36.1  # the 0.1% tail with 14 degrees of freedom


def test_iid_denoising_hides_each_token_alike():
    rng = np.random.default_rng(0)
    sentinels = np.arange(1_000, 900, -1)
    tokens = np.arange(2, 102)
    hidden = np.zeros(100)
    for _ in range(2_000):
        example = iid_denoising(tokens, rng, sentinels=sentinels, noise_density=0.15)
        assert max(len(v) for v in example.values()) <= iid_denoising_lengths(100)[0]
        targets = example["targets"]
        visible = example["inputs"][(example["inputs"] < 900) & (example["inputs"] > EOS)]
        taken = targets[(targets < 900) & (targets > EOS)]
        assert sorted([*visible, *taken]) == tokens.tolist()
        hidden[taken - 2] += 1
    # Standard deviation of a frequency: 0.008; of the mean of all: 0.0008.
    assert abs(hidden.mean() / 2_000 - 0.15) < 0.004
    assert np.abs(hidden / 2_000 - 0.15).max() < 0.04


def test_iid_denoising_leaves_runs_beyond_the_sentinels_visible():
    sentinels = np.array([1_000, 999, 998])
    tokens = np.arange(2, 202)
    for seed in range(20):
        example = iid_denoising(
            tokens, np.random.default_rng(seed), sentinels=sentinels, noise_density=0.5
        )
        for side in example.values():
            used = side[side >= 998]
            assert used.tolist() == sentinels[: len(used)].tolist()
        assert 1 <= np.count_nonzero(example["inputs"] >= 998) <= 2


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"noise_density": 0.0}, "noise_density must lie between 0 and 1, got 0.0"),
        ({"noise_density": 1.0}, "noise_density must lie between 0 and 1, got 1.0"),
        ({"noise_density": float("nan")}, "noise_density must lie between 0 and 1"),
        ({"mean_span": 0.5}, "mean_span must be at least 1 token, got 0.5"),
        ({"sentinels": SENTINELS[:27]}, "568 tokens needs 28 sentinels and there are 27"),
        ({"sentinels": SENTINELS[:0]}, "needs 28 sentinels and there are 0"),
    ],
)
def test_bad_settings_are_named(settings, message):
    settings = {"sentinels": SENTINELS, **settings}
    with pytest.raises(ValueError, match=message):
        span_corruption(np.arange(2, 570), np.random.default_rng(0), **settings)


def test_no_tokens_and_no_room_are_named():
    rng = np.random.default_rng(0)
    with pytest.raises(ValueError, match="at least one token, got 0"):
        span_corruption(np.zeros(0, int), rng, sentinels=SENTINELS)
    with pytest.raises(ValueError, match="at least one token"):
        iid_denoising(np.zeros(0, int), rng, sentinels=SENTINELS)
    with pytest.raises(ValueError, match="two sentinels or more, got 1"):
        iid_denoising(np.arange(5), rng, sentinels=SENTINELS[:1])
    with pytest.raises(ValueError, match="inputs_length must be at least 2, got 1"):
        span_corruption_window(1)

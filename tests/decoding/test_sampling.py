import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.stats import chisquare

from lmjax.decoding.sampling import GREEDY, Sampling, log_probability, nucleus, sample

LOGITS = np.log([0.05, 0.4, 0.1, 0.15, 0.3], dtype=np.float32)
DRAWS = 20_000


def frequencies(sampling, logits=LOGITS):
    """How often each token is drawn in as many rows with keys of their own."""
    rows = jnp.tile(jnp.asarray(logits), (DRAWS, 1))
    tokens = jax.jit(sample, static_argnums=2)(
        rows, jax.random.split(jax.random.key(0), DRAWS), sampling
    )
    return np.bincount(np.asarray(tokens), minlength=len(logits))


@pytest.mark.parametrize(
    "sampling, expected",
    [
        (Sampling(), [0.05, 0.4, 0.1, 0.15, 0.3]),
        (Sampling(temperature=0.5), np.array([0.05, 0.4, 0.1, 0.15, 0.3]) ** 2),
        (Sampling(top_k=3), [0, 0.4, 0, 0.15, 0.3]),
        (Sampling(top_k=9), [0.05, 0.4, 0.1, 0.15, 0.3]),
        (Sampling(top_p=0.65), [0, 0.4, 0, 0, 0.3]),
        (Sampling(top_p=0.75), [0, 0.4, 0, 0.15, 0.3]),
        # Top-p counts what top-k leaves: 0.4 / 0.85 < 0.5 < 0.7 / 0.85 < 0.86.
        (Sampling(top_k=3, top_p=0.8), [0, 0.4, 0, 0, 0.3]),
        (Sampling(top_k=3, top_p=0.86), [0, 0.4, 0, 0.15, 0.3]),
        # The temperature comes first: squares are 0.16, 0.09, 0.0225 ... of 0.285.
        (Sampling(temperature=0.5, top_p=0.86), [0, 0.4**2, 0, 0, 0.3**2]),
    ],
)
def test_tokens_come_as_often_as_they_should(sampling, expected):
    counts, expected = frequencies(sampling), np.asarray(expected) / np.sum(expected)
    possible = expected > 0
    assert counts[~possible].sum() == 0
    assert chisquare(counts[possible], DRAWS * expected[possible]).pvalue > 0.01


def test_one_token_is_left():
    for sampling in (GREEDY, Sampling(top_k=1), Sampling(top_p=1e-6), Sampling(top_p=0.39)):
        assert frequencies(sampling).tolist() == [0, DRAWS, 0, 0, 0]


def test_equal_logits():
    logits = np.array([0, 2, 2, 2, 0], np.float32)
    assert frequencies(GREEDY, logits).tolist() == [0, DRAWS, 0, 0, 0]
    assert (frequencies(Sampling(top_k=2), logits) > 0).tolist() == [
        False,
        True,
        True,
        False,
        False,
    ]
    assert (frequencies(Sampling(top_p=0.1), logits) > 0).tolist() == [
        False,
        True,
        True,
        True,
        False,
    ]


@pytest.mark.parametrize("mass", [0.01, 0.3, 0.9, 0.999, 0.999999])
def test_nucleus_is_that_of_sorting(mass):
    logits = 4 * np.random.default_rng(0).normal(size=(8, 5_000)).astype(np.float32) + 50
    kept = np.asarray(nucleus(jnp.asarray(logits), mass))
    probabilities = np.exp(logits.astype(np.float64))
    probabilities /= probabilities.sum(-1, keepdims=True)
    for row, own in zip(kept, probabilities, strict=True):
        order = np.argsort(-own)
        count = np.searchsorted(np.cumsum(own[order]), mass) + 1
        # In float32 the sum of 5,000 probabilities is only so exact.
        assert abs(own[row].sum() - own[order[:count]].sum()) < 1e-6 + own[order[count - 1]]
        assert set(order[: row.sum()]) == set(np.flatnonzero(row))


def test_log_probability():
    logits, tokens = jnp.tile(LOGITS, (2, 1)), jnp.array([1, 3])
    np.testing.assert_allclose(log_probability(logits + 7, tokens), LOGITS[[1, 3]], atol=1e-5)


@pytest.mark.parametrize(
    "settings, name",
    [
        ({"temperature": -1}, "temperature"),
        ({"temperature": float("nan")}, "temperature"),
        ({"top_k": 0}, "top_k"),
        ({"top_p": 0}, "top_p"),
        ({"top_p": 1.5}, "top_p"),
    ],
)
def test_bad_settings_are_named(settings, name):
    with pytest.raises(ValueError, match=name):
        Sampling(**settings)

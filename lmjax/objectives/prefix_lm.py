"""Prefix language modelling: see the start of a text, predict the rest.

Paper: Raffel et al. 2020, section 3.3.1 ("prefix LM" as an objective for an encoder-decoder).
Reference: google-research/text-to-text-transfer-transformer, t5/data/preprocessors.py (`prefix_lm`,
`random_prefix_noise_mask`, whose "noise" is the prefix). Departures: none.
"""

import numpy as np


def prefix_lm(
    tokens: np.ndarray, rng: np.random.Generator, *, eos: int = 1
) -> dict[str, np.ndarray]:
    """Split `tokens` in two: the length of the prefix is uniform over 1 ... len(tokens) - 1.

    A single token has an empty prefix and is the target.

    Args:
        tokens: `[window]` integers, at least one.
        rng: the only source of randomness.
        eos: the id that ends inputs and targets.

    Returns:
        int32 `inputs` (the prefix) and `targets` (the rest), at most
        `prefix_lm_lengths(len(tokens))` long.

    Raises:
        ValueError: `tokens` is empty.
    """
    if len(tokens) < 1:
        raise ValueError("prefix LM needs at least one token, got none")
    prefix = int(rng.integers(1, len(tokens))) if len(tokens) > 1 else 0
    return {"inputs": _ended(tokens[:prefix], eos), "targets": _ended(tokens[prefix:], eos)}


def prefix_lm_lengths(window: int) -> tuple[int, int]:
    """Upper bounds on the lengths of inputs and targets, EOS included, for `window` tokens."""
    return window, max(window, 2)


def _ended(tokens: np.ndarray, eos: int) -> np.ndarray:
    out = np.empty(len(tokens) + 1, np.int32)
    out[:-1], out[-1] = tokens, eos
    return out

"""T5's denoising objectives: hide parts of a text behind sentinels, ask for what they hid.

    tokens    Thank you for inviting me to your party last week
    inputs    Thank you X0 me to your party X1 EOS
    targets   X0 for inviting X1 last week EOS

Paper: Raffel et al. 2020, "Exploring the Limits of Transfer Learning with a Unified Text-to-Text
Transformer", sections 3.1.4 and 3.3.4.
Reference: google-research/text-to-text-transfer-transformer, t5/data/preprocessors.py
(`random_spans_helper`, `random_spans_noise_mask`, `iid_noise_mask`,
`noise_span_to_unique_sentinel`). As there, and unlike the paper's figure, the targets do not close
with one more sentinel.

Departures: where density and mean length ask for more spans than there are tokens on either side of
the mask (there the reference fails), there are as many spans as fit; i.i.d. noise beyond the last
sentinel is left uncorrupted (there the reference runs into the ordinary vocabulary).
"""

import bisect
import math

import numpy as np


def span_corruption(
    tokens: np.ndarray,
    rng: np.random.Generator,
    *,
    sentinels: np.ndarray,
    noise_density: float = 0.15,
    mean_span: float = 3.0,
    eos: int = 1,
) -> dict[str, np.ndarray]:
    """Replace random spans of `tokens` by sentinels; the targets are the spans.

    Args:
        tokens: `[window]` integers, at least one.
        rng: the only source of randomness.
        sentinels: `sentinels[k]` is the id that stands for the k-th span, `<extra_id_k>`.
        noise_density: the share of tokens to hide, rounded to whole tokens, within (0, 1).
        mean_span: the mean length of a hidden span in tokens, at least 1.
        eos: the id that ends inputs and targets.

    Returns:
        int32 `inputs` and `targets`, of exactly `span_corruption_lengths(window, ...)`.

    Raises:
        ValueError: a setting is out of range, `tokens` is empty, or there are too few sentinels.
    """
    noise, spans = _noise_and_spans(len(tokens), noise_density, mean_span)
    if max(spans, 1) > len(sentinels):
        raise ValueError(
            f"span corruption of {len(tokens)} tokens needs {spans} sentinels and there are "
            f"{len(sentinels)}: use shorter windows, longer spans, a lower noise density or a "
            "tokenizer with more sentinels"
        )
    mask = random_spans_mask(len(tokens), noise, spans, rng)
    return corrupt(tokens, mask, sentinels, eos)


def span_corruption_lengths(
    window: int, noise_density: float = 0.15, mean_span: float = 3.0
) -> tuple[int, int]:
    """The exact lengths of inputs and targets, EOS included, for `window` tokens.

    568 tokens give (512, 114). Raises ValueError for settings out of range.
    """
    noise, spans = _noise_and_spans(window, noise_density, mean_span)
    # A single token stays as it is; its targets are one sentinel that stands for it.
    return window - noise + spans + 1, noise + max(spans, 1) + 1


def span_corruption_window(
    inputs_length: int, noise_density: float = 0.15, mean_span: float = 3.0
) -> int:
    """The largest number of tokens whose corrupted inputs fit into `inputs_length`.

    512 gives 568 and 1,024 gives 1,137 (reference: `random_spans_helper`). As there, at a density
    of exactly 0.5 the window is one token shorter where that makes targets as short as inputs.
    Raises ValueError where not even one token fits, or for settings out of range.
    """

    def inputs(window: int) -> int:
        return span_corruption_lengths(window, noise_density, mean_span)[0]

    if inputs(1) > inputs_length:
        raise ValueError(f"inputs_length must be at least {inputs(1)}, got {inputs_length}")
    # The inputs keep a share of 1 - density, so that no longer window can fit.
    limit = math.ceil((inputs_length + 1) / (1 - noise_density))
    window = bisect.bisect_right(range(1, limit + 1), inputs_length, key=inputs)
    inputs_used, targets_used = span_corruption_lengths(window, noise_density, mean_span)
    return window - 1 if noise_density == 0.5 and targets_used > inputs_used else window


def iid_denoising(
    tokens: np.ndarray,
    rng: np.random.Generator,
    *,
    sentinels: np.ndarray,
    noise_density: float = 0.15,
    eos: int = 1,
) -> dict[str, np.ndarray]:
    """Hide each token with probability `noise_density`; each run of hidden tokens is one sentinel.

    The baseline of the paper's section 3.1.4. Both sides are made as in the reference: in the
    targets each run of *visible* tokens becomes one sentinel, so a text whose first token is hidden
    has targets that start with it, and a text whose last token is visible has targets that end with
    a sentinel. Runs beyond the sentinels stay visible.

    Takes and returns what `span_corruption` does; the lengths are random, at most
    `iid_denoising_lengths(len(tokens))`.

    Raises:
        ValueError: a setting is out of range, `tokens` is empty, or there are fewer than two
            sentinels.
    """
    _check_density(noise_density)
    if len(tokens) < 1:
        raise ValueError("denoising needs at least one token, got none")
    if len(sentinels) < 2:
        raise ValueError(f"i.i.d. denoising needs two sentinels or more, got {len(sentinels)}")
    mask = rng.random(len(tokens)) < noise_density
    # The targets may have one more visible run than there are hidden ones: keep a sentinel for it.
    hidden_runs = np.cumsum(_run_starts(mask))
    mask &= hidden_runs < len(sentinels)
    return corrupt(tokens, mask, sentinels, eos)


def iid_denoising_lengths(window: int) -> tuple[int, int]:
    """Upper bounds on the lengths of inputs and targets, EOS included, for `window` tokens."""
    return window + 1, window + 1


def random_spans_mask(length: int, noise: int, spans: int, rng: np.random.Generator) -> np.ndarray:
    """A boolean mask `[length]`, True in `spans` spans that hold `noise` tokens together.

    It starts with visible tokens and ends with hidden ones; all such masks are equally likely.
    """
    if spans == 0:
        return np.zeros(length, bool)
    lengths = np.empty(2 * spans, np.int64)
    lengths[0::2] = random_segmentation(length - noise, spans, rng)
    lengths[1::2] = random_segmentation(noise, spans, rng)
    return np.repeat(np.arange(2 * spans) % 2 == 1, lengths)


def random_segmentation(items: int, segments: int, rng: np.random.Generator) -> np.ndarray:
    """Lengths `[segments]` of positive parts of `items`, uniform over all ordered partitions."""
    edges = np.empty(segments + 1, np.int64)
    edges[0], edges[-1] = 0, items
    edges[1:-1] = rng.permutation(items - 1)[: segments - 1]
    edges[1:-1] += 1
    edges.sort()
    return edges[1:] - edges[:-1]


def corrupt(
    tokens: np.ndarray, mask: np.ndarray, sentinels: np.ndarray, eos: int
) -> dict[str, np.ndarray]:
    """The example of a given mask: hidden runs leave the inputs, visible runs leave the targets."""
    return {
        "inputs": replace_runs(tokens, mask, sentinels, eos),
        "targets": replace_runs(tokens, ~mask, sentinels, eos),
    }


def replace_runs(
    tokens: np.ndarray, mask: np.ndarray, sentinels: np.ndarray, eos: int
) -> np.ndarray:
    """`tokens` with the k-th run of True in `mask` as the one id `sentinels[k]`, then `eos`."""
    starts = _run_starts(mask)
    keep = ~mask
    keep |= starts
    out = np.empty(np.count_nonzero(keep) + 1, np.int32)
    out[:-1] = tokens[keep]
    places = np.flatnonzero(starts[keep])
    out[places] = sentinels[: len(places)]
    out[-1] = eos
    return out


def _run_starts(mask: np.ndarray) -> np.ndarray:
    starts = mask.copy()
    starts[1:] &= ~mask[:-1]
    return starts


def _noise_and_spans(length: int, noise_density: float, mean_span: float) -> tuple[int, int]:
    """How many of `length` tokens to hide, and in how many spans; none of a single token."""
    _check_density(noise_density)
    if not mean_span >= 1:
        raise ValueError(f"mean_span must be at least 1 token, got {mean_span}")
    if length < 1:
        raise ValueError(f"span corruption needs at least one token, got {length}")
    if length == 1:
        return 0, 0
    noise = min(max(round(length * noise_density), 1), length - 1)
    spans = max(round(noise / mean_span), 1)
    return noise, min(spans, noise, length - noise)


def _check_density(noise_density: float) -> None:
    if not 0 < noise_density < 1:
        raise ValueError(f"noise_density must lie between 0 and 1, got {noise_density}")

"""Reading what a denoising model wrote: which span belongs to which sentinel."""

from collections.abc import Mapping, Sequence

import numpy as np


def spans_by_sentinel(
    output: Sequence[int], sentinels: Sequence[int], eos: int = 1
) -> dict[int, list[int]]:
    """{k: tokens written after sentinel k}, up to the end of the text.

    What comes before the first sentinel, or repeats one, is dropped.
    """
    place = {int(token): k for k, token in enumerate(sentinels)}
    spans, current = {}, None
    for token in map(int, output):
        if token == eos:
            break
        if token in place:
            k = place[token]
            current = [] if k in spans else spans.setdefault(k, [])
        elif current is not None:
            current.append(token)
    return spans


def fill_in(
    inputs: Sequence[int], spans: Mapping[int, Sequence[int]], sentinels: Sequence[int]
) -> tuple[np.ndarray, list[tuple[int, int]]]:
    """`inputs` with each sentinel replaced by its span, and where (start, end) those spans lie.

    A sentinel without a span, or with an empty one, stays.
    """
    place = {int(token): k for k, token in enumerate(sentinels)}
    filled, places = [], []
    for token in map(int, inputs):
        if span := spans.get(place.get(token)):
            places.append((len(filled), len(filled) + len(span)))
            filled += span
        else:
            filled.append(token)
    return np.asarray(filled, np.int32), places

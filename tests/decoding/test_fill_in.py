import numpy as np

from lmjax.decoding.fill_in import fill_in, spans_by_sentinel

SENTINELS = [99, 98, 97]


def test_spans_follow_their_sentinels():
    output = [5, 99, 10, 11, 98, 97, 12, 99, 13, 1, 97, 14]
    assert spans_by_sentinel(output, SENTINELS) == {0: [10, 11], 1: [], 2: [12]}


def test_filled_text_says_where_its_spans_lie():
    tokens, places = fill_in([3, 99, 4, 98, 97, 1], {0: [10, 11], 1: [], 2: [12]}, SENTINELS)
    np.testing.assert_array_equal(tokens, [3, 10, 11, 4, 98, 12, 1])
    assert places == [(1, 3), (5, 6)]

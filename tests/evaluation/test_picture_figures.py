import numpy as np
import pytest

from lmjax.evaluation.pictures import psnr, use_of_codes


def test_decibels():
    """Of an error of 255 in each colour none, of a tenth of it 20, and of none 60."""
    pictures = np.zeros((3, 2, 2, 3), np.uint8)
    again = np.zeros_like(pictures)
    again[0], again[1] = 255, 26
    expected = [0, -20 * np.log10(26 / 255), 60]
    np.testing.assert_allclose(psnr(pictures, again), expected, atol=1e-9)


def test_how_evenly_codes_are_used():
    assert use_of_codes(np.array([3, 3, 0, 3])) == (3, pytest.approx(3))
    used, perplexity = use_of_codes(np.array([1, 3]))
    assert used == 2 and perplexity == pytest.approx(4 / 3**0.75)

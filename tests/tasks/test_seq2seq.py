import math

import pytest

from lmjax.tasks.seq2seq import Seq2Seq


@pytest.mark.parametrize(
    "settings",
    [{"z_loss": -1e-4}, {"z_loss": math.nan}, {"label_smoothing": 1.0}, {"label_smoothing": -0.1}],
)
def test_settings_out_of_range_are_refused(settings):
    with pytest.raises(ValueError, match="0 <= z_loss and 0 <= label_smoothing < 1"):
        Seq2Seq(None, **settings)
    Seq2Seq(None, z_loss=1e-4, label_smoothing=0.1)

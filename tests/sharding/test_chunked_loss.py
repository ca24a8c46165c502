import pytest

from tests.sharding.chunked import FEW_ROWS, LAYOUTS, MANY_ROWS, D
from tests.sharding.conftest import printed_by


@pytest.fixture(scope="module")
def results():
    return printed_by("chunked")


@pytest.mark.parametrize("rows", [FEW_ROWS, MANY_ROWS])
@pytest.mark.parametrize("name", LAYOUTS)
def test_chunks_give_what_one_device_gives_and_no_gradient_is_sent_for_each(results, name, rows):
    found = results[str(rows)][name]
    assert all(error < 2e-6 for error in found["errors"])
    # A ring sends 7/8 of an array to gather it, and twice that to sum it: the matrix is gathered
    # and its gradient summed once at most, and all else is small beside that.
    assert found["sent"] < 1.1 * 7 / 8 * 3 * (4 * rows * D)

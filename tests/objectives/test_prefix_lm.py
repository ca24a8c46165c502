import numpy as np
import pytest

from lmjax.objectives.prefix_lm import prefix_lm, prefix_lm_lengths


def test_prefix_and_rest_are_the_text_and_every_split_is_as_likely():
    rng, tokens, draws = np.random.default_rng(0), np.arange(10, 16, dtype=np.uint16), 5_000
    prefixes = np.zeros(6, int)
    for _ in range(draws):
        example = prefix_lm(tokens, rng, eos=1)
        inputs, targets = example["inputs"].tolist(), example["targets"].tolist()
        assert inputs[-1] == targets[-1] == 1
        assert inputs[:-1] + targets[:-1] == tokens.tolist()
        assert len(inputs) <= prefix_lm_lengths(6)[0] and len(targets) <= prefix_lm_lengths(6)[1]
        prefixes[len(inputs) - 1] += 1
    assert prefixes[0] == 0
    chi_squared = ((prefixes[1:] - draws / 5) ** 2 / (draws / 5)).sum()
    assert chi_squared < 18.5  # the 0.1% tail with 4 degrees of freedom


def test_shortest_texts():
    rng = np.random.default_rng(0)
    one, two = prefix_lm(np.array([7]), rng), prefix_lm(np.array([7, 8]), rng)
    assert one["inputs"].tolist() == [1] and one["targets"].tolist() == [7, 1]
    assert two["inputs"].tolist() == [7, 1] and two["targets"].tolist() == [8, 1]
    assert prefix_lm_lengths(1) == (1, 2)
    with pytest.raises(ValueError, match="at least one token"):
        prefix_lm(np.zeros(0, int), rng)

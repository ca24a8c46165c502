import numpy as np
import pytest

from lmjax.data.batches import assemble
from lmjax.objectives.causal_lm import CausalLM, causal_lm


def test_every_token_but_the_first_is_a_target():
    example = causal_lm(np.array([5, 6, 7, 8], np.uint16), np.random.default_rng(0))
    assert example["inputs"].tolist() == [5, 6, 7] and example["targets"].tolist() == [6, 7, 8]
    assert example["inputs"].dtype == np.int32


def test_lengths_are_those_of_the_examples():
    objective = CausalLM(length=6)
    bound = objective.bind(tokenizer=None)
    example = bound(np.arange(objective.window), np.random.default_rng(0))
    assert {name: len(array) for name, array in example.items()} == objective.lengths
    assert objective.sizes(4) == (3, 3)
    batch = assemble(
        [[example], [bound(np.arange(3), None), bound(np.arange(4), None)]], objective.lengths
    )
    assert batch["inputs_segment_ids"][1].tolist() == [1, 1, 2, 2, 2, 0]
    assert batch["inputs_positions"][1].tolist() == [0, 1, 0, 1, 2, 0]
    assert batch["loss_weights"].sum() == 11


def test_no_length():
    with pytest.raises(ValueError, match="length >= 1, got 0"):
        CausalLM(length=0)

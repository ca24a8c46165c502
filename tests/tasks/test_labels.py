import jax
import pytest

from experiments import (
    bart_pretrain,
    bert_pretrain,
    gpt2_pretrain,
    roberta_pretrain,
    t5_pretrain,
    xlnet_pretrain,
)
from lmjax.training.state import abstract_parameters

NORM = {"scale", "bias"}
ATTENTION = {"query", "key", "value", "out"}
FEED_FORWARD = {"up", "down"}
KERNELS = ATTENTION | FEED_FORWARD


def biases(names):
    return {f"{name}_bias" for name in names}


# The last parts of the parameters' names: of those that decay, and of those that do not.
EXPECTED = {
    bert_pretrain: (
        KERNELS | {"embedding", "positions", "token_types", "transform", "dense"},
        NORM | biases(KERNELS | {"transform", "dense", "output"}),
    ),
    roberta_pretrain: (
        KERNELS | {"embedding", "positions", "token_types", "transform"},
        NORM | biases(KERNELS | {"transform", "output"}),
    ),
    gpt2_pretrain: (KERNELS | {"embedding", "positions"}, NORM | biases(KERNELS)),
    xlnet_pretrain: (
        KERNELS
        | {"embedding", "mask_embedding", "distance", "segments"}
        | biases({"content", "distance", "segment"}),
        NORM | biases(FEED_FORWARD | {"output"}),
    ),
    bart_pretrain: (KERNELS | {"embedding", "table"}, NORM | biases(KERNELS)),
    t5_pretrain: (KERNELS | {"embedding", "table"}, {"scale"}),
}


@pytest.mark.parametrize("module", EXPECTED, ids=lambda module: module.__name__)
def test_norms_and_biases_do_not_decay(module):
    """google-research/bert, optimization.py (`exclude_from_weight_decay`), and zihangdai/xlnet,
    model_utils.py, where the biases of queries decay (`include_in_weight_decay`)."""
    task = module.PRESETS["mini"].task()
    params, _ = abstract_parameters(task)
    found = {"decay": set(), "no_decay": set()}
    for path, label in jax.tree.leaves_with_path(task.labels(params)):
        found[label].add(path[-1].key)
    assert (found["decay"], found["no_decay"]) == EXPECTED[module]

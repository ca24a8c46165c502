"""What transformers' PyTorch T5 writes, ours writes."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from transformers import T5Config as TorchConfig
from transformers import T5ForConditionalGeneration

from lmjax.decoding.beam_search import Beam
from lmjax.decoding.generate import generate
from lmjax.interop import t5 as interop
from lmjax.models.t5 import T5


@pytest.fixture(scope="module")
def reference(tmp_path_factory):
    """A random model of transformers, and ours with its parameters."""
    torch.manual_seed(9)
    sizes = dict(vocab_size=40, d_model=16, d_kv=8, d_ff=32, num_heads=2, num_layers=2)
    theirs = T5ForConditionalGeneration(TorchConfig(**sizes, decoder_start_token_id=0)).eval()
    for parameter in theirs.parameters():
        parameter.data += 0.6 * torch.randn_like(parameter)
    theirs.shared.weight.data /= 2
    directory = tmp_path_factory.mktemp("reference")
    theirs.save_pretrained(directory)
    config, params = interop.load_pretrained(directory)
    inputs = np.random.default_rng(3).integers(2, 40, (6, 10))
    inputs[1, 5:], inputs[4, 8:] = 0, 0
    return theirs, T5(config), jax.tree.map(jnp.asarray, params), inputs


def transformers_writes(theirs, inputs, **options):
    mask = torch.tensor(inputs != 0).long()
    tokens = theirs.generate(torch.tensor(inputs), attention_mask=mask, do_sample=False, **options)
    return tokens.numpy()[:, 1:]


def test_greedy_is_that_of_transformers(reference):
    theirs, model, params, inputs = reference
    expected = transformers_writes(theirs, inputs, max_new_tokens=16)
    result = generate(model, params, jnp.asarray(inputs), max_length=16)
    assert result.lengths.min() < result.lengths.max() == 16
    np.testing.assert_array_equal(result.tokens, expected)


def test_beams_are_those_of_transformers(reference):
    """Without ends of texts, where conventions differ: transformers lets only the first K of 2K
    candidates end, and in the last step ranks texts cut off beside those that ended. Its penalty
    is length ** x, without 5 and 6; at 0 both rank by probability.
    """
    theirs, model, params, inputs = reference
    options = dict(num_beams=4, num_return_sequences=4, length_penalty=0.0, max_new_tokens=16)
    theirs.generation_config.eos_token_id = None
    expected = transformers_writes(theirs, inputs, **options)
    beam = Beam(size=4, alpha=0, best=4)
    result = generate(model, params, jnp.asarray(inputs), max_length=16, strategy=beam, eos=None)
    np.testing.assert_array_equal(result.tokens.reshape(-1, 16), expected)

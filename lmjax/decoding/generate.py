"""Writing text: a loop over any model's `extend`, and the front for the systems here.

Axes: B batch, S source length, T prompt length, L max_length, V vocabulary.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Key

from lmjax.decoding.beam_search import Beam, Hypotheses, beam_search, repeated
from lmjax.decoding.sampling import GREEDY, Sampling, log_probability, sample
from lmjax.models import bart, gpt2, t5, xlnet

DECODERS = (gpt2.GPT2, xlnet.XLNet)
"""Models that continue a text; the others answer one."""


class Generated(NamedTuple):
    tokens: Int[Array, "B L"]
    """0 after the end."""
    lengths: Int[Array, " B"]
    """Tokens of each row, with the one that ends it."""
    log_probs: Float[Array, " B"]
    """Sum over a row's tokens, under the model itself (before temperature, top-k and top-p)."""


def generate(
    model: t5.T5 | bart.Bart | gpt2.GPT2 | xlnet.XLNet,
    params,
    inputs: Int[Array, "B S"],
    *,
    max_length: int,
    lengths: Int[Array, " B"] | None = None,
    strategy: Sampling | Beam = GREEDY,
    key: Key[Array, ""] | None = None,
    eos: int | None = 1,
    vocab_size: int | None = None,
) -> Generated | Hypotheses:
    """What the model writes: Hypotheses of a Beam, else Generated.

    `inputs` are texts to answer, padded with 0 (T5) or `config.padding` (BART), or to continue
    (GPT-2, XLNet), of `lengths` tokens each, by default all of S; what stands behind a shorter one
    is not read.

    Compiled once for each shape, model and setting; other parameters reuse the program. `eos` ends
    a text (None: nothing does) and counts as one of `max_length`. Ids from `vocab_size` on, which
    the tokenizer does not have, are never chosen. Sampling draws with `key`, and each row with its
    own, so the other rows of the batch make no difference to it.

    Raises ValueError for settings that do not fit the model or each other.
    """
    vocab = model.config.vocab if vocab_size is None else vocab_size
    if max_length < 1:
        raise ValueError(f"max_length is {max_length}; generate at least 1 token")
    if not 2 <= vocab <= model.config.vocab:
        raise ValueError(f"vocab_size is {vocab}; the model has {model.config.vocab} ids")
    if eos is not None and not 0 <= eos < vocab:
        raise ValueError(f"eos is {eos}, not one of the {vocab} ids; None lets no token end a text")
    if lengths is not None and not isinstance(model, DECODERS):
        raise ValueError(
            "an encoder knows the lengths of its inputs by their padding: drop lengths"
        )
    if isinstance(strategy, Sampling) and strategy.temperature > 0 and key is None:
        raise ValueError("sampling needs a key: pass key=jax.random.key(seed), or strategy=GREEDY")
    inputs = jnp.asarray(inputs, jnp.int32)
    return _generate(model, params, inputs, lengths, key, max_length, strategy, eos, vocab)


@partial(jax.jit, static_argnames=("model", "max_length", "strategy", "eos", "vocab"))
def _generate(model, params, inputs, lengths, key, max_length, strategy, eos, vocab):
    beams = strategy.size if isinstance(strategy, Beam) else 1
    extend, state, prompt = _read(model, params, inputs, lengths, max_length, beams)
    settings = dict(max_length=max_length, eos=eos, vocab_size=vocab)
    if isinstance(strategy, Beam):
        return beam_search(extend, state, prompt, beam=strategy, **settings)[0]
    return continue_text(extend, state, prompt, sampling=strategy, key=key, **settings)[0]


def _read(model, params, inputs, lengths, max_length, beams):
    """`extend` of the model, its state with room for `max_length` tokens, and the one to begin with
    [B, 1]."""
    batch, length = inputs.shape
    if not isinstance(model, DECODERS):
        system, start = (t5, 0) if isinstance(model, t5.T5) else (bart, model.config.start)
        state = system.start_decoding(model, params, inputs, max_length, beams=beams)
        return system.extender(model, params), state, jnp.full((batch, 1), start, jnp.int32)
    lengths = jnp.full(batch, length) if lengths is None else lengths
    room = length - 1 + max_length
    if isinstance(model, gpt2.GPT2):
        extend, state = gpt2.extender(model, params), gpt2.start_decoding(model, batch, room)
    else:
        extend = xlnet.extender(model, params)
        state = xlnet.start_decoding(model, params, batch, room)
    if length > 1:
        _, state = extend(inputs[:, :-1], state)
    # The places behind a shorter text are written over.
    layers, read = repeated((state.layers, lengths - 1), beams)
    state = state._replace(layers=layers, length=read)
    return extend, state, jnp.take_along_axis(inputs, lengths[:, None] - 1, 1)


def continue_text(
    extend: Callable,
    state,
    prompt: Int[Array, "B T"],
    *,
    max_length: int,
    sampling: Sampling = GREEDY,
    key: Key[Array, ""] | None = None,
    eos: int | None,
    vocab_size: int | None = None,
) -> tuple[Generated, Any]:
    """Up to `max_length` tokens after `prompt`, and the state they leave; stops when all ended.

    `extend(tokens [B, T], state) -> (logits [B, T, V], state)`; the state needs room for T +
    `max_length` - 1 tokens. Row b draws its token number i with `key` folded with b, then with i.
    Ids from `vocab_size` on are padding and never chosen.
    """
    batch = prompt.shape[0]
    if prompt.shape[1] > 1:
        _, state = extend(prompt[:, :-1], state)
    keys = None
    if sampling.temperature > 0:
        keys = jax.vmap(jax.random.fold_in, (None, 0))(key, jnp.arange(batch))

    def step(carry):
        i, last, ended, (tokens, lengths, log_probs), state = carry
        logits, state = extend(last[:, None], state)
        logits = logits[:, -1, :vocab_size]
        drawn = keys if keys is None else jax.vmap(jax.random.fold_in, (0, None))(keys, i)
        token = jnp.where(ended, 0, sample(logits, drawn, sampling))
        written = Generated(
            tokens.at[:, i].set(token),
            lengths + ~ended,
            log_probs + jnp.where(ended, 0, log_probability(logits, token)),
        )
        return i + 1, token, ended | (token == eos) if eos is not None else ended, written, state

    def unfinished(carry):
        i, _, ended, *_ = carry
        return (i < max_length) & ~ended.all()

    nothing = Generated(
        jnp.zeros((batch, max_length), jnp.int32), jnp.zeros(batch, jnp.int32), jnp.zeros(batch)
    )
    start = (0, prompt[:, -1], jnp.zeros(batch, bool), nothing, state)
    *_, written, state = jax.lax.while_loop(unfinished, step, start)
    return written, state

"""Drawing pictures for captions, token by token.

Axes: B batch, T caption length, N pictures of each caption, P image tokens.
"""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Key

from lmjax.decoding.generate import continue_text
from lmjax.decoding.sampling import Sampling
from lmjax.models import dalle


class Pictures(NamedTuple):
    codes: Int[Array, "B N P"]
    """In raster order; those given among them."""
    log_probs: Float[Array, "B N"]
    """Sum over the codes drawn, under the model itself (before temperature, top-k and top-p)."""


def draw(
    model: dalle.DALLE,
    params,
    captions: Int[Array, "B T"],
    *,
    lengths: Int[Array, " B"] | None = None,
    samples: int = 1,
    top: Int[Array, "B given"] | None = None,
    sampling: Sampling = Sampling(),  # noqa: B008 (it is frozen)
    key: Key[Array, ""] | None = None,
) -> Pictures:
    """`samples` pictures for each caption of `lengths` tokens (by default all of T).

    `top` holds the codes of the first rows of tokens, or of a part of one, where pictures are to be
    completed. Captions are read once for all their pictures. Compiled once for each shape, model
    and setting; other parameters reuse the program. Sampling draws each picture with a key of its
    own, so that the other captions make no difference to it.

    Raises ValueError for captions that are too long, settings out of range, or no key to sample
    with.
    """
    room = model.config.image_length
    if samples < 1:
        raise ValueError(f"samples is {samples}; draw at least 1 picture of each caption")
    if sampling.temperature > 0 and key is None:
        raise ValueError("sampling needs a key: pass key=jax.random.key(seed), or sampling=GREEDY")
    captions = jnp.asarray(captions, jnp.int32)
    lengths = jnp.full(len(captions), captions.shape[1]) if lengths is None else lengths
    top = jnp.zeros((len(captions), 0), jnp.int32) if top is None else jnp.asarray(top, jnp.int32)
    if top.ndim != 2 or len(top) != len(captions) or top.shape[1] >= room:
        raise ValueError(
            f"top has shape {top.shape}: expected one row for each of {len(captions)} captions, of"
            f" fewer codes than the {room} of a picture"
        )
    return _draw(model, params, captions, lengths, top, key, samples, sampling)


@partial(jax.jit, static_argnames=("model", "samples", "sampling"))
def _draw(model, params, captions, lengths, top, key, samples, sampling):
    c = model.config
    text = dalle.caption_tokens(c, captions, lengths)
    state = dalle.start_decoding(model, params, text, samples)
    given = jnp.repeat(top, samples, axis=0)
    drawn, _ = continue_text(
        dalle.extender(model, params),
        state,
        jnp.concatenate([jnp.repeat(text[:, -1:], samples, axis=0), given], axis=1),
        max_length=c.image_length - top.shape[1],
        sampling=sampling,
        key=key,
        eos=None,
    )
    codes = jnp.concatenate([given, drawn.tokens], axis=1)
    shape = (len(captions), samples)
    return Pictures(codes.reshape(*shape, -1), drawn.log_probs.reshape(shape))

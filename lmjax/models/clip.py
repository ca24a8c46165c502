"""CLIP: pictures and texts as vectors that point the same way where they belong together.

Paper: Radford et al. 2021, "Learning Transferable Visual Models From Natural Language Supervision",
section 2. Reference files: openai/CLIP clip/model.py, transformers modeling_clip.py.
Axes: B pictures, C texts, R pixels a side of a picture, P pixels a side of a patch, T and S length,
D width of a tower, N heads, H head width, F feed-forward width, V vocabulary, E width of what both
towers give.

What is peculiar to CLIP: GELU is approximated by x * sigmoid(1.702 x); a picture is its patches
after a class token, which in the end stands for it, with a norm before the layers too; a text is
read causally, and its end token stands for it; how much similarities count is learned.
Departures: pictures are from 0 to 1, and their normalization is part of the model; none has
dropout; queries, keys and values have a kernel each (OpenAI's files join the three).
"""

import dataclasses
import math
from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from lmjax.models.layers import (
    Execution,
    LayerNorm,
    affine,
    attention,
    check_config,
    check_pictures,
    constrain,
    dense,
    fold,
    lookup,
    split_heads,
    stack,
    weight,
)

MEAN = (0.48145466, 0.4578275, 0.40821073)
DEVIATION = (0.26862954, 0.26130258, 0.27577711)
"""Of red, green and blue in the pictures that OpenAI trained on."""
LARGEST_SCALE = 100.0
"""Of similarities: section 2.5."""


class Tower(NamedTuple):
    """Sizes of one of the two transformers."""

    layers: int
    width: int
    heads: int
    feed_forward: int
    norm_epsilon: float
    exact_gelu: bool


@dataclasses.dataclass(frozen=True)
class CLIPConfig:
    """What a CLIP is; the defaults are OpenAI's ViT-B/32."""

    size: int = 224
    """R, pixels a side of a picture."""
    patch: int = 32
    """P, pixels a side of a patch."""
    picture_layers: int = 12
    picture_width: int = 768
    picture_heads: int = 12
    picture_feed_forward: int = 3_072
    vocab: int = 49_408
    """Rows of the embedding: the tokenizer's ids."""
    positions: int = 77
    """The longest text."""
    layers: int = 12
    """Of the texts' transformer, as the three that follow."""
    width: int = 512
    heads: int = 8
    feed_forward: int = 2_048
    joint_width: int = 512
    """E, of the vectors that are compared."""
    end: int | None = None
    """The token whose first occurrence stands for a text; by default the one with the largest id,
    as in OpenAI's vocabulary."""
    exact_gelu: bool = False
    """GELU as it is, in place of x * sigmoid(1.702 x)."""
    norm_epsilon: float = 1e-5

    def __post_init__(self):
        towers = ("layers", "width", "heads", "feed_forward")
        towers += tuple(f"picture_{name}" for name in towers)
        check_config(self, "size", "patch", "vocab", "positions", "joint_width", *towers)
        for prefix in ("", "picture_"):
            width, heads = getattr(self, f"{prefix}width"), getattr(self, f"{prefix}heads")
            if width % heads:
                raise ValueError(
                    f"CLIPConfig.{prefix}width is {width}, which does not divide into {heads} heads"
                )
        if self.size % self.patch:
            raise ValueError(
                f"CLIPConfig.size is {self.size} pixels, which do not divide into patches of"
                f" {self.patch}"
            )
        if self.end is not None and not 0 <= self.end < self.vocab:
            raise ValueError(f"CLIPConfig.end is {self.end}, not one of {self.vocab} ids")

    @property
    def patches(self) -> int:
        """Of a picture."""
        return (self.size // self.patch) ** 2

    def tower(self, prefix: str = "") -> Tower:
        """That of the texts or, with "picture_", of the pictures."""
        names = ("layers", "width", "heads", "feed_forward")
        sizes = (getattr(self, prefix + name) for name in names)
        return Tower(*sizes, self.norm_epsilon, self.exact_gelu)

    def training_flops(self, pictures: int, texts: int, length: int) -> float:
        """Floating-point operations of the products in one step: forwards, and twice backwards.

        Attention scores count in full; recomputation does not count.
        """
        products = pictures * texts * self.joint_width
        for rows, places, t in (
            (pictures, self.patches + 1, self.tower("picture_")),
            (texts, length, self.tower()),
        ):
            layer = 4 * t.width**2 + 2 * t.width * t.feed_forward + 2 * places * t.width
            products += rows * (places * t.layers * layer + t.width * self.joint_width)
        products += pictures * self.patches * 3 * self.patch**2 * self.picture_width
        return 6.0 * products


PRESETS = {
    "vit-b-32": CLIPConfig(),
    "emoji": CLIPConfig(
        size=64,
        patch=8,
        picture_layers=4,
        picture_width=128,
        picture_heads=4,
        picture_feed_forward=512,
        vocab=4_096,
        positions=32,
        layers=4,
        width=128,
        heads=4,
        feed_forward=512,
        joint_width=128,
    ),
}


class Layer(nn.Module):
    tower: Tower
    execution: Execution

    @nn.compact
    def __call__(
        self, x: Float[Array, "B T D"], mask: Bool[Array, "1 1 #T S"]
    ) -> tuple[Float[Array, "B T D"], None]:
        t, e = self.tower, self.execution
        normed = LayerNorm(t.norm_epsilon, e, name="attention_norm")(x)
        x = x + Attention(t, e, name="attention")(normed, mask)
        normed = LayerNorm(t.norm_epsilon, e, name="feed_forward_norm")(x)
        x = x + FeedForward(t, e, name="feed_forward")(normed)
        return constrain(x, "batch", "activation_length", "activation_embed"), None


class Attention(nn.Module):
    tower: Tower
    execution: Execution

    @nn.compact
    def __call__(
        self, x: Float[Array, "B T D"], mask: Bool[Array, "1 1 #T S"]
    ) -> Float[Array, "B T D"]:
        t = self.tower
        init = nn.initializers.normal(t.width**-0.5)

        def heads(name: str) -> Float[Array, "B T N H"]:
            return split_heads(affine(self, x, name, init, embed=t.width, heads=t.width), t.heads)

        queries, keys, values = heads("query"), heads("key"), heads("value")
        queries = queries * (t.width // t.heads) ** -0.5
        context = attention(queries, keys, values, mask, execution=self.execution)
        out = residual_init(t)
        return affine(self, context.reshape(x.shape), "out", out, heads=t.width, embed=t.width)


class FeedForward(nn.Module):
    tower: Tower
    execution: Execution

    @nn.compact
    def __call__(self, x: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
        t = self.tower
        init = nn.initializers.normal((2 * t.width) ** -0.5)
        up = affine(self, x, "up", init, embed=t.width, mlp=t.feed_forward)
        hidden = nn.gelu(up, approximate=False) if t.exact_gelu else quick_gelu(up)
        hidden = constrain(hidden, "batch", "activation_length", "activation_mlp")
        return affine(self, hidden, "down", residual_init(t), mlp=t.feed_forward, embed=t.width)


def quick_gelu(x: Array) -> Array:
    return x * nn.sigmoid(1.702 * x)


def residual_init(t: Tower):
    """Smaller with depth, as in GPT-2."""
    return nn.initializers.normal((2 * t.layers * t.width) ** -0.5)


class PictureEncoder(nn.Module):
    config: CLIPConfig
    execution: Execution

    @nn.compact
    def __call__(self, pictures: Float[Array, "B R R 3"]) -> Float[Array, "B E"]:
        c, e, t = self.config, self.execution, self.config.tower("picture_")
        check_pictures(pictures, c)
        init = nn.initializers.normal(t.width**-0.5)
        pixels = fold((pictures - np.float32(MEAN)) / np.float32(DEVIATION), c.patch)
        pixels = pixels.reshape(len(pixels), c.patches, -1).astype(e.dtype)
        kernel = weight(self, "patches", INIT, pixels=pixels.shape[-1], embed=t.width)
        token = weight(self, "class_token", init, embed=t.width)
        token = jnp.broadcast_to(token, (len(pixels), 1, t.width))
        x = jnp.concatenate([token, dense(pixels, kernel)], axis=1)
        x = x + weight(self, "positions", init, positions=c.patches + 1, embed=t.width)
        x = LayerNorm(c.norm_epsilon, e, name="first_norm")(x)
        mask = jnp.ones((1, 1, 1, c.patches + 1), bool)
        x, _ = stack(Layer, t.layers, e, inputs=1)(t, e, name="layers")(x, mask)
        x = LayerNorm(c.norm_epsilon, e, name="final_norm")(x[:, 0])
        return unit(dense(x, weight(self, "out", init, embed=t.width, joint=c.joint_width)))


class TextEncoder(nn.Module):
    config: CLIPConfig
    execution: Execution

    @nn.compact
    def __call__(self, tokens: Int[Array, "C T"]) -> Float[Array, "C E"]:
        c, e, t = self.config, self.execution, self.config.tower()
        length = tokens.shape[1]
        if length > c.positions:
            raise ValueError(
                f"{length} tokens do not fit the {c.positions} positions that this CLIP has"
                " learned: shorten the text, or train a model with more"
            )
        table = weight(self, "embedding", INIT, vocab=c.vocab, embed=t.width)
        places = weight(
            self,
            "positions",
            nn.initializers.normal(0.01),
            positions=c.positions,
            embed=t.width,
        )
        x = lookup(table, tokens) + places[:length]
        mask = jnp.tril(jnp.ones((length, length), bool))[None, None]
        x, _ = stack(Layer, t.layers, e, inputs=1)(t, e, name="layers")(x, mask)
        last = (tokens if c.end is None else tokens == c.end).argmax(-1)
        x = jnp.take_along_axis(x, last[:, None, None], axis=1)[:, 0]
        x = LayerNorm(c.norm_epsilon, e, name="final_norm")(x)
        init = nn.initializers.normal(t.width**-0.5)
        return unit(dense(x, weight(self, "out", init, embed=t.width, joint=c.joint_width)))


INIT = nn.initializers.normal(0.02)


def unit(x: Float[Array, "*rows E"]) -> Float[Array, "*rows E"]:
    """Scaled to length 1, float32."""
    x = x.astype(jnp.float32)
    return x / jnp.linalg.norm(x, axis=-1, keepdims=True)


@jax.custom_vjp
def at_most(x: Float[Array, ""], limit: float) -> Float[Array, ""]:
    """min(x, limit), with a gradient where x is above that if descending it brings x back."""
    return jnp.minimum(x, limit)


at_most.defvjp(
    lambda x, limit: (at_most(x, limit), x < limit),
    lambda below, gradient: (jnp.where(below | (gradient > 0), gradient, 0), None),
)


class CLIP(nn.Module):
    """A picture and a text encoder; what follows a text's end token in its row is not read."""

    config: CLIPConfig
    execution: Execution = Execution()

    def setup(self):
        self.pictures = PictureEncoder(self.config, self.execution)
        self.texts = TextEncoder(self.config, self.execution)
        start = nn.initializers.constant(math.log(1 / 0.07))
        self.scale = weight(self, "scale", start, "float32")  # its logarithm

    def __call__(
        self, pictures: Float[Array, "B R R 3"], tokens: Int[Array, "C T"]
    ) -> Float[Array, "B C"]:
        """How well each picture and each text fit: cosines, scaled to be logits."""
        return self.logits(self.encode_pictures(pictures), self.encode_texts(tokens))

    def encode_pictures(self, pictures: Float[Array, "B R R 3"]) -> Float[Array, "B E"]:
        """Unit vectors of pictures from 0 to 1.

        Raises:
            ValueError: pictures of another size than the config's.
        """
        return self.pictures(pictures)

    def encode_texts(self, tokens: Int[Array, "C T"]) -> Float[Array, "C E"]:
        """Unit vectors.

        Raises:
            ValueError: longer texts than there are positions.
        """
        return self.texts(tokens)

    def logits(
        self, pictures: Float[Array, "B E"], texts: Float[Array, "C E"]
    ) -> Float[Array, "B C"]:
        """From both sides' unit vectors."""
        scale = jnp.exp(at_most(self.scale, math.log(LARGEST_SCALE)))
        return scale * (pictures @ texts.T)

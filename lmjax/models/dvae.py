"""Pictures as grids of discrete codes: DALL-E's discrete VAE, and the VQ-VAE.

Papers: Ramesh et al. 2021, "Zero-Shot Text-to-Image Generation", sections 2.1 and A; Jang et al.
2017, "Categorical Reparameterization with Gumbel-Softmax"; van den Oord et al. 2017, "Neural
Discrete Representation Learning", section 3. Reference files: openai/DALL-E encoder.py, decoder.py,
utils.py.
Axes: B batch, R pixels a side, H and W rows and columns of a grid, K size of a kernel, I/O any two
widths, D width of a code's vector, V codes.

What is peculiar to them: pictures are [B, R, R, 3] from 0 to 1; both halves are residual blocks of
four convolutions, whose sum starts close to the identity; a pixel's likelihood is a Laplace
distribution of its logit, so pictures are squeezed into (0.1, 0.9) first. In training the dVAE
decodes soft codes, drawn by Gumbel-softmax; the VQ-VAE decodes the vector nearest to what the
encoder says, and the encoder gets that vector's gradient.
Departures, all off by default: `patch` folds pixels into channels at full resolution, which is
where convolutions are slow on a CPU; `least_log_scale` bounds the likelihood, which flat colours
make infinite; `normalized` has norms, and learns in a thousand steps what takes long without them;
`nearest` makes a VQ-VAE of the same two halves.
"""

import dataclasses
from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float, Int, PRNGKeyArray

from lmjax.models.layers import (
    REMAT_POLICIES,
    Execution,
    LayerNorm,
    check_config,
    check_pictures,
    constrain,
    dense,
    fold,
    lookup,
    weight,
)

SQUEEZE = 0.1
"""Pixels are mapped from [0, 1] to [SQUEEZE, 1 - SQUEEZE], where logits are finite."""


@dataclasses.dataclass(frozen=True)
class DVAEConfig:
    """What a discrete VAE is; the defaults are OpenAI's."""

    size: int = 256
    """R, pixels a side of a picture."""
    codes: int = 8_192
    """V, the codes that a place of the grid chooses from."""
    width: int = 256
    """Channels at full resolution; they double where the resolution halves."""
    code_width: int = 128
    """D, of the vector that the decoder has for each code."""
    groups: int = 4
    """Resolutions, each half the one before."""
    blocks: int = 2
    """Residual blocks of each group."""
    kernel: int = 7
    """K of the first convolution; the others have 3 or 1."""
    patch: int = 1
    """Pixels a side that are folded into channels before the first convolution, and unfolded after
    the last."""
    least_log_scale: float | None = None
    """The logarithm of a pixel's scale stays above this."""
    normalized: bool = False
    """Everything is of size 1: pixels go from -1 to 1, a norm comes before each block and each
    half's last convolution, blocks have no gain, and the codes' vectors start with variance 1."""
    nearest: bool = False
    """A VQ-VAE: the code is the one whose vector is nearest to what the encoder says."""

    def __post_init__(self):
        sizes = ("size", "codes", "width", "code_width", "groups", "blocks", "kernel", "patch")
        check_config(self, *sizes)
        if self.width % 4:
            raise ValueError(
                f"DVAEConfig.width is {self.width}, which does not divide by 4: hidden layers have"
                " a quarter of it"
            )
        if self.kernel % 2 == 0:
            raise ValueError(f"DVAEConfig.kernel is {self.kernel}, expected an odd size")
        if self.size % self.stride:
            raise ValueError(
                f"DVAEConfig.size is {self.size} pixels, which do not divide into the"
                f" {self.stride} x {self.stride} that patch {self.patch} and {self.groups} groups"
                " make one code of: choose a multiple, or other groups"
            )

    @property
    def stride(self) -> int:
        """Pixels a side that become one code."""
        return self.patch * 2 ** (self.groups - 1)

    @property
    def grid(self) -> int:
        """Codes a side of a picture."""
        return self.size // self.stride

    @property
    def widths(self) -> list[int]:
        """Channels of each group, from the pictures to the codes."""
        return [self.width * 2**i for i in range(self.groups)]


PRESETS = {
    "openai": DVAEConfig(),
    "emoji": DVAEConfig(
        size=64,
        codes=512,
        groups=1,
        blocks=1,
        kernel=1,
        patch=8,
        least_log_scale=-1.0,
        normalized=True,
    ),
}


# --- pixels and their likelihood


def map_pixels(pictures: Float[Array, "*picture"]) -> Float[Array, "*picture"]:
    """From [0, 1] to where a logit is finite: section A.1."""
    return (1 - 2 * SQUEEZE) * pictures + SQUEEZE


def unmap_pixels(mapped: Float[Array, "*picture"]) -> Float[Array, "*picture"]:
    """The inverse of `map_pixels`, cut off at 0 and 1."""
    return jnp.clip((mapped - SQUEEZE) / (1 - 2 * SQUEEZE), 0, 1)


class LogitLaplace(NamedTuple):
    """A distribution of mapped pixels, whose logits have a Laplace distribution: section A.3."""

    location: Float[Array, "B R R 3"]
    log_scale: Float[Array, "B R R 3"]

    def log_density(self, mapped: Float[Array, "B R R 3"]) -> Float[Array, "B R R 3"]:
        """Of mapped pixels, strictly between 0 and 1."""
        logit = jnp.log(mapped) - jnp.log1p(-mapped)
        distance = jnp.abs(logit - self.location) * jnp.exp(-self.log_scale)
        return -distance - self.log_scale - jnp.log(2 * mapped * (1 - mapped))

    def picture(self) -> Float[Array, "B R R 3"]:
        """The median, as a picture from 0 to 1."""
        return unmap_pixels(nn.sigmoid(self.location))


# --- codes


def gumbel_softmax(
    logits: Float[Array, "*grid V"], temperature: Float[Array, ""] | float, key: PRNGKeyArray
) -> Float[Array, "*grid V"]:
    """Soft codes, which become draws of a code as the temperature goes to 0: Jang et al. 2017."""
    noise = jax.random.gumbel(key, logits.shape, logits.dtype)
    return nn.softmax((logits + noise) / temperature)


def kl_to_uniform(logits: Float[Array, "*grid V"]) -> Float[Array, "*grid"]:
    """KL(q || uniform) in nats at each place, of the codes' distribution q = softmax(logits)."""
    log_q = nn.log_softmax(logits)
    return (jnp.exp(log_q) * log_q).sum(-1) + jnp.log(logits.shape[-1])


def codes_of(logits: Float[Array, "*grid V"]) -> Int[Array, "*grid"]:
    """The most likely code at each place."""
    return logits.argmax(-1)


class Usage(NamedTuple):
    """How many codes a set of pictures needs."""

    codes: Int[Array, ""]
    """That occur at all."""
    perplexity: Float[Array, ""]
    """Of the codes as they occur: as many, used equally often, would be as hard to foretell."""


def usage(codes: Int[Array, "*grid"], config: DVAEConfig) -> Usage:
    counts = jnp.bincount(codes.reshape(-1), length=config.codes)
    entropy = jax.scipy.special.entr(counts / codes.size).sum()
    return Usage((counts > 0).sum(), jnp.exp(entropy))


# --- the two halves


def conv(x: Float[Array, "B H W I"], kernel: Float[Array, "K K I O"]) -> Float[Array, "B H W O"]:
    """A convolution with zeros around; K = 1 is a product, three times as fast backwards on CPU."""
    if kernel.shape[0] == 1:
        return dense(x, kernel[0, 0])
    layout = ("NHWC", "HWIO", "NHWC")
    y = jax.lax.conv_general_dilated(x, kernel, (1, 1), "SAME", dimension_numbers=layout)
    return checkpoint_name(y, "product")


def biased_conv(
    module: nn.Module, x: Float[Array, "B H W I"], name: str, size: int, dtype=None, **axes: int
) -> Float[Array, "B H W O"]:
    """`conv` with a kernel and a bias of the module's own, `name` and `name`_bias."""
    (_, inputs), (outputs, length) = axes.items()
    init = nn.initializers.normal((inputs * size**2) ** -0.5)
    kernel = weight(module, name, init, dtype, rows=size, columns=size, **axes)
    bias = weight(module, f"{name}_bias", nn.initializers.zeros, dtype, **{outputs: length})
    return conv(x.astype(kernel.dtype), kernel) + bias


class Block(nn.Module):
    """x + what four convolutions make of it."""

    config: DVAEConfig
    execution: Execution
    outputs: int
    kernels: tuple[int, ...]

    @nn.compact
    def __call__(self, x: Float[Array, "B H W I"]) -> Float[Array, "B H W O"]:
        c, y = self.config, normed(self, x)
        widths = (x.shape[-1], *(self.outputs // 4,) * 3, self.outputs)
        for i, kernel in enumerate(self.kernels):
            # Pairs, as tensor parallelism has them: what one divides, the next one sums up.
            names = ("embed", "mlp") if i % 2 == 0 else ("mlp", "embed")
            axes = dict(zip(names, widths[i : i + 2], strict=True))
            y = biased_conv(self, nn.relu(y), f"conv_{i + 1}", kernel, **axes)
        if x.shape[-1] != self.outputs:
            x = biased_conv(self, x, "identity", 1, embed=x.shape[-1], mlp=self.outputs)
        gain = 1 if c.normalized else (c.groups * c.blocks) ** -2
        return constrain(x + gain * y, "batch", None, None, "activation_embed")


def normed(module: nn.Module, x: Float[Array, "B H W I"]) -> Float[Array, "B H W I"]:
    """By a norm of the module's own, where the config has them."""
    if not module.config.normalized:
        return x
    return LayerNorm(1e-5, module.execution, name="norm")(x)


def residual_blocks(
    module: nn.Module,
    x: Float[Array, "B H W I"],
    group: int,
    outputs: int,
    kernels: tuple[int, ...],
) -> Float[Array, "B H W O"]:
    """One group of a half."""
    c, e = module.config, module.execution
    policy = REMAT_POLICIES[e.remat]
    block = Block if policy is None else nn.remat(Block, policy=policy)
    for i in range(c.blocks):
        x = block(c, e, outputs, kernels, name=f"group_{group + 1}_block_{i + 1}")(x)
    return x


class Encoder(nn.Module):
    config: DVAEConfig
    execution: Execution

    @nn.compact
    def __call__(self, mapped: Float[Array, "B R R 3"]) -> Float[Array, "B H W O"]:
        """A score for each code, or where the nearest one is taken a vector; float32."""
        c = self.config
        x = fold((mapped - 0.5) / (0.5 - SQUEEZE) if c.normalized else mapped, c.patch)
        x = biased_conv(self, x, "input", c.kernel, pixels=x.shape[-1], embed=c.width)
        for group, width in enumerate(c.widths):
            x = halve(x) if group else x
            x = residual_blocks(self, x, group, width, (3, 3, 3, 1))
        x = normed(self, x)
        outputs = {"code": c.code_width} if c.nearest else {"vocab": c.codes}
        return biased_conv(self, nn.relu(x), "output", 1, "float32", embed=x.shape[-1], **outputs)


class Decoder(nn.Module):
    config: DVAEConfig
    execution: Execution

    def setup(self):
        c = self.config
        init = nn.initializers.normal(1.0 if c.normalized else c.codes**-0.5)
        self.codebook = weight(self, "codebook", init, "float32", vocab=c.codes, code=c.code_width)
        self.codebook_bias = weight(self, "codebook_bias", nn.initializers.zeros, code=c.code_width)

    def embed(
        self, codes: Int[Array, "B H W"] | Float[Array, "B H W V"]
    ) -> Float[Array, "B H W D"]:
        """The vectors of codes, or of soft ones their mixture."""
        if jnp.issubdtype(codes.dtype, jnp.integer):
            return lookup(self.codebook, codes)
        return dense(codes, self.codebook)

    @nn.compact
    def __call__(self, vectors: Float[Array, "B H W D"]) -> LogitLaplace:
        c = self.config
        x = vectors.astype(self.execution.dtype) + self.codebook_bias
        for group, width in enumerate(c.widths[::-1]):
            x = double(x) if group else x
            x = residual_blocks(self, x, group, width, (1, 3, 3, 3))
        x = normed(self, x)
        outputs = 2 * 3 * c.patch**2
        x = biased_conv(self, nn.relu(x), "output", 1, "float32", embed=c.width, pixels=outputs)
        location, log_scale = jnp.split(x, 2, axis=-1)
        if c.least_log_scale is not None:
            log_scale = c.least_log_scale + nn.softplus(log_scale - c.least_log_scale)
        return LogitLaplace(unfold(location, c.patch), unfold(log_scale, c.patch))


def halve(x: Float[Array, "B H W I"]) -> Float[Array, "B H/2 W/2 I"]:
    """The largest of every two by two."""
    return nn.max_pool(x, (2, 2), (2, 2))


def double(x: Float[Array, "B H W I"]) -> Float[Array, "B 2*H 2*W I"]:
    """Each place four times."""
    return x.repeat(2, axis=1).repeat(2, axis=2)


def unfold(x: Float[Array, "B H W I*P*P"], patch: int) -> Float[Array, "B R R I"]:
    """The inverse of `fold`."""
    batch, rows, columns, _ = x.shape
    x = x.reshape(batch, rows, columns, -1, patch, patch).transpose(0, 1, 4, 2, 5, 3)
    return x.reshape(batch, rows * patch, columns * patch, -1)


class DVAE(nn.Module):
    """A discrete VAE or, with `config.nearest`, a VQ-VAE."""

    config: DVAEConfig
    execution: Execution = Execution()

    def setup(self):
        self.encoder = Encoder(self.config, self.execution)
        self.decoder = Decoder(self.config, self.execution)

    def __call__(self, pictures: Float[Array, "B R R 3"]) -> LogitLaplace:
        """What is left of pictures after going through their codes."""
        return self.decode(codes_of(self.encode(pictures)))

    def encode(self, pictures: Float[Array, "B R R 3"]) -> Float[Array, "B H W V"]:
        """Logits of the codes at each place, float32.

        Raises:
            ValueError: pictures of another size than the config's.
        """
        encoded = self.encoder_output(pictures)
        return -self.distances(encoded) if self.config.nearest else encoded

    def encoder_output(self, pictures: Float[Array, "B R R 3"]) -> Float[Array, "B H W O"]:
        check_pictures(pictures, self.config)
        return self.encoder(map_pixels(pictures))

    def distances(self, vectors: Float[Array, "B H W D"]) -> Float[Array, "B H W V"]:
        """Squared, to the vector of each code."""
        book = self.decoder.codebook
        squares = (vectors**2).sum(-1, keepdims=True) + (book**2).sum(-1)
        return squares - 2 * dense(vectors, book.T)

    def decode(self, codes: Int[Array, "B H W"] | Float[Array, "B H W V"]) -> LogitLaplace:
        """The distribution of the mapped pixels that codes, or soft ones, stand for."""
        return self.decoder(self.decoder.embed(codes))

    def decode_nearest(
        self, vectors: Float[Array, "B H W D"]
    ) -> tuple[LogitLaplace, Float[Array, "B H W D"]]:
        """Of a VQ-VAE's encoder output: the decoded pictures, and the nearest codes' vectors.

        Decoding's gradient goes straight through to `vectors`: van den Oord et al., section 3.2.
        """
        nearest = self.decoder.embed(codes_of(-self.distances(vectors)))
        return self.decoder(vectors + jax.lax.stop_gradient(nearest - vectors)), nearest

    def reconstruct(self, pictures: Float[Array, "B R R 3"]) -> Float[Array, "B R R 3"]:
        """Pictures after going through their codes."""
        return self(pictures).picture()

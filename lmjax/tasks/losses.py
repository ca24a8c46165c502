"""Cross-entropy from features and an output matrix, without ever holding all logits.

A language model's float32 logits are its largest activation: 4,096 tokens x 250,112 rows of mT5
are 4.1 GB, several times over in a backward pass. Here positions are taken a chunk at a time; when
the loss is differentiated, the pass that computes it also computes both gradients of the chunk
while its logits are at hand: three matrix products, as many as with full logits, none repeated.

The loss of a token is the one T5 was trained with: t5x, `t5x/losses.py`.
Axes: B batch, T position, D width, V vocabulary row, R = B * (positions of a chunk).
"""

import functools
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec
from jaxtyping import Array, Float, Int

from lmjax.models.layers import division, parallel_devices
from lmjax.tasks.task import Batch, Scalars


class _Settings(NamedTuple):
    z_loss: float
    label_smoothing: float
    valid_rows: int
    chunks: int


def cross_entropy(
    features: Float[Array, "B T D"],
    matrix: Float[Array, "V D"],
    targets: Int[Array, "B T"],
    weights: Float[Array, "B T"],
    *,
    bias: Float[Array, " V"] | None = None,
    z_loss: float = 0.0,
    label_smoothing: float = 0.0,
    valid_rows: int | None = None,
    chunk_bytes: int | None = None,
) -> tuple[Float[Array, ""], dict[str, Float[Array, ""]]]:
    """Sums over all tokens of weight x loss, where logits are `features @ matrix.T + bias`.

    The loss of a token is its cross-entropy against a target smoothed by `label_smoothing`, minus
    the entropy of that smoothed target (a perfect prediction has loss 0), plus
    `z_loss * logsumexp(logits)**2`, which keeps logits from drifting (1e-4 in T5).

    Args:
        features: what the output matrix multiplies, scaled by the caller where a model does that.
        matrix: one row per vocabulary entry, of the same dtype as the features: float32 or
            bfloat16. Products accumulate in float32 either way.
        targets: ids below `valid_rows`; anything where the weight is 0.
        weights: 0 for padding.
        bias: float32, one for every row.
        valid_rows: rows from here on are padding: they take no part in the softmax and get no
            gradient. All V rows by default.
        chunk_bytes: float32 logits to hold at a time, per device where a mesh is set. By default
            as many as take the space of the matrix gradient, which keeps adding the gradients of
            chunks cheap beside computing them. It changes speed and memory, not the result. Where
            the batch is divided, each device has a float32 gradient of the matrix of its own too.

    Returns:
        The sum of the losses, differentiable with respect to `features`, `matrix` and `bias`, and
        sums for reporting, through which no gradient flows: `nll` (negative log-likelihood, nats,
        without smoothing), `z_loss`, and `correct` (targets that score above every other row).

    Raises:
        ValueError: for shapes or dtypes that do not fit each other or settings out of range.
    """
    (batch, length, width), (rows, matrix_width) = features.shape, matrix.shape
    valid_rows = rows if valid_rows is None else valid_rows
    if matrix_width != width:
        raise ValueError(
            f"features have width {width} but the output matrix has rows of {matrix_width}; "
            "pass it as [vocabulary, width]"
        )
    if features.dtype != matrix.dtype:
        raise ValueError(
            f"features are {features.dtype} but the output matrix is {matrix.dtype}; cast one"
        )
    for name, array in {"targets": targets, "weights": weights}.items():
        if array.shape != (batch, length):
            raise ValueError(f"{name} have shape {array.shape}, expected {(batch, length)}")
    if bias is not None and bias.shape != (rows,):
        raise ValueError(f"bias has shape {bias.shape}, expected {(rows,)}, one for every row")
    if not 1 <= valid_rows <= rows:
        raise ValueError(f"valid_rows is {valid_rows}, expected 1 to {rows}, the matrix's rows")
    if not 0 <= label_smoothing < 1:
        raise ValueError(f"label_smoothing is {label_smoothing}, expected 0 <= it < 1")

    chunk_bytes = 4 * rows * width if chunk_bytes is None else chunk_bytes
    if chunk_bytes < 1:
        raise ValueError(f"chunk_bytes is {chunk_bytes}, expected a positive number of bytes")
    chunks = min(length, math.ceil(4 * batch * length * rows / (chunk_bytes * parallel_devices())))
    settings = _Settings(z_loss, label_smoothing, valid_rows, chunks)
    sums = _cross_entropy(features, matrix, bias, targets, weights.astype(jnp.float32), settings)
    return sums.pop("loss"), jax.lax.stop_gradient(sums)


def token_loss(
    features: Float[Array, "B T D"],
    matrix: Float[Array, "V D"],
    batch: Batch,
    normalizers: Scalars,
    z_loss: float = 0.0,
    label_smoothing: float = 0.0,
    bias: Float[Array, " V"] | None = None,
) -> tuple[Float[Array, ""], Scalars]:
    """The cross-entropy of a batch's `targets`, by their `loss_weights`, and its metrics.

    All are sums over these tokens divided by `normalizers["tokens"]`.
    """
    total, sums = cross_entropy(
        features,
        matrix,
        batch["targets"],
        batch["loss_weights"],
        bias=bias,
        z_loss=z_loss,
        label_smoothing=label_smoothing,
    )
    tokens = normalizers["tokens"]
    metrics = {
        "nll": sums["nll"] / tokens,
        "z_loss": sums["z_loss"] / tokens,
        "accuracy": sums["correct"] / tokens,
    }
    return total / tokens, metrics


def check_regularisers(z_loss: float, label_smoothing: float) -> None:
    """Raises ValueError for coefficients that `cross_entropy` has no use for."""
    if not (0 <= z_loss < math.inf and 0 <= label_smoothing < 1):
        raise ValueError(
            f"z_loss is {z_loss} and label_smoothing {label_smoothing}: expected"
            " 0 <= z_loss and 0 <= label_smoothing < 1"
        )


@functools.partial(jax.custom_vjp, nondiff_argnums=(5,))
def _cross_entropy(features, matrix, bias, targets, weights, settings: _Settings):
    def add(sums, chunk):
        x, targets, weights = chunk
        _, _, own = _chunk_sums(x, matrix, bias, targets, weights, settings)
        return jax.tree.map(jnp.add, sums, own), None

    chunks = _split((features, targets, weights), settings.chunks)
    return jax.lax.scan(add, _zero_sums(), chunks)[0]


def _forward(features, matrix, bias, targets, weights, settings: _Settings):
    """The sums, and as residuals the gradients of the loss, complete but for its cotangent.

    Where the batch is divided into G parts, each adds up a gradient of its own for the matrix, so
    that these are summed over devices once and not with every chunk.
    """
    axes = _axes_of_parts(*features.shape[:2], matrix.shape)

    def add(carry, chunk):
        sums, matrix_gradient, bias_gradient = carry
        x, targets, weights = chunk
        logits, log_z, own = _chunk_sums(x, matrix, bias, targets, weights, settings)
        logits_gradient = _logits_gradient(logits, log_z, targets, weights, settings)
        if bias is not None:
            bias_gradient += _by_part(logits_gradient, axes).sum(1)
        logits_gradient = logits_gradient.astype(x.dtype)
        x_gradient = _product(logits_gradient, matrix, 1, 0).astype(x.dtype)
        matrix_gradient += _product_by_part(logits_gradient, x, axes)
        return (jax.tree.map(jnp.add, sums, own), matrix_gradient, bias_gradient), x_gradient

    zeros = jax.tree.map(
        lambda x: _divided(jnp.zeros((parallel_devices(axes), *x.shape), jnp.float32), axes),
        (matrix, bias),
    )
    chunks = _split((features, targets, weights), settings.chunks)
    (sums, *of_parts), gradients = jax.lax.scan(add, (_zero_sums(), *zeros), chunks)
    matrix_gradient, bias_gradient = jax.tree.map(lambda x: x.sum(0), of_parts)
    gradients = _join(gradients, features.shape)
    return sums, (gradients, matrix_gradient.astype(matrix.dtype), bias_gradient)


def _axes_of_parts(batch: int, length: int, matrix_shape: tuple[int, int]) -> tuple[str, ...]:
    """The axes of the mesh along which parts of the batch have matrix gradients of their own.

    Parts along an axis that divides the matrix too cost each device a whole gradient of it. Where
    the axis divides the rows, and these are more than there are tokens, it is cheaper to bring all
    tokens to each part of the matrix, which the compiler does by itself: such axes are left out.
    """
    (axes,) = division(("batch",), (batch,))
    if matrix_shape[0] <= batch * length:
        return axes
    rows, _ = division(("vocab", "embed"), matrix_shape)
    return tuple(axis for axis in axes if axis not in rows)


def _product_by_part(a, b, axes: tuple[str, ...]):
    """[R, V], [R, D] -> [G, V, D], accumulated in float32."""
    if not axes:  # with an axis G of 1 the compiler divides the product otherwise, and sends more
        return _product(a, b, 0, 0)[None]
    parts = _by_part(a, axes), _by_part(b, axes)
    return jnp.einsum("grv,grd->gvd", *parts, preferred_element_type=jnp.float32)


def _by_part(x, axes: tuple[str, ...]):
    """[R, ...] -> [G, R / G, ...], each part of the batch by itself."""
    parts = parallel_devices(axes)
    return _divided(x.reshape(parts, -1, *x.shape[1:]), axes)


def _divided(x, axes: tuple[str, ...]):
    """An array [G, ...] whose first axis is divided along these of the mesh."""
    if not axes:
        return x
    others = [PartitionSpec.UNCONSTRAINED] * (x.ndim - 1)
    return jax.lax.with_sharding_constraint(x, PartitionSpec(axes, *others))


def _backward(settings: _Settings, gradients, cotangents):
    del settings
    scale = cotangents["loss"]
    return *jax.tree.map(lambda x: (scale * x).astype(x.dtype), gradients), None, None


_cross_entropy.defvjp(_forward, _backward)


def _zero_sums():
    return {name: jnp.zeros((), jnp.float32) for name in ("loss", "nll", "z_loss", "correct")}


def _product(a, b, a_axis: int, b_axis: int):
    """A two-dimensional product over the named axes, accumulated in float32."""
    contract = (((a_axis,), (b_axis,)), ((), ()))
    return jax.lax.dot_general(a, b, contract, preferred_element_type=jnp.float32)


def _chunk_sums(x, matrix, bias, targets, weights, settings: _Settings):
    """The logits [R, V] of R tokens, their logsumexp [R, 1], and the sums over these tokens."""
    rows = jnp.arange(matrix.shape[0])
    logits = _product(x, matrix, 1, 1)
    if bias is not None:
        logits += bias
    if settings.valid_rows < len(rows):
        logits = jnp.where(rows < settings.valid_rows, logits, jnp.finfo(jnp.float32).min)
    log_z = jax.nn.logsumexp(logits, axis=-1, keepdims=True)
    # A masked sum rather than a gather: it stays local where the rows are sharded.
    at_target = jnp.where(rows == targets[:, None], logits, 0).sum(-1, keepdims=True)
    nll = log_z - at_target
    # One row reaches the target's score: the target itself, so ties count as wrong.
    correct = (logits >= at_target).sum(-1, keepdims=True) == 1

    loss = nll
    if settings.label_smoothing:
        on, off, entropy = _smoothed(settings)
        valid = jnp.where(rows < settings.valid_rows, logits, 0)
        loss = log_z - (on - off) * at_target - off * valid.sum(-1, keepdims=True) - entropy
    z_loss = settings.z_loss * log_z**2
    terms = {"loss": loss + z_loss, "nll": nll, "z_loss": z_loss, "correct": correct}
    return logits, log_z, {k: (v[:, 0] * weights).sum() for k, v in terms.items()}


def _logits_gradient(logits, log_z, targets, weights, settings: _Settings):
    """Of the sum of weight x loss, [R, V]."""
    rows = jnp.arange(logits.shape[-1])
    on, off, _ = _smoothed(settings)
    target = jnp.where(rows == targets[:, None], on, off)
    gradient = (1 + 2 * settings.z_loss * log_z) * jnp.exp(logits - log_z) - target
    gradient = jnp.where(rows < settings.valid_rows, gradient, 0)
    return gradient * weights[:, None]


def _smoothed(settings: _Settings) -> tuple[float, float, float]:
    """The smoothed target's probability on the target, on any other row, and its entropy."""
    others = settings.valid_rows - 1
    on = 1 - settings.label_smoothing
    off = settings.label_smoothing / max(others, 1)
    entropy = -on * math.log(on) - (others * off * math.log(off) if off else 0)
    return on, off, entropy


def _split(arrays, chunks: int):
    """[B, T, ...] -> [chunks, R, ...], the batch whole and in front, padded with zeros.

    Padding has weight 0. Rows of a chunk are two-dimensional products' rows: up to twice as fast
    on CPU as [B, T], and free where only the batch is sharded.
    """

    def split(x):
        batch, length = x.shape[:2]
        step = math.ceil(length / chunks)
        padding = [(0, 0), (0, chunks * step - length)] + [(0, 0)] * (x.ndim - 2)
        x = jnp.pad(x, padding).reshape(batch, chunks, step, *x.shape[2:])
        return jnp.moveaxis(x, 1, 0).reshape(chunks, batch * step, *x.shape[3:])

    return jax.tree.map(split, arrays)


def _join(x, shape):
    """[chunks, R, D] -> [B, T, D], the inverse of `_split`."""
    batch, length, width = shape
    x = jnp.moveaxis(x.reshape(x.shape[0], batch, -1, width), 0, 1)
    return x.reshape(batch, -1, width)[:, :length]

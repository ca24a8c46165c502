"""Primitives that several models share: parameters, products, attention, norms, stacks of layers.

Axes: B batch, T query length, S key length, D width, N heads, H head width, I/O any two widths,
R pixels a side of a picture, P pixels a side of a patch of it.
"""

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import NamedTuple, get_args

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Bool, Float, Int

from lmjax.sharding.partition import as_spec, divided_by

REMAT_POLICIES = {
    "none": None,
    # Named, because a policy that goes by the kind of operation would also keep attention's scores.
    "matmuls": jax.checkpoint_policies.save_only_these_names("product", "attention"),
    "full": jax.checkpoint_policies.nothing_saveable,
}
ATTENTION = ("whole", "blocked")
DTYPES = ("float32", "bfloat16", "float16")


@dataclasses.dataclass(frozen=True)
class Execution:
    """How a model runs, as opposed to what it is; it may change when a run is resumed."""

    dtype: str = "float32"
    """Type of activations and products: float32, bfloat16 or float16 (whose gradients vanish unless
    a model scales them). Parameters are always float32."""
    remat: str = "none"
    """What each layer forgets and computes again backwards: none (fastest), matmuls (keep their
    outputs) or full (least memory)."""
    attention: str = "whole"
    """whole: all scores of a layer at once. blocked: one example at a time, so that its scores stay
    in a CPU's cache and are never stored; for a single CPU device."""

    def __post_init__(self):
        for name, known in (("dtype", DTYPES), ("remat", REMAT_POLICIES), ("attention", ATTENTION)):
            if getattr(self, name) not in known:
                raise ValueError(f"{name} is {getattr(self, name)!r}, not one of {list(known)}")


def check_config(config, *sizes: str) -> None:
    """Raises ValueError for sizes that are not positive, or for a dropout that is no probability or
    an init_scale that is not above 0, if there are such."""
    name = type(config).__name__
    for size in sizes:
        if getattr(config, size) < 1:
            raise ValueError(f"{name}.{size} is {getattr(config, size)}, not a positive size")
    if not 0 <= getattr(config, "dropout", 0) < 1:
        raise ValueError(f"{name}.dropout is {config.dropout}, not in [0, 1)")
    if not getattr(config, "init_scale", 1) > 0:
        raise ValueError(f"{name}.init_scale is {config.init_scale}, not above 0")


def check_choices(config, *names: str) -> None:
    """Raises ValueError for a value that its field's Literal does not list."""
    for name in names:
        value, known = getattr(config, name), get_args(type(config).__annotations__[name])
        if value not in known:
            raise ValueError(
                f"{type(config).__name__}.{name} is {value!r}, not one of {list(known)}"
            )


def check_heads(config) -> None:
    """Raises ValueError if the heads do not divide the width."""
    if config.width % config.heads:
        raise ValueError(
            f"{type(config).__name__}.width is {config.width}, which does not divide into"
            f" {config.heads} heads"
        )


def check_pictures(pictures: Array, config) -> None:
    """Raises ValueError for pictures that are not of the config's size."""
    expected = [config.size, config.size, 3]
    if list(pictures.shape[1:]) != expected:
        raise ValueError(
            f"pictures are {list(pictures.shape[1:])}, but {type(config).__name__}.size calls for"
            f" {expected}: resize them, or train with another size"
        )


def weight(module: nn.Module, name: str, init, dtype: str | None = None, **axes: int) -> Array:
    """Declares a parameter whose shape and logical axis names are one list; cast for compute."""
    partitioned = nn.with_logical_partitioning(init, tuple(axes))
    return module.param(name, partitioned, tuple(axes.values())).astype(
        dtype or module.execution.dtype
    )


def constrain(x: Array, *axes: str | None) -> Array:
    """Names an activation's axes, apart from the parameters' names so that rules cannot collide.

    Outside a mesh that divides any of them this does nothing.
    """
    parts = division(axes, x.shape)
    return jax.lax.with_sharding_constraint(x, as_spec(parts)) if any(parts) else x


@jax.custom_vjp
def into_branch(x: Float[Array, "B T D"], scale: Float[Array, ""] | None) -> Float[Array, "B T D"]:
    """Where a residual branch begins whose gradients are `scale` times what they are: x itself, and
    backwards out of the scale, with 0 for what is not finite, so that the branches before it do not
    suffer. Without a scale nothing happens. Ramesh et al. 2021, section 2.4, figure 4."""
    return x


def _into_branch_backward(scale, gradient):
    if scale is None:
        return gradient, None
    gradient = gradient / scale
    return jnp.where(jnp.isfinite(gradient), gradient, 0), jnp.zeros_like(scale)


into_branch.defvjp(lambda x, scale: (x, scale), _into_branch_backward)


@jax.custom_vjp
def out_of_branch(
    x: Float[Array, "B T D"], scale: Float[Array, ""] | None
) -> Float[Array, "B T D"]:
    """Where that branch ends: x in float32, and backwards into the scale and x's type."""
    return x if scale is None else x.astype(jnp.float32)


def _out_of_branch_backward(residuals, gradient):
    scale, empty = residuals
    if scale is None:
        return gradient, None
    return (gradient * scale).astype(empty.dtype), jnp.zeros_like(scale)


out_of_branch.defvjp(
    lambda x, scale: (out_of_branch(x, scale), (scale, jnp.zeros(0, x.dtype))),
    _out_of_branch_backward,
)


def lookup(table: Float[Array, "V D"], tokens: Int[Array, "*rows"]) -> Float[Array, "*rows D"]:
    """The table's rows for these tokens, its width made whole first.

    A device that holds a part of the width and some of the batch would otherwise need either all of
    the batch or all of the result.
    """
    if parallel_devices() > 1:
        parts = division(("activation_vocab", None), table.shape)
        table = jax.lax.with_sharding_constraint(table, as_spec(parts))
    return table[tokens]


def parallel_devices(axes: Sequence[str] | None = None) -> int:
    """Over how many devices the compiler divides arrays along these axes of the mesh set; by
    default along all of them, and 1 where no mesh is set."""
    mesh = jax.sharding.get_abstract_mesh()
    if axes is None:
        axes = [axis for axis in mesh.axis_names if axis not in mesh.manual_axes]
    return math.prod(mesh.shape[axis] for axis in axes)


def division(axes: Sequence[str | None], shape: Sequence[int]) -> tuple[tuple[str, ...], ...]:
    """The axes of the mesh set that divide each axis of an array."""
    mesh = jax.sharding.get_abstract_mesh()
    return divided_by(axes, shape, nn.get_logical_axis_rules(), mesh.shape)


def unboxed(variables) -> tuple[dict, dict]:
    """Splits freshly initialised variables into (arrays, logical axis names), both plain trees."""
    axes = jax.tree.map(
        lambda box: box.names if isinstance(box, nn.LogicallyPartitioned) else (None,) * box.ndim,
        variables,
        is_leaf=lambda node: isinstance(node, nn.LogicallyPartitioned),
    )
    return nn.meta.unbox(variables), axes


def stack(
    layer: type[nn.Module], length: int, execution: Execution, inputs: int, own_inputs: int = 0
) -> type:
    """`length` equal layers as one scanned, rematerialised module with stacked parameters.

    The layer's `__call__` takes the carried activations, `own_inputs` arguments whose first axis is
    the layers, of which it sees its own entry, and `inputs` arguments that every layer shares. It
    returns `(activations, what to stack over the layers or None)`.
    """
    return nn.scan(
        rematerialised(layer, execution, prevent_cse=False),
        length=length,
        variable_axes={"params": 0},
        split_rngs={"params": True, "dropout": True},
        in_axes=(0,) * own_inputs + (nn.broadcast,) * inputs,
        metadata_params={nn.PARTITION_NAME: "layers"},
    )


def rematerialised(
    layer: type[nn.Module], execution: Execution, prevent_cse: bool = True
) -> type[nn.Module]:
    """The layer, forgetting and computing again what `execution` says. A scan needs nothing to keep
    the compiler from finding both computations equal."""
    policy = REMAT_POLICIES[execution.remat]
    if policy is None:
        return layer
    return nn.remat(layer, policy=policy, prevent_cse=prevent_cse)


def unstacked(params, layers: int) -> list:
    """The parameters of a scanned stack, layer by layer."""
    return [jax.tree.map(lambda stacked, i=i: stacked[i], params) for i in range(layers)]


def stacked(params: list):
    """The inverse of `unstacked`."""
    return jax.tree.map(lambda *layers: jnp.stack(layers), *params)


def dense(x: Float[Array, "*rows I"], kernel: Float[Array, "I O"]) -> Float[Array, "*rows O"]:
    """On one device a two-dimensional product whatever the leading axes: twice as fast backwards on
    CPU. On several the axes stay apart, for each may be divided."""
    if parallel_devices() > 1:
        return checkpoint_name(x @ kernel, "product")
    rows = checkpoint_name(x.reshape(-1, x.shape[-1]) @ kernel, "product")
    return rows.reshape(*x.shape[:-1], kernel.shape[-1])


def affine(
    module: nn.Module, x: Float[Array, "*rows I"], name: str, init, **axes: int
) -> Float[Array, "*rows O"]:
    """`dense` with a kernel and a bias of the module's own, `name` and `name`_bias."""
    kernel = weight(module, name, init, **axes)
    (_, (outputs, length)) = axes.items()
    return dense(x, kernel) + weight(
        module, f"{name}_bias", nn.initializers.zeros, **{outputs: length}
    )


def fold(x: Float[Array, "B R R I"], patch: int) -> Float[Array, "B H W I*P*P"]:
    """Each square of P x P pixels as the channels of one place, colour by colour."""
    batch, rows, columns, channels = x.shape
    x = x.reshape(batch, rows // patch, patch, columns // patch, patch, channels)
    return x.transpose(0, 1, 3, 5, 2, 4).reshape(batch, rows // patch, columns // patch, -1)


def split_heads(x: Float[Array, "B T N*H"], heads: int) -> Float[Array, "B T N H"]:
    x = x.reshape(*x.shape[:2], heads, -1)
    return constrain(x, "batch", "activation_length", "activation_heads", None)


def dropout_key(module: nn.Module, rate: float) -> Array | None:
    """For dropout inside of a function, as in `attention`; None where nothing is dropped."""
    return module.make_rng("dropout") if rate and module.has_rng("dropout") else None


def dropout(module: nn.Module, x: Array, rate: float) -> Array:
    """Training is being given a "dropout" key; there is no deterministic flag."""
    key = dropout_key(module, rate)
    return x if key is None else drop(x, rate, key)


def drop(x: Array, rate: float, key: Array) -> Array:
    keep = jax.random.bernoulli(key, 1 - rate, x.shape)
    return jnp.where(keep, x / (1 - rate), 0).astype(x.dtype)


def attention(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B S N H"],
    v: Float[Array, "B S N H"],
    mask: Bool[Array, "#B #N #T S"],
    bias: Float[Array, "#B N T S"] | None = None,
    *,
    rate: float = 0.0,
    key: Array | None = None,
    execution: Execution = Execution(),
) -> Float[Array, "B T N H"]:
    """Softmax attention with float32 scores; the caller scales `q`.

    `rate` of the attention weights are dropped where a `key` is given.
    """

    def whole(operands, key):
        return whole_attention(*operands, rate=rate, key=key)

    return attend(whole, (q, k, v, mask, bias), key, execution)


def attend(attention: Callable, operands, key: Array | None, execution: Execution) -> Array:
    """`attention(operands, key)` of a batch, all of it at once or blocked, as `execution` says.

    Every array in `operands` has the batch in front, or 1 where its rows share one. `attention`
    must do with an ellipsis in the batch's place: blocked, it gets one example without that axis.
    """
    if execution.attention == "blocked":
        context = _example_by_example(attention, operands, key)
    else:
        context = attention(operands, key)
    return checkpoint_name(context, "attention")


def whole_attention(
    q: Float[Array, "*B T N H"],
    k: Float[Array, "*B S N H"],
    v: Float[Array, "*B S N H"],
    mask: Bool[Array, "*#B #N #T S"],
    bias: Float[Array, "*#B N T S"] | None = None,
    *,
    rate: float = 0.0,
    key: Array | None = None,
) -> Float[Array, "*B T N H"]:
    """`attention` with all scores at once, of a batch or of one example.

    Heads in front and positions and widths last are what CPU products want, backwards too; what the
    softmax divides by divides the H numbers of each context instead of the S weights.
    """
    q, k, v = (x.swapaxes(-2, -3) for x in (q, k, v))
    scores = jnp.einsum("...NTH,...NSH->...NTS", q, k, preferred_element_type=jnp.float32)
    scores = scores if bias is None else scores + bias
    scores = jnp.where(mask, scores, jnp.finfo(jnp.float32).min)
    weights = jnp.exp(scores - jax.lax.stop_gradient(scores.max(-1, keepdims=True)))
    total = weights.sum(-1, keepdims=True)
    if rate > 0 and key is not None:
        weights = drop(weights, rate, key)
    context = jnp.einsum(
        "...NTS,...NSH->...NTH", weights.astype(v.dtype), v, preferred_element_type=jnp.float32
    )
    return (context / total).astype(v.dtype).swapaxes(-2, -3)


def _example_by_example(attention, operands, key):
    """One example at a time, forgotten and computed again backwards.

    On a CPU the scores of one example stay in cache, which is worth a factor of two to three over
    the whole batch at once.
    """
    arrays, tree = jax.tree.flatten(operands)
    batch = max(x.shape[0] for x in arrays)
    shared = [x[0] if x.shape[0] < batch else None for x in arrays]

    def example(inputs):
        index, own = inputs
        each = [x if common is None else common for x, common in zip(own, shared, strict=True)]
        folded = None if key is None else jax.random.fold_in(key, index)
        return attention(jax.tree.unflatten(tree, each), folded)

    own = [x if common is None else None for x, common in zip(arrays, shared, strict=True)]
    return jax.lax.map(jax.checkpoint(example), (jnp.arange(batch), own))


class Pooler(nn.Module):
    """What stands for a whole text, made of one token's state."""

    kernel_init: nn.initializers.Initializer
    execution: Execution

    @nn.compact
    def __call__(self, x: Float[Array, "B D"]) -> Float[Array, "B D"]:
        width = x.shape[-1]
        return jnp.tanh(affine(self, x, "dense", self.kernel_init, embed=width, mlp=width))


class Classifier(nn.Module):
    """Scores of classes, of whatever has a vector."""

    labels: int
    kernel_init: nn.initializers.Initializer
    execution: Execution
    rate: float = 0.0
    """Of dropout on what it reads."""
    bias: bool = True

    @nn.compact
    def __call__(self, x: Float[Array, "*B D"]) -> Float[Array, "*B labels"]:
        x = dropout(self, x, self.rate)
        axes = {"embed": x.shape[-1], "classes": self.labels}
        if self.bias:
            scores = affine(self, x, "dense", self.kernel_init, **axes)
        else:
            scores = dense(x, weight(self, "dense", self.kernel_init, **axes))
        return scores.astype(jnp.float32)


def last_of(x: Float[Array, "B T D"], chosen: Bool[Array, "B T"]) -> Float[Array, "B D"]:
    """The state of the last chosen token of each row; of the first token where none is."""
    last = jnp.where(chosen, jnp.arange(chosen.shape[1]), 0).max(1)
    return jnp.take_along_axis(x, last[:, None, None], axis=1)[:, 0]


def shift_right(
    targets: Int[Array, "B T"], positions: Int[Array, "B T"], start: int = 0
) -> Int[Array, "B T"]:
    """What a decoder reads to predict `targets`: each text's own past, after a start token."""
    shifted = jnp.pad(targets[:, :-1], ((0, 0), (1, 0)))
    return jnp.where(positions == 0, start, shifted)


def same_segment(queries: Int[Array, "B T"], keys: Int[Array, "B S"]) -> Bool[Array, "B 1 T S"]:
    """Tokens see their own segment: text n > 0 of a packed row, or padding (0) among itself."""
    return (queries[:, :, None] == keys[:, None, :])[:, None]


def positions_within(segments: Int[Array, "B T"]) -> Int[Array, "B T"]:
    """The place of each token in its own text, counted from 0."""
    places = jnp.arange(segments.shape[1])
    first = jnp.pad(segments[:, 1:] != segments[:, :-1], ((0, 0), (1, 0)))
    return places - jax.lax.cummax(jnp.where(first, places, 0), axis=1)


class KeyValue(NamedTuple):
    """What one attention reads: a decoder's own past, or an encoder's output."""

    keys: Float[Array, "B S N H"]
    values: Float[Array, "B S N H"]

    def swapped(self) -> "KeyValue":
        """[B, N, S, H] and back: a decoding state has heads first, to be read without a copy."""
        return KeyValue(self.keys.swapaxes(1, 2), self.values.swapaxes(1, 2))

    def extended(self, new: "KeyValue", length: Int[Array, " B"]) -> "KeyValue":
        """Of a decoding state: `new` in place of the positions of each row from its length on."""
        write = jax.vmap(jax.lax.dynamic_update_slice_in_dim, (0, 0, 0, None))
        return KeyValue(*(write(*each, length, 1) for each in zip(self, new, strict=True)))

    def settled(self) -> "KeyValue":
        """The same, with positions and head widths last in memory, whatever the compiler prefers.

        Only so are keys and values rearranged once, and not in every step of a decoding loop.
        """

        def settle(x):
            return jax.lax.optimization_barrier(x.reshape(*x.shape[:2], -1)).reshape(x.shape)

        return KeyValue(settle(self.keys), settle(self.values))


class LayerState(NamedTuple):
    """Keys and values of one layer of an encoder-decoder's decoder, with heads before positions:
    [rows, N, S, H]."""

    past: KeyValue
    """Buffers of fixed length; positions from `DecodingState.length` on are not written yet."""
    memory: KeyValue
    """Keys and values of the encoder's output, computed once."""


class DecodingState(NamedTuple):
    """All that decoding carries in an encoder-decoder; the first axis of every array is rows.

    The decoder has one row per text, or with beams several neighbouring rows that share one row of
    `memory` and `visible`.
    """

    layers: tuple[LayerState, ...]
    length: Int[Array, " rows"]
    """Tokens of each decoder row read so far."""
    visible: Bool[Array, "B S"]
    """Which source tokens are no padding."""


def all_logits(
    features: Float[Array, "B T D"], matrix: Float[Array, "V D"]
) -> Float[Array, "B T V"]:
    """float32, whatever the type of the activations."""
    return jnp.einsum("BTD,VD->BTV", features, matrix, preferred_element_type=jnp.float32)


def few_rows_logits(
    features: Float[Array, "B T D"], matrix: Float[Array, "V D"]
) -> Float[Array, "B T V"]:
    """`all_logits` of a few rows: vocabulary first, which on CPU reads the matrix a third faster.

    The barrier keeps the compiler from turning the product around again.
    """
    logits = jnp.einsum("VD,BTD->VBT", matrix, features, preferred_element_type=jnp.float32)
    return jnp.moveaxis(jax.lax.optimization_barrier(logits), 0, -1)


class LayerNorm(nn.Module):
    """Ba et al. 2016. Scale, bias and statistics are float32; only the result is cast."""

    epsilon: float
    execution: Execution

    @nn.compact
    def __call__(self, x: Float[Array, "*rows D"]) -> Float[Array, "*rows D"]:
        scale = weight(self, "scale", nn.initializers.ones, "float32", embed=x.shape[-1])
        bias = weight(self, "bias", nn.initializers.zeros, "float32", embed=x.shape[-1])
        x = x.astype(jnp.float32)
        centred = x - x.mean(-1, keepdims=True)
        normed = centred * jax.lax.rsqrt((centred**2).mean(-1, keepdims=True) + self.epsilon)
        return (normed * scale + bias).astype(self.execution.dtype)


class RMSNorm(nn.Module):
    """Zhang and Sennrich 2019, as T5 has it: no mean, no bias; statistics and scale in float32."""

    epsilon: float
    execution: Execution

    @nn.compact
    def __call__(self, x: Float[Array, "*rows D"]) -> Float[Array, "*rows D"]:
        scale = weight(self, "scale", nn.initializers.ones, "float32", embed=x.shape[-1])
        x = x.astype(jnp.float32)
        normed = x * jax.lax.rsqrt((x**2).mean(-1, keepdims=True) + self.epsilon)
        return (normed * scale).astype(self.execution.dtype)

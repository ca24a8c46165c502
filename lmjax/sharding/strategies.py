"""Ways to divide a model and its batch over devices, each a table of axes.

The devices form a mesh with three axes. Along `data` only the batch is divided; along `fsdp` the
batch, and parameters that are gathered when they are used; along `model` products themselves. A
table's pairs are tried from the top: see `lmjax.sharding.partition`. Names that begin with
`activation_`, and `batch`, are axes of activations, the others of parameters. Axes that are not in
a table, and parameters with fewer than `SMALL` numbers a layer, are whole on every device.
"""

import dataclasses
import math
from collections.abc import Iterator, Sequence
from typing import Any, Literal, NamedTuple

import jax

from lmjax.sharding.partition import Axes, Rules, divided_by

MESH_AXES = ("data", "fsdp", "model")
SMALL = 2**13
NARROWEST = 8  # a TPU keeps arrays in tiles of 8 x 128: thinner parts are summed whole
LARGE = 2**28  # numbers a layer (1 GiB) that should not lie whole on every device by mistake


@dataclasses.dataclass(frozen=True)
class Strategy:
    name: str
    about: str
    mesh_axes: tuple[str, ...]
    """Those axes of the mesh along which it divides anything."""
    rules: Rules


_BATCH = (("batch", "data"), ("batch", "fsdp"))
# Megatron (Shoeybi et al. 2019): whole heads, hidden units and vocabulary rows on each device, so
# that a layer needs one sum over devices after attention and one after the feed-forward layer.
_TENSOR = (
    ("vocab", "model"),
    ("mlp", "model"),
    ("heads", "model"),
    ("activation_heads", "model"),
    ("activation_mlp", "model"),
)

PMAP = Strategy(
    "pmap",
    "Classic data parallelism by jax.pmap: each device holds the whole model",
    ("data",),
    (("batch", "data"),),
)
DP = Strategy(
    "dp",
    "Data parallelism: each device holds the whole model and a part of the batch",
    ("data",),
    (("batch", "data"),),
)
FSDP = Strategy(
    "fsdp",
    "ZeRO-3: as dp, with parameters, gradients and optimizer state divided too",
    ("data", "fsdp"),
    (*_BATCH, ("mlp", "fsdp"), ("heads", "fsdp"), ("vocab", "fsdp"), ("embed", "fsdp")),
)
TP = Strategy(
    "tp",
    "Tensor parallelism: products are divided, and groups of devices share the batch",
    ("data", "model"),
    (*_BATCH, *_TENSOR),
)
FSDP_TP = Strategy(
    "fsdp_tp",
    "Both: parameters in two dimensions, as T5X has them",
    ("data", "fsdp", "model"),
    (
        *_BATCH,
        *_TENSOR,
        ("embed", "fsdp"),
        ("mlp", "fsdp"),
        ("heads", "fsdp"),
        ("vocab", "fsdp"),
    ),
)
STRATEGIES = {s.name: s for s in (PMAP, DP, FSDP, TP, FSDP_TP)}
StrategyName = Literal["auto", "pmap", "dp", "fsdp", "tp", "fsdp_tp"]


@dataclasses.dataclass(frozen=True)
class MeshOptions:
    """How many devices each axis of the mesh has. What is left over goes to `data`."""

    fsdp: int | None = None
    """Devices that divide parameters among them (fsdp, fsdp_tp). By default all that are left, or
    as many of them as the model's large parameters divide by."""
    model: int | None = None
    """Devices that divide products among them (tp, fsdp_tp). By default at most 8."""
    slices: int = 1
    """TPU slices or GPU nodes joined by a slower network: only the batch is divided across them."""
    activations: Literal["whole", "width", "length"] = "whole"
    """What lies between layers, over `model`: whole on each device, or divided along its width (as
    T5X's second activation dimension) or its length (sequence parallelism), to need less memory."""

    def __post_init__(self):
        for name in ("fsdp", "model", "slices"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"mesh.{name} is {value}, and must be at least 1")

    def rules(self) -> Rules:
        """What `activations` adds to a strategy's table."""
        named = {"whole": None, "width": "activation_embed", "length": "activation_length"}
        axis = named[self.activations]
        return () if axis is None else ((axis, "model"),)


class Large(NamedTuple):
    """A parameter that matters for the choice of a mesh: its axes and shape."""

    axes: tuple[str | None, ...]
    shape: tuple[int, ...]


def mesh_shape(
    strategy: Strategy, options: MeshOptions, devices: int, params: Any, axes: Any
) -> dict[str, int]:
    """Devices along each axis of the mesh.

    Args:
        params: shapes of the model's parameters, and `axes` their axes' names.

    Raises:
        ValueError: axes that do not multiply to the devices, or that the strategy does not use.
    """
    for name in ("fsdp", "model"):
        asked = getattr(options, name)
        if asked not in (None, 1) and name not in strategy.mesh_axes:
            users = [s.name for s in STRATEGIES.values() if name in s.mesh_axes]
            raise ValueError(
                f"mesh.{name} is {asked}, but strategy {strategy.name} divides nothing along"
                f" {name}: leave it out, or choose {' or '.join(users)}"
            )
    if devices % options.slices:
        raise ValueError(
            f"{devices} devices do not form {options.slices} equal slices: mesh.slices must be one"
            f" of {list(divisors(devices))}"
        )
    left = devices // options.slices
    model, fsdp = options.model or 1, options.fsdp or 1
    if left % (model * fsdp):
        raise ValueError(
            f"a mesh of model {model} x fsdp {fsdp} does not divide the {left} devices"
            f"{' of a slice' if options.slices > 1 else ''}: their product must be one of"
            f" {list(divisors(left))}"
        )
    large = large_parameters(params, axes)
    huge = [p for p in large if layer_size(p.axes, p.shape) >= LARGE]
    if options.model is None and "model" in strategy.mesh_axes:
        most = min(8, left // fsdp)
        if strategy is FSDP_TP and options.fsdp is None:
            most = min(most, math.isqrt(left))
        model = max(
            d
            for d in divisors(left // fsdp)
            if d <= most and all(_divides(strategy.rules, p, "model", d) for p in huge)
        )
    if options.fsdp is None and "fsdp" in strategy.mesh_axes:
        fsdp = max(
            d
            for d in divisors(left // model)
            if all(_divides(strategy.rules, p, "fsdp", d, model) for p in large)
        )
    return {"data": devices // (fsdp * model), "fsdp": fsdp, "model": model}


def divisors(number: int) -> Iterator[int]:
    return (d for d in range(1, number + 1) if number % d == 0)


def large_parameters(params: Any, axes: Any) -> list[Large]:
    """Those that hold more than a hundredth of the model."""
    leaves = jax.tree.leaves(params)
    everything = sum(math.prod(x.shape) for x in leaves)
    names = jax.tree.structure(params).flatten_up_to(axes)
    return [
        Large(tuple(own), x.shape)
        for x, own in zip(leaves, names, strict=True)
        if math.prod(x.shape) * 100 >= everything
    ]


def layer_size(axes: Axes, shape: Sequence[int]) -> int:
    """Numbers in one layer of a parameter."""
    return math.prod(n for n, axis in zip(shape, axes, strict=True) if axis != "layers")


def _divides(rules: Rules, p: Large, mesh_axis: str, devices: int, model: int = 1) -> bool:
    """Whether a parameter divides well along this axis of a mesh, beside `model`."""
    shape = {"model": model, mesh_axis: devices}
    parts = divided_by(p.axes, p.shape, rules, shape)
    for length, names in zip(p.shape, parts, strict=True):
        if mesh_axis in names:
            return length // math.prod(shape[name] for name in names) >= NARROWEST
    return devices == 1


class Need(NamedTuple):
    """What the automatic choice goes by, in bytes unless it says otherwise."""

    state: float
    """Parameters, optimizer state and gradients of the whole model."""
    memory: float | None
    """Of one device; None if it is not known, or the devices share it."""
    rows: int
    """Of the global batch."""


def choose(need: Need, devices: int, slices: int = 1) -> tuple[Strategy, str]:
    """A strategy by size, and the reason, to be printed.

    The state may take half of a device's memory: the rest is for activations.
    """
    if devices == 1:
        return DP, "there is one device"
    if need.memory is None:
        return DP, "the devices have no memory of their own"
    room = need.memory / 2
    size = f"state and gradients take {need.state / 1e9:.2f} GB, half a device has {room / 1e9:.2f}"
    if need.state <= room:
        return DP, f"{size}: each device can hold them all"
    if need.rows % devices == 0 and need.state / (devices // slices) <= room:
        return FSDP, f"{size}: they are divided, and the batch gives every device rows"
    if need.rows % devices:
        return FSDP_TP, f"{size}; a batch of {need.rows} does not divide by {devices} devices"
    return FSDP_TP, f"{size}: divided as far as it goes"

"""Adafactor, as T5 was trained with it, and AdamW.

A frozen dataclass holds the settings; `transformation(axes, labels)` makes of them an `Optimizer`
for one parameter tree. `axes` holds each parameter's logical axis names; a first axis named
"layers" is a stack of layers (`nn.scan`), whose layers are treated one by one, exactly as if each
were a parameter of its own. `labels` says of each parameter "decay", "no_decay" or "frozen".
A frozen parameter holds no optimizer state and its update is zero.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, Int

from lmjax.training.schedules import InverseSquareRoot, Schedule

LABELS = ("decay", "no_decay", "frozen")


class Optimizer(NamedTuple):
    """An `optax.GradientTransformation` that also names the axes of its state."""

    init: Callable[[Any], Any]
    """params -> state"""
    update: Callable[[Any, Any, Any], tuple[Any, Any]]
    """(grads, state, params) -> (updates to add to the parameters, state)"""
    state_axes: Callable[[Any, Any], Any]
    """(params or their shapes, a tuple per parameter with one entry per axis) -> a tree like the
    state, with the entries that belong to the axes of its arrays"""


@dataclasses.dataclass(frozen=True)
class Adafactor:
    """Adafactor with T5's settings: no momentum, steps relative to the size of a parameter.

    Shazeer and Stern 2018, algorithms 4 and 5, as in `mesh_tensorflow/optimize.py`. A matrix whose
    two largest dimensions both reach `factored_from` keeps means of its squared gradient over rows
    and over columns, everything else the squared gradient in full. Statistics and arithmetic are
    float32.
    """

    schedule: Schedule = InverseSquareRoot()
    """The learning rate, relative to the root mean square of each parameter."""
    gradient_clip: float | None = None
    """Scale gradients down to this global norm before anything else. T5 does not clip."""
    decay_exponent: float = 0.8
    """Squared gradients are averaged with beta2 = 1 - (step + 1) ** -decay_exponent."""
    factored_from: int = 128
    """Factor a parameter whose two largest dimensions (of one layer) are both at least this."""
    update_clip: float = 1.0
    """Largest root mean square of one parameter's update, before the learning rate."""
    epsilon: float = 1e-30
    """Added to squared gradients."""
    scale_floor: float = 1e-3
    """Smallest root mean square a parameter counts as, so that zeros can start to move."""

    def __post_init__(self):
        names = ("gradient_clip", "decay_exponent", "factored_from", "update_clip", "epsilon")
        _check_positive(self, *names, "scale_floor")

    def transformation(self, axes, labels) -> Optimizer:
        """The optimizer of a parameter tree with these axes and labels.

        Raises:
            ValueError: for an unknown label, or, in `init`, axes that do not fit a parameter.
        """
        axes = _trained(labels, axes)

        def init(params):
            moments = jax.tree.map(self._zero_moment, params, axes)
            return AdafactorState(jnp.zeros((), jnp.int32), moments)

        def update(grads, state, params):
            mixing = (state.step + 1.0) ** -self.decay_exponent
            next_moment = functools.partial(self._next_moment, mixing)
            moments = jax.tree.map(next_moment, grads, state.moments, axes)
            scaled = functools.partial(self._update, self.schedule(state.step))
            updates = jax.tree.map(scaled, grads, moments, params, axes)
            return updates, AdafactorState(state.step + 1, moments)

        def state_axes(params, entries):
            return AdafactorState((), jax.tree.map(self._moment_axes, params, axes, entries))

        return _completed(Optimizer(init, update, state_axes), axes, labels, self.gradient_clip)

    def _factored_axes(self, shape, axes) -> tuple[int, int] | None:
        """The row axis and the column axis of the matrices in a parameter, if it is factored."""
        own = _own_axes(axes)
        largest = sorted(own, key=lambda axis: -shape[axis])[:2]
        if len(largest) < 2 or shape[largest[1]] < self.factored_from:
            return None
        row, column = sorted(largest)
        return row, column

    def _zero_moment(self, param, axes):
        if factored := self._factored_axes(param.shape, axes):
            row, column = factored
            return Factored(
                jnp.zeros(_without(param.shape, column), jnp.float32),
                jnp.zeros(_without(param.shape, row), jnp.float32),
            )
        return jnp.zeros(param.shape, jnp.float32)

    def _moment_axes(self, param, axes, entries):
        if factored := self._factored_axes(param.shape, axes):
            row, column = factored
            return Factored(_without(entries, column), _without(entries, row))
        return tuple(entries)

    def _next_moment(self, mixing, grad, moment, axes):
        """Moves the means by the fraction `mixing`, 1 - beta2, towards the squared gradient."""
        squared = jnp.square(grad) + self.epsilon
        if factored := self._factored_axes(grad.shape, axes):
            row, column = factored
            squared = Factored(squared.mean(column), squared.mean(row))
        return jax.tree.map(lambda old, new: old + mixing * (new - old), moment, squared)

    def _update(self, rate, grad, moment, param, axes):
        if factored := self._factored_axes(grad.shape, axes):
            row, column = factored
            rows = jnp.expand_dims(moment.row, column)
            columns = jnp.expand_dims(moment.column, row)
            rows = rows / rows.mean(row, keepdims=True)
            direction = grad * jax.lax.rsqrt(rows) * jax.lax.rsqrt(columns)
        else:
            direction = grad * jax.lax.rsqrt(moment)
        excess = jnp.maximum(1.0, _root_mean_square(direction, axes) / self.update_clip)
        scale = jnp.maximum(self.scale_floor, _root_mean_square(param, axes))
        return direction * (-rate * scale / excess)


class AdafactorState(NamedTuple):
    """Updates done so far, and for each parameter its `Factored` or full mean squared gradient."""

    step: Int[Array, ""]
    moments: Any


class Factored(NamedTuple):
    """Mean squared gradient of each row and of each column, [layers,] before the rest."""

    row: Float[Array, "*rows"]
    column: Float[Array, "*columns"]


@dataclasses.dataclass(frozen=True)
class AdamW:
    """Adam with decoupled weight decay (Loshchilov and Hutter 2019) on the "decay" parameters."""

    schedule: Schedule
    """The learning rate; it scales the weight decay too."""
    gradient_clip: float | None = 1.0
    """Scale gradients down to this global norm before anything else."""
    beta1: float = 0.9
    """Decay of the mean of gradients."""
    beta2: float = 0.999
    """Decay of the mean of squared gradients; language models often take 0.98 or 0.95."""
    epsilon: float = 1e-6
    """Added to the root of the mean squared gradient."""
    weight_decay: float = 0.01
    """Fraction of a "decay" parameter taken away per step, before the learning rate."""
    bias_correction: bool = True
    """Divide the means by the weight of the gradients in them, as Adam does; BERT and XLNet were
    trained without (google-research/bert optimization.py)."""
    variance_clip: float | None = None
    """The most that a mean of squared gradients may be; 5 in DALL-E (Ramesh et al. 2021, B.2)."""
    layer_decay: float = 1.0
    """What part of a layer's learning rate the layer below it has; XLNet is fine-tuned with 0.75.
    What is in no stack of layers has the whole rate. (XLNet's code scales gradients instead, which
    Adam undoes.)"""

    def __post_init__(self):
        _check_positive(self, "epsilon", "gradient_clip", "variance_clip", "layer_decay")
        for name in ("beta1", "beta2"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}, expected 0 <= {name} < 1")
        if self.weight_decay < 0:
            raise ValueError(f"weight_decay is {self.weight_decay}, expected 0 or more")

    def transformation(self, axes, labels) -> Optimizer:
        """The optimizer of a parameter tree with these axes and labels.

        Raises:
            ValueError: for an unknown label, or, in `init`, axes that do not fit a parameter.
        """
        axes, kept_labels = _trained(labels, axes), _trained(labels, labels)
        adam = optax.scale_by_adam(self.beta1, self.beta2, self.epsilon)

        def update(grads, state, params):
            rate = self.schedule(state.count)
            _, state = adam.update(grads, state)
            if self.variance_clip is not None:
                clipped = jax.tree.map(lambda x: jnp.minimum(x, self.variance_clip), state.nu)
                state = state._replace(nu=clipped)

            def corrected(mean, decay):
                return mean / (1 - decay**state.count) if self.bias_correction else mean

            def direction(mean, square):
                root = jnp.sqrt(corrected(square, self.beta2))
                return corrected(mean, self.beta1) / (root + self.epsilon)

            directions = jax.tree.map(direction, state.mu, state.nu)

            def scaled(direction, param, label, axes):
                decay = self.weight_decay if label == "decay" else 0.0
                return -rate * self._layer_rates(param, axes) * (direction + decay * param)

            return jax.tree.map(scaled, directions, params, kept_labels, axes), state

        def state_axes(params, entries):
            del params
            return optax.ScaleByAdamState(count=(), mu=entries, nu=entries)

        optimizer = Optimizer(adam.init, update, state_axes)
        return _completed(optimizer, axes, labels, self.gradient_clip)

    def _layer_rates(self, param, axes):
        """What part of the learning rate each layer of a parameter has, broadcastable to it."""
        if self.layer_decay == 1 or axes[:1] != ("layers",):
            return 1.0
        above = jnp.arange(len(param))[::-1].astype(jnp.float32)
        return (self.layer_decay**above).reshape(-1, *(1,) * (param.ndim - 1))


def _trained(labels, tree):
    """The tree with None, which JAX takes for an empty tree, in place of what is frozen."""
    return jax.tree.map(lambda label, x: None if label == "frozen" else x, labels, tree)


def _completed(optimizer: Optimizer, axes, labels, gradient_clip: float | None) -> Optimizer:
    """Adds what every optimizer does: checks, frozen parameters, float32, gradient clipping."""
    for path, label in jax.tree.leaves_with_path(labels):
        if label not in LABELS:
            raise ValueError(
                f"parameter {_name(path)} has the label {label!r}, expected one of {LABELS}"
            )

    def init(params):
        params = _trained(labels, params)
        jax.tree.map_with_path(_check_axes, params, axes)
        return optimizer.init(params)

    def update(grads, state, params):
        grads = jax.tree.map(lambda g: g.astype(jnp.float32), _trained(labels, grads))
        if gradient_clip is not None:
            clip = optax.clip_by_global_norm(gradient_clip)
            grads, _ = clip.update(grads, clip.init(None))
        updates, state = optimizer.update(grads, state, _trained(labels, params))

        def filled(param, update):
            return jnp.zeros_like(param) if update is None else update

        return jax.tree.map(filled, params, updates), state

    def state_axes(params, entries):
        return optimizer.state_axes(_trained(labels, params), _trained(labels, entries))

    return Optimizer(init, update, state_axes)


def _own_axes(axes) -> tuple[int, ...]:
    """The dimensions of one layer's parameter: all but a leading stack of layers."""
    return tuple(range(axes[:1] == ("layers",), len(axes)))


def _without(items: tuple, index: int) -> tuple:
    return (*items[:index], *items[index + 1 :])


def _root_mean_square(x, axes):
    """Of each layer, broadcastable to `x`."""
    return jnp.sqrt(jnp.square(x.astype(jnp.float32)).mean(_own_axes(axes), keepdims=True))


def _name(path) -> str:
    return jax.tree_util.keystr(path, simple=True, separator="/")


def _check_axes(path, param, axes):
    if len(axes) != len(param.shape):
        raise ValueError(
            f"parameter {_name(path)} has shape {tuple(param.shape)} but axes {axes}, "
            "expected one axis name per dimension"
        )


def _check_positive(settings, *names: str):
    for name in names:
        value = getattr(settings, name)
        if value is not None and not value > 0:
            raise ValueError(f"{name} is {value}, expected a positive number")

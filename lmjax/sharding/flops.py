"""Floating-point operations of products, counted in the jaxpr, where loops' lengths are written."""

import math
from typing import Any

import jax
from jax.extend.core import ClosedJaxpr, Jaxpr, Literal


def product_flops(jaxpr: ClosedJaxpr | Jaxpr) -> float:
    """FLOPs, two for each multiply-add, of all products and convolutions, over all devices.

    What a rematerialised layer computes again counts again: these are the FLOPs that the hardware
    does. Of the branches of a condition the costliest counts.

    Raises:
        ValueError: products in a while loop that does not count from one constant to another.
    """
    equations = jaxpr.jaxpr.eqns if isinstance(jaxpr, ClosedJaxpr) else jaxpr.eqns
    return math.fsum(map(_equation_flops, equations))


def _equation_flops(equation) -> float:
    name, params = equation.primitive.name, equation.params
    if name in ("dot_general", "conv_general_dilated"):
        left, right = (variable.aval.shape for variable in equation.invars)
        if name == "dot_general":
            (contracted, _), _ = params["dimension_numbers"]
            each = math.prod(left[axis] for axis in contracted)
        else:
            # All of the kernel but its output features; zeros between inputs are not multiplied.
            features = params["dimension_numbers"].rhs_spec[0]
            each = math.prod(right) / right[features] / math.prod(params["lhs_dilation"])
        return 2.0 * each * math.prod(equation.outvars[0].aval.shape)
    leaves = jax.tree.leaves(params, is_leaf=_is_jaxpr)
    inner = [product_flops(leaf) for leaf in leaves if _is_jaxpr(leaf)]
    if not any(inner):
        return 0.0
    if name == "cond":
        return max(inner)
    return _repetitions(equation) * math.fsum(inner)


def _is_jaxpr(value: Any) -> bool:
    return isinstance(value, ClosedJaxpr | Jaxpr)


def _repetitions(equation) -> int:
    """How often the jaxprs in an equation run; those of shard_map (and pmap) on each device."""
    params = equation.params
    match equation.primitive.name:
        case "scan":
            return params["length"]
        case "shard_map":
            return math.prod(params["mesh"].shape[axis] for axis in params["newly_manual_axes"])
        case "while":
            return _trips_of_while(equation)
    return 1


def _trips_of_while(equation) -> int:
    """Of a loop that counts by ones from a constant to below another."""
    condition, body = (equation.params[name].jaxpr for name in ("cond_jaxpr", "body_jaxpr"))
    skipped, others = equation.params["cond_nconsts"], equation.params["body_nconsts"]
    if [e.primitive.name for e in condition.eqns] == ["lt"]:
        index, last = condition.eqns[0].invars
        if index in condition.invars[skipped:] and isinstance(last, Literal):
            place = condition.invars.index(index) - skipped
            first = equation.invars[skipped + others + place]
            before, after = body.invars[others + place], body.outvars[place]
            steps = [e for e in body.eqns if after in e.outvars and e.primitive.name == "add"]
            terms = [getattr(v, "val", v) for e in steps for v in e.invars]
            if isinstance(first, Literal) and before in terms and 1 in terms:
                return len(range(int(first.val), int(last.val)))
    raise ValueError(
        "products in a while loop that does not count from one constant to another by ones cannot"
        " be counted: use jax.lax.scan"
    )

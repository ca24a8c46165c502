import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from lmjax.models.t5 import PRESETS, T5
from lmjax.tasks.seq2seq import Seq2Seq
from lmjax.training.optimizers import Adafactor, AdamW
from lmjax.training.schedules import Constant, InverseSquareRoot, Linear
from lmjax.training.state import abstract_parameters

STEPS = 25
AXES = {
    "vector": ("embed",),
    "bias_table": ("buckets", "heads"),
    "wide": ("embed", "mlp"),
    "tall": ("mlp", "embed"),
    "cube": ("height", "embed", "mlp"),
    "stacked_scalar": ("layers",),
    "stacked_vector": ("layers", "embed"),
    "stacked_wide": ("layers", "embed", "mlp"),
    "stacked_tall": ("layers", "mlp", "embed"),
}
SHAPES = {
    "vector": (40,),
    "bias_table": (32, 128),
    "wide": (128, 192),
    "tall": (160, 128),
    "cube": (3, 128, 130),
    "stacked_scalar": (3,),
    "stacked_vector": (3, 40),
    "stacked_wide": (3, 128, 192),
    "stacked_tall": (3, 160, 128),
}


def labelled(tree, label="decay"):
    return {name: label for name in tree}


def trajectory(shapes=SHAPES):
    """Parameters and gradients; layers differ in size, so that mixing them would show."""
    rng = np.random.default_rng(0)

    def draw(shape):
        scale = 10.0 ** np.arange(-1, shape[0] - 1).reshape(-1, *[1] * (len(shape) - 1))
        return (rng.normal(size=shape) * (scale if shape[0] == 3 else 0.05)).astype(np.float32)

    params = {name: draw(shape) for name, shape in shapes.items()}
    params["vector"] = np.zeros_like(params["vector"])  # moves only by the floor of its scale
    return params, [{n: draw(s) * (1 + step) for n, s in shapes.items()} for step in range(STEPS)]


def run(settings, params, grads, axes=AXES, labels=None):
    optimizer = settings.transformation(axes, labels or labelled(params))
    update = jax.jit(optimizer.update)
    params, state = jax.tree.map(jnp.asarray, params), optimizer.init(params)
    for step in grads:
        updates, state = update(step, state, params)
        params = optax.apply_updates(params, updates)
    return params, state


def layers(name, array):
    """The arrays that T5 would treat as one parameter each."""
    return list(array) if AXES[name][0] == "layers" else [array]


def error(ours, expected):
    """Relative; float32 parameters after 25 steps stay within a few roundings of 6e-8."""
    return np.linalg.norm(ours - expected) / np.linalg.norm(expected)


def reference_adafactor(param, grads, rate):
    """One unstacked parameter through all steps: the formulas, in float64."""
    param = np.array(param, np.float64)
    order = sorted(range(param.ndim), key=lambda axis: -param.shape[axis])
    factored = param.ndim >= 2 and param.shape[order[1]] >= 128
    v = np.zeros_like(param)
    vr, vc = np.zeros(1), np.zeros(1)
    for t, grad in enumerate(grads):
        grad = np.array(grad, np.float64)
        beta = 1 - (t + 1) ** -0.8
        squared = grad**2 + 1e-30
        if factored:
            largest, second = order[:2]
            vr = beta * vr + (1 - beta) * squared.mean(largest, keepdims=True)
            vc = beta * vc + (1 - beta) * squared.mean(second, keepdims=True)
            x = grad / np.sqrt(vr / vr.mean(second, keepdims=True)) / np.sqrt(vc)
        else:
            v = beta * v + (1 - beta) * squared
            x = grad / np.sqrt(v)
        x = x / max(1.0, np.sqrt((x**2).mean()))
        param = param - rate(t) * max(1e-3, np.sqrt((param**2).mean())) * x
    return param


def test_adafactor_follows_the_formulas_layer_by_layer():
    params, grads = trajectory()
    ours, _ = run(Adafactor(InverseSquareRoot(warmup=10)), params, grads)
    for name in SHAPES:
        for i, (own, start) in enumerate(
            zip(layers(name, ours[name]), layers(name, params[name]), strict=True)
        ):
            expected = reference_adafactor(
                start, [layers(name, g[name])[i] for g in grads], lambda t: max(t, 10) ** -0.5
            )
            assert error(own, expected) < 5e-7, (name, i)


def test_a_stack_is_its_layers():
    params, grads = trajectory()
    stacked = [name for name in SHAPES if AXES[name][0] == "layers"]

    def unrolled(tree):
        return {f"{n}{i}": tree[n][i] for n in stacked for i in range(3)}

    axes = {f"{n}{i}": AXES[n][1:] for n in stacked for i in range(3)}
    together, _ = run(Adafactor(), params, grads)
    apart, _ = run(Adafactor(), unrolled(params), [unrolled(g) for g in grads], axes)
    for name, expected in unrolled(together).items():
        assert error(apart[name], expected) < 1e-7, name


def test_first_step_takes_the_squared_gradient_as_it_is():
    params, grads = trajectory()
    _, state = run(Adafactor(), params, grads[:1])
    g = grads[0]
    np.testing.assert_allclose(state.moments["bias_table"], g["bias_table"] ** 2, rtol=1e-6)
    row, column = state.moments["stacked_wide"]
    np.testing.assert_allclose(row, (g["stacked_wide"] ** 2).mean(2), rtol=1e-5)
    np.testing.assert_allclose(column, (g["stacked_wide"] ** 2).mean(1), rtol=1e-5)
    assert int(state.step) == 1


@pytest.mark.parametrize(
    ("axes", "shape", "expected"),
    [
        (("layers", "embed", "mlp"), (6, 512, 2048), [(6, 512), (6, 2048)]),
        (("layers", "mlp", "embed"), (6, 2048, 512), [(6, 2048), (6, 512)]),
        (("layers", "embed", "mlp"), (24, 1024, 65536), [(24, 1024), (24, 65536)]),
        (("layers", "embed", "heads"), (24, 1024, 16384), [(24, 1024), (24, 16384)]),
        (("vocab", "embed"), (32128, 512), [(32128,), (512,)]),
        (("layers", "embed"), (512, 512), [(512, 512)]),
        (("buckets", "heads"), (32, 128), [(32, 128)]),
        (("embed",), (512,), [(512,)]),
    ],
)
def test_adafactor_statistics_are_factored_as_in_t5(axes, shape, expected):
    optimizer = Adafactor().transformation({"w": axes}, {"w": "decay"})
    params = {"w": jax.ShapeDtypeStruct(shape, jnp.bfloat16)}
    moments = jax.tree.leaves(jax.eval_shape(optimizer.init, params).moments)
    assert [m.shape for m in moments] == expected
    assert {m.dtype for m in moments} == {jnp.dtype("float32")}


@pytest.mark.parametrize(
    ("preset", "width", "heads", "head_width", "feed_forward", "layers"),
    [("small", 512, 8, 64, 2_048, 6), ("11b", 1_024, 128, 128, 65_536, 24)],
)
def test_the_statistics_of_the_published_t5(preset, width, heads, head_width, feed_forward, layers):
    """Of each layer a row and a column, as mesh_tensorflow/optimize.py has them (`_factored_dims`);
    sizes are Raffel et al. 2020, section 3.7."""
    params, axes = abstract_parameters(Seq2Seq(T5(PRESETS[preset])))
    optimizer = Adafactor().transformation(axes, jax.tree.map(lambda _: "decay", params))
    moments = jax.eval_shape(optimizer.init, params).moments
    expected = {
        "embedding": [(32_128,), (width,)],
        "final_norm": [(width,)],
        "relative_bias": [(32, heads)],  # even 128 heads: there are only 32 buckets
        "query": [(layers, width), (layers, heads * head_width)],
        "out": [(layers, heads * head_width), (layers, width)],
        "up": [(layers, width), (layers, feed_forward)],
        "down": [(layers, feed_forward), (layers, width)],
        "attention_norm": [(layers, width)],
        "feed_forward_norm": [(layers, width)],
    }
    for stack in ("encoder", "decoder"):
        parts = {**moments, **moments[stack], **moments[stack]["layers"]}
        parts |= parts["attention"] | parts["feed_forward"]
        found = {name: [x.shape for x in jax.tree.leaves(parts[name])] for name in expected}
        assert found == expected, stack


@pytest.mark.parametrize(("corrected", "most"), [(True, None), (False, None), (True, 0.3)])
def test_adamw_follows_the_formulas_and_decays_what_is_labelled(corrected, most):
    params, grads = trajectory()
    labels = {**labelled(params), "vector": "no_decay", "wide": "no_decay"}
    settings = AdamW(
        Linear(0.01, 20, warmup=5),
        gradient_clip=None,
        weight_decay=0.1,
        epsilon=1e-3,
        beta2=0.9,
        bias_correction=corrected,
        variance_clip=most,
    )
    ours, _ = run(settings, params, grads, labels=labels)
    for name, start in params.items():
        param = np.array(start, np.float64)
        m, v = np.zeros_like(param), np.zeros_like(param)
        for t, grad in enumerate(grads):
            g = np.array(grad[name], np.float64)
            m, v = 0.9 * m + 0.1 * g, np.minimum(0.9 * v + 0.1 * g**2, most or np.inf)
            weight = 1 - 0.9 ** (t + 1) if corrected else 1
            step = m / weight / (np.sqrt(v / weight) + 1e-3)
            decay = 0.1 if labels[name] == "decay" else 0.0
            rate = 0.01 * (t / 5 if t < 5 else max(0, (20 - t) / 15))
            param = param - rate * (step + decay * param)
        assert error(ours[name], param) < 5e-7, name


def test_a_layer_moves_less_than_the_one_above_it():
    """By the factor, for a first step: its size does not depend on the gradient's."""
    params, grads = trajectory()
    whole, _ = run(AdamW(Constant(0.1)), params, grads[:1])
    decayed, _ = run(AdamW(Constant(0.1), layer_decay=0.75), params, grads[:1])
    for name, start in params.items():
        moved, less = whole[name] - start, decayed[name] - start
        if AXES[name][0] != "layers":
            np.testing.assert_array_equal(moved, less)
            continue
        for layer, factor in enumerate([0.75**2, 0.75, 1.0]):
            np.testing.assert_allclose(less[layer], factor * moved[layer], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("settings", [Adafactor(), AdamW(Constant(0.1))])
def test_frozen_parameters_hold_no_state_and_stay(settings):
    params, grads = trajectory()
    frozen = {"wide", "stacked_vector", "vector"}
    labels = {name: "frozen" if name in frozen else "decay" for name in params}
    ours, state = run(settings, params, grads[:3], labels=labels)
    kept = {name: value for name, value in params.items() if name not in frozen}
    alone, alone_state = run(
        settings,
        kept,
        [{name: step[name] for name in kept} for step in grads[:3]],
        {name: AXES[name] for name in kept},
    )
    assert jax.tree.map(jnp.shape, jax.tree.leaves(state)) == jax.tree.map(
        jnp.shape, jax.tree.leaves(alone_state)
    )
    for name in params:
        expected = params[name] if name in frozen else alone[name]
        np.testing.assert_array_equal(ours[name], expected)


@pytest.mark.parametrize("settings", [Adafactor(), AdamW(Constant(0.1))])
def test_state_axes_fit_the_state(settings):
    labels = {**labelled(SHAPES), "cube": "frozen"}
    optimizer = settings.transformation(AXES, labels)
    params = {name: jax.ShapeDtypeStruct(s, jnp.float32) for name, s in SHAPES.items()}
    state = jax.eval_shape(optimizer.init, params)
    axes = optimizer.state_axes(params, AXES)
    sizes = {name: dict(zip(AXES[name], SHAPES[name], strict=True)) for name in SHAPES}

    def check(path, array, axes):
        assert isinstance(axes, tuple) and len(axes) == array.ndim
        name = next((key.key for key in path if isinstance(key, jax.tree_util.DictKey)), None)
        assert array.shape == tuple(sizes[name][axis] for axis in axes) if name else axes == ()

    jax.tree.map_with_path(check, state, axes)


@pytest.mark.parametrize("make", [Adafactor, AdamW])
def test_gradients_are_clipped_by_the_norm_of_all_that_is_trained(make):
    grads = {"a": jnp.full(4, 3.0), "b": jnp.full(4, 4.0), "frozen": jnp.full(4, 100.0)}
    axes = {name: ("embed",) for name in grads}
    labels = {"a": "decay", "b": "decay", "frozen": "frozen"}
    params = jax.tree.map(jnp.ones_like, grads)

    def state_after(gradient_clip, factor):
        settings = make(Constant(0.1), gradient_clip=gradient_clip)
        scaled = jax.tree.map(lambda g: g * factor, grads)
        return run(settings, params, [scaled], axes, labels)[1]

    for clip, factor in ((5.0, 0.5), (20.0, 1.0)):  # the norm is 10
        jax.tree.map(
            lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-6),
            state_after(clip, 1.0),
            state_after(None, factor),
        )


def test_bfloat16_gradients_are_squared_in_float32():
    axes, labels = {"w": ("embed",)}, {"w": "decay"}
    grads = {"w": jnp.linspace(1, 2, 7, dtype=jnp.bfloat16)}
    _, state = run(Adafactor(), {"w": np.ones(7, np.float32)}, [grads], axes, labels)
    np.testing.assert_allclose(state.moments["w"], np.float32(grads["w"]) ** 2, rtol=1e-6)


def test_bad_settings_labels_and_axes_are_refused():
    with pytest.raises(ValueError, match="update_clip is 0"):
        Adafactor(update_clip=0)
    with pytest.raises(ValueError, match="beta2 is 1"):
        AdamW(Constant(0.1), beta2=1)
    with pytest.raises(ValueError, match="parameter a/w has the label 'wd', expected one of"):
        Adafactor().transformation({"a": {"w": ("embed",)}}, {"a": {"w": "wd"}})
    optimizer = Adafactor().transformation({"a": {"w": ("embed",)}}, {"a": {"w": "decay"}})
    with pytest.raises(ValueError, match=r"parameter a/w has shape \(2, 3\) but axes \('embed',\)"):
        optimizer.init({"a": {"w": jnp.zeros((2, 3))}})

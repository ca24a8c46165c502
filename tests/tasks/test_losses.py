import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lmjax.tasks.losses import cross_entropy

B, T, D, V = 3, 7, 16, 50
ROW_OF_A_POSITION = 4 * B * V  # bytes of float32 logits at one position
CASES = [
    {},
    {"z_loss": 1e-2},
    {"label_smoothing": 0.1},
    {"z_loss": 1e-2, "label_smoothing": 0.2, "valid_rows": 41},
]
CHUNK_POSITIONS = [1, 3, 7]  # 3 leaves a ragged end


def example(dtype=jnp.float32, rows=41):
    rng = np.random.default_rng(0)
    weights = rng.uniform(size=(B, T)) * (rng.uniform(size=(B, T)) < 0.7)
    return (
        jnp.asarray(rng.normal(size=(B, T, D)), dtype),
        jnp.asarray(rng.normal(size=(V, D)), dtype),
        jnp.asarray(rng.integers(0, rows, (B, T)), jnp.int32),
        jnp.asarray(weights, jnp.float32),
    )


def reference(
    features, matrix, targets, weights, z_loss=0.0, label_smoothing=0.0, valid_rows=V, **_
):
    """Sums and gradients in float64 from full logits and full soft targets, as the paper has it."""
    features, matrix, weights = (np.asarray(x, np.float64) for x in (features, matrix, weights))
    matrix = matrix[:valid_rows]
    logits = features @ matrix.T
    log_z = np.log(np.exp(logits).sum(-1, keepdims=True))
    one_hot = np.eye(valid_rows)[np.asarray(targets)]
    soft = np.full_like(logits, label_smoothing / (valid_rows - 1))
    soft[one_hot == 1] = 1 - label_smoothing
    entropy = -(soft * np.log(np.maximum(soft, 1e-30))).sum(-1)
    z = z_loss * log_z[..., 0] ** 2
    loss = -(soft * (logits - log_z)).sum(-1) - entropy + z
    nll = (log_z - logits)[one_hot == 1].reshape(weights.shape)
    correct = logits.argmax(-1) == targets
    terms = {"loss": loss, "nll": nll, "z_loss": z, "correct": correct}
    sums = {name: (term * weights).sum() for name, term in terms.items()}

    gradient = weights[..., None] * ((1 + 2 * z_loss * log_z) * np.exp(logits - log_z) - soft)
    matrix_gradient = np.zeros((V, D))
    matrix_gradient[:valid_rows] = np.einsum("BTV,BTD->VD", gradient, features)
    return sums, (gradient @ matrix, matrix_gradient)


@pytest.mark.parametrize("positions", CHUNK_POSITIONS)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_sums_and_gradients_are_those_of_full_logits(case, positions):
    arrays = example()
    case = {**case, "chunk_bytes": positions * ROW_OF_A_POSITION}
    expected, expected_gradients = reference(*arrays, **case)

    def scaled(features, matrix):
        loss, sums = cross_entropy(features, matrix, *arrays[2:], **case)
        return loss / 3, {"loss": loss, **sums}

    evaluated = jax.jit(scaled)(*arrays[:2])[1]
    gradients, sums = jax.jit(jax.grad(scaled, argnums=(0, 1), has_aux=True))(*arrays[:2])
    for name, value in expected.items():
        np.testing.assert_allclose(sums[name], value, rtol=2e-6, err_msg=name)
        np.testing.assert_allclose(evaluated[name], value, rtol=2e-6, err_msg=name)
    for ours, theirs in zip(gradients, expected_gradients, strict=True):
        np.testing.assert_allclose(3 * ours, theirs, rtol=1e-5, atol=2e-6)
    assert not np.any(gradients[1][case.get("valid_rows", V) :])


def test_a_perfect_prediction_has_loss_zero_even_when_smoothed():
    targets = jnp.arange(V)[None]
    smoothed = 0.1 / (V - 1) + (0.9 - 0.1 / (V - 1)) * jnp.eye(V)
    loss, _ = cross_entropy(
        jnp.log(smoothed)[None], jnp.eye(V), targets, jnp.ones((1, V)), label_smoothing=0.1
    )
    np.testing.assert_allclose(loss / V, 0, atol=1e-6)


def test_where_the_weight_is_zero_nothing_counts():
    features, matrix, targets, weights = example()
    hidden = weights == 0
    assert hidden.any()

    @jax.jit
    @jax.value_and_grad
    def loss(features, targets):
        return cross_entropy(features, matrix, targets, weights, z_loss=0.1, valid_rows=41)[0]

    changed = jnp.where(hidden[..., None], 9.0, features)
    expected = loss(features, targets)
    for ids in (-100, 45):
        ours = loss(changed, jnp.where(hidden, ids, targets))
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5), ours, expected)
        assert not np.any(ours[1][hidden])


def test_equal_scores_are_not_correct():
    _, matrix, targets, _ = example()
    _, sums = cross_entropy(jnp.zeros((B, T, D)), matrix, targets, jnp.ones((B, T)))
    assert sums["correct"] == 0


def test_under_remat_and_accumulated_over_a_scan():
    features, matrix, targets, weights = example()

    def whole(matrix):
        return cross_entropy(features, matrix, targets, weights, z_loss=0.1)[0]

    @jax.checkpoint
    def part(matrix, row):
        features, targets, weights = (x[None] for x in row)
        return cross_entropy(
            features, matrix, targets, weights, z_loss=0.1, chunk_bytes=ROW_OF_A_POSITION
        )[0]

    def accumulated(matrix):
        def add(total, row):
            loss, gradient = jax.value_and_grad(part)(matrix, row)
            return jax.tree.map(jnp.add, total, (loss, gradient)), None

        zero = (jnp.float32(0), jnp.zeros_like(matrix))
        return jax.lax.scan(add, zero, (features, targets, weights))[0]

    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5),
        jax.jit(accumulated)(matrix),
        jax.value_and_grad(whole)(matrix),
    )


def test_bfloat16_products_accumulate_in_float32():
    arrays = example(jnp.bfloat16)
    expected, expected_gradients = reference(*arrays, z_loss=1e-2)

    def loss(features, matrix):
        chunk = 2 * ROW_OF_A_POSITION
        return cross_entropy(features, matrix, *arrays[2:], z_loss=1e-2, chunk_bytes=chunk)[0]

    value, gradients = jax.jit(jax.value_and_grad(loss, argnums=(0, 1)))(*arrays[:2])
    np.testing.assert_allclose(value, expected["loss"], rtol=1e-5)  # the inputs are exact
    for ours, theirs in zip(gradients, expected_gradients, strict=True):
        assert ours.dtype == jnp.bfloat16
        error = np.linalg.norm(np.float64(ours) - theirs) / np.linalg.norm(theirs)
        assert error < 2**-8  # logits' gradients and the result are rounded to 8 bits


def shapes(batch, length, rows, width):
    return (
        jax.ShapeDtypeStruct((batch, length, width), jnp.float32),
        jax.ShapeDtypeStruct((rows, width), jnp.float32),
        jax.ShapeDtypeStruct((batch, length), jnp.int32),
        jax.ShapeDtypeStruct((batch, length), jnp.float32),
    )


def scaled_loss(features, matrix, targets, weights):
    return cross_entropy(features, matrix, targets, weights, z_loss=1e-4)[0] / weights.sum()


def full_loss(features, matrix, targets, weights):
    logits = features @ matrix.T
    log_z = jax.nn.logsumexp(logits, axis=-1)
    at_target = jnp.take_along_axis(logits, targets[..., None], axis=-1)[..., 0]
    return ((log_z - at_target + 1e-4 * log_z**2) * weights).sum() / weights.sum()


def temporary_bytes(function, arguments):
    compiled = jax.jit(jax.value_and_grad(function, argnums=(0, 1))).lower(*arguments).compile()
    return compiled.memory_analysis().temp_size_in_bytes


@pytest.mark.parametrize(("rows", "width"), [(250_112, 512), (250_112, 768)])
def test_memory_is_less_than_a_quarter_of_full_logits(rows, width):
    """4,096 tokens of mT5-small and mT5-base; compiled, not run."""
    arguments = shapes(8, 512, rows, width)
    assert temporary_bytes(scaled_loss, arguments) < temporary_bytes(full_loss, arguments) / 4


def test_evaluation_multiplies_once_and_training_three_times():
    arguments = shapes(2, 8, 100, 16)
    train = jax.value_and_grad(scaled_loss, argnums=(0, 1))
    for function, products in ((scaled_loss, 1), (train, 3)):
        assert str(jax.make_jaxpr(function)(*arguments)).count("dot_general[") == products


def test_the_chunk_is_a_budget_per_device():
    def chunks(**settings):
        jaxpr = jax.make_jaxpr(lambda *x: cross_entropy(*x, **settings))(*shapes(B, 8, V, D))
        return int(str(jaxpr).split("length=")[1].split()[0])

    assert chunks(chunk_bytes=2 * ROW_OF_A_POSITION) == 4
    assert chunks(chunk_bytes=1) == 8
    with jax.sharding.use_abstract_mesh(jax.sharding.AbstractMesh((2,), ("data",))):
        assert chunks(chunk_bytes=2 * ROW_OF_A_POSITION) == 2


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"matrix": jnp.zeros((D, V))}, "features have width 16 but the output matrix has rows"),
        ({"matrix": jnp.zeros((V, D), jnp.bfloat16)}, "float32 but the output matrix is bfloat16"),
        ({"targets": jnp.zeros((B, T + 1), jnp.int32)}, r"targets have shape \(3, 8\), expected"),
        ({"weights": jnp.zeros((B, T, 1))}, r"weights have shape \(3, 7, 1\), expected"),
        ({"valid_rows": V + 1}, "valid_rows is 51, expected 1 to 50"),
        ({"label_smoothing": 1.0}, "label_smoothing is 1.0"),
        ({"chunk_bytes": 0}, "chunk_bytes is 0"),
    ],
)
def test_bad_input_is_refused(change, message):
    arguments = dict(zip(("features", "matrix", "targets", "weights"), example(), strict=True))
    with pytest.raises(ValueError, match=message):
        cross_entropy(**{**arguments, **change})

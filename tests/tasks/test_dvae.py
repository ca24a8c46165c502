import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.special

from lmjax.models.dvae import DVAE, PRESETS, DVAEConfig, gumbel_softmax
from lmjax.sharding.mesh import Layout
from lmjax.sharding.strategies import STRATEGIES, MeshOptions, mesh_shape
from lmjax.tasks.dvae import GumbelSoftmax, HalfCosine, Nearest
from lmjax.training.state import TrainState, abstract_parameters
from lmjax.training.step import accumulate

TINY = DVAEConfig(size=8, codes=7, width=8, code_width=6, groups=2, blocks=1, kernel=3, patch=2)
SOFT = GumbelSoftmax(DVAE(TINY), HalfCosine(0, 5, 10), HalfCosine(1, 0.5, 20))
HARD = Nearest(DVAE(dataclasses.replace(TINY, nearest=True)))
TASKS = {"gumbel": SOFT, "nearest": HARD}


def pictures(rows, seed=0):
    shape = (rows, TINY.size, TINY.size, 3)
    values = np.random.default_rng(seed).integers(0, 256, shape).astype(np.uint8)
    return {"pictures": values, "loss_weights": np.ones(rows, np.float32)}


@pytest.fixture(scope="module")
def params():
    """Of both tasks, every array random: no residual part is small beside its sum."""

    def draw(x):
        return np.random.default_rng(0).normal(size=x.shape, scale=0.3).astype(np.float32)

    return {name: jax.tree.map(draw, abstract_parameters(task)[0]) for name, task in TASKS.items()}


def losses(task, params, batch, step=0):
    def run(params, batch):
        key = {"dropout": jax.random.key(3)}
        return task.loss(params, {}, batch, task.normalizers(batch), key, step)

    value, (metrics, _) = jax.jit(run)(params, batch)
    return float(value), {name: float(x) for name, x in metrics.items()}


def evaluated(task, params, batch):
    def run(params, batch):
        return task.evaluate(params, {}, batch, task.normalizers(batch))[0]

    found = jax.jit(run)(params, batch)
    return {name: float(x) for name, x in found.items()}


def apply(task, params, method, *inputs):
    def run(params, *inputs):
        return task.model.apply({"params": params}, *inputs, method=method)

    return jax.device_get(jax.jit(run)(params, *inputs))


def nll_of(decoded, values):
    """In float64, of each picture, summed."""
    location, b = np.float64(decoded.location), np.exp(np.float64(decoded.log_scale))
    x = 0.1 + 0.8 * values / 255
    density = np.exp(-np.abs(scipy.special.logit(x) - location) / b) / (2 * b * x * (1 - x))
    return -np.log(density).sum((1, 2, 3))


@pytest.mark.parametrize(("step", "beta", "temperature"), [(0, 0, 1), (5, 2.5, None), (30, 5, 0.5)])
def test_the_loss_is_that_of_the_paper(params, step, beta, temperature):
    batch, own = pictures(3), params["gumbel"]
    logits = apply(SOFT, own, "encode", np.float32(batch["pictures"]) / 255)
    key = jax.random.fold_in(jax.random.key(3), 0)
    temperature = temperature or 0.5 + 0.5 * (1 + math.cos(math.pi / 4)) / 2
    codes = gumbel_softmax(logits, temperature, key)
    nll = nll_of(apply(SOFT, own, "decode", codes), batch["pictures"])
    q = scipy.special.softmax(np.float64(logits), -1)
    kl = (q * np.log(q * 7)).sum((1, 2, 3))
    value, metrics = losses(SOFT, own, batch, step)
    colours = 8 * 8 * 3
    assert kl.mean() > 1
    assert value == pytest.approx((nll.mean() + beta * kl.mean()) / colours, rel=1e-4)
    assert metrics["nll"] == pytest.approx(nll.mean() / colours, rel=1e-4)
    assert metrics["kl"] == pytest.approx(kl.mean() / colours, rel=1e-4)


def test_the_balance_of_codes(params):
    """Relative to their use so far, of which a batch is a tenth; rows that fill up have no part."""
    task, own = dataclasses.replace(SOFT, balance=HalfCosine(3, 1, 10)), params["gumbel"]
    batch = pictures(4) | {"loss_weights": np.float32([1, 0, 1, 1])}
    before = np.random.default_rng(0).dirichlet(np.ones(7)).astype(np.float32)

    def run(params, extra, batch):
        key = {"dropout": jax.random.key(3)}
        return task.loss(params, extra, batch, task.normalizers(batch), key, 5)

    value, (metrics, extra) = jax.jit(run)(own, {"use": before}, batch)
    logits = apply(task, own, "encode", np.float32(batch["pictures"][[0, 2, 3]]) / 255)
    use = scipy.special.softmax(np.float64(logits), -1).mean((0, 1, 2))
    after = 0.9 * before + 0.1 * use
    np.testing.assert_allclose(extra["use"], after, rtol=1e-4)
    places, colours = 2 * 2, 8 * 8 * 3
    use_kl = float(metrics["use_kl"])
    assert use_kl == pytest.approx(
        (use * np.log(7 * after + 1e-3)).sum() * places / colours, rel=1e-3
    )
    without = losses(SOFT, own, batch, 5)[0]
    assert float(value) - without == pytest.approx(2 * use_kl, abs=1e-5)


def test_the_loss_of_the_nearest_code(params):
    batch, own = pictures(3), params["nearest"]
    vectors = apply(HARD, own, "encoder_output", np.float32(batch["pictures"]) / 255)
    book = own["decoder"]["codebook"]
    codes = ((vectors[..., None, :] - book) ** 2).sum(-1).argmin(-1)
    nll = nll_of(apply(HARD, own, "decode", codes), batch["pictures"]).mean() / (8 * 8 * 3)
    distance = ((vectors - book[codes]) ** 2).mean()
    value, metrics = losses(HARD, own, batch)
    assert metrics["nll"] == pytest.approx(nll, rel=1e-4)
    assert metrics["codebook"] == pytest.approx(distance, rel=1e-4)
    assert value == pytest.approx(nll + 1.25 * distance, rel=1e-4)


def test_what_the_losses_of_the_nearest_code_move(params):
    """The codebook goes where the encoder's vectors are, and they go to it a quarter as much."""
    batch, own = pictures(3), params["nearest"]

    def gradient(commitment):
        task = dataclasses.replace(HARD, commitment=commitment)

        def loss(params, batch):
            return task.loss(params, {}, batch, task.normalizers(batch), {}, 0)[0]

        return jax.jit(jax.grad(loss))(own, batch)

    vectors = apply(HARD, own, "encoder_output", np.float32(batch["pictures"]) / 255)
    vectors, book = vectors.reshape(-1, 6), own["decoder"]["codebook"]
    codes = ((vectors[:, None] - book) ** 2).sum(-1).argmin(-1)
    pull = 2 * (vectors - book[codes]) / vectors.size
    without, some = gradient(0.0), gradient(0.25)
    found = some["encoder"]["output_bias"] - without["encoder"]["output_bias"]
    np.testing.assert_allclose(found, 0.25 * pull.sum(0), atol=1e-5)
    expected = np.stack([-pull[codes == code].sum(0) for code in range(7)])
    for gradients in (without, some):
        np.testing.assert_allclose(gradients["decoder"]["codebook"], expected, atol=1e-5)
    assert np.abs(expected).max() > 0.01


@pytest.mark.parametrize("name", TASKS)
def test_rows_that_fill_up_do_not_count(params, name):
    task, own = TASKS[name], params[name]
    batch, filled = pictures(2), pictures(3, seed=1)
    filled["pictures"][:2] = batch["pictures"]
    filled["loss_weights"][2] = 0
    assert evaluated(task, own, filled) == pytest.approx(evaluated(task, own, batch), rel=1e-5)
    if name == "nearest":  # the other one's noise depends on the shape of a batch
        assert losses(task, own, filled)[0] == pytest.approx(losses(task, own, batch)[0], rel=1e-5)


def test_pictures_may_be_floats(params):
    batch = pictures(2)
    floats = batch | {"pictures": np.float32(batch["pictures"]) / 255}
    found = [evaluated(SOFT, params["gumbel"], b) for b in (batch, floats)]
    assert found[0] == pytest.approx(found[1], rel=1e-6)


def test_evaluation(params):
    batch, own = pictures(3), params["gumbel"]
    values = np.float32(batch["pictures"]) / 255
    codes = apply(SOFT, own, "encode", values).argmax(-1)
    mse = ((apply(SOFT, own, "reconstruct", values) - values) ** 2).mean((1, 2, 3))
    found = evaluated(SOFT, own, batch)
    nll = nll_of(apply(SOFT, own, "decode", codes), batch["pictures"])
    assert found["loss"] == pytest.approx(nll.mean() / (8 * 8 * 3), rel=1e-4)
    assert found["mse"] == pytest.approx(mse.mean(), rel=1e-4)
    assert found["psnr"] == pytest.approx((-10 * np.log10(mse)).mean(), rel=1e-4)


def test_micro_batches_add_up(params):
    """Rows of one weight and of others, in one piece and in three."""
    batch = pictures(6) | {"loss_weights": np.float32([1, 1, 0, 1, 0, 0])}
    state = TrainState(0, params["nearest"], {}, None, None, None)

    def run(pieces):
        def taken(state, batch):
            normalizers = HARD.normalizers(batch)
            return accumulate(HARD, state, batch, jax.random.key(0), pieces, {}, normalizers)

        return jax.jit(taken)(state, batch)

    whole, pieces = run(1), run(3)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), whole, pieces)


def test_half_cosine():
    beta = HalfCosine(0, 6.6, 5_000)
    assert [float(beta(step)) for step in (0, 2_500, 5_000, 9_999)] == pytest.approx(
        [0, 3.3, 6.6, 6.6]
    )
    temperature = HalfCosine(1, 1 / 16, 150_000)
    expected = 1 / 16 + 15 / 16 * (1 + math.cos(math.pi / 3)) / 2
    assert float(temperature(jnp.int32(50_000))) == pytest.approx(expected, rel=1e-6)
    for fields in ((-1, 1, 5), (0, math.inf, 5), (0, 1, 0)):
        with pytest.raises(ValueError, match="start >= 0, end >= 0 and horizon >= 1"):
            HalfCosine(*fields)


def test_settings_that_cannot_be():
    with pytest.raises(ValueError, match="temperature is .*, expected more than 0"):
        GumbelSoftmax(SOFT.model, temperature=HalfCosine(1, 0, 5))
    with pytest.raises(ValueError, match=r"tasks.dvae.Nearest trains"):
        GumbelSoftmax(HARD.model)
    with pytest.raises(ValueError, match="set DVAEConfig.nearest"):
        Nearest(SOFT.model)
    with pytest.raises(ValueError, match="commitment is -1"):
        Nearest(HARD.model, commitment=-1)


@pytest.mark.parametrize("name", TASKS)
def test_flops(name):
    """Products written out; the first group is at 4 x 4 places, the second at 2 x 2."""

    def block(places, kernels, channels, straight):
        pairs = zip(kernels, channels[:-1], channels[1:], strict=True)
        return places * (sum(k * k * i * o for k, i, o in pairs) + straight)

    down, up = (3, 3, 3, 1), (1, 3, 3, 3)
    encoder = 16 * 9 * 12 * 8 + block(16, down, (8, 2, 2, 2, 8), 0)
    encoder += block(4, down, (8, 4, 4, 4, 16), 8 * 16)
    decoder = block(4, up, (6, 4, 4, 4, 16), 6 * 16) + block(16, up, (16, 2, 2, 2, 8), 16 * 8)
    decoder += 16 * 8 * 24
    # Scores of codes, then their mixture; or vectors, and distances to codes.
    middle = 4 * (16 * 7 + 7 * 6) if name == "gumbel" else 4 * (16 * 6 + 6 * 7)
    shapes = {"pictures": (5, 8, 8, 3), "loss_weights": (5,)}
    assert TASKS[name].flops(shapes) == 6 * 5 * (encoder + middle + decoder)


@pytest.mark.parametrize("strategy", STRATEGIES.values(), ids=list(STRATEGIES))
def test_it_lies_on_eight_devices(strategy):
    params, axes = abstract_parameters(GumbelSoftmax(DVAE(PRESETS["openai"])))
    shape = mesh_shape(strategy, MeshOptions(), 8, params, axes)
    mesh = jax.sharding.AbstractMesh(tuple(shape.values()), tuple(shape))
    layout = Layout(strategy, mesh, strategy.rules, "")
    parts = layout.parameters(params, axes)
    jax.tree.map(lambda x, own: layout.sharding(own).shard_shape(x.shape), params, parts)
    convolution = parts["decoder"]["group_1_block_1"]["conv_4"]
    divided = strategy.name not in ("dp", "pmap")
    assert any(convolution) == any(parts["decoder"]["codebook"]) == divided


def test_biases_do_not_decay():
    params, _ = abstract_parameters(SOFT)
    labels = SOFT.labels(params)
    assert labels["decoder"]["codebook"] == labels["encoder"]["input"] == "decay"
    assert labels["decoder"]["codebook_bias"] == labels["encoder"]["input_bias"] == "no_decay"

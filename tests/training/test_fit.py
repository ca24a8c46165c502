import functools
import os
import signal
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from lmjax.training.checkpoints import CheckpointError, Checkpoints, latest_step, restore_params
from lmjax.training.fit import FitOptions, NonFinite, OutOfMemory
from lmjax.training.optimizers import Adafactor, AdamW
from lmjax.training.reporting import METRICS, read_metrics
from lmjax.training.schedules import Constant
from lmjax.training.state import Averaging, init_state
from lmjax.training.step import accumulate, train_step
from tests.training import toy

ROOT = Path(__file__).parents[2]


def losses(workdir):
    records = read_metrics(Path(workdir) / METRICS)
    return {r["step"]: r["loss"] for r in records if "loss" in r}


def assert_same(a, b):
    """Bit for bit."""
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        if jnp.issubdtype(x.dtype, jax.dtypes.prng_key):
            x, y = jax.random.key_data(x), jax.random.key_data(y)
        np.testing.assert_array_equal(x, y)


def start(averaging=None, task=None, settings=toy.OPTIMIZER):
    """A first state and a jitted step, without the loop."""
    task = task or toy.Regression()
    params, axes, _, extra_axes = task.init(jax.random.key(0))
    optimizer = settings.transformation(axes, task.labels(params))
    state = init_state(task, optimizer, averaging is not None, seed=3)

    def step(state, batch):
        return train_step(
            state, batch, task=task, optimizer=optimizer, schedule=settings.schedule,
            microbatches=1, averaging=averaging, extra_axes=extra_axes,
        )  # fmt: skip

    return state, jax.jit(step)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A run of 14 steps that nothing disturbed: (its directory, its last state)."""
    workdir = tmp_path_factory.mktemp("whole")
    return workdir, toy.train(workdir, 14).state


def run_script(workdir, steps, fate, **environment):
    return subprocess.run(
        [sys.executable, "-m", "tests.training.toy", str(workdir), str(steps), fate],
        cwd=ROOT,
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=120,
    )


# --- the step


class Remembering(toy.Regression):
    """With what each row has brought so far."""

    def init(self, rng):
        initial = super().init(rng)
        return initial._replace(
            extra={**initial.extra, "brought": jnp.arange(24.0).reshape(2, 12)},
            extra_axes={**initial.extra_axes, "brought": (None, "batch")},
        )

    def loss(self, params, extra, batch, *rest):
        loss, (metrics, counted) = super().loss(params, extra, batch, *rest)
        return loss, (metrics, {**counted, "brought": 2 * extra["brought"] + batch["y"]})


@pytest.mark.parametrize("kind", [toy.Regression, Remembering])
def test_micro_batches_add_up_to_the_whole_batch(kind):
    task = kind(dropout=0.0)
    state, _ = start(task=task)
    batch = toy.Numbers(batch_size=12).batch(0)
    axes = task.init(jax.random.key(0)).extra_axes

    def accumulated(microbatches):
        run = functools.partial(
            accumulate,
            task,
            microbatches=microbatches,
            extra_axes=axes,
            normalizers=task.normalizers(batch),
        )
        return jax.jit(run)(state, batch, jax.random.key(0))

    parts, whole = accumulated(4), accumulated(1)
    for a, b in zip(jax.tree.leaves(parts), jax.tree.leaves(whole), strict=True):
        np.testing.assert_allclose(a, b, rtol=2e-6, atol=1e-7)


def test_a_step_that_is_not_finite_changes_nothing_but_the_counter():
    state, step = start(averaging=Averaging(0.5))
    state, _ = step(state, toy.Numbers().batch(0))
    after, outcome = step(state, toy.Numbers(bad=[1]).batch(1))
    assert_same(after._replace(step=state.step), state)
    assert after.step == state.step + 1
    assert not np.isfinite(outcome.metrics["loss"])


@pytest.mark.parametrize("optimizer", [AdamW, Adafactor])
def test_the_learning_rate_logged_is_the_one_used_after_a_skipped_step(optimizer):
    settings = optimizer(Constant(1e-2, warmup=4))
    first, step = start(task=toy.Regression(dropout=0.0), settings=settings)
    good, bad = toy.Numbers(), toy.Numbers(bad=[1])
    results = []
    for batches in ([good.batch(0), good.batch(2)], [good.batch(0), bad.batch(1), good.batch(2)]):
        state = first
        for batch in batches:
            state, outcome = step(state, batch)
        results.append((state.params, outcome.metrics["learning_rate"]))
    assert results[0][1] == pytest.approx(2.5e-3)
    assert_same(*results)


def test_average_is_updated_at_its_interval():
    """In updates of the parameters, of which a step that is skipped is none."""
    state, step = start(averaging=Averaging(decay=0.75, interval=2))
    expected, updates = state.params, 0
    for number in range(1, 7):
        state, outcome = step(state, toy.Numbers(bad=[2, 5]).batch(number))
        updates += bool(np.isfinite(outcome.metrics["loss"]))
        if number in (3, 6):
            assert updates in (2, 4)
            expected = jax.tree.map(lambda e, p: 0.75 * e + 0.25 * p, expected, state.params)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6), state.ema, expected)


# --- evaluation


def test_evaluation_is_exact_over_batches_of_unequal_weight_and_uses_the_average(tmp_path):
    state = toy.train(tmp_path, 3, averaging=Averaging(0.9), evaluation=toy.EVALUATION).state
    joined = {k: np.concatenate([b[k] for b in toy.EVALUATION]) for k in toy.EVALUATION[0]}
    task = toy.Regression()
    expected = task.evaluate(state.ema, {}, joined, task.normalizers(joined))[0]["loss"]
    last = read_metrics(tmp_path / METRICS)[-1]
    assert last["step"] == 3
    assert last["eval_loss"] == pytest.approx(float(expected), rel=1e-6)
    assert_same(restore_params(tmp_path), state.ema)
    with pytest.raises(CheckpointError, match=r"averaging.decay 0.9 -> 0.5\)"):
        toy.train(tmp_path, 4, averaging=Averaging(0.5))


def test_pictures_follow_evaluations_until_memory_runs_out(tmp_path, capsys):
    given = []

    def watch(params):
        given.append(jax.device_get(params))
        if len(given) == 2:
            raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: too many\npictures")
        return {"square": Image.new("RGB", (2, 2))}

    watched = {"averaging": Averaging(0.9), "evaluation": toy.EVALUATION, "watch": watch}
    state = toy.train(tmp_path / "a", 14, **watched).state
    assert state.step == 14 and len(given) == 2  # of steps 4 and 8, not of 12
    assert "step 8: no pictures from now on: RESOURCE_EXHAUSTED: too many\n" in (
        capsys.readouterr().out
    )
    assert_same(given[0], toy.train(tmp_path / "b", 4, averaging=Averaging(0.9)).state.ema)
    (events,) = (tmp_path / "a" / "tensorboard").iterdir()
    assert events.read_bytes().count(b"\x89PNG") == 1


# --- going on where a run ended


def test_resuming_is_bit_exact(tmp_path, whole):
    toy.train(tmp_path, 6)
    resumed = toy.train(tmp_path, 14).state
    assert losses(tmp_path) == losses(whole[0])
    assert_same(resumed, whole[1])


def test_steps_already_reached_are_not_repeated(tmp_path, capsys):
    toy.train(tmp_path, 3)
    before = (tmp_path / METRICS).read_bytes()
    result = toy.train(tmp_path, 2)
    assert result.state.step == 3
    assert not result.interrupted
    assert "at step 3 already" in capsys.readouterr().out
    assert (tmp_path / METRICS).read_bytes() == before


def test_a_run_killed_twice_continues_bit_exactly(tmp_path, whole):
    assert run_script(tmp_path, 14, "kill-between").returncode == -signal.SIGKILL
    assert latest_step(tmp_path) == 4
    assert run_script(tmp_path, 14, "kill-saving").returncode == -signal.SIGKILL
    assert latest_step(tmp_path) in (4, 8)  # the second may just have been finished
    state = toy.train(tmp_path, 14).state
    assert losses(tmp_path) == losses(whole[0])
    assert_same(state, whole[1])
    assert not list((tmp_path / "checkpoints").glob("*tmp*"))


def test_sigterm_saves_and_another_number_of_devices_continues(tmp_path, whole):
    eight = {"XLA_FLAGS": "--xla_force_host_platform_device_count=8"}
    done = run_script(tmp_path, 14, "terminate", **eight)
    assert done.returncode == 0, done.stderr
    assert "8 x cpu" in done.stdout
    saved = latest_step(tmp_path)
    assert saved == 6  # the signal came while the sixth batch was made
    assert f"Stopped at step {saved} of 14" in done.stdout
    assert "the same command continues it" in done.stdout
    assert max(losses(tmp_path)) == saved

    toy.train(tmp_path, 14)
    ours, theirs = losses(tmp_path), losses(whole[0])
    np.testing.assert_allclose([*ours.values()], [*theirs.values()], rtol=2e-6)


@pytest.fixture
def python_takes_ctrl_c():
    """As in a terminal; a shell has what it runs in the background ignore it."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("python_takes_ctrl_c")
def test_a_second_ctrl_c_ends_the_run_at_once(tmp_path):
    def twice():
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)

    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt):
        toy.train(tmp_path, 14, data=toy.Numbers(before={6: twice}))
    assert latest_step(tmp_path) == 4
    assert signal.getsignal(signal.SIGINT) is before


@pytest.mark.parametrize("step", [5, 6, 8])  # 6 has been evaluated, 8 is saved already
def test_data_processes_that_die_of_ctrl_c_cost_no_step(tmp_path, whole, step):
    def die():
        os.kill(os.getpid(), signal.SIGINT)
        raise RuntimeError("a worker process was terminated")

    options = FitOptions(log_every=1, eval_every=3, checkpoint_every=4)
    data = toy.Numbers(before={step: die})
    assert toy.train(tmp_path, 14, data=data, runtime=options).interrupted
    assert latest_step(tmp_path) == step == max(losses(tmp_path))
    if step == 6:
        assert_same(toy.train(tmp_path, 14).state, whole[1])


def test_a_run_that_ended_before_its_first_checkpoint_can_be_corrected(tmp_path):
    def fail():
        raise ValueError("a mistake")

    with pytest.raises(ValueError, match="a mistake"):
        data = toy.Numbers(before={3: fail})
        toy.train(tmp_path, 14, data=data, averaging=Averaging(0.5))
    assert max(losses(tmp_path)) == 2  # it had come that far
    toy.train(tmp_path, 1)
    assert [*losses(tmp_path)] == [1]
    assert len(list((tmp_path / "tensorboard").iterdir())) == 1
    with pytest.raises(CheckpointError, match="averaging null -> "):
        toy.train(tmp_path, 2, averaging=Averaging(0.5))


def test_starting_from_given_parameters(tmp_path, whole):
    given = restore_params(whole[0])
    assert_same(given, whole[1].params)
    toy.train(tmp_path / "a", 1, init=lambda: given, evaluation=toy.EVALUATION[:1])
    batch, task = toy.EVALUATION[0], toy.Regression()
    expected = task.evaluate(given, {}, batch, task.normalizers(batch))[0]["loss"]
    first = read_metrics(tmp_path / "a" / METRICS)[0]
    assert first["eval_loss"] == pytest.approx(float(expected), rel=1e-6)

    narrow = {**given, "out": {"kernel": jnp.zeros((4, 1))}}
    with pytest.raises(ValueError, match=r"out.kernel is \[4, 1\] there and \[8, 1\] here"):
        toy.train(tmp_path / "b", 1, init=lambda: narrow)


# --- what goes wrong


def test_a_loss_that_is_not_finite_stops_with_a_report(tmp_path):
    with pytest.raises(NonFinite) as error:
        toy.train(tmp_path, 14, data=toy.Numbers(bad=[5]))
    for part in ("step 6 ", "loss is inf", "hidden.kernel", "step 4", "nonfinite=skip"):
        assert part in str(error.value)
    assert read_metrics(tmp_path / METRICS)[-1]["loss"] is None
    assert latest_step(tmp_path) == 4


def test_a_failed_write_does_not_hide_that_a_loss_is_not_finite(tmp_path, monkeypatch):
    def full(_):
        raise CheckpointError("no space is left")

    monkeypatch.setattr(Checkpoints, "wait", full)
    with pytest.raises(NonFinite):
        toy.train(tmp_path, 14, data=toy.Numbers(bad=[2]))


def test_memory_is_told_before_it_is_taken_and_what_to_do_when_it_is_not_enough(tmp_path, capsys):
    def init():
        jnp.zeros(2**43).sum().block_until_ready()

    with pytest.raises(OutOfMemory, match=r"asked for 35.2 TB, with a batch of 8 .*microbatches"):
        toy.train(tmp_path, 1, init=init)
    assert "optimizer 580 B" in capsys.readouterr().out


def test_steps_that_are_not_finite_can_be_skipped_a_few_times(tmp_path):
    data = toy.Numbers(bad=[2, 5, 6])
    options = FitOptions(log_every=1, nonfinite="skip", max_skips=2)
    state = toy.train(tmp_path, 4, data=data, runtime=options).state
    assert state.step == 4
    assert all(np.isfinite(p).all() for p in jax.tree.leaves(state.params))
    with pytest.raises(NonFinite, match=r"2 steps in a row \(max_skips\)"):
        toy.train(tmp_path, 9, data=data, runtime=options)
    last = read_metrics(tmp_path / METRICS)[-1]
    assert (last["step"], last["skipped"]) == (7, 3)  # counted across the resume


def test_a_batch_that_does_not_divide_is_refused_before_anything_is_written(tmp_path):
    with pytest.raises(ValueError, match="8 rows .* 3 micro-batch.* 6 or 9"):
        toy.train(tmp_path / "run", 4, runtime=FitOptions(microbatches=3))
    assert not (tmp_path / "run").exists()


def test_data_that_ends_early(tmp_path):
    class Nothing(toy.Numbers):
        def start(self, position):
            return iter(())

    with pytest.raises(ValueError, match="training data ended"):
        toy.train(tmp_path, 4, data=Nothing())

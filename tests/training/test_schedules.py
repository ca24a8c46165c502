import math

import jax
import jax.numpy as jnp
import pytest

from lmjax.training.schedules import Constant, Cosine, InverseSquareRoot, Linear


@pytest.mark.parametrize(
    ("schedule", "expected"),
    [
        (InverseSquareRoot(), {0: 0.01, 10_000: 0.01, 40_000: 0.005, 1_000_000: 0.001}),
        (InverseSquareRoot(scale=2, warmup=4), {0: 1, 4: 1, 16: 0.5}),
        (Linear(1.0, 110, warmup=10, end=0.5), {0: 0, 5: 0.5, 10: 1, 60: 0.75, 110: 0.5, 999: 0.5}),
        (Linear(2.0, 10), {0: 2, 5: 1, 10: 0, 11: 0}),
        (Linear(1.0, 100, warmup=10, from_start=True), {0: 0, 5: 0.5, 10: 0.9, 50: 0.5, 100: 0}),
        (
            Cosine(1.0, 110, warmup=10, final_fraction=0.2),
            {0: 0, 5: 0.5, 10: 1, 35: 0.6 + 0.4 * math.sqrt(0.5), 60: 0.6, 110: 0.2, 999: 0.2},
        ),
        (Constant(0.3), {0: 0.3, 10**6: 0.3}),
        (Constant(0.3, warmup=3), {0: 0, 1: 0.1, 3: 0.3, 4: 0.3}),
    ],
)
def test_values_for_python_and_traced_steps(schedule, expected):
    traced = jax.jit(schedule)
    for step, rate in expected.items():
        for value in (schedule(step), traced(jnp.int32(step))):
            assert value.dtype == jnp.float32 and value.shape == ()
            assert float(value) == pytest.approx(rate, rel=1e-6, abs=1e-7)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: InverseSquareRoot(scale=0), "scale is 0"),
        (lambda: InverseSquareRoot(warmup=0), "warmup is 0"),
        (lambda: Linear(math.inf, 10), "peak is inf"),
        (lambda: Linear(1.0, 10, warmup=10), "warmup is 10 steps and horizon 10"),
        (lambda: Linear(1.0, 10, end=2.0), "end is 2.0"),
        (lambda: Cosine(1.0, 10, final_fraction=1.5), "final_fraction is 1.5"),
        (lambda: Constant(0.1, warmup=-1), "warmup is -1"),
    ],
)
def test_bad_settings_are_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()

"""What importing does not import, each in a process of its own."""

import subprocess
import sys

import pytest

REFERENCES = {"torch", "transformers", "tensorflow"}
JAX = {"jax", "flax"}
MODULES = {
    "lmjax": JAX | REFERENCES | {"numpy"},
    "lmjax.objectives": JAX | REFERENCES,
    "lmjax.models.t5": REFERENCES,
    "lmjax.loading": REFERENCES,
}


@pytest.mark.parametrize("module", MODULES)
def test_importing_stays_light(module):
    code = f"import sys, {module}; print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert MODULES[module].isdisjoint(done.stdout.split())


def test_load_is_found_when_it_is_asked_for():
    code = "import lmjax, sys; assert 'jax' not in sys.modules; print(lmjax.load.__module__)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "lmjax.loading"
    missing = subprocess.run(
        [sys.executable, "-c", "import lmjax; lmjax.laod"], capture_output=True, text=True
    )
    assert "module 'lmjax' has no attribute 'laod'" in missing.stderr

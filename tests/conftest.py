"""Tests run on CPUs, wherever they run: their figures are for float32, and libtpu, with which plans
are made, would look for a TPU."""

import os

os.environ.setdefault("JAX_PLATFORMS", "cpu")

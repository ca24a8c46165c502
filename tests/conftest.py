"""Tests run on CPUs, wherever they run: their figures are for float32, and libtpu, with which plans
are made, would look for a TPU. They compile for few runs on tiny arrays, so compiling is what takes
time, and it is done quickly; experiments in processes of their own compile as they do for users."""

import os

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("JAX_DISABLE_MOST_OPTIMIZATIONS", "1")

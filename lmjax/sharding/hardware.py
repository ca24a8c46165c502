"""What the makers say their devices can do."""

import dataclasses

import jax


@dataclasses.dataclass(frozen=True)
class Hardware:
    """One JAX device: a chip, or one of the two cores of a TPU v2, v3 and v7x chip."""

    flops: float
    """Dense bfloat16 FLOP/s."""
    memory: float
    """Bytes of HBM."""
    memory_bandwidth: float
    """Bytes/s."""
    link: float
    """Bytes/s in one direction of one link of a TPU's torus, or of all of a GPU's NVLink."""
    network: float
    """Bytes/s in one direction between slices or nodes: the host's network, shared out."""
    wraps: int = 0
    """A TPU torus closes to a ring along dimensions that are a multiple of this (0: a GPU)."""


def _halves(chip: Hardware) -> Hardware:
    """Each of two cores that share a chip."""
    return Hardware(
        chip.flops / 2,
        chip.memory / 2,
        chip.memory_bandwidth / 2,
        chip.link / 2,
        chip.network / 2,
        chip.wraps,
    )


_GIB = 2**30

# By the beginning of `device_kind`; a longer name comes before a shorter one that it begins with.
# TPU FLOP/s, HBM and links: https://docs.cloud.google.com/tpu/docs, "Peak compute per chip", "HBM
# capacity and bandwidth", "Inter-chip interconnect" divided by the links of a chip (4 in a 2D, 6 in
# a 3D torus; figures called bidirectional by 2 more). v2 and v3 links: Jouppi et al. 2020, "A
# Domain-Specific Supercomputer for Training Deep Neural Networks" (496 and 656 Gbit/s). Network:
# "Data center network bandwidth per Pod" for v5e (6.4 Tbit/s over 256 chips) and v6e; for the
# others 200 Gbit/s per host of four chips (v2, v3: 100), an assumption.
# NVIDIA: tensor core, memory and NVLink rows of the data sheets, without sparsity; NVLink counts
# one direction. Network: one 200 Gbit/s (A100) or 400 Gbit/s (H100, H200) adapter per GPU, and four
# of 100 Gbit/s per eight V100, as in the makers' DGX machines.
_TABLE = {
    "TPU v2": _halves(Hardware(45e12, 16 * _GIB, 700e9, 62e9, 3.1e9, 16)),
    "TPU v3": _halves(Hardware(123e12, 32 * _GIB, 900e9, 82e9, 3.1e9, 32)),
    # v4i: Jouppi et al. 2021, "Ten Lessons From Three Generations"
    "TPU v4 lite": Hardware(138e12, 8 * _GIB, 614e9, 50e9, 6.25e9, 16),
    "TPU v4": Hardware(275e12, 32 * _GIB, 1.2e12, 50e9, 6.25e9, 4),
    "TPU v5 lite": Hardware(197e12, 16 * _GIB, 819e9, 50e9, 3.1e9, 16),
    "TPU v5e": Hardware(197e12, 16 * _GIB, 819e9, 50e9, 3.1e9, 16),
    "TPU v5": Hardware(459e12, 95 * _GIB, 2.765e12, 100e9, 6.25e9, 4),  # v5p
    "TPU v6": Hardware(918e12, 32 * _GIB, 1.64e12, 100e9, 12.5e9, 16),  # v6e, Trillium
    "TPU7x": _halves(Hardware(2307e12, 192 * _GIB, 7.38e12, 100e9, 12.5e9, 4)),  # Ironwood
    "TPU 7x": _halves(Hardware(2307e12, 192 * _GIB, 7.38e12, 100e9, 12.5e9, 4)),
    "Tesla V100": Hardware(125e12, 32e9, 900e9, 150e9, 6.25e9),  # SXM2; float16, not bfloat16
    "NVIDIA A100": Hardware(312e12, 80e9, 2.039e12, 300e9, 25e9),
    "NVIDIA H100 PCIe": Hardware(756e12, 80e9, 2.0e12, 64e9, 50e9),
    "NVIDIA H100 NVL": Hardware(835e12, 94e9, 3.9e12, 300e9, 50e9),
    "NVIDIA H100": Hardware(989.4e12, 80e9, 3.35e12, 450e9, 50e9),  # SXM5
    "NVIDIA H200": Hardware(989.4e12, 141e9, 4.8e12, 450e9, 50e9),  # SXM
}


def hardware(kind: str) -> Hardware | None:
    """The device of this `device_kind`, or None where nothing is known (as of CPUs)."""
    return next((found for name, found in _TABLE.items() if kind.startswith(name)), None)


def peak_flops(device: jax.Device) -> float | None:
    """Dense bfloat16 FLOP/s of `device`, or None where no figure is known."""
    found = hardware(device.device_kind)
    return found and found.flops


def device_memory(device: jax.Device) -> float | None:
    """Bytes that programs can use of a device's own memory; None for a CPU, which shares it.

    A device that is only planned with cannot say, and has what its maker says.
    """
    if device.platform == "cpu":
        return None
    try:
        stats = device.memory_stats() or {}
    except (jax.errors.JaxRuntimeError, NotImplementedError, AttributeError):
        stats = {}
    found = hardware(device.device_kind)
    return stats.get("bytes_limit", found and found.memory)

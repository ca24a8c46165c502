"""What the makers say their devices can do."""

import jax

# Dense bfloat16 FLOP/s of one JAX device, by the beginning of `device_kind`; a longer name comes
# before a shorter one that it begins with. TPU: https://docs.cloud.google.com/tpu/docs, "Peak
# compute per chip", halved where JAX shows one device for each of a chip's two cores (v2, v3, 7x).
# NVIDIA: the tensor core rows of the data sheets, without sparsity.
_PEAKS = {
    "TPU v2": 45e12 / 2,
    "TPU v3": 123e12 / 2,
    "TPU v4 lite": 138e12,  # v4i: Jouppi et al. 2021, "Ten Lessons From Three Generations"
    "TPU v4": 275e12,
    "TPU v5 lite": 197e12,
    "TPU v5e": 197e12,
    "TPU v5": 459e12,  # v5p
    "TPU v6": 918e12,  # v6e, Trillium
    "TPU7x": 2307e12 / 2,  # Ironwood
    "TPU 7x": 2307e12 / 2,
    "Tesla V100": 125e12,  # SXM2; float16, for it has no bfloat16
    "NVIDIA A100": 312e12,
    "NVIDIA H100 PCIe": 756e12,
    "NVIDIA H100 NVL": 835e12,
    "NVIDIA H100": 989.4e12,  # SXM5
    "NVIDIA H200": 989.4e12,  # SXM
}


def peak_flops(device: jax.Device) -> float | None:
    """Dense bfloat16 FLOP/s of `device`, or None where no figure is known (as for CPUs)."""
    return next((p for kind, p in _PEAKS.items() if device.device_kind.startswith(kind)), None)


def device_memory(device: jax.Device) -> float | None:
    """Bytes that programs can use of a device's own memory; None for a CPU, which shares it."""
    stats = device.memory_stats() or {}
    return stats.get("bytes_limit") if device.platform != "cpu" else None

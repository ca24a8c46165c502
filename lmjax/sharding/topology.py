"""Devices that are not here: TPU slices to compile for, and how their meshes are wired.

Topologies are written as `v3:32x32`, `v5p:4x4x4`, `tpu7x:2x2x1` (chips along each dimension),
`cpu:8`, or, for GPUs, `h100:64`.
"""

import math
import os
import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from lmjax.sharding.hardware import Hardware, hardware

TPUS = {
    "v2": "TPU v2",
    "v3": "TPU v3",
    "v4": "TPU v4",
    "v5e": "TPU v5e",
    "v5p": "TPU v5",
    "v6e": "TPU v6",
    "tpu7x": "TPU7x",
}
GPUS = {"v100": "Tesla V100", "a100": "NVIDIA A100", "h100": "NVIDIA H100", "h200": "NVIDIA H200"}
GPUS_PER_NODE = 8
EXAMPLES = "v2:4x4, v3:32x32, v4:4x4x4, v5e:16x16, v5p:4x4x4, v6e:16x16, tpu7x:4x4x4, cpu:8, h100:8"


class Topology(NamedTuple):
    name: str
    devices: Sequence[Any]
    hardware: Hardware | None
    """Of one device; None for a CPU."""
    compiled_for: str
    """The devices that the compiler is asked for: others, where it cannot be asked for these."""


def environment(name: str) -> dict[str, str]:
    """What must be in the environment before JAX is imported, to plan for `name` without noise."""
    variables = {"JAX_PLATFORMS": "cpu"}
    kind, _, size = name.partition(":")
    if kind == "cpu":
        flags = os.environ.get("XLA_FLAGS", "")
        return {**variables, "XLA_FLAGS": f"{flags} --xla_force_host_platform_device_count={size}"}
    return {
        **variables,
        "TPU_SKIP_MDS_QUERY": "1",
        "TPU_ACCELERATOR_TYPE": "v5p-8",  # any: the topology's name decides
        "TPU_WORKER_HOSTNAMES": "localhost",
        "TPU_WORKER_ID": "0",
        "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",  # nothing here holds a TPU
        "TF_CPP_MIN_LOG_LEVEL": "3",  # what matters is raised too
    }


def find_topology(name: str, slices: int = 1) -> Topology:
    """The devices of a topology, of which there may be several slices.

    Raises:
        ValueError: a name that is not known, a size that does not exist, or no libtpu.
    """
    kind, _, size = name.partition(":")
    if kind == "cpu" and size.isdigit():
        devices = jax.devices("cpu")
        if len(devices) != int(size) * slices:
            raise ValueError(
                f"this process has {len(devices)} CPU device(s), not {name}: start it with"
                f" XLA_FLAGS=--xla_force_host_platform_device_count={size}"
            )
        return Topology(name, devices, None, name)
    if kind in GPUS and size.isdigit() and int(size) > 0:
        stand_in = _stand_in(int(size) * slices)
        return Topology(name, _tpu(stand_in, 1).devices, hardware(GPUS[kind]), stand_in)
    if kind in TPUS and re.fullmatch(r"\d+(x\d+){1,2}", size):
        return _tpu(name, slices)
    raise ValueError(f"topology {name} is not known: give one such as {EXAMPLES}")


def _tpu(name: str, slices: int) -> Topology:
    from jax.experimental import topologies

    kind, _, _ = name.partition(":")
    settings: dict[str, Any] = {"num_slices": slices} if slices > 1 else {}
    if kind == "v4":
        settings["chip_config_name"] = "megacore"  # both cores of a chip as one device
    try:
        found = topologies.get_topology_desc(platform="tpu", topology_name=name, **settings)
    except Exception as error:
        text = str(error).splitlines()[0]
        if re.search("libtpu|not found|No module|[Pp]lugin|backend", text):
            raise ValueError(
                f"planning for {name} needs libtpu, Google's compiler for TPUs (it runs on any"
                " Linux machine): pip install libtpu"
            ) from error
        raise ValueError(f"topology {name} does not exist ({text}): one is {EXAMPLES}") from error
    return Topology(name, found.devices, hardware(found.devices[0].device_kind), name)


def _stand_in(devices: int) -> str:
    """A TPU v5p slice (or, of one or two, v5e) with as many devices."""
    if devices in (1, 2):
        return f"v5e:1x{devices}"
    if devices & (devices - 1):
        raise ValueError(f"a plan for GPUs needs a power of two of them, not {devices}")
    shape = [2, 2, 1]
    while math.prod(shape) < devices:
        shape[shape.index(min(shape))] *= 2
    return "v5p:" + "x".join(map(str, sorted(shape, key=lambda n: (n == 1, n))))  # 2x2x1, 2x4x4


# --- how fast an axis of a mesh is


def axis_bandwidths(mesh: jax.sharding.Mesh, topology: Topology) -> Mapping[str, float]:
    """Bytes/s that each device can send to the others of its slice along each axis of a mesh.

    On a TPU's torus a collective uses both directions of every dimension that the axis spans, if
    the dimension closes to a ring, one direction if it is a line or a part of the ring, and shares
    the links with the groups that it is interleaved with. Of GPUs an axis that leaves a node is as
    slow as the network.
    """
    result = {}
    for place, name in enumerate(mesh.axis_names):
        if mesh.shape[name] == 1:
            continue
        group = list(np.moveaxis(mesh.devices, place, -1).reshape(-1, mesh.shape[name])[0])
        if topology.hardware is None:
            continue
        if topology.compiled_for != topology.name:  # GPUs
            result[name] = _gpu(mesh, place, topology.hardware)
        else:
            result[name] = _torus(group, topology)
    return result


def _gpu(mesh: jax.sharding.Mesh, place: int, device: Hardware) -> float:
    """NVLink if the groups along this axis, and those inside them, stay within a node."""
    reach = math.prod(mesh.devices.shape[place:])
    return device.link if reach <= GPUS_PER_NODE else device.network


def _torus(group: list[Any], topology: Topology) -> float:
    coordinates = np.array([device.coords for device in group])
    sizes = np.array([device.coords for device in topology.devices]).max(0) + 1
    total = 0.0
    for places, size in zip(coordinates.T, sizes, strict=True):
        found = sorted(set(places.tolist()))
        if len(found) == 1:
            continue
        link = topology.hardware.link
        if len(found) == size:
            ring = topology.hardware.wraps and size % topology.hardware.wraps == 0
            total += 2 * link if ring else link
        elif found[-1] - found[0] + 1 == len(found):
            total += link
        else:
            total += link * len(found) / size
    # The cores of one chip alone: memory they share.
    return total or topology.hardware.memory_bandwidth

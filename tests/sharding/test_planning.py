from pathlib import Path
from types import SimpleNamespace

import jax
import numpy as np
import pytest
from jax.experimental import topologies

from experiments.plan import markdown
from lmjax.sharding import planning
from lmjax.sharding.hardware import Hardware, hardware
from lmjax.sharding.planning import _temporaries, _text, plan_step, roofline
from lmjax.sharding.topology import Topology, axis_bandwidths, find_topology
from lmjax.training.optimizers import AdamW
from lmjax.training.schedules import Constant
from lmjax.training.step import arrange, prepare
from tests.training.toy import Numbers, Regression

CHIP = Hardware(flops=100.0, memory=1e3, memory_bandwidth=50.0, link=10.0, network=1.0, wraps=4)


def torus(*sizes):
    """Devices of a slice in the order of their coordinates."""
    places = np.ndindex(*sizes)
    return [SimpleNamespace(coords=place, id=i) for i, place in enumerate(places)]


def bandwidths(devices, shape, name="v4:4x8", compiled_for="v4:4x8"):
    grid = np.array(devices, dtype=object).reshape(shape)
    mesh = SimpleNamespace(
        axis_names=("data", "fsdp", "model"),
        devices=grid,
        shape=dict(zip(("data", "fsdp", "model"), shape, strict=True)),
    )
    return axis_bandwidths(mesh, Topology(name, devices, CHIP, compiled_for))


def test_an_axis_uses_the_links_it_spans():
    devices = torus(4, 8)
    assert bandwidths(devices, (1, 32, 1)) == {"fsdp": 40.0}  # both rings, both directions
    assert bandwidths(devices, (1, 4, 8)) == {"fsdp": 20.0, "model": 20.0}
    # Four neighbours are a line; pairs with a stride of four share each link with three others.
    assert bandwidths(devices, (4, 2, 4)) == {"data": 20.0, "fsdp": 10.0 * 2 / 8, "model": 10.0}
    assert bandwidths(torus(3, 8), (1, 3, 8)) == {"fsdp": 10.0, "model": 20.0}  # 3 is no ring


def test_gpus_have_their_node_and_then_the_network():
    rates = bandwidths(torus(4, 8), (2, 2, 8), name="h100:32")
    assert rates == {"data": 1.0, "fsdp": 1.0, "model": 10.0}


def test_the_roofline():
    found = roofline(
        CHIP,
        devices=4,
        hardware_flops=7_200.0,
        model_flops=5_400.0,
        memory_bytes=600.0,
        sent={"fsdp": 100.0, "data+fsdp": 6.0, "slices": 2.0},
        rates={"fsdp": 20.0, "data": 2.0, "slices": 1.0},
        tokens=100,
        steps=86_400,
    )
    assert found["compute_seconds"] == pytest.approx(20.0)  # at 0.9 of 100 FLOP/s
    assert found["memory_seconds"] == pytest.approx(12.0)
    assert found["collective_seconds"] == pytest.approx(5 + 3 + 2)
    assert found["bound"] == "compute"
    assert found["step_seconds"] == pytest.approx(20.0)
    assert found["step_seconds_exposed"] == pytest.approx(30.0)
    assert found["utilization"] == pytest.approx(5_400 / 400 / 20)
    assert found["tokens_per_second"] == pytest.approx(5.0)
    assert found["schedule_days"] == pytest.approx(20.0)
    assert found["schedule_device_hours"] == pytest.approx(20 * 24 * 4)


def test_what_the_compiler_says_when_memory_runs_out():
    says = "the total memory required for HLO temporaries (23.60G) exceeds available HBM (15.75G)"
    assert _temporaries(says) == 23.6 * 2**30
    assert _temporaries("RESOURCE_EXHAUSTED: Used 20.5G of 15.7G hbm. Exceeded") == 20.5 * 2**30
    assert _temporaries("RESOURCE_EXHAUSTED") == 0


def test_programs_that_jaxlib_cannot_read_back():
    """As libtpu makes them for SparseCores: the compiler writes them down instead."""

    class Unreadable:
        def as_text(self):
            raise jax.errors.JaxRuntimeError("INTERNAL: RET_CHECK failure")

    class Lowered:
        def compile(self, options):
            assert options["xla_dump_hlo_as_text"] is True
            for name in ("m.before_optimizations.txt", "m.after_optimizations.txt"):
                (Path(options["xla_dump_to"]) / name).write_text(name)

    assert _text(Lowered(), Unreadable()) == "m.after_optimizations.txt"


def test_the_makers_figures_are_of_one_device():
    assert hardware("TPU v3").memory == 16 * 2**30  # a core
    assert hardware("TPU v4").memory == 32 * 2**30  # a chip
    assert hardware("TPU v5").memory_bandwidth == 2.765e12
    assert hardware("cpu") is None


@pytest.mark.parametrize("name", ["v9:4x4", "v3", "v3:four", "cpu:x", "h100:0", "x"])
def test_unknown_topologies_list_what_is_known(name):
    with pytest.raises(ValueError, match=f"topology {name} is not known: .* v3:32x32.* cpu:8"):
        find_topology(name)


def test_topologies_that_do_not_exist(monkeypatch):
    def refuse(**_):
        raise RuntimeError('INVALID_ARGUMENT: Topology layout "v5e:3x5" is not divisible')

    monkeypatch.setattr(topologies, "get_topology_desc", refuse)
    with pytest.raises(ValueError, match="topology v5e:3x5 does not exist .*not divisible"):
        find_topology("v5e:3x5")


def test_without_libtpu_the_pip_line(monkeypatch):
    def refuse(**_):
        raise RuntimeError("Unable to find libtpu.so")

    monkeypatch.setattr(topologies, "get_topology_desc", refuse)
    with pytest.raises(ValueError, match="pip install libtpu"):
        find_topology("v3:4x4")


@pytest.mark.parametrize(
    ("topology", "kind", "used", "fits"),
    [
        ("h200:1", "NVIDIA H200", 120, True),
        ("h200:1", "NVIDIA H200", 140, False),
        ("v5e:1x1", "TPU v5 lite", 15, False),
    ],
)
def test_a_gpu_may_hold_what_its_stand_in_does_not(monkeypatch, topology, kind, used, fits):
    def no_room(*_):
        raise jax.errors.JaxRuntimeError(f"RESOURCE_EXHAUSTED: Used {used}.0G of 15.7G hbm.")

    monkeypatch.setattr(planning, "lower_step", no_room)
    task, optimizer, devices = Regression(), AdamW(Constant(0.1)), jax.devices()[:1]
    layout = arrange(task, optimizer, 8, devices=devices)
    report = plan_step(
        prepare(task, optimizer, layout),
        {k: jax.ShapeDtypeStruct(v.shape, v.dtype) for k, v in Numbers().batch(0).items()},
        layout,
        Topology(topology, devices, hardware(kind), "v5e:1x1"),
        reads=(),
        model_flops=1.0,
        steps=1,
    )
    assert report.fits == fits and report.step_seconds is None
    assert report.bytes_per_device > used * 2**30
    assert fits == any("v5e:1x1 has less memory" in note for note in report.notes)
    row = markdown([("mini", "dp", report)]).splitlines()[-1]
    assert row.startswith(f"| mini | 1 x {topology} | {'dp' if fits else 'does not fit'} | ")
    assert row.endswith(" | | | |")


def test_gpus_need_a_power_of_two():
    with pytest.raises(ValueError, match="a power of two of them, not 12"):
        find_topology("h100:12")

"""Runs itself, `python -m tests.sharding.test_hlo`, where it needs eight devices or a TPU."""

import json
import os
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from lmjax.models.layers import Execution
from lmjax.models.t5 import T5, T5Config
from lmjax.sharding.flops import product_flops
from lmjax.sharding.hlo import (
    Collective,
    Loop,
    collectives,
    hbm_bytes,
    loops,
    parse_hlo,
    sent_bytes,
)
from lmjax.tasks.seq2seq import Seq2Seq
from lmjax.training.state import abstract_parameters
from tests.sharding.conftest import printed_by

LAYERS, WIDTH, HIDDEN, ROWS = 5, 256, 512, 4_096


# --- products


def layer(x, weights):
    up, down = weights
    return x + jnp.tanh(x @ up) @ down, None


def shapes():
    return (
        jax.ShapeDtypeStruct((LAYERS, WIDTH, HIDDEN), jnp.float32),
        jax.ShapeDtypeStruct((LAYERS, HIDDEN, WIDTH), jnp.float32),
    )


def loss(weights, x, layer=layer, unroll=1):
    x, _ = jax.lax.scan(layer, x, weights, unroll=unroll)
    return (x**2).sum()


def flops(function, *arguments):
    return product_flops(jax.make_jaxpr(function)(*arguments))


X = jax.ShapeDtypeStruct((ROWS, WIDTH), jnp.float32)
PRODUCT = 2 * ROWS * WIDTH * HIDDEN


def test_products_of_a_scan_forwards_backwards_and_again():
    assert flops(loss, shapes(), X) == 2 * LAYERS * PRODUCT
    # Gradients of both operands of both products of a layer; the first needs none of x.
    gradient = jax.grad(loss, argnums=(0, 1))
    assert flops(gradient, shapes(), X) == 6 * LAYERS * PRODUCT
    assert flops(jax.jit(gradient), shapes(), X) == 6 * LAYERS * PRODUCT

    def again(weights, x):
        policy = jax.checkpoint_policies.nothing_saveable
        return loss(weights, x, jax.checkpoint(layer, policy=policy, prevent_cse=False))

    # The second product is not needed backwards.
    assert flops(jax.grad(again, argnums=(0, 1)), shapes(), X) == 7 * LAYERS * PRODUCT


def test_products_of_unrolled_layers_are_those_of_scanned_ones():
    def unrolled(weights, x):
        for i in range(LAYERS):
            x, _ = layer(x, jax.tree.map(lambda w, i=i: w[i], weights))
        return (x**2).sum()

    both = (0, 1)
    assert flops(jax.grad(unrolled, both), shapes(), X) == flops(jax.grad(loss, both), shapes(), X)
    assert flops(lambda w, x: loss(w, x, unroll=LAYERS), shapes(), X) == flops(loss, shapes(), X)


def test_products_through_other_calls():
    a, b = jnp.zeros((8, 4)), jnp.zeros((4, 16))
    one = 2 * 8 * 4 * 16

    @jax.custom_vjp
    def custom(a, b):
        return a @ b

    custom.defvjp(lambda a, b: (a @ b, None), lambda _, g: (g @ b.T, a.T @ g))
    jvp = jax.custom_jvp(jnp.matmul)
    jvp.defjvp(lambda values, tangents: (values[0] @ values[1], tangents[0] @ values[1]))
    assert flops(custom, a, b) == flops(jvp, a, b) == one

    def branches(a, b):
        return jax.lax.cond(a[0, 0] > 0, lambda: a @ b, lambda: (a @ b) @ (b.T @ b))

    assert flops(branches, a, b) == one + 2 * 16 * 4 * 16 + 2 * 8 * 16 * 16
    einsum = flops(lambda x: jnp.einsum("bthd,bshd->bhts", x, x), jnp.zeros((2, 6, 3, 5)))
    assert einsum == 2 * 2 * 3 * 6 * 6 * 5

    def nested(x):
        def inner(x, _):
            return jax.lax.scan(lambda x, _: (x @ x, None), x, length=3)

        return jax.lax.scan(lambda x, _: (inner(x, None)[0], None), x, length=4)[0]

    assert flops(nested, jnp.zeros((7, 7))) == 12 * 2 * 7**3

    mesh = jax.sharding.AbstractMesh((4, 2), ("x", "y"), axis_types=(AxisType.Auto,) * 2)
    shard = jax.shard_map(jnp.matmul, mesh=mesh, in_specs=(P("x"), P()), out_specs=P("x"))
    assert flops(shard, a, b) == 2 * one  # computed twice along y


def test_products_of_t5_are_those_of_its_formula():
    config = T5Config(vocab=512, layers=3, width=32, heads=4, head_width=8, feed_forward=64)
    rows, lengths = 2, {"inputs": 24, "targets": 12}
    batch = {
        name + end: jax.ShapeDtypeStruct((rows, length), jnp.int32)
        for name, length in lengths.items()
        for end in ("", "_segment_ids", "_positions")
    }
    batch["loss_weights"] = jax.ShapeDtypeStruct((rows, 12), jnp.float32)

    def training(remat):
        task = Seq2Seq(T5(config, Execution("float32", remat)))
        params, _ = abstract_parameters(task)

        def loss(params, batch):
            return task.loss(params, {}, batch, task.normalizers(batch), {}, 0)[0]

        return flops(jax.grad(loss), params, batch)

    formula = config.training_flops(rows, *lengths.values())
    logits = 6 * rows * 12 * 32 * 512
    assert training("none") == formula
    assert training("matmuls") < training("full")
    assert training("full") < formula + (formula - logits) / 3  # layers once more, at the most


def test_convolutions():
    image, kernel = jnp.zeros((2, 8, 8, 6)), jnp.zeros((3, 3, 3, 10))

    def convolve(image, kernel):
        names = ("NHWC", "HWIO", "NHWC")
        return jax.lax.conv_general_dilated(
            image, kernel, (2, 2), "SAME", dimension_numbers=names, feature_group_count=2
        )

    assert flops(convolve, image, kernel) == 2 * (2 * 4 * 4 * 10) * (3 * 3 * 3)


def test_products_in_while_loops():
    x = jnp.zeros((4, 4))

    def loop(last):
        def go_on(state):
            return state[0] < last

        return lambda x: jax.lax.while_loop(go_on, lambda s: (s[0] + 1, s[1] @ s[1]), (2, x))[1]

    assert flops(loop(7), x) == 5 * 2 * 4**3
    with pytest.raises(ValueError, match="use jax.lax.scan"):
        flops(lambda n, x: loop(n)(x), 7, x)
    # Without products it does not matter.
    assert flops(lambda n: jax.lax.fori_loop(0, n, lambda _, i: i + 1, 0), 3) == 0


# --- a program by hand

TEXT = """
HloModule step, is_scheduled=true

%add (a: f32[], b: f32[]) -> f32[] {
  %a = f32[] parameter(0)
  %b = f32[] parameter(1)
  ROOT %sum = f32[] add(%a, %b)
}

%slice_one (stack: f32[6,8,4], at: s32[]) -> f32[8,4] {
  %stack = f32[6,8,4]{2,1,0:T(8,128)} parameter(0)
  %at = s32[] parameter(1)
  %zero = s32[] constant(0)
  %one = f32[1,8,4]{2,1,0} dynamic-slice(%stack, %at, %zero, %zero), dynamic_slice_sizes={1,8,4}
  ROOT %flat = f32[8,4]{1,0} bitcast(%one)
}

%all-reduce-scatter (whole: f32[8,4]) -> f32[2,4] {
  %whole = f32[8,4]{1,0} parameter(0)
  %reduced = f32[8,4]{1,0} all-reduce(%whole), channel_id=3, replica_groups=[2,4]<=[8], to_apply=%add
  %here = s32[] constant(0)
  ROOT %part = f32[2,4]{1,0} dynamic-slice(%reduced, %here, %here), dynamic_slice_sizes={2,4}
}

%bounded (state: (s32[], s32[], f32[8,4])) -> pred[] {
  %state = (s32[], s32[], f32[8,4]{1,0}) parameter(0)
  %i = s32[] get-tuple-element(%state), index=0
  %n = s32[] get-tuple-element(%state), index=1
  ROOT %less = pred[] compare(%i, %n), direction=LE
}

%permuting (state.1: (s32[], s32[], f32[8,4])) -> (s32[], s32[], f32[8,4]) {
  %state.1 = (s32[], s32[], f32[8,4]{1,0}) parameter(0)
  %i.1 = s32[] get-tuple-element(%state.1), index=0
  %n.1 = s32[] get-tuple-element(%state.1), index=1
  %x.1 = f32[8,4]{1,0:S(1)} get-tuple-element(%state.1), index=2
  %two = s32[] constant(2)
  %next = s32[] add(%i.1, %two)
  %sent = (f32[8,4]{1,0}, f32[8,4]{1,0}, u32[], u32[]) collective-permute-start(%x.1), channel_id=5, source_target_pairs={{0,1},{1,2},{2,3},{3,0},{4,5},{5,6},{6,7},{7,4}}
  %got = f32[8,4]{1,0:S(1)} collective-permute-done(%sent)
  ROOT %out = (s32[], s32[], f32[8,4]{1,0}) tuple(%next, %n.1, %got)
}

%outer_condition (state.2: (s32[], f32[6,8,4], f32[8,4], s32[])) -> pred[] {
  %state.2 = (s32[], f32[6,8,4]{2,1,0}, f32[8,4]{1,0}, s32[]) parameter(0)
  %i.2 = s32[] get-tuple-element(%state.2), index=0
  %last = s32[] constant(0)
  ROOT %more = pred[] compare(%last, %i.2), direction=LT
}

%outer_body (state.3: (s32[], f32[6,8,4], f32[8,4], s32[])) -> (s32[], f32[6,8,4], f32[8,4], s32[]) {
  %state.3 = (s32[], f32[6,8,4]{2,1,0}, f32[8,4]{1,0}, s32[]) parameter(0)
  %i.3 = s32[] get-tuple-element(%state.3), index=0
  %stack.3 = f32[6,8,4]{2,1,0} get-tuple-element(%state.3), index=1
  %x.3 = f32[8,4]{1,0} get-tuple-element(%state.3), index=2
  %n.3 = s32[] get-tuple-element(%state.3), index=3
  %weight = f32[8,4]{1,0:S(1)} fusion(%stack.3, %i.3), kind=kLoop, calls=%slice_one
  %start = s32[] constant(1)
  %inner_state = (s32[], s32[], f32[8,4]{1,0}) tuple(%start, %n.3, %weight)
  %inner = (s32[], s32[], f32[8,4]{1,0}) while(%inner_state), condition=%bounded, body=%permuting
  %moved = f32[8,4]{1,0:S(1)} get-tuple-element(%inner), index=2
  %scattered = f32[2,4]{1,0:S(1)} fusion(%moved), kind=kCustom, calls=%all-reduce-scatter
  %gathered = f32[8,4]{1,0:S(1)} all-gather(%scattered), channel_id=4, replica_groups=[4,2]<=[2,4]T(1,0), dimensions={0}
  %step = s32[] constant(1)
  %next.3 = s32[] subtract(%i.3, %step)
  ROOT %out.3 = (s32[], f32[6,8,4]{2,1,0}, f32[8,4]{1,0}, s32[]) tuple(%next.3, %stack.3, %x.3, %n.3)
}

ENTRY %main (weights: f32[6,8,4], x: f32[8,4]) -> f32[8,4] {
  %weights = f32[6,8,4]{2,1,0} parameter(0)
  %x = f32[8,4]{1,0} parameter(1)
  %six = s32[] constant(6)
  %seven = s32[]{:T(128)} constant(7)
  %copied = s32[]{:T(128)} copy(%seven)
  %begin = (s32[], f32[6,8,4]{2,1,0}, f32[8,4]{1,0}, s32[]) tuple(%six, %weights, %x, %copied)
  %loop = (s32[], f32[6,8,4]{2,1,0}, f32[8,4]{1,0}, s32[]) while(%begin), condition=%outer_condition, body=%outer_body
  ROOT %result = f32[8,4]{1,0} get-tuple-element(%loop), index=2
}
"""  # noqa: E501


class Device:
    def __init__(self, slice_index=0):
        self.slice_index = slice_index


class Grid:
    """As much of a mesh as there is to know about devices that are not there."""

    def __init__(self, slices=1, **shape):
        self.shape, self.axis_names = shape, tuple(shape)
        count = int(np.prod([*shape.values()]))
        devices = [Device(i * slices // count) for i in range(count)]
        self.devices = np.array(devices, object).reshape(tuple(shape.values()))


def test_a_program_by_hand():
    program = parse_hlo(TEXT)
    assert loops(program) == (Loop("inner", 4, 6), Loop("loop", 6, 1))
    found = collectives(program, Grid(data=2, fsdp=4))
    whole = 8 * 4 * 4
    assert found == (
        Collective("collective-permute", whole, whole, 24, ("fsdp",), 4, False, True),
        Collective("reduce-scatter", whole * 3 / 4, whole / 4, 6, ("fsdp",), 4, False, True),
        Collective("all-gather", whole / 4, whole / 2, 6, ("data",), 2, False, True),
    )
    assert sent_bytes(found)["collective-permute", ("fsdp",)] == 24 * whole
    # From HBM come one layer's weights each time, and the scalars; the rest is on the chip.
    layers = 6 * whole
    assert layers <= hbm_bytes(program) <= layers + 24 * 12 + 6 * 16 + 8


def test_an_unknown_number_of_trips_is_not_hidden():
    program = parse_hlo(TEXT.replace("constant(7)", 'custom-call(), custom_call_target="f"'))
    assert loops(program) == (Loop("inner", None, 6), Loop("loop", 6, 1))
    permute, scatter, _ = collectives(program, Grid(data=2, fsdp=4))
    assert (permute.count, permute.certain) == (6, False)
    assert (scatter.count, scatter.certain) == (6, True)
    with pytest.raises(ValueError, match="no ENTRY"):
        parse_hlo("HloModule nothing")


@pytest.mark.parametrize(
    ("groups", "axes", "size"),
    [
        ("replica_groups={{0,1,2,3},{4,5,6,7}}", ("fsdp", "model"), 4),
        ("replica_groups={{0,4},{1,5},{2,6},{3,7}}", ("data",), 2),
        ("replica_groups={}", ("data", "fsdp", "model"), 8),
        ("replica_groups=[4,2]<=[8]", ("model",), 2),
        ("replica_groups=[2,4]<=[4,2]T(1,0)", ("data", "fsdp"), 4),
        ("replica_groups=[4,2]<=[2,2,2]T(0,2,1)", ("fsdp",), 2),
        ("replica_groups=mesh['axis_0'=2,'axis_1'=4] {'axis_1'}", ("fsdp", "model"), 4),
        ("replica_groups=mesh['a'=2,'b'=4] {'b':(1)2}", ("fsdp",), 2),
        ("replica_groups=mesh['a'=2,'b'=4] {'a','b':(2)2}", ("data", "model"), 4),
        ("replica_groups=mesh['a'=4,'b'=2], device_ids=([2,4]T(1,0)) {'b'}", ("data",), 2),
        ("replica_groups=mesh['a'=4,'b'=2], device_ids=(0,4,1,5,2,6,3,7) {'b'}", ("data",), 2),
    ],
)
def test_groups_are_found_on_the_mesh(groups, axes, size):
    old = "replica_groups=[4,2]<=[2,4]T(1,0)"
    *_, gather = collectives(parse_hlo(TEXT.replace(old, groups)), Grid(data=2, fsdp=2, model=2))
    assert (gather.axes, gather.group_size) == (axes, size)
    assert gather.bytes == (size - 1) * 2 * 4 * 4


def test_what_goes_between_slices():
    start = TEXT.index("  %gathered")
    message = (
        "  %sent.3 = (f32[2,4]{1,0}, u32[], token[]) send(%scattered), channel_id=9,"
        ' frontend_attributes={_xla_megascale_transfer_type="ALL_REDUCE"}\n'
    )
    program = parse_hlo(TEXT[:start] + message + TEXT[start:])
    found = collectives(program, Grid(2, data=2, fsdp=4))
    assert found[2] == Collective("all-reduce", 32, 32, 6, ("data",), 2, True, True)
    assert not found[1].across_slices and found[3].across_slices


# --- programs that the compiler makes


def step(weights, x):
    """One of plain gradient descent; the last layer's output has no collective of its own."""
    gradients = jax.grad(loss)(weights, x)
    return jax.tree.map(lambda w, g: w - g, weights, gradients)


def microbatched(weights, x):
    def add(total, x):
        return jax.tree.map(jnp.add, total, jax.grad(loss)(weights, x)), None

    return jax.lax.scan(add, jax.tree.map(jnp.zeros_like, weights), x)[0]


LAYOUTS = {  # mesh, up, down, rows
    "dp": ({"data": 8}, P(), P(), P("data")),
    "fsdp": ({"data": 2, "fsdp": 4}, P(None, "fsdp"), P(None, "fsdp"), P(("data", "fsdp"))),
    "tp": ({"data": 2, "model": 4}, P(None, None, "model"), P(None, "model"), P("data")),
}


def analyse(devices, layout, function=step, pieces=()):
    shape, up, down, rows = LAYOUTS[layout]
    devices = np.array(devices[:8]).reshape(tuple(shape.values()))
    mesh = Mesh(devices, tuple(shape), axis_types=(AxisType.Auto,) * len(shape))
    weights = tuple(
        jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=NamedSharding(mesh, spec))
        for s, spec in zip(shapes(), (up, down), strict=True)
    )
    spec = NamedSharding(mesh, P(*(None,) * len(pieces), *rows))
    x = jax.ShapeDtypeStruct((*pieces, ROWS, WIDTH), jnp.float32, sharding=spec)
    shardings = tuple(w.sharding for w in weights)
    compiled = jax.jit(function, out_shardings=shardings).lower(weights, x).compile()
    program = parse_hlo(compiled.as_text())
    return {
        "sent": {f"{kind} {' '.join(axes)}": b for (kind, axes), b in _sent(program, mesh)},
        "trips": sorted(l.trips * l.count for l in loops(program)),  # noqa: E741
        "hbm": hbm_bytes(program),
    }


def _sent(program, mesh):
    return sent_bytes(collectives(program, mesh)).items()


def main() -> None:
    if sys.argv[1] == "cpu":
        os.environ["XLA_FLAGS"] = "--xla_force_host_platform_device_count=8"
        jax.config.update("jax_platforms", "cpu")
        results = {name: analyse(jax.devices(), name) for name in LAYOUTS}
        results["nested"] = analyse(jax.devices(), "fsdp", microbatched, (3,))
    else:
        from jax.experimental import topologies

        topology = topologies.get_topology_desc(platform="tpu", topology_name="v5e:2x4")
        results = {name: analyse(topology.devices, name) for name in LAYOUTS}
    print(json.dumps(results))


def run(kind: str) -> dict:
    tpu = {
        "TPU_SKIP_MDS_QUERY": "1",
        "TPU_ACCELERATOR_TYPE": "v5litepod-8",
        "TPU_WORKER_HOSTNAMES": "localhost",
        "TPU_WORKER_ID": "0",
        "JAX_PLATFORMS": "cpu",
        "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
    }
    return printed_by("test_hlo", kind, **(tpu if kind == "tpu" else {}))


LAYER = 2 * WIDTH * HIDDEN * 4  # bytes of its weights, and of their gradients
ROWS_OF_GROUP = ROWS // 2 * WIDTH * 4  # bytes of activations, where the batch is divided by two


@pytest.fixture(scope="module")
def on_cpu():
    return run("cpu")


def test_traffic_of_compiled_layers(on_cpu):
    shards = LAYER / 4  # a device's part of a layer, whose gradient two groups add up
    assert on_cpu["dp"]["sent"] == {"all-reduce data": LAYERS * 2 * 7 / 8 * LAYER}
    assert on_cpu["fsdp"]["sent"] == {
        "all-gather fsdp": 2 * LAYERS * 3 / 4 * LAYER,
        "all-reduce fsdp": LAYERS * 2 * 3 / 4 * LAYER,  # a CPU program scatters nothing
        "all-reduce data": LAYERS * 2 * 1 / 2 * shards,
    }
    assert on_cpu["tp"]["sent"] == {
        "all-reduce model": 2 * LAYERS * 2 * 3 / 4 * ROWS_OF_GROUP,  # forwards and backwards
        "all-reduce data": LAYERS * 2 * 1 / 2 * shards,
    }
    nested = {kind: 3 * sent for kind, sent in on_cpu["fsdp"]["sent"].items()}
    assert on_cpu["nested"]["sent"] == nested
    assert on_cpu["nested"]["trips"] == [3, 3 * LAYERS, 3 * LAYERS]


def test_memory_traffic_of_compiled_layers(on_cpu):
    # At the least the weights, forwards and backwards, and each product's rows.
    rows = ROWS // 8 * 4 * (WIDTH + HIDDEN)
    least = LAYERS * (2 * LAYER + 6 * rows)
    for layout in ("dp", "fsdp"):
        assert least < on_cpu[layout]["hbm"] < 6 * least


def test_traffic_on_tpus_that_are_not_there():
    pytest.importorskip("libtpu")
    found = run("tpu")
    for layout in LAYOUTS:
        assert found[layout]["trips"] == [LAYERS, LAYERS], layout
    assert found["dp"]["sent"] == {"all-reduce data": LAYERS * 2 * 7 / 8 * LAYER}
    assert found["fsdp"]["sent"] == {
        "all-gather fsdp": 2 * LAYERS * 3 / 4 * LAYER / 2,  # products there are of bfloat16
        "reduce-scatter fsdp": LAYERS * 3 / 4 * LAYER,
        "all-reduce data": LAYERS * 2 * 1 / 2 * LAYER / 4,
    }
    assert found["tp"]["sent"]["all-reduce model"] == 2 * LAYERS * 2 * 3 / 4 * ROWS_OF_GROUP


if __name__ == "__main__":
    main()

"""What a compiled program moves between devices and to and from memory, from its text.

XLA's own `cost_analysis` counts the body of a loop once; here it counts as often as it runs. Sizes
are those of the arrays, without a TPU's padding to tiles.
"""

import dataclasses
import functools
import itertools
import math
import operator
import re
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from typing import NamedTuple

import jax
import numpy as np

# --- the text of the compiled program


class Instruction(NamedTuple):
    """One line of HLO: `%name = shape opcode(arguments), attributes`."""

    name: str
    opcode: str
    shape: str
    arguments: str
    """Names of operands; of a constant its value, of a parameter its number."""
    attributes: str

    @property
    def operands(self) -> list[str]:
        return re.findall(r"%([\w.\-]+)", self.arguments)

    @property
    def called(self) -> list[str]:
        """Computations that it runs itself, but for the body and condition of a loop."""
        keys = "calls|to_apply|true_computation|false_computation|branch_computations"
        found = re.findall(rf"(?:{keys})=(\{{.*?\}}|%[\w.\-]+)", self.attributes)
        return re.findall(r"%([\w.\-]+)", ",".join(found))

    def attribute(self, pattern: str) -> str | None:
        found = re.search(pattern, self.attributes)
        return found and found[1]


@dataclasses.dataclass(frozen=True)
class Computation:
    """Instructions in the order in which they run."""

    instructions: dict[str, Instruction]
    root: str

    @functools.cached_property
    def users(self) -> dict[str, list[tuple[Instruction, int]]]:
        """Who uses a result, and as which operand."""
        users = defaultdict(list)
        for op in self.instructions.values():
            for position, name in enumerate(op.operands):
                users[name].append((op, position))
        return users

    @functools.cached_property
    def parameters(self) -> dict[int, str]:
        ops = self.instructions.values()
        return {int(op.arguments): op.name for op in ops if op.opcode == "parameter"}


class Program(NamedTuple):
    """A compiled program."""

    computations: dict[str, Computation]
    entry: str


_HEADER = re.compile(r"(ENTRY )?%([\w.\-]+) \(.*\{$")
_LINE = re.compile(r"\s+(ROOT )?%([\w.\-]+) = (.*?) ([a-z][a-z0-9\-]*)\((.*?)\)(?:, (.*))?$")


def parse_hlo(text: str) -> Program:
    """Reads `compiled.as_text()`.

    Raises:
        ValueError: a text of another kind.
    """
    computations, entry, name, own, root = {}, "", "", {}, ""
    for line in text.splitlines():
        if line.startswith("}"):
            computations[name] = Computation(own, root)
        elif header := _HEADER.match(line):
            name, own, root = header[2], {}, ""
            entry = name if header[1] else entry
        elif found := _LINE.match(line):
            own[found[2]] = Instruction(found[2], found[4], found[3], found[5], found[6] or "")
            root = found[2] if found[1] else root
    if entry not in computations:
        raise ValueError("this is not the text of a compiled program: it has no ENTRY computation")
    return Program(computations, entry)


@functools.lru_cache(maxsize=4096)
def _sizes(shape: str) -> tuple[tuple[float, bool], ...]:
    """(bytes, in HBM) of each array in a shape; S(...) is one of a TPU's other memories."""
    sizes = []
    for kind, dims, layout in re.findall(r"([a-z]\w*)\[([\d,<=]*)\](\{[^}]*\})?", shape):
        bits = re.match(r"[a-z]+(\d+)", kind)
        count = math.prod(int(dim.lstrip("<=")) for dim in dims.split(",") if dim)
        sizes.append((count * (int(bits[1]) / 8 if bits else kind == "pred"), "S(" not in layout))
    return tuple(sizes)


def _bytes(shape: str) -> float:
    return sum(size for size, _ in _sizes(shape))


# --- how often each instruction runs

# The value of a computation's parameter, or of one element of it, where that is known.
_Given = Callable[[int, int | None], int | None]
_SAME = ("bitcast", "convert", "copy", "copy-done", "copy-start", "opt-barrier", "reshape")
_SCALARS = {
    **{"add": operator.add, "subtract": operator.sub, "multiply": operator.mul},
    **{"and": operator.and_, "LT": operator.lt, "LE": operator.le, "GT": operator.gt},
    **{"GE": operator.ge, "EQ": operator.eq, "NE": operator.ne},
}
_MOST_TRIPS = 100_000  # that are followed one by one


def _unknown(*_) -> None:
    return None


def _number(
    program: Program, computation: Computation, name: str, given: _Given, element: int | None = None
) -> int | None:
    """The integer that an instruction (or an element of its tuple) gives, if it can be known."""

    def of(name, element=None):
        return _number(program, computation, name, given, element)

    op = computation.instructions[name]
    match op.opcode:
        case "constant":
            value = {"true": "1", "false": "0"}.get(op.arguments, op.arguments)
            return int(value) if re.fullmatch(r"-?\d+", value) else None
        case "parameter":
            return given(int(op.arguments), element)
        case "get-tuple-element":
            return of(op.operands[0], int(op.attribute(r"index=(\d+)")))
        case "tuple":
            return of(op.operands[element])
        case "fusion" | "call":
            inner, operands = program.computations[op.called[0]], op.operands
            return _number(program, inner, inner.root, lambda i, e: of(operands[i], e), element)
        case "while":
            body = program.computations[op.attribute(r"body=%([\w.\-]+)")]
            return of(op.operands[0], element) if _unchanged(body, element) else None
    if op.opcode in _SAME:
        return of(op.operands[0], element)
    scalar = _SCALARS.get(op.attribute(r"direction=(\w+)") or op.opcode, _unknown)
    values = [of(operand) for operand in op.operands]
    return None if None in values else scalar(*values)


def _unchanged(body: Computation, element: int | None) -> bool:
    """Whether a loop hands on an element of its tuple as it is."""
    op = body.instructions[body.root]
    if element is None or op.opcode != "tuple":
        return False
    op = body.instructions[op.operands[element]]
    while op.opcode in _SAME:
        op = body.instructions[op.operands[0]]
    if op.opcode != "get-tuple-element" or op.attribute(r"index=(\d+)") != str(element):
        return False
    return body.instructions[op.operands[0]].opcode == "parameter"


def _loop(
    program: Program, computation: Computation, loop: Instruction, given: _Given
) -> tuple[int | None, _Given]:
    """How often a while loop runs, None if that cannot be known, and what its body is given.

    CPU programs say how often. TPU programs do not: their condition and body are run on numbers.
    """
    condition, body = (
        program.computations[loop.attribute(rf"{part}=%([\w.\-]+)")]
        for part in ("condition", "body")
    )

    def start(element):
        return _number(program, computation, loop.operands[0], given, element)

    def inside(state) -> _Given:
        def value(_, element):
            if element in state:
                return state[element]
            return start(element) if _unchanged(body, element) else None

        return value

    if known := loop.attribute(r'"known_trip_count":\{"n":"(\d+)"'):
        return int(known), inside({})
    read = set()
    _number(program, condition, condition.root, lambda _, element: read.add(element))
    state = {element: start(element) for element in read if not _unchanged(body, element)}
    for trips in range(_MOST_TRIPS):
        goes_on = _number(program, condition, condition.root, inside(state))
        if not goes_on:
            return None if goes_on is None else trips, inside({})
        state = {e: _number(program, body, body.root, inside(state), e) for e in state}
    return None, inside({})


class _Executed(NamedTuple):
    computation: Computation
    op: Instruction
    count: int
    certain: bool
    trips: int | None
    """Of a loop."""


def _executed(
    program: Program, name: str, given: _Given = _unknown, count: int = 1, certain: bool = True
) -> Iterator[_Executed]:
    """What a computation runs, with its loops and all branches, but without fusions' insides."""
    computation = program.computations[name]
    for op in computation.instructions.values():
        trips = None
        if op.opcode == "while":
            trips, inside = _loop(program, computation, op, given)
            times, sure = count * (1 if trips is None else trips), certain and trips is not None
            body = op.attribute(r"body=%([\w.\-]+)")
            yield from _executed(program, body, inside, times, sure)
        elif op.opcode in ("call", "conditional", "async-start"):
            for inner in op.called:
                yield from _executed(program, inner, _unknown, count, certain)
        yield _Executed(computation, op, count, certain, trips)


class Loop(NamedTuple):
    """A loop of the compiled program."""

    name: str
    trips: int | None
    """None where it cannot be known; what is in the loop then counts as if it ran once."""
    count: int
    """How often the loop is begun in a step."""


def loops(program: Program) -> tuple[Loop, ...]:
    """All loops, inner ones before those around them."""
    executed = _executed(program, program.entry)
    return tuple(Loop(e.op.name, e.trips, e.count) for e in executed if e.op.opcode == "while")


# --- what devices send to each other

_IOTA = r"\[[\d,]+\](?:T\([\d,]+\))?"
_KINDS = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute")


class Collective(NamedTuple):
    """A collective operation of the compiled program."""

    kind: str
    """all-gather, all-reduce, reduce-scatter, all-to-all or collective-permute."""
    bytes: float
    """What a device sends each time, and receives too, by the ring algorithm: (g - 1) / g of the
    whole array in a group of g devices, for an all-reduce twice that; a permute sends all it has.
    """
    result_bytes: float
    """What a device has afterwards."""
    count: int
    """How often it runs in a step."""
    axes: tuple[str, ...]
    """The axes of the mesh along which the devices of a group differ; it may span a part of them.
    """
    group_size: int
    """Devices in a group, for a permute those along `axes`."""
    across_slices: bool
    """Whether it takes the network between slices."""
    certain: bool
    """False in a loop that runs an unknown number of times, where it is counted as if once."""


def collectives(program: Program, mesh: jax.sharding.Mesh) -> tuple[Collective, ...]:
    """Everything that a device sends to others in a step; what is started and finished counts once.

    Args:
        mesh: the one that the program was compiled for; HLO numbers devices in its order.
    """
    slices = np.array([getattr(device, "slice_index", 0) or 0 for device in mesh.devices.flat])
    found = []
    for e in _executed(program, program.entry):
        for computation, op, kind in _communications(program, e):
            groups = _groups(op, slices)
            if groups.shape[1] < 2:
                continue
            places = np.unravel_index(groups, mesh.devices.shape)
            differ = [(place != place[:, :1]).any() for place in places]
            axes = tuple(np.array(mesh.axis_names)[differ].tolist())
            size = groups.shape[1]
            if kind == "collective-permute":
                size = math.prod(mesh.shape[axis] for axis in axes)
            own = sum(_bytes(computation.instructions[name].shape) for name in op.operands)
            sent, result = {
                "all-gather": ((size - 1) * own, size * own),
                "all-reduce": (2 * (size - 1) / size * own, own),
                "reduce-scatter": ((size - 1) / size * own, own / size),
                "all-to-all": ((size - 1) / size * own, own),
                "collective-permute": (own, own),
            }[kind]
            across = bool((slices[groups] != slices[groups][:, :1]).any())
            found.append(
                Collective(kind, sent, result, e.count, axes, size, across, certain=e.certain)
            )
    return tuple(found)


def sent_bytes(collectives: Iterable[Collective]) -> dict[tuple[str, tuple[str, ...]], float]:
    """What a device sends in a step, by kind and axes of the mesh."""
    total = defaultdict(float)
    for c in collectives:
        total[c.kind, c.axes] += c.count * c.bytes
    return dict(total)


def _communications(
    program: Program, executed: _Executed
) -> Iterator[tuple[Computation, Instruction, str]]:
    """(computation, instruction, kind): the instruction itself, or those in a TPU's fusion."""
    computation, op = executed.computation, executed.op
    # Between slices a TPU's host takes part, and the operation is a message to it.
    message = op.attribute(r'_xla_megascale_transfer_type="(\w+)"')
    if message and op.opcode == "send":
        kind = message.lower().replace("_", "-")
        yield computation, op, kind if kind in _KINDS else "collective-permute"
    elif op.opcode.removesuffix("-start") in _KINDS:
        yield computation, op, op.opcode.removesuffix("-start")
    elif op.opcode == "fusion":
        inner = program.computations[op.called[0]]
        for each in inner.instructions.values():
            # Several fusions work on a gather at the same time: that which starts it counts.
            work = "async_collective_fusion_config" in each.attributes
            users = inner.users[each.name] if work else ()
            if work and not any('"AsyncCollectiveStart"' in u.attributes for u, _ in users):
                continue
            for found in _communications(program, executed._replace(computation=inner, op=each)):
                scatters = found[2] == "all-reduce" and _bytes(op.shape) < _bytes(each.shape)
                # An all-reduce of which a slice is kept is one that need not gather.
                yield (*found[:2], "reduce-scatter" if scatters else found[2])


def _groups(op: Instruction, slices: np.ndarray) -> np.ndarray:
    """The devices that take part, by their place in the program: a row for each group."""
    text, ids = op.attributes, np.arange(len(slices))
    if op.opcode == "send":
        return np.unique(slices, return_index=True)[1][None]  # one of each slice, whichever it is
    if found := re.search(r"source_target_pairs=\{([{},\d]*)\}", text):
        pairs = np.array(re.findall(r"\{(\d+),(\d+)\}", found[1]), int).reshape(-1, 2)
        return pairs if (pairs[:, 0] != pairs[:, 1]).any() else ids[:, None]
    if found := re.search(r"replica_groups=\{(\{[{},\d]*\})\}", text):
        return np.array([_integers(group) for group in re.findall(r"\{(.*?)\}", found[1])])
    if found := re.search(rf"replica_groups=\[([\d,]+)\]<=({_IOTA})", text):
        return _iota(found[2], ids).reshape(_integers(found[1]))
    mesh = rf"replica_groups=mesh\[(.*?)\](?:, device_ids=\(({_IOTA}|[\d,]+)\))? \{{(.*?)\}}"
    if found := re.search(mesh, text):
        axes, devices, along = found.groups()
        if devices:
            ids = _iota(devices, ids) if "[" in devices else np.array(_integers(devices))
        return _mesh_groups(axes, along, ids)
    return ids[None]  # no groups, or an empty list of them: all devices


def _mesh_groups(axes: str, along: str, ids: np.ndarray) -> np.ndarray:
    """The groups along some axes of a mesh that the compiler has named; `ids` fill it row by row.

    `'x':(2)4` in `along` is a part of the axis x, of size 4, with 2 before it.
    """
    parts = re.findall(r"'([^']+)'(?::\((\d+)\)(\d+))?", along)
    dims, grouped = [], []
    for name, size in re.findall(r"'([^']+)'=(\d+)", axes):
        own = [
            (int(b or 1), int(b or 1) * int(n or size)) for other, b, n in parts if other == name
        ]
        cuts = sorted({1, int(size)}.union(*own))
        for low, high in itertools.pairwise(cuts):
            if any(first <= low and high <= last for first, last in own):
                grouped.append(len(dims))
            dims.append(high // low)
    rest = [dim for dim in range(len(dims)) if dim not in grouped]
    groups = math.prod(dims[dim] for dim in rest)
    return ids.reshape(dims).transpose(*rest, *grouped).reshape(groups, -1)


def _iota(text: str, ids: np.ndarray) -> np.ndarray:
    """`[2,4]T(1,0)`: devices in this shape, transposed."""
    shape, _, order = text.partition("T")
    ids = ids.reshape(_integers(shape))
    return ids.transpose(_integers(order)) if order else ids


def _integers(text: str) -> list[int]:
    return [int(number) for number in re.findall(r"\d+", text)]


# --- what goes to and from memory

# These compute nothing, or what they do is counted elsewhere: at -done, or in what they run.
_FREE = (
    "parameter constant get-tuple-element tuple bitcast while call conditional opt-barrier"
    " after-all partition-id replica-id add-dependency copy-start slice-start async-start"
    " async-update async-done send send-done recv"
).split()
_FREE += [f"{kind}-start" for kind in _KINDS]
_ALIASES = ("AllocateBuffer", "ConcatBitcast", "AssumeGatherIndicesInBound")  # TPU custom calls


def hbm_bytes(program: Program) -> float:
    """Bytes that a device reads from and writes to its memory in a step, estimated.

    Every fusion, and everything not fused, reads its operands and writes its results once, from and
    to memory unless the compiler has placed them in a TPU's on-chip memory. Of what is sliced,
    gathered or updated in place only the slice counts. Kernels that read an operand several times
    are not known of, nor are a CPU's caches.
    """
    return math.fsum(
        e.count * _moved(program, e.computation, e.op)
        for e in _executed(program, program.entry)
        if e.op.opcode not in _FREE
        and e.op.attribute(r'custom_call_target="(\w+)"') not in _ALIASES
    )


def _moved(program: Program, computation: Computation, op: Instruction) -> float:
    starts = computation.instructions[op.operands[0]] if op.opcode.endswith("-done") else op
    total = math.fsum(
        written * in_hbm
        for written, (_, in_hbm) in zip(
            _written(program, computation, op), _sizes(op.shape), strict=True
        )
    )
    for position, name in enumerate(starts.operands):
        for size, in_hbm in _sizes(computation.instructions[name].shape):
            if in_hbm:
                total += min(size, _read(program, computation, op, position, size))
    return total


def _read(
    program: Program, computation: Computation, op: Instruction, position: int, size: float
) -> float:
    """Bytes that an instruction reads of an operand of this size."""
    opcode = op.opcode.removesuffix("-done")
    if position == 0 and opcode in ("dynamic-slice", "slice", "gather"):
        return _bytes(op.shape)
    if position == 0 and opcode == "dynamic-update-slice":
        return 0
    if position == 0 and opcode == "scatter":
        return _bytes(computation.instructions[op.operands[2]].shape)
    if op.opcode in ("bitcast", "get-tuple-element", "fusion"):
        name = op.name
        if op.opcode == "fusion":
            computation = program.computations[op.called[0]]
            name = computation.parameters[position]
        users = computation.users[name]
        return sum(min(size, _read(program, computation, *user, size)) for user in users)
    return size


def _written(program: Program, computation: Computation, op: Instruction) -> list[float]:
    """Bytes that an instruction writes of each of its results."""
    if op.opcode == "fusion":
        inner = program.computations[op.called[0]]
        root = inner.instructions[inner.root]
        names = root.operands if root.opcode == "tuple" else [root.name]
        written = [_written_inside(inner, name) for name in names]
        if len(written) == len(_sizes(op.shape)):
            return written
    elif op.opcode == "dynamic-update-slice":
        return [_bytes(computation.instructions[op.operands[1]].shape)]
    return [size for size, _ in _sizes(op.shape)]


def _written_inside(fused: Computation, name: str) -> float:
    """Of a result of a fusion: an update, where it updates an operand in place."""
    op = _source(fused, name)
    update = {"dynamic-update-slice": 1, "scatter": 2}.get(op.opcode)
    if update is not None and _source(fused, op.operands[0]).opcode == "parameter":
        return _bytes(fused.instructions[op.operands[update]].shape)
    return _bytes(fused.instructions[name].shape)


def _source(computation: Computation, name: str) -> Instruction:
    """What a result is, under another shape."""
    op = computation.instructions[name]
    return _source(computation, op.operands[0]) if op.opcode == "bitcast" else op

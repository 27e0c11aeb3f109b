"""What a compiled program does, from its optimised HLO text: operations, how often each runs, what devices exchange.

The TPU compiler writes its own estimate of the cycles into most operations (`"estimated_cycles"`), the bodies of loops
once. How many turns a loop makes it writes for CPUs and GPUs only (`known_trip_count`); elsewhere it is read from the
loop's condition.
"""

import collections
import dataclasses
import functools
import math
import re
from collections.abc import Iterable, Iterator

import numpy as np

COLLECTIVES = (
    "all-reduce", "all-gather", "reduce-scatter", "all-to-all", "ragged-all-to-all", "collective-permute",
    "collective-broadcast",
)  # fmt: skip
_COMPUTATION = re.compile(r"(ENTRY )?%?([\w.\-]+) \(.*\{$")
_INSTRUCTION = re.compile(r"\s+(ROOT )?%?([\w.\-]+) = (.*?) ([a-z][a-z0-9\-]*)\((.*?)\)(.*)$")
_CALLED = re.compile(r"(body|condition|to_apply|calls|branch_computations|\w+_computation)=(\{[^}]*\}|%[\w.\-]+)")
_TRIPS = re.compile(r'"known_trip_count":\{"n":"(\d+)"\}')
_CYCLES = re.compile(r'"estimated_cycles":"(\d+)"')
_ARRAY = re.compile(r"([a-z]\w*)\[([\d,]*)\]")
_BITS = re.compile(r"(?:pred|[a-z]+?(\d+)(?:e\d+m\d+\w*)?)$")
# Computations that these opcodes name run in their place; those of others (fusions, reductions) are part of them.
_RUNS = {
    "while": ("body", "condition"),
    "conditional": ("branch_computations", "true_computation", "false_computation"),
    "call": ("to_apply",),
    "async-start": ("calls",),
}
_SAME_VALUE = ("copy", "bitcast", "convert", "copy-done", "copy-start", "reshape")


@dataclasses.dataclass(frozen=True)
class Operation:
    """One instruction.

    Attributes:
      name, opcode: e.g. "fusion.7", "fusion".
      result: its HLO type.
      operands: names, within its computation.
      rest: what follows the operands, attributes as text.
      computation: where it stands.
      root: whether it is the computation's result.
    """

    name: str
    opcode: str
    result: str
    operands: tuple[str, ...]
    rest: str
    computation: str
    root: bool = False

    @property
    def source(self) -> str:
        """The operation of the model that it comes from, by JAX's name stack; "" where XLA does not say."""
        found = re.search(r'op_name="([^"]*)"', self.rest)
        return found[1] if found else ""

    @property
    def cycles(self) -> int | None:
        """Of one execution, as the TPU compiler estimates them; None where it does not."""
        found = _CYCLES.search(self.rest)
        return int(found[1]) if found else None

    @property
    def called(self) -> list[tuple[str, str]]:
        """(role, computation) of every computation that it names."""
        roles = _CALLED.findall(self.rest)
        return [(role, name) for role, names in roles for name in re.findall(r"%([\w.\-]+)", names)]


@dataclasses.dataclass(frozen=True)
class Collective:
    """One exchange.

    Attributes:
      kind: of `COLLECTIVES`.
      bytes: of the whole result on one device (for a reduce-scatter: of its operand).
      groups: (groups, members) devices by position in the mesh, flattened; those of a permute are (source, target).
      times: how often a step makes it, more than once inside loops.
    """

    kind: str
    bytes: int
    groups: tuple[tuple[int, ...], ...]
    times: int

    @property
    def members(self) -> int:
        return max((len(group) for group in self.groups), default=1)

    @property
    def sent(self) -> float:
        """Bytes that each device sends in a step when a ring (or a direct permute) makes it."""
        n = self.members
        factor = {"all-reduce": 2 * (n - 1) / n, "collective-permute": 1.0}.get(self.kind, (n - 1) / n)
        return self.times * self.bytes * factor


class Program:
    """A compiled program as its HLO text tells it.

    Attributes:
      computations: name -> its operations by name, in order.
      entry: name of the computation that a step runs.
    """

    def __init__(self, text: str):
        self.computations: dict[str, dict[str, Operation]] = {}
        self.entry = here = ""
        for line in text.splitlines():
            if header := _COMPUTATION.match(line):
                here = header[2]
                self.computations[here] = {}
                self.entry = here if header[1] else self.entry
            elif here and (found := _INSTRUCTION.match(line)):
                root, name, result, opcode, inside, rest = found.groups()
                operands = (inside,) if opcode in ("constant", "parameter") else re.findall(r"%([\w.\-]+)", inside)
                self.computations[here][name] = Operation(
                    name, opcode, result, tuple(operands), rest, here, bool(root)
                )  # fmt: skip

    @functools.cached_property
    def runs(self) -> dict[str, int]:
        """Computation -> how often a step runs it; those inside fusions and reductions are not among them."""
        callers: dict[str, list[tuple[str, int]]] = collections.defaultdict(list)
        for operation in self._all():
            for role, name in operation.called:
                if role in _RUNS.get(operation.opcode, ()):
                    callers[name].append((operation.computation, self.turns(operation) if role == "body" else 1))

        @functools.cache
        def times(name: str) -> int:
            return 1 if name == self.entry else sum(n * times(caller) for caller, n in callers[name])

        return {name: times(name) for name in self.computations if times(name)}

    @functools.cached_property
    def operations(self) -> list[tuple[Operation, int]]:
        """What a step runs, fusions as one, with how often."""
        return [(each, n) for name, n in self.runs.items() for each in self.computations[name].values()]

    def turns(self, loop: Operation) -> int:
        """Of a while loop; 1 where neither a known count nor the condition (a counter below a constant) says."""
        if known := _TRIPS.search(loop.rest):
            return int(known[1])
        called, here = dict(loop.called), self.computations[loop.computation]
        condition, body = (self.computations[called[role]] for role in ("condition", "body"))
        test, state = _root(condition), here.get(loop.operands[0])
        if test.opcode != "compare" or "direction=LT" not in test.rest:
            return 1
        counter, limit = (_resolve(condition, name) for name in test.operands)
        first, last = (_constant(_taken(here, state, value)) for value in (counter, limit))
        if last is None:
            return 1
        return max(0, -(-(last - (first or 0)) // _step(body, counter)))

    def collectives(self) -> list[Collective]:
        """What a step exchanges, those among one device left out; also inside fusions and asynchronous calls.

        Raises:
          ValueError: a notation of replica groups or a type that is not known here.
        """
        found = [
            _collective(each, times)
            for operation, times in self.operations
            for each in (operation, *self.fused(operation))
            if each.opcode.removesuffix("-start") in COLLECTIVES
        ]
        return [each for each in found if each.members > 1]

    def fused(self, operation: Operation) -> Iterator[Operation]:
        """What a fusion consists of, fusions inside it too; nothing for other operations."""
        for role, inner in operation.called if operation.opcode == "fusion" else ():
            if role == "calls":
                for each in self.computations[inner].values():
                    yield each
                    yield from self.fused(each)

    def touched(self, operation: Operation) -> int:
        """Bytes of its operands and result: read and written at most (a scatter or gather touches fewer)."""
        here = self.computations[operation.computation]
        operands = sum(array_bytes(here[name].result) for name in operation.operands if name in here)
        return operands + array_bytes(operation.result)

    def source(self, operation: Operation) -> str:
        """Of the operation; where XLA does not say, of what reads it, else of what it reads."""
        if operation.source:
            return operation.source
        place, readers = operation.computation, self._readers
        here = self.computations[place]
        near = [*readers[place, operation.name], *[here[name] for name in operation.operands if name in here]]
        further = [each for one in near for each in readers[place, one.name]]
        return next((each.source for each in [*near, *further] if each.source), "")

    @functools.cached_property
    def _readers(self) -> dict[tuple[str, str], list[Operation]]:
        """(computation, operation) -> the operations there that read it."""
        readers = collections.defaultdict(list)
        for operation in self._all():
            for name in operation.operands:
                readers[operation.computation, name].append(operation)
        return readers

    def _all(self) -> Iterator[Operation]:
        return (each for operations in self.computations.values() for each in operations.values())


def by_kind(found: Iterable[Collective]) -> dict[str, tuple[int, int]]:
    """Kind -> (how many exchanges a step, their bytes on one device)."""
    totals: dict[str, tuple[int, int]] = {}
    for each in found:
        count, size = totals.get(each.kind, (0, 0))
        totals[each.kind] = (count + each.times, size + each.times * each.bytes)
    return totals


def array_bytes(shapes: str) -> int:
    """Bytes of the arrays in an HLO type, tuples summed up: "(f32[2,3]{1,0}, bf16[4])" is 32."""
    return sum(_array_sizes(shapes))


def _array_sizes(shapes: str) -> list[int]:
    sizes = []
    for dtype, dims in _ARRAY.findall(shapes):
        if dtype == "token":  # an order, not an array
            continue
        match = _BITS.match(dtype)
        if match is None:
            raise ValueError(f"unknown HLO type {dtype}")
        sizes.append(math.prod(int(d) for d in dims.split(",") if d) * int(match[1] or 8) // 8)
    return sizes


def _root(operations: dict[str, Operation]) -> Operation:
    return next(each for each in operations.values() if each.root)


def _resolve(operations: dict[str, Operation], name: str) -> Operation:
    """The operation that a value comes from, through copies."""
    found = operations[name]
    while found.opcode in _SAME_VALUE and found.operands[0] in operations:
        found = operations[found.operands[0]]
    return found


def _constant(operation: Operation | None) -> int | None:
    if operation is None or operation.opcode != "constant" or not re.fullmatch(r"-?\d+", operation.operands[0]):
        return None
    return int(operation.operands[0])


def _taken(operations: dict[str, Operation], state: Operation | None, value: Operation) -> Operation | None:
    """What `value` is where it takes one place of `state`, a tuple among these operations; a constant is itself.

    None where they do not say."""
    if value.opcode == "constant":
        return value
    if value.opcode != "get-tuple-element" or state is None or state.opcode != "tuple":
        return None
    return _resolve(operations, state.operands[int(re.search(r"index=(\d+)", value.rest)[1])])


def _step(body: dict[str, Operation], counter: Operation) -> int:
    """By how much a loop's body moves its counter on: 1 where it is not a plain addition."""
    moved = _taken(body, _root(body), counter)
    steps = [_constant(_resolve(body, name)) for name in moved.operands] if moved and moved.opcode == "add" else []
    return next((step for step in steps if step), 1)


def _collective(operation: Operation, times: int) -> Collective:
    kind, started = operation.opcode.removesuffix("-start"), operation.opcode.endswith("-start")
    if kind == "collective-permute":
        pairs = re.search(r"source_target_pairs=\{(.*?\})\}", operation.rest)
        groups = tuple(pair for pair in _listed(pairs[1] if pairs else "") if pair[0] != pair[1])
    else:
        groups = _groups(re.search(r"replica_groups=(.*)", operation.rest)[1])
    sizes = _array_sizes(operation.result)
    if started and kind in ("all-gather", "collective-permute"):  # (operands, results, what the runtime keeps)
        operands = len(operation.operands)
        sizes = sizes[operands : 2 * operands]
    size = sum(sizes)
    if kind == "reduce-scatter":
        size *= len(groups[0])
    return Collective(kind, size, groups, times)


def _listed(text: str) -> tuple[tuple[int, ...], ...]:
    return tuple(tuple(int(i) for i in group.split(",")) for group in re.findall(r"\{([\d,]+)\}", text))


def _groups(text: str) -> tuple[tuple[int, ...], ...]:
    """The three notations of replica groups in HLO: listed, as a reshaped and transposed iota, by axes of a mesh."""
    if text.startswith("{"):
        return _listed(text.split("}}")[0] + "}}")
    if iota := re.match(r"\[([\d,]+)\]<=(\[[\d,]+\](?:T\([\d,]+\))?)", text):
        return _as_tuples(_iota(iota[2]).reshape([int(n) for n in iota[1].split(",")]))
    if mesh := re.match(r"mesh\[(.*?)\](?:, device_ids=\((\[.*?\)?)\))? \{(.*?)\}", text):
        sizes = {name: int(size) for name, size in re.findall(r"('\w+')=(\d+)", mesh[1])}
        axes = mesh[3].split(",") if mesh[3] else []
        if all(axis in sizes for axis in axes):
            ids = _iota(mesh[2]) if mesh[2] else np.arange(math.prod(sizes.values()))
            positions = [list(sizes).index(axis) for axis in axes]
            ids = np.moveaxis(ids.reshape(list(sizes.values())), positions, range(-len(axes), 0))
            return _as_tuples(ids.reshape(-1, math.prod(sizes[axis] for axis in axes)))
    raise ValueError(f"unknown notation of replica groups: {text[:120]}")


def _iota(text: str) -> np.ndarray:
    """ "[2,4]T(1,0)": the numbers from 0 on in this shape, transposed, flattened."""
    dims, order = re.match(r"\[([\d,]+)\](?:T\(([\d,]+)\))?", text).groups()
    shape = [int(n) for n in dims.split(",")]
    array = np.arange(math.prod(shape)).reshape(shape)
    return (array.transpose([int(n) for n in order.split(",")]) if order else array).reshape(-1)


def _as_tuples(array: np.ndarray) -> tuple[tuple[int, ...], ...]:
    return tuple(map(tuple, array.tolist()))

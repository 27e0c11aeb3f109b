"""The collectives of a compiled program: what is exchanged, how much, among which devices, how often."""

from __future__ import annotations

import collections
import dataclasses
import math
import re
from collections.abc import Iterable

import numpy as np

KINDS = ("all-reduce", "all-gather", "reduce-scatter", "all-to-all", "collective-permute")

_BITS = re.compile(r"(?:pred|[a-z]+?(\d+)(?:e\d+m\d+\w*)?)$")
_ARRAY = re.compile(r"([a-z]\w*)\[([\d,]*)\]")
_COMPUTATION = re.compile(r"(ENTRY )?%([\w.\-]+) \(.*\{$")
_COLLECTIVE = re.compile(rf"%[\w.\-]+ = (.*?) ({'|'.join(KINDS)})(-start)?\((.*)$")
_CALLED = re.compile(r"(body|condition|to_apply|calls|branch_computations)=\{?([^}\s]*?%[^}\s]*)")
_TRIPS = re.compile(r'"known_trip_count":\{"n":"(\d+)"\}')


@dataclasses.dataclass(frozen=True)
class Collective:
    """One exchange.

    Attributes:
      kind: of `KINDS`.
      bytes: of the whole result on one device (for a reduce-scatter: of its operand).
      groups: (groups, members) devices by position in the mesh, flattened; those of a permute are (source, target).
      times: how often a step makes it, more than once inside loops.
      source: the operation of the model it comes from, by JAX's name stack.
    """

    kind: str
    bytes: int
    groups: tuple[tuple[int, ...], ...]
    times: int
    source: str

    @property
    def members(self) -> int:
        return max((len(group) for group in self.groups), default=1)

    @property
    def sent(self) -> float:
        """Bytes that each device sends in a step when a ring (or a direct permute) makes it."""
        n = self.members
        factor = {"all-reduce": 2 * (n - 1) / n, "collective-permute": 1.0}.get(self.kind, (n - 1) / n)
        return self.times * self.bytes * factor


def collectives(program: str) -> list[Collective]:
    """The collectives of a program compiled for CPU devices, from its HLO text, those among one device left out.

    Raises:
      ValueError: a notation of groups or of an asynchronous collective that is not known here.
    """
    found: list[tuple[str, Collective]] = []
    callers: dict[str, list[tuple[str, int]]] = collections.defaultdict(list)
    here = entry = ""
    for line in program.splitlines():
        if header := _COMPUTATION.match(line):
            here = header[2]
            entry = here if header[1] else entry
        elif match := _COLLECTIVE.search(line):
            if match[3]:
                raise ValueError(f"asynchronous collective: {line.strip()[:120]}")
            found.append((here, _collective(match[2], match[1], match[4])))
        trips = int(found_trips[1]) if (found_trips := _TRIPS.search(line)) else 1
        for role, names in _CALLED.findall(line):
            for name in re.findall(r"%([\w.\-]+)", names):
                callers[name].append((here, trips if role == "body" else 1))

    def runs(computation: str) -> int:
        return 1 if computation == entry else sum(n * runs(caller) for caller, n in callers[computation])

    counted = [dataclasses.replace(collective, times=runs(where)) for where, collective in found]
    return [collective for collective in counted if collective.members > 1 and collective.times]


def by_kind(found: Iterable[Collective]) -> dict[str, tuple[int, int]]:
    """Kind -> (how many exchanges a step, their bytes on one device)."""
    totals: dict[str, tuple[int, int]] = {}
    for each in found:
        count, size = totals.get(each.kind, (0, 0))
        totals[each.kind] = (count + each.times, size + each.times * each.bytes)
    return totals


def _collective(kind: str, result: str, rest: str) -> Collective:
    if kind == "collective-permute":
        pairs = re.search(r"source_target_pairs=\{(.*?\})\}", rest)[1]
        groups = tuple(pair for pair in _listed(pairs) if pair[0] != pair[1])
    else:
        groups = _groups(re.search(r"replica_groups=(.*)", rest)[1])
    size = array_bytes(result)
    if kind == "reduce-scatter":
        size *= len(groups[0])
    source = re.search(r'op_name="([^"]*)"', rest)
    return Collective(kind, size, groups, 1, source[1] if source else "")


def array_bytes(shapes: str) -> int:
    """Bytes of the arrays in an HLO type, tuples summed up: "(f32[2,3]{1,0}, bf16[4])" is 32."""
    total = 0
    for dtype, dims in _ARRAY.findall(shapes):
        match = _BITS.match(dtype)
        if match is None:
            raise ValueError(f"unknown HLO type {dtype}")
        total += math.prod(int(d) for d in dims.split(",") if d) * int(match[1] or 8) // 8
    return total


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

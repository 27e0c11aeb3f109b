"""Where the time of a training step goes: by part of the model, by kind of work, and the slowest operations.

Names and times come from JAX's profiler, parts and kinds from the compiled program: XLA names what it makes of a layer
after the layer.
"""

from __future__ import annotations

import dataclasses
import os
import re
import tempfile
from collections import defaultdict
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import jax

from infmae_jax.benchmarks.flops import STAGES
from infmae_jax.benchmarks.report import NEEDS_ACCELERATOR, Row, on_accelerator, report
from infmae_jax.benchmarks.training import TrainingProgram, visible_tokens
from infmae_jax.training.config import PretrainConfig

KINDS = ("matrix products", "depthwise convolutions", "norms, activations, sums", "copies and moves", "updates")
LOSS, UPDATE = "input, loss", "optimizer, guards"
_NAMED_PARTS = (
    (r"InfMAE.*encoder.*blocks1_", STAGES[0]),
    (r"InfMAE.*encoder.*blocks2_", STAGES[1]),
    (r"InfMAE.*encoder.*blocks3_", STAGES[2]),
    (r"InfMAE.*encoder", STAGES[3]),
    (r"InfMAE.*(decoder|_predict)", STAGES[4]),
    (r"InfMAE|^batch", LOSS),
)
_PRODUCTS = {"dot", "convolution"}
_LIBRARY_PRODUCTS = re.compile(r'custom_call_target="[^"]*(gemm|matmul|conv|fmha|dot)', re.IGNORECASE)
_MOVES = {
    "bitcast", "broadcast", "concatenate", "constant", "convert", "copy", "copy-done", "copy-start", "dynamic-slice",
    "dynamic-update-slice", "gather", "get-tuple-element", "iota", "pad", "parameter", "reshape", "reverse", "scatter",
    "slice", "transpose", "tuple",
}  # fmt: skip
_HOLDERS = {"while", "conditional", "call"}  # their time is that of the operations inside
_LINE = re.compile(r"^\s+(?:ROOT )?%?(?P<name>[\w.\-]+) = .*?(?<![\w.\-])(?P<opcode>[a-z][a-z0-9\-]*)\((?P<rest>.*)$")
_COMPUTATION = re.compile(r"^(?:ENTRY )?%?(?P<name>[\w.\-]+) \(.*\{$")


@dataclasses.dataclass
class Operation:
    """An instruction of a compiled program.

    Attributes:
      opcodes: its own, and those of what it fuses.
      source: path of the layer that it comes from ("jit(step)/jvp(InfMAE)/encoder/..."); empty if XLA does not tell.
    """

    opcode: str
    opcodes: set[str]
    source: str

    @property
    def part(self) -> str:
        """Of the model, or the update."""
        return next((part for pattern, part in _NAMED_PARTS if re.search(pattern, self.source)), UPDATE)

    @property
    def kind(self) -> str:
        """Of `KINDS`."""
        if self.opcodes & _PRODUCTS and "dwconv" not in self.source:
            return KINDS[0]
        if self.opcodes <= _MOVES:
            return KINDS[3]
        if "dwconv" in self.source:
            return KINDS[1]
        return KINDS[4] if self.part == UPDATE else KINDS[2]


def operations(program: str) -> dict[str, Operation]:
    """Instructions of a compiled program by name, from its text (`Compiled.as_text()`)."""
    found: dict[str, Operation] = {}
    inside: dict[str, set[str]] = defaultdict(set)
    fused: dict[str, list[str]] = {}
    computation = ""
    for line in program.splitlines():
        if head := _COMPUTATION.match(line):
            computation = head["name"]
        elif match := _LINE.match(line):
            opcode = "dot" if _LIBRARY_PRODUCTS.search(match["rest"]) else match["opcode"]
            inside[computation].add(opcode)
            source = re.search(r'op_name="([^"]*)"', match["rest"])
            operand = re.match(r"%?([\w.\-]+)", match["rest"])
            told = found.get(operand[1]) if operand else None  # what XLA adds itself belongs to what it works on
            text = source[1] if source else told.source if told else ""
            found[match["name"]] = Operation(match["opcode"], {opcode}, text)
            fused[match["name"]] = re.findall(r"calls=%?([\w.\-]+)", match["rest"])
    for name, computations in fused.items():
        if computations:
            found[name].opcodes = set().union(*(inside[each] for each in computations))
    return found


def operation_times(profile: jax.profiler.ProfileData, names: Iterable[str]) -> list[tuple[str, float, float]]:
    """Name, start and end in seconds of each run of an operation of these names, on all devices and threads."""
    names, times = set(names), []
    for event in (event for plane in profile.planes for line in plane.lines for event in line.events):
        # On TPUs events are named after the whole instruction, on GPUs after the kernel.
        name = dict(event.stats).get("hlo_op", event.name.split(" ")[0].lstrip("%"))
        if name in names:
            times.append((name, event.start_ns / 1e9, (event.start_ns + event.duration_ns) / 1e9))
    return times


def idle_seconds(times: Iterable[tuple[str, float, float]]) -> float:
    """Of the time between the first start and the last end, that in which nothing ran."""
    idle, busy_until = 0.0, None
    for _, start, end in sorted(times, key=lambda each: each[1]):
        idle += max(0.0, start - busy_until) if busy_until is not None else 0.0
        busy_until = end if busy_until is None else max(busy_until, end)
    return idle


def _shares(seconds: dict[str, float], of: Iterable[tuple[str, str]], steps: int) -> Iterator[Row]:
    """Milliseconds a step and percent of each group; `of`: group and operation."""
    groups: dict[str, float] = defaultdict(float)
    for group, name in of:
        groups[group] += seconds[name]
    total = sum(groups.values())
    for group, spent in sorted(groups.items(), key=lambda item: -item[1]):
        yield {"what": group, "ms": 1e3 * spent / steps, "percent": 100 * spent / total}


def profile(config: PretrainConfig, batch: int, steps: int, slowest: int = 12) -> dict[str, Any]:
    """The step under JAX's profiler.

    Args:
      steps: so many are averaged.
      slowest: rows of single operations.
    """
    program = TrainingProgram(config, batch)
    program.start()
    program(2)
    options = jax.profiler.ProfileOptions()
    options.python_tracer_level = 0  # operations alone are read
    with tempfile.TemporaryDirectory(prefix="infmae-profile-") as folder:
        with jax.profiler.trace(folder, profiler_options=options):
            program(steps)
        (trace,) = Path(folder).rglob("*.xplane.pb")
        data = jax.profiler.ProfileData.from_file(str(trace))
    program.stop()
    known = {name: op for name, op in operations(program.text).items() if op.opcode not in _HOLDERS}
    times = operation_times(data, known)
    seconds: dict[str, float] = defaultdict(float)
    for name, start, end in times:
        seconds[name] += end - start
    whole = max(end for _, _, end in times) - min(start for _, start, _ in times)
    rows: list[Row] = [
        {"by": "clock", "what": what, "ms": 1e3 * spent / steps, "percent": 100 * spent / whole}
        for what, spent in (("step", whole), ("nothing runs", idle_seconds(times)))
    ]
    rows += [{"by": "kind", **row} for row in _shares(seconds, ((known[n].kind, n) for n in seconds), steps)]
    rows += [{"by": "part", **row} for row in _shares(seconds, ((known[n].part, n) for n in seconds), steps)]
    for row in list(_shares(seconds, ((n, n) for n in seconds), steps))[:slowest]:
        operation = known[row["what"]]
        rows.append({"by": "operation", **row, "kind": operation.kind, "source": _short(operation.source)})
    notes = ["by kind, part and operation: of the time of all operations, which run beside each other where they can"]
    if not on_accelerator() and len(os.sched_getaffinity(0)) > 1:
        notes.append("what an operation leaves to other CPU threads is not seen; with taskset -c 0 in front, all is")
    if not on_accelerator():
        notes.append(f"kernels of a GPU: {NEEDS_ACCELERATOR}")
    settings = {"batch": batch, "dtype": config.model.encoder.dtype, "image_size": list(config.data.image_size)}
    return report("profile", settings | {"visible_tokens": visible_tokens(config), "steps": steps}, rows, notes)


def _short(source: str) -> str:
    """The path of a layer without what all of them share."""
    backward = "backward " if "transpose(" in source else ""
    return backward + re.sub(r"^jit\(step\)/|transpose\(jvp\(InfMAE\)\)/|jvp\(InfMAE\)/|encoder\._stages/", "", source)

"""Where the time of a training step goes: by part of the model, and the slowest operations.

Names and times come from JAX's profiler, parts from the compiled program: XLA names what it makes of a layer after it.
"""

from __future__ import annotations

import collections
import re
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jax

from infmae_jax.bench.flops import STAGES
from infmae_jax.bench.results import Row, on_accelerator, report
from infmae_jax.bench.step import TimedStep
from infmae_jax.tasks.pretrain import PretrainConfig

_PARTS = (
    (r"InfMAE.*encoder.*blocks1_", STAGES[0]),
    (r"InfMAE.*encoder.*blocks2_", STAGES[1]),
    (r"InfMAE.*encoder.*blocks3_", STAGES[2]),
    (r"InfMAE.*encoder", STAGES[3]),
    (r"InfMAE.*(decoder|_predict)", STAGES[4]),
    (r"InfMAE|^batch", "input, loss"),
    (r"", "optimizer, guards, not named"),
)
_INSTRUCTION = re.compile(r"^\s+(?:ROOT )?%?([\w.\-]+) = .*?(?<![\w.\-])([a-z][a-z0-9\-]*)\((.*)$", re.MULTILINE)
_HOLDERS = ("while", "conditional", "call")  # their time is that of the operations inside
_SLOWEST = 12  # single operations in the report


def sources(program: str) -> dict[str, str]:
    """Operation -> the layer that it comes from, as a path ("" where XLA does not say), from `Compiled.as_text()`."""
    found = {}
    for name, opcode, rest in _INSTRUCTION.findall(program):
        if opcode not in _HOLDERS:
            source = re.search(r'op_name="([^"]*)"', rest)
            found[name] = source[1] if source else ""
    return found


def part_of(source: str) -> str:
    """The part of the model that an operation's source belongs to."""
    return next(part for pattern, part in _PARTS if re.search(pattern, source))


def seconds_of(profile: Any, names: Mapping[str, Any]) -> dict[str, float]:
    """Seconds of all runs of each operation on all devices and threads, from a `jax.profiler.ProfileData`."""
    seconds: dict[str, float] = collections.defaultdict(float)
    for event in (event for plane in profile.planes for line in plane.lines for event in line.events):
        # On TPUs events are named after the whole instruction, on GPUs after the kernel.
        name = dict(event.stats).get("hlo_op", event.name.split(" ")[0].lstrip("%"))
        if name in names:
            seconds[name] += event.duration_ns / 1e9
    return seconds


def profile(config: PretrainConfig, batch: int, steps: int) -> dict[str, Any]:
    """The step under JAX's profiler, averaged over `steps`."""
    program = TimedStep(config, batch)
    program.start()
    program(2)
    options = jax.profiler.ProfileOptions()
    options.python_tracer_level = 0  # operations alone are read
    with tempfile.TemporaryDirectory(prefix="infmae-profile-") as folder:
        with jax.profiler.trace(folder, profiler_options=options):
            program(steps)
        (trace,) = Path(folder).rglob("*.xplane.pb")
        data = jax.profiler.ProfileData.from_file(str(trace))
    origin = sources(program.program.compiled.as_text())
    seconds = seconds_of(data, origin)
    parts: dict[str, float] = collections.defaultdict(float)
    for name, spent in seconds.items():
        parts[part_of(origin[name])] += spent
    rows = [{"by": "part", **row} for row in _shares(parts, steps)]
    for row in list(_shares(seconds, steps))[:_SLOWEST]:
        rows.append({"by": "operation", **row, "source": origin[row["what"]]})
    notes = ["shares of the time of all operations, which run beside each other where they can"]
    if not on_accelerator():
        notes.append("what an operation leaves to other CPU threads is not seen; with taskset -c 0 in front, all is")
    settings = {"batch": batch, "dtype": config.model.encoder.dtype, "image_size": list(config.data.image_size)}
    return report("profile", settings | {"steps": steps}, rows, notes)


def _shares(seconds: Mapping[str, float], steps: int) -> Iterator[Row]:
    total = sum(seconds.values())
    for what, spent in sorted(seconds.items(), key=lambda item: -item[1]):
        yield {"what": what, "ms": 1e3 * spent / steps, "percent": 100 * spent / total}

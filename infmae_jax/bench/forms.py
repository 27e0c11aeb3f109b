"""Ways to compute the training step on this device, in turns and with PyTorch; and the operations it spends time on."""

import collections
import re
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from infmae_jax.ahead.account import part_of
from infmae_jax.bench.results import Row, report
from infmae_jax.bench.step import FASTER_NOTE, TimedStep, compared, settings_of
from infmae_jax.tasks.pretrain import PretrainConfig

OURS = "as configured"
_ANYWHERE = (
    {"depthwise": "shift"}, {"depthwise": "conv"}, {"depthwise": "products"}, {"depthwise": "windows"},
    {"attention": "xla"}, {"attention": "heads"},
)  # fmt: skip
_ON_NVIDIA = ({"attention": "cudnn"},)
_STEPS = 3  # that are traced, and that two runs are compared after
_LISTED = 25
_NOTE = (
    "repeatable: two runs of 3 steps give the same parameters, bit for bit. compile_s: while all forms are compiled at "
    "once."
)


def forms(config: PretrainConfig, batch: int, rounds: int, torch_forms: Sequence[str]) -> dict[str, Any]:
    """The step as configured, with other ways for depthwise convolutions and attention, and PyTorch's, in turns.

    Args:
      torch_forms: of `step.TORCH_FORMS`; none: without PyTorch.
    """
    # In float32 it would be measured as what it falls back to.
    nvidia = "cuda" in jax.devices()[0].client.platform_version and config.model.encoder.dtype == "bfloat16"
    changes = (*_ANYWHERE, *(_ON_NVIDIA if nvidia else ()))
    ways = {OURS: {}} | {"=".join(map(str, *change.items())): change for change in changes}

    rows = compared(config, batch, rounds, ways, torch_forms, _repeatable, threads=len(ways))
    settings = settings_of(config) | {"batch": batch, "rounds": rounds}
    return report("forms", settings, [{"name": name} | row for name, row in rows.items()], [_NOTE, FASTER_NOTE])


def _repeatable(program: TimedStep) -> Row:
    def trained() -> list[np.ndarray]:
        program.start()
        program(_STEPS)
        return [np.asarray(leaf) for leaf in jax.tree.leaves(program.state.params)]

    return {"repeatable": all(map(np.array_equal, trained(), trained()))}


def profile(config: PretrainConfig, batch: int) -> dict[str, Any]:
    """Operations of the step that take most time, by JAX's profiler, with the part of the model each belongs to."""
    program = TimedStep(config, batch)
    program.start()
    program(2)
    with tempfile.TemporaryDirectory(prefix="infmae-bench-trace-") as folder:
        options = jax.profiler.ProfileOptions()
        options.python_tracer_level = 0
        with jax.profiler.trace(folder, profiler_options=options):
            program(_STEPS)
        (trace,) = Path(folder).rglob("*.xplane.pb")
        times = _operation_times(jax.profiler.ProfileData.from_file(str(trace)))
    sources = _sources(program.program.compiled.as_text())
    program.stop()
    parts: collections.Counter[str] = collections.Counter()
    rows: list[Row] = []
    for name, (count, nanoseconds) in sorted(times.items(), key=lambda item: -item[1][1]):
        source, milliseconds = sources.get(_plain(name), ""), nanoseconds / _STEPS / 1e6
        part = part_of(source) if source else "libraries, not named"
        parts[part] += milliseconds
        rows.append({"name": name[:60], "part": part, "ms": milliseconds, "times": count / _STEPS, "of": source[-80:]})
    total = [{"name": f"all of {part}", "part": part, "ms": spent} for part, spent in parts.most_common()]
    kernels = sum(count for count, _ in times.values()) / _STEPS
    settings = settings_of(config) | {"batch": batch, "steps": _STEPS, "operations_a_step": kernels}
    return report("profile", settings, total + rows[:_LISTED], ["ms: a step, one operation after the other."])


def _operation_times(trace: Any) -> dict[str, tuple[int, float]]:
    """How often operations ran and for how many nanoseconds, on the devices; on the host where that is the device."""
    # CUSTOM planes belong to no device: a TPU compiler adds one wherever it is loaded.
    planes = [plane for plane in trace.planes if re.match("/device:(?!CUSTOM)", plane.name)]
    found: dict[str, tuple[int, float]] = {}
    for plane in planes or trace.planes:
        for line in plane.lines:
            if planes and "Stream" not in line.name and "XLA Ops" not in line.name:
                continue
            for event in line.events:
                if planes or any(name == "hlo_op" for name, _ in event.stats):
                    count, total = found.get(event.name, (0, 0.0))
                    found[event.name] = count + 1, total + event.duration_ns
    return found


def _sources(text: str) -> dict[str, str]:
    """Where each operation of a compiled program comes from, by its name as kernels bear it."""
    named = re.findall(r'^\s*(?:ROOT )?%?([\w.-]+) = .*?op_name="([^"]*)"', text, re.MULTILINE)
    return {_plain(name): source for name, source in named}


def _plain(name: str) -> str:
    return re.sub(r"[.-]", "_", name)

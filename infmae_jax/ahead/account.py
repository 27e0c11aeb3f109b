"""What a program costs, by the account of the compiler that made it: memory, cycles, exchanges, estimated time.

Nothing here is measured but the compile time. Estimates are named so wherever they are shown.
"""

import collections
import math
import re
import time
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
from jax.sharding import Mesh

from infmae_jax.ahead import hlo
from infmae_jax.ahead.targets import Target
from infmae_jax.training.hardware import mfu

GIB = 2**30
_MOST_EXPENSIVE = 10
# Parts of the model, by the names that XLA gives to what it makes of a layer.
_PARTS = (
    (r"encoder.*blocks1_", "convolution stage 1"),
    (r"encoder.*blocks2_", "convolution stage 2"),
    (r"encoder.*blocks3_", "transformer"),
    (r"encoder", "embeddings, final norm"),
    (r"decoder|_predict|head|auxiliary|stride32|(?<!Target)Detector", "decoder or head"),
    (r"InfMAE|Segmenter|TargetDetector|^batch", "input, loss"),
    (r"", "optimizer, guards, not named"),
)
# Kinds of work, the first that matches an operation; the rest is "other".
KINDS = ("copies", "zero fills", "depthwise", "products", "other")
# What costs nothing by itself or is counted where it runs.
_FREE = re.compile(
    r"(parameter|constant|tuple|get-tuple-element|bitcast|while|conditional|call|after-all|partition-id|iota|.*-done)$"
)
_NO_WORK = re.compile(r'custom_call_target="(AllocateBuffer|ConcatBitcast)"')
# The TPU compiler's two ways to refuse a program; the second counts temporaries alone.
_REFUSED = (
    re.compile(r"Used ([\d.]+)([KMGT]?) of ([\d.]+)([KMGT]?) hbm", re.IGNORECASE),
    re.compile(r"temporaries \(([\d.]+)([KMGT]?)\) exceeds available HBM \(([\d.]+)([KMGT]?)\)", re.IGNORECASE),
)
_UNITS = {"": 1, "K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}


def part_of(source: str) -> str:
    """The part of the model that an operation's source belongs to."""
    return next(part for pattern, part in _PARTS if re.search(pattern, source))


class DoesNotFit(Exception):
    """The compiler refused a program for want of device memory.

    Attributes:
      needed, capacity: bytes a device, of temporaries at least; None where the compiler does not say.
    """

    def __init__(self, text: str):
        super().__init__(text)
        found = next(filter(None, (pattern.search(text) for pattern in _REFUSED)), None)
        sizes = [int(float(found[i]) * _UNITS[found[i + 1].upper()]) for i in (1, 3)] if found else (None, None)
        self.needed, self.capacity = sizes


class Traced(NamedTuple):
    """A program that was traced for a mesh of described devices, and batches of these shapes."""

    lowered: jax.stages.Lowered
    mesh: Mesh
    batch_shapes: Mapping[str, jax.ShapeDtypeStruct]


def compile_step(traced: Traced) -> tuple[hlo.Program, dict[str, Any]]:
    """Compiles a traced program for the devices of its mesh.

    Returns:
      Its HLO, and as JSON holds it:
      memory_bytes: a device: "state", "batch", "temporaries", "program", and "needed", their sum.
      gflop_counted, gigabytes_counted: of operations, and read and written, a device and step, by XLA's count, loop
        bodies once; None where the compiler does not count.
      compile_seconds: measured.

    Raises:
      DoesNotFit: the compiler finds too little device memory.
    """
    options = None
    if traced.mesh.devices.flat[0].platform == "gpu":
        # Which tiles suit a matrix product is measured on a GPU. Without one, jaxlib 0.10 may find none at all.
        options = {"xla_gpu_enable_triton_gemm": False}
    since = time.perf_counter()
    cached = jax.config.jax_enable_compilation_cache
    jax.config.update("jax_enable_compilation_cache", False)  # so that the time is that of compiling
    try:
        compiled = traced.lowered.compile(compiler_options=options)
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" in str(error):
            raise DoesNotFit(str(error)) from None
        raise
    finally:
        jax.config.update("jax_enable_compilation_cache", cached)
    seconds, analysis = time.perf_counter() - since, compiled.memory_analysis()
    cost = compiled.cost_analysis() or {}
    shards = [(shape.sharding.shard_shape(shape.shape), shape.dtype) for shape in traced.batch_shapes.values()]
    batch = sum(math.prod(sides) * dtype.itemsize for sides, dtype in shards)
    memory = {
        "state": analysis.argument_size_in_bytes - batch,
        "batch": batch,
        "temporaries": analysis.temp_size_in_bytes,
        "program": analysis.generated_code_size_in_bytes,
    }
    # The new state takes the place of the old one.
    memory["needed"] = sum(memory.values()) + analysis.output_size_in_bytes - analysis.alias_size_in_bytes
    counts = {
        "gflop_counted": cost.get("flops", 0) / 1e9 or None,
        "gigabytes_counted": cost.get("bytes accessed", 0) / 1e9 or None,
    }
    return hlo.Program(compiled.as_text()), {"memory_bytes": memory, **counts, "compile_seconds": seconds}


def account(traced: Traced, target: Target, useful_gflop: float, dtype: str) -> dict[str, Any]:
    """Compiles a traced program, and tells everything that the compiler says of it, as JSON holds it.

    Args:
      useful_gflop: of the model in a step on one device (see `hardware.mfu`), for the estimated MFU.
      dtype: of matrix products.

    Raises:
      DoesNotFit: see `compile_step`.
    """
    program, known = compile_step(traced)
    chip, exchanged = target.chip, program.collectives()
    told: dict[str, Any] = {
        **known,
        "chip_memory_bytes": chip.memory,
        "fits": known["memory_bytes"]["needed"] <= chip.memory,
        "gflop_useful": useful_gflop,
        "collectives": {
            kind: {"times": times, "bytes": size} for kind, (times, size) in sorted(hlo.by_kind(exchanged).items())
        },
        "bytes_sent": sum(each.sent for each in exchanged),
        "operations": operation_counts(program),
    }
    if chip.clock:
        told["cycles"] = cycles(program)
        told["estimate"] = estimate(told, target, dtype)
    return told | {"most_expensive": most_expensive(program, bool(chip.clock))}


def estimate(told: dict[str, Any], target: Target, dtype: str) -> dict[str, float | None]:
    """Seconds of a step and MFU from an account, nothing overlapped; `hidden`: with exchanges behind computing."""
    computing = told["cycles"]["total"] / target.chip.clock
    moving = told["cycles"]["bytes_without_estimate"] / target.chip.bandwidth
    exchanging = told["bytes_sent"] / target.link
    step = computing + moving + exchanging
    hidden = max(computing + moving, exchanging)
    useful = told["gflop_useful"] * 1e9
    return {
        "computing_seconds": computing,
        "moving_seconds": moving,
        "exchanging_seconds": exchanging,
        "step_seconds": step,
        "step_seconds_hidden": hidden,
        "mfu": mfu(useful, step, target.chip.kind, 1, dtype),
        "mfu_hidden": mfu(useful, hidden, target.chip.kind, 1, dtype),
    }


def cycles(program: hlo.Program) -> dict[str, Any]:
    """The compiler's estimate: "total", "by_kind" (`KINDS`), "by_part" of the model, and what it leaves out."""
    kinds: collections.Counter[str] = collections.Counter(dict.fromkeys(KINDS, 0))
    parts: collections.Counter[str] = collections.Counter()
    left_out, moved = 0, 0
    for operation, times in program.operations:
        if operation.cycles is not None:
            kinds[kind_of(program, operation)] += operation.cycles * times
            parts[part_of(program.source(operation))] += operation.cycles * times
        elif _moves(operation):
            left_out += times
            moved += program.touched(operation) * times
    return {
        "total": sum(kinds.values()),
        "by_kind": dict(kinds),
        "by_part": dict(parts.most_common()),
        "operations_without_estimate": left_out,
        "bytes_without_estimate": moved,
    }


def _moves(operation: hlo.Operation) -> bool:
    """Whether an operation without an estimate touches memory: neither free, nor an exchange, nor asynchronous."""
    known = operation.opcode.removesuffix("-start") in hlo.COLLECTIVES or operation.opcode.endswith("-start")
    return not (_FREE.match(operation.opcode) or known or _NO_WORK.search(operation.rest))


def kind_of(program: hlo.Program, operation: hlo.Operation) -> str:
    """Of `KINDS`."""
    inside = {operation.opcode} | {each.opcode for each in program.fused(operation)}
    computing = inside - {"fusion", "parameter", "constant", "bitcast", "tuple", "get-tuple-element"}
    if computing <= {"copy", "transpose", "reshape"}:
        return "copies"
    if computing <= {"broadcast", "pad"}:
        return "zero fills"
    if "dwconv" in program.source(operation):
        return "depthwise"
    return "products" if inside & {"convolution", "dot"} else "other"


def operation_counts(program: hlo.Program) -> dict[str, int]:
    """How many fusions, library calls and copies a step runs one after the other; on GPUs each is a kernel or more."""
    counts = collections.Counter({"fusions": 0, "library calls": 0, "copies": 0, "others": 0})
    names = {"fusion": "fusions", "custom-call": "library calls", "copy": "copies"}
    for operation, times in program.operations:
        if _moves(operation):
            counts[names.get(operation.opcode, "others")] += times
    return dict(counts)


def most_expensive(program: hlo.Program, by_cycles: bool) -> list[dict[str, Any]]:
    """The ten operations that cost most a step: by estimated cycles, or by the bytes that they touch."""
    rows: list[dict[str, Any]] = []
    name = "cycles" if by_cycles else "bytes_touched"
    for operation, times in program.operations:
        cost = operation.cycles if by_cycles else program.touched(operation) if _moves(operation) else None
        if cost:
            source = program.source(operation)
            rows.append({
                "operation": operation.name, "part": part_of(source), "times": times, "result": operation.result,
                "source": source, name: cost * times,
            })  # fmt: skip
    return sorted(rows, key=lambda row: -row[name])[:_MOST_EXPENSIVE]


def largest_batch(needed: Callable[[int], float], capacity: float, start: int, granule: int) -> int:
    """The largest multiple of `granule` images a device that fits, 0 where none does.

    Bisection, whose next try is where the memory of two batches says that the limit lies.

    Args:
      needed: images a device -> bytes, growing, infinite where that is not known; asked once for each number.
      start: the first try, a multiple of `granule`.
    """
    sizes: dict[int, float] = {}
    low, high, batch = 0, None, start
    least, tries = granule, 0
    while high is None or high - low > granule:
        sizes[batch] = needed(batch)
        low, high = (batch, high) if sizes[batch] <= capacity else (low, batch)
        guess, tries = _crossing(sizes, capacity), tries + 1
        if high is None:  # each time further, so that guesses that are always a little short end too
            batch, least = max(min(guess or 2 * low, 4 * low) // granule * granule, low + least), 2 * least
        else:
            wanted = guess if guess and tries % 2 else (low + high) // 2
            batch = max(min(wanted, high - granule) // granule * granule, low + granule)
    return low


def _crossing(sizes: dict[int, float], capacity: float) -> int | None:
    """Where a line through the two largest batches of known size meets the capacity."""
    known = sorted(batch for batch, size in sizes.items() if size < math.inf)[-2:]
    if len(known) < 2 or sizes[known[1]] <= sizes[known[0]]:
        return None
    slope = (sizes[known[1]] - sizes[known[0]]) / (known[1] - known[0])
    return int(known[0] + (capacity - sizes[known[0]]) / slope)

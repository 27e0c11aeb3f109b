"""Device memory of the training step: visible patches against the published way, and the largest batch that fits.

Where the backend tells how much memory there is (GPU, TPU), a batch fits when a child process has really made two
steps with it. On a CPU the compiled program's buffers are compared with a given budget.
"""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import jax

from infmae_jax.benchmarks import flops
from infmae_jax.benchmarks.report import NEEDS_ACCELERATOR, Row, on_accelerator, report
from infmae_jax.benchmarks.training import TrainingProgram
from infmae_jax.training.config import PretrainConfig, from_config, to_config

_DOES_NOT_FIT = 17  # exit code of a child process that ran out of device memory


def memory(config: PretrainConfig, batch: int, budget_gib: float) -> dict[str, Any]:
    """Memory at a batch size and the largest batch that fits, both ways.

    Args:
      budget_gib: what a CPU run compares with; of no meaning where the device has its own limit.
    """
    ways = {
        flops.PUBLISHED: dataclasses.replace(config, model=flops.as_published(config.model)),
        flops.VISIBLE_ONLY: dataclasses.replace(config, model=flops.on_visible(config.model)),
    }
    gib = {way: TrainingProgram(of, batch).memory_gib for way, of in ways.items()}
    rows: list[Row] = [
        {"what": f"batch {batch}, {way}", "gib": used, "against_published": used / gib[flops.PUBLISHED]}
        for way, used in gib.items()
    ]
    for way, of in ways.items():
        fits, limit = _fits(of, budget_gib, batch, gib[way])
        rows.append({"what": f"largest batch in {limit}, {way}", "images": largest_batch(fits)})
    notes = ["gib: state, batch and temporaries of the compiled program"]
    if not on_accelerator():
        notes.append(f"largest batch by real allocation: {NEEDS_ACCELERATOR}")
    settings = {"image_size": list(config.data.image_size), "dtype": config.model.encoder.dtype, "remat": config.model.encoder.remat}
    return report("memory", settings, rows, notes)


def largest_batch(fits: Callable[[int], bool], precision: int = 16) -> int:
    """The largest batch that fits, to one part in `precision`: doubling, then bisection. 0 where not even one image
    fits."""
    low, high = 0, 1
    while fits(high):
        low, high = high, 2 * high
    while high - low > max(1, low // precision):
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low


def _fits(config: PretrainConfig, budget_gib: float, batch: int, gib: float) -> tuple[Callable[[int], bool], str]:
    if on_accelerator():
        return lambda tried: fits_in_child(config, tried), "the device's memory"
    # The compiled program's memory grows linearly, so a second program tells it for all batches.
    other = batch // 2 or 2
    each = (gib - TrainingProgram(config, other).memory_gib) / (batch - other)
    return lambda tried: gib + (tried - batch) * each <= budget_gib, f"{budget_gib:g} GiB"


def fits_in_child(config: PretrainConfig, batch: int) -> bool:
    """Whether a process of its own can make two steps with this batch.

    Raises:
      RuntimeError: it failed for another reason than a lack of device memory.
    """
    command = [sys.executable, "-m", __name__, str(batch)]
    settings = to_config(config).to_json()
    child = subprocess.run(command, input=settings, text=True, capture_output=True, check=False)
    if child.returncode not in (0, _DOES_NOT_FIT):
        raise RuntimeError(f"batch {batch}: {child.stderr.strip().splitlines()[-1:]}")
    return child.returncode == 0


def _main(batch: int) -> int:
    config = from_config(PretrainConfig, json.load(sys.stdin))
    try:
        program = TrainingProgram(config, batch)
        program.start()
        program(2)
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" in str(error):
            return _DOES_NOT_FIT
        raise
    return 0


if __name__ == "__main__":
    sys.exit(_main(int(sys.argv[1])))

"""What saving and observing cost: the same short run bare, with checkpoints, observed, and with both, in turns."""

from __future__ import annotations

import dataclasses
import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from infmae_jax.benchmarks import shards, timing
from infmae_jax.benchmarks.end_to_end import short_run, train_to_the_end
from infmae_jax.benchmarks.report import report
from infmae_jax.tasks.pretrain import PretrainConfig, PretrainTask
from infmae_jax.training.task import Position
from infmae_jax.training.metrics import read_events

_WARM = 2  # steps that do not count: the first ones allocate
_MINUTES = 10  # between the saves of a long run
_ALIKE = {"checkpoints": "bare", "both": "observed"}  # a form that saves: the one that differs in nothing else


class _TimedTask(PretrainTask):
    """Notes when the loop takes each batch; it takes the next one only when the step before the last has ended."""

    def train_batches(self, at: Position) -> Any:
        self.taken: list[float] = []
        return _TimedBatches(super().train_batches(at), self.taken)


class _TimedBatches:
    def __init__(self, batches: Any, taken: list[float]):
        self._batches, self._taken = batches, taken

    def __iter__(self) -> Iterator[dict[str, np.ndarray]]:
        return self

    def __next__(self) -> dict[str, np.ndarray]:
        self._taken.append(time.perf_counter())
        return next(self._batches)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._batches, name)


def overhead(config: PretrainConfig, batch: int, rounds: int, steps: int, log_every: int) -> dict[str, Any]:
    """Milliseconds a step in each form and what it adds to the bare one, paired by round.

    A benchmark saves far more often than a long run does, so that saves are many enough to be measured. What a save
    adds in all, blocking and slowing down what runs beside it, is therefore also put into the time between the saves
    of a long run.

    Args:
      steps: of a run, between the third and the last; a checkpoint is saved after each third of them.
      log_every: steps between logged ones where a run is observed: metrics.jsonl, TensorBoard, Prometheus file.
    """
    seconds: dict[str, list[float]] = {}
    blocked: list[float] = []
    with shards.scratch(config, max(4 * batch, 64)) as (with_shards, folder):
        forms = _forms(short_run(with_shards, batch, steps + _WARM + 1), steps, log_every, folder)
        _seconds_a_step(forms["both"], folder / "run")  # compiles, and does what is done once in a process
        for number in range(rounds):
            for name in list(forms) if number % 2 == 0 else reversed(forms):
                taken, saves = _seconds_a_step(forms[name], folder / "run")
                seconds.setdefault(name, []).append(taken)
                blocked += saves
    rows, save_every = [], max(1, steps // 3)
    for name in forms:
        low, median, high = timing.spread(np.asarray(seconds[name]) * 1e3)
        row = {"form": name, "step_ms": median, "low": low, "high": high}
        if name != "bare":
            row |= _added(seconds[name], seconds["bare"])
            row["long_run_percent"] = row["added_percent"]
        if alike := _ALIKE.get(name):
            row["seconds_a_save"] = float(np.median(np.subtract(seconds[name], seconds[alike]))) * save_every
            without = 0.0 if alike == "bare" else _added(seconds[alike], seconds["bare"])["added_percent"]
            row["long_run_percent"] = without + 100 * row["seconds_a_save"] / (60 * _MINUTES)
        rows.append(row)
    notes = [
        f"a save blocks the loop for {np.median(blocked):.3g} s (median of {len(blocked)}); added_percent: step time "
        "over that of the bare run of the same round; seconds_a_save: all that a save adds to the time of the run; "
        f"long_run_percent: the same with a save every {_MINUTES} minutes"
    ]
    settings = {
        "batch": batch, "steps": steps, "save_every": save_every, "log_every": log_every, "rounds": rounds,
        "image_size": list(config.data.image_size), "shards": shards.origin(config),
    }  # fmt: skip
    return report("overhead", settings, rows, notes)


def _seconds_a_step(config: PretrainConfig, run: Path) -> tuple[float, list[float]]:
    """Seconds a step, and how long each save but the last one blocked; the run is made and removed."""
    task = _TimedTask(config)
    train_to_the_end(task, config, run)
    saves = [event["seconds_blocked"] for event in read_events(run) if event["event"] == "save"]
    shutil.rmtree(run)
    return (task.taken[-1] - task.taken[_WARM]) / (len(task.taken) - 1 - _WARM), saves[:-1]


def _added(seconds: list[float], bare: list[float]) -> dict[str, float]:
    low, median, high = timing.spread(100 * (np.divide(seconds, bare) - 1))
    return {"added_percent": median, "added_low": low, "added_high": high}


def _forms(bare: PretrainConfig, steps: int, log_every: int, folder: Path) -> dict[str, PretrainConfig]:
    observe = dataclasses.replace(bare.observe, prometheus_file=str(folder / "metrics.prom"))
    saving = {"checkpoint_every": f"{max(1, steps // 3)} steps"}
    observing = {"log_every": f"{log_every} steps", "observe": observe}
    bare = dataclasses.replace(bare, log_every="0 steps")
    return {
        "bare": bare,
        "checkpoints": dataclasses.replace(bare, **saving),
        "observed": dataclasses.replace(bare, **observing),
        "both": dataclasses.replace(bare, **saving, **observing),
    }

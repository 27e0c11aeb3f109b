"""Data and step together: the training loop as `pretrain` runs it, and how much of its time goes into waiting."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np

from infmae_jax.benchmarks import shards, timing
from infmae_jax.benchmarks.report import NEEDS_ACCELERATOR, on_accelerator, report
from infmae_jax.benchmarks.training import TrainingProgram
from infmae_jax.tasks.pretrain import PretrainConfig, PretrainTask
from infmae_jax.training import loop
from infmae_jax.training.metrics import read_metrics

_PUBLISHED_IMAGES = 305_241 * 400  # of Inf30, times epochs


def short_run(config: PretrainConfig, batch: int, steps: int, **changes: Any) -> PretrainConfig:
    """The config of a run of so many steps that saves and draws only at its end."""
    return dataclasses.replace(
        config,
        data=dataclasses.replace(config.data, batch_size=batch),
        optimizer=dataclasses.replace(config.optimizer, warmup="0 steps"),
        **{"duration": f"{steps} steps", "checkpoint_every": "0 steps", "picture_every": "0 steps", **changes},
    )


def train_to_the_end(task: PretrainTask, config: PretrainConfig, run: Path) -> None:
    """`loop.train`; whoever ends it early (Ctrl-C, SIGTERM) ends the benchmark."""
    result = loop.train(task, config, run)
    if result.interrupted:
        raise SystemExit(result.stop_code)


def end_to_end(config: PretrainConfig, batch: int, rounds: int, steps: int) -> dict[str, Any]:
    """Trains on the config's shards (synthetic ones where it has none) for `rounds` windows of `steps` steps each.

    Raises:
      InputError: unusable shards, or fewer images than a batch.
    """
    with shards.scratch(config, max(4 * batch, 64)) as (with_shards, folder):
        run = short_run(with_shards, batch, (rounds + 1) * steps, log_every=f"{steps} steps")
        train_to_the_end(PretrainTask(run), run, folder / "run")
        windows = [row for row in read_metrics(folder / "run") if row["step"] > steps]  # the first one compiles
    program = TrainingProgram(run, batch)
    program.start()
    alone = float(np.median(timing.take_turns({"step": program}, rounds)["step"]))
    rates = np.asarray([row["images_per_second"] for row in windows])
    seconds = np.diff([steps, *(row["step"] for row in windows)]) * batch / rates
    waits = np.asarray([row["data_wait_seconds"] for row in windows]) / seconds
    low, median, high = timing.spread(rates)
    row = {
        "images_per_second": median, "low": low, "high": high, "host_waits": float(np.median(waits)),
        "step_alone_images_per_second": batch / alone, "device_idle_at_most": max(0.0, 1 - alone * median / batch),
        "hours_for_published_schedule": _PUBLISHED_IMAGES / median / 3600,
    }  # fmt: skip
    notes = [
        "host_waits: share of wall time in which the loop waits for a batch. device_idle_at_most: share of a step's "
        "time in the loop that it does not take alone, on a batch that is there already."
    ]
    if not on_accelerator():
        notes.append(f"on a CPU, data and step share the cores; share of an accelerator's time: {NEEDS_ACCELERATOR}")
    settings = {
        "batch": batch, "steps": steps, "rounds": rounds, "image_size": list(config.data.image_size),
        "workers": config.data.workers, "shards": shards.origin(config),
    }  # fmt: skip
    return report("end_to_end", settings, [row], notes)

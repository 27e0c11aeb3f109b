"""Reads a run's metrics one step late, and tells people and the loop what they say."""

import dataclasses
import math
import time
from collections.abc import Mapping
from pathlib import Path

import jax
from absl import logging

from data_pipelines.commands import progress_bar
from infmae_jax.training import hardware
from infmae_jax.training.goodput import Goodput
from infmae_jax.training.program import Program
from infmae_jax.training.task import Batches, Position
from infmae_jax.training.writers import EventLog, MetricsWriter

_NOT_LOGGED = ("skipped", "in_a_row", "stop")
_KEYS_NAMED = 4  # record keys in a message; the event has all


@dataclasses.dataclass(frozen=True)
class Signs:
    """What a step's metrics ask of the loop: the same on all hosts, as metrics are.

    Attributes:
      stop: exit code of a stop request that reached the step, 0 without one.
      in_a_row: updates skipped in a row, that of the step included.
    """

    stop: int = 0
    in_a_row: int = 0


@dataclasses.dataclass(eq=False)
class Monitor:
    """Metrics, events and the progress line of a run, from step `first` on. Close it.

    Attributes:
      signs: what the last step that was read says.
    """

    workdir: Path
    program: Program
    clock: Goodput
    events: EventLog
    first: int
    primary: bool

    def __post_init__(self):
        self._task = self.program.task
        self._writer = MetricsWriter(self.workdir, self.first, self.primary)
        self._bar = progress_bar("train", self.program.total_steps, "step", done=self.first, active=self.primary)

    def restart(self, batches: Batches, at: Position) -> None:
        """From now on steps are counted from `at` and come from `batches`."""
        self._batches, self.signs = batches, Signs()
        self._pending: tuple | None = None
        self._losses: list[float] = []
        self._bar.n = at.step
        self._start_window()

    def rewind(self, step: int) -> None:
        """Forgets the logged rows of `step` and later ones: they will be made again."""
        self._writer.rewind(step)

    def _start_window(self) -> None:
        self._steps, self._since, self._waited = 0, time.perf_counter(), self.clock.seconds()["data_wait"]

    def step(self, step: int, metrics: dict[str, jax.Array], log: bool) -> None:
        """Takes the metrics of a step that was just dispatched; reads those of the one before, which is done or soon
        will be, so that the device is never without work."""
        before, self._pending = self._pending, (step, metrics, log)
        self._bar.update()
        if before:
            self._read(*before)

    def flush(self) -> Signs:
        """Reads what is left to read."""
        before, self._pending = self._pending, None
        if before:
            self._read(*before)
        return self.signs

    def mean_loss(self) -> float:
        """Of the accepted updates since the last call (infinite without any)."""
        losses, self._losses = self._losses, []
        return math.fsum(losses) / len(losses) if losses else math.inf

    def results(self, step: int, values: Mapping[str, float]) -> None:
        """Logs what evaluators found at the state before `step`."""
        self._writer.write({"step": step, "epoch": self._epoch(step), **values})

    def close(self) -> None:
        self._bar.close()
        self._writer.close()

    def _read(self, step: int, metrics: dict[str, jax.Array], log: bool) -> None:
        with self.clock.spend("stepping"):
            values = {name: value.item() for name, value in jax.device_get(metrics).items()}
        self._steps += 1
        if values["skipped"]:
            self._log_skipped(step, values)
        else:
            self._losses.append(values["loss"])
        if log and not values["skipped"]:
            self._log(step, {k: v for k, v in values.items() if k not in _NOT_LOGGED})
        self.signs = Signs(values["stop"], values["in_a_row"])

    def _epoch(self, step: int) -> float:
        return step * self._task.batch_size / self._task.num_examples

    def _log(self, step: int, values: dict[str, float]) -> None:
        seconds_per_step = max(time.perf_counter() - self._since, 1e-9) / self._steps
        row = {"step": step, "epoch": self._epoch(step), **values}
        row |= {
            "images_per_second": self._task.batch_size / seconds_per_step,
            "data_wait_seconds": self.clock.seconds()["data_wait"] - self._waited,
            "substituted_samples": self._batches.substituted,
            "goodput": self.clock.shares()["stepping"],
            "device_memory_gib": hardware.device_memory_gib(),
            "mfu": self.program.mfu(seconds_per_step),
        }
        self._writer.write({name: value for name, value in row.items() if value is not None})
        text = f"loss {values['loss']:.4f}, {row['images_per_second']:.1f} images/s"
        self._bar.set_postfix_str(text, refresh=False)
        self._start_window()

    def _log_skipped(self, step: int, values: dict[str, float]) -> None:
        if not self.primary:
            return
        finite = math.isfinite(values["loss"]) and math.isfinite(values["grad_norm"])
        part = "loss" if not math.isfinite(values["loss"]) else "gradient"
        reason = "spike" if finite else f"non-finite {part}"
        keys = self._batches.keys(step)
        self.events.write("skip", step, reason=reason, loss=values["loss"], grad_norm=values["grad_norm"], records=keys)
        named = ", ".join(keys[:_KEYS_NAMED]) + (f" and {len(keys) - _KEYS_NAMED} more" * (len(keys) > _KEYS_NAMED))
        logging.warning(
            "step %d: %s (loss %g, gradient norm %g), update skipped; records: %s",
            step, reason, values["loss"], values["grad_norm"], named,
        )  # fmt: skip

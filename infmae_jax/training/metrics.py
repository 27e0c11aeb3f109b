"""What a run writes down while it trains: metrics.jsonl, events.jsonl, TensorBoard, optional services, a progress line.

Losing a line must never lose the run: where a file or service refuses (full disk, folder gone, network down), the
failure is counted, the first one is a warning, and each later line is tried anew. No line is ever left half-written.
"""

from __future__ import annotations

import contextlib
import json
import math
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from absl import logging

from infmae_jax.training.config import ObserveConfig
from infmae_jax.training.sinks import AppendOnlyFile, Prometheus, Sink, TensorBoard, WeightsAndBiases

METRICS_NAME = "metrics.jsonl"
EVENTS_NAME = "events.jsonl"
_NON_FINITE = ("nan", "inf", "-inf")


def read_metrics(run: str | Path) -> list[dict[str, float]]:
    """All logged steps of a run, in order; lines that are not whole (the process was killed) are left out."""
    return [row for row in _read_lines(Path(run) / METRICS_NAME) if "step" in row]


def read_events(run: str | Path) -> list[dict[str, Any]]:
    """All events of a run, in order: each has `time` (unix seconds), `step`, `event` (its name) and details."""
    return [row for row in _read_lines(Path(run) / EVENTS_NAME) if {"time", "step", "event"} <= row.keys()]


class EventLog:
    """Appends what happens to a run to RUN/events.jsonl; does nothing where `active` is False.

    Numbers that JSON does not have are written as the texts "nan", "inf" and "-inf".
    """

    def __init__(self, run: str | Path, active: bool = True):
        self._file = AppendOnlyFile(Path(run) / EVENTS_NAME) if active else None
        self._guard = _Guard(EVENTS_NAME)

    def write(self, event: str, step: int, **details: Any) -> None:
        """One line: the time, the step that it happened at, the event's name, and what is known of it."""
        if self._file is not None:
            with self._guard:
                row = {"time": time.time(), "step": int(step), "event": event, **details}
                self._file.append(_to_line(row))

    def close(self) -> None:
        if self._file is not None:
            self._file.close()


class MetricsWriter:
    """Writes logged steps to RUN/metrics.jsonl, RUN/tensorboard and what `observe` asks for.

    Opening for a run resumed at `first_step` drops the rows of that step and later ones: they will be made again.
    Does nothing where `active` is False.

    Args:
      run: run folder.
      first_step: the step that will be made first.
      active: on one process of a job.
      observe: services besides the files.
      config: flat, for Weights & Biases.

    Attributes:
      last_row_time: unix seconds of the last row found at opening, dropped or not; None without rows. It goes into
        the `resume` event, where `goodput.lost_time` looks for it.
      failures: writes that failed so far, over all files and services.

    Raises:
      InputError: `observe` names a service or file that cannot be used.
    """

    def __init__(
        self,
        run: str | Path,
        first_step: int,
        active: bool = True,
        observe: ObserveConfig = ObserveConfig(),
        config: Mapping[str, Any] | None = None,
    ):
        self.last_row_time: float | None = None
        self._sinks: list[tuple[Sink, _Guard]] = []
        if not active:
            return
        rows = read_metrics(run)
        self.last_row_time = rows[-1].get("time") if rows else None
        sinks: list[Sink] = []
        if observe.prometheus_file:
            sinks.append(Prometheus(observe.prometheus_file, Path(run).resolve().name))
        if observe.wandb_project:
            sinks.append(WeightsAndBiases(run, observe.wandb_project, config or {}))
        sinks += [_JsonRows(Path(run) / METRICS_NAME), TensorBoard(Path(run) / "tensorboard")]
        self._sinks = [(sink, _Guard(sink.name, sink.errors)) for sink in sinks]
        self.rewind(first_step)

    @property
    def failures(self) -> int:
        return sum(guard.failures for _, guard in self._sinks)

    def write(self, row: Mapping[str, float]) -> None:
        """One object a logged step; `row` has the key "step". The time of writing is added, as `time`."""
        stamped = {"step": row["step"], "time": time.time(), **row}
        self._each(lambda sink: sink.write(stamped))

    def picture(self, name: str, image: np.ndarray, step: int) -> None:
        """image: (H,W,3) uint8."""
        self._each(lambda sink: sink.picture(name, image, step))

    def rewind(self, step: int) -> None:
        """Drops the rows of `step` and later: the run goes back there, and they will be made again."""
        self._each(lambda sink: sink.rewind(step))

    def close(self) -> None:
        self._each(lambda sink: sink.close())

    def _each(self, act: Callable[[Sink], None]) -> None:
        for sink, guard in self._sinks:
            with guard:
                act(sink)


class _JsonRows:
    """metrics.jsonl: one object a logged step, steps growing."""

    name, errors = METRICS_NAME, (OSError,)

    def __init__(self, path: Path):
        self._file = AppendOnlyFile(path)

    def write(self, row: Mapping[str, float]) -> None:
        self._file.append(_to_line(row))

    def picture(self, name: str, image: np.ndarray, step: int) -> None:
        pass

    def rewind(self, step: int) -> None:
        end = 0
        for line in self._file.read().splitlines(keepends=True):
            row = _parse_line(line)
            if row is not None and row.get("step", -1) >= step:
                break
            end += len(line)
        self._file.truncate(end)

    def close(self) -> None:
        self._file.close()


class _Guard(contextlib.AbstractContextManager):
    """Swallows the failures of one file or service: counts them, and warns at the first."""

    def __init__(self, name: str, errors: tuple[type[Exception], ...] = (OSError,)):
        self._name, self._errors = name, errors
        self.failures = 0

    def __exit__(self, kind, error, traceback) -> bool:
        if not isinstance(error, self._errors):
            return False
        self.failures += 1
        if self.failures == 1:
            logging.warning("%s: a write failed (%s); training goes on, later lines are tried anew", self._name, error)
        return True


def _to_line(row: Mapping[str, Any]) -> bytes:
    return (json.dumps(_without_non_finite(row), allow_nan=False, default=_plain) + "\n").encode()


def _without_non_finite(value: Any) -> Any:
    if isinstance(value, float):
        return value if math.isfinite(value) else repr(float(value))
    if isinstance(value, Mapping):
        return {str(key): _without_non_finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_without_non_finite(item) for item in value]
    return value


def _plain(value: Any) -> Any:
    """NumPy scalars and arrays, paths and exceptions as JSON."""
    return _without_non_finite(value.tolist()) if isinstance(value, (np.generic, np.ndarray)) else str(value)


def _parse_line(line: bytes) -> dict[str, Any] | None:
    try:
        row = json.loads(line)
    except ValueError:
        return None
    if not isinstance(row, dict):
        return None
    return {key: float(value) if value in _NON_FINITE else value for key, value in row.items()}


def _read_lines(path: Path) -> Iterator[dict[str, Any]]:
    for line in path.read_bytes().splitlines() if path.is_file() else []:
        row = _parse_line(line)
        if row is not None:
            yield row

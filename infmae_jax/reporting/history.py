"""What a run folder says about its run, however little is there yet."""

from __future__ import annotations

import dataclasses
import functools
import json
import math
import statistics
import time
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from data_pipelines.errors import InputError
from infmae_jax.training.duration import in_steps
from infmae_jax.training.goodput import LostTime, lost_time
from infmae_jax.training.writers import EVENTS_NAME, METRICS_NAME, read_events, read_metrics
from infmae_jax.training.run_folder import CONFIG_NAME, RUN_INFO_NAME

PICTURES = "pictures"
_ENDINGS = ("finished", "preempted", "interrupted", "stopped")
_STARTS = ("start", "resume")
_INTERRUPTED = 130  # exit code that a `preempted` event carries after Ctrl-C
_SILENT_SECONDS = 600.0  # at least; a run that logs rarely may be silent for longer
_SILENT_ROWS = 10
_RECENT = 0.1  # of the rows


@dataclasses.dataclass(frozen=True)
class Status:
    """What became of a run: one of "finished", "running", "silent", "preempted", "interrupted", "stopped", "new"."""

    word: str
    detail: str


@dataclasses.dataclass(frozen=True)
class RunHistory:
    """The contents of a run folder.

    Attributes:
      folder: the run folder.
      config, record: config.json and run_info.json; empty where missing or unreadable.
      rows: logged steps, steps growing.
      events: what happened, in order.
      pictures: reconstructions, oldest first.
      problems: one line for each file that could not be read.
      now: unix seconds of reading.
    """

    folder: Path
    config: dict[str, Any]
    record: dict[str, Any]
    rows: list[dict[str, Any]]
    events: list[dict[str, Any]]
    pictures: list[Path]
    problems: list[str]
    now: float

    def series(self, key: str) -> tuple[np.ndarray, np.ndarray]:
        """Steps and values, float64, of the rows that have `key`; what is no number is NaN."""
        pairs = [(row["step"], _number(row[key])) for row in self.rows if key in row]
        return tuple(np.array(pairs, np.float64).reshape(-1, 2).T)

    def keys(self, prefix: str) -> list[str]:
        """Names of logged values that begin with `prefix`, in order of appearance."""
        return list(dict.fromkeys(key for row in self.rows for key in row if key.startswith(prefix)))

    def finite(self, key: str) -> np.ndarray:
        values = self.series(key)[1]
        return values[np.isfinite(values)]

    def recent(self, key: str) -> float | None:
        """Median over the last tenth of the rows."""
        values = self.finite(key)
        return float(np.median(values[-max(1, math.ceil(len(values) * _RECENT)) :])) if len(values) else None

    @functools.cached_property
    def step(self) -> int:
        """Steps made, as far as the folder says."""
        last_row = self.rows[-1]["step"] + 1 if self.rows else 0
        at_end = [event["step"] for event in self.events[-1:] if event["event"] in (*_ENDINGS, "save")]
        return int(max([last_row, *at_end]))

    @functools.cached_property
    def total_steps(self) -> int | None:
        """Steps of the whole run; None where the folder does not tell."""
        try:
            images, batch_size = self.config["data_set"]["images"], self.config["data"]["batch_size"]
            return in_steps(self.config["duration"], batch_size=batch_size, num_examples=images)
        except (KeyError, TypeError, AttributeError, ArithmeticError, InputError):
            return None

    @functools.cached_property
    def last_sign(self) -> float | None:
        """Unix seconds of the last row or event."""
        times = [entry["time"] for entry in (*self.rows[-1:], *self.events[-1:]) if "time" in entry]
        return max(times) if times else None

    @functools.cached_property
    def began(self) -> float | None:
        times = [entry["time"] for entry in (*self.rows[:1], *self.events[:1]) if "time" in entry]
        return min(times) if times else None

    @functools.cached_property
    def counts(self) -> Counter[str]:
        """How often each event happened."""
        return Counter(event["event"] for event in self.events)

    @functools.cached_property
    def skipped(self) -> int:
        """Updates skipped; rows count those whose events could not be written."""
        logged = self.finite("skipped_updates")
        return int(max(self.counts["skip"] + self.counts["spike"], logged.max(initial=0)))

    @functools.cached_property
    def lost(self) -> LostTime:
        return lost_time(self.events)

    @functools.cached_property
    def status(self) -> Status:
        for event in reversed(self.events):
            if event["event"] in _STARTS:
                break
            if event["event"] in _ENDINGS:
                return _ended(event)
        if not self.events and self.total_steps is not None and self.step >= self.total_steps:
            return Status("finished", "by its last logged step; there are no events")
        if self.last_sign is None:
            return Status("silent", "nothing says when") if self.rows else Status("new", "nothing logged yet")
        gaps = np.diff([row["time"] for row in self.rows if "time" in row])
        usual = statistics.median(gaps) if len(gaps) else 0.0
        silent = self.now - self.last_sign
        if silent > max(_SILENT_SECONDS, _SILENT_ROWS * usual):
            return Status("silent", f"no sign of life for {duration_text(silent)}: killed, or it hangs")
        return Status("running", f"last sign of life {duration_text(max(silent, 0.0))} ago")

    @functools.cached_property
    def seconds_left(self) -> float | None:
        """Of a running run, from the rate of its recent steps."""
        rate = self.recent("images_per_second")
        if self.status.word != "running" or not rate or self.total_steps is None:
            return None
        return max(0, self.total_steps - self.step) * self.config["data"]["batch_size"] / rate


def read_history(run: str | Path) -> RunHistory:
    """Reads a run folder.

    Raises:
      InputError: `run` holds none of the files of a run.
    """
    folder = Path(run)
    names = (CONFIG_NAME, RUN_INFO_NAME, METRICS_NAME, EVENTS_NAME)
    if not any((folder / name).is_file() for name in names):
        raise InputError(f"{run} is not a run folder: it has none of {', '.join(names)}; give the --workdir of a run")
    problems: list[str] = []
    rows = {row["step"]: row for row in _plausible(read_metrics(folder, at_most=20_000), ("step",))}
    return RunHistory(
        folder=folder,
        config=_read_object(folder / CONFIG_NAME, problems),
        record=_read_object(folder / RUN_INFO_NAME, problems),
        rows=[rows[step] for step in sorted(rows)],
        events=[{**event, "event": str(event["event"])} for event in _plausible(read_events(folder), ("step", "time"))],
        pictures=sorted((folder / PICTURES).glob("step_*.png")),
        problems=problems,
        now=time.time(),
    )


def _plausible(entries: Iterable[Mapping[str, Any]], needed: Sequence[str]) -> list[dict[str, Any]]:
    """Entries with finite numbers for `needed`; of the other keys that are reckoned with, those that are numbers."""
    numbers = {"step", "time", "to_step", "last_row_time"}
    found = []
    for entry in entries:
        kept = {k: v for k, v in entry.items() if k not in numbers or math.isfinite(_number(v))}
        if kept.keys() >= set(needed):
            found.append(kept)
    return found


def duration_text(seconds: float) -> str:
    """12 s, 3 min, 4.5 h, 2.1 d."""
    for unit, size in (("d", 86400.0), ("h", 3600.0), ("min", 60.0)):
        if seconds >= 2 * size:
            return f"{seconds / size:.1f} {unit}" if seconds < 20 * size else f"{seconds / size:.0f} {unit}"
    return f"{seconds:.0f} s"


def _ended(event: Mapping[str, Any]) -> Status:
    word = event["event"]
    if word == "preempted" and event.get("code") == _INTERRUPTED:
        word = "interrupted"
    if word == "finished":
        return Status(word, "")
    if word == "stopped":
        return Status(word, str(event.get("reason", "")))
    return Status(word, f"at step {int(event['step']):,}; the same command goes on")


def _number(value: Any) -> float:
    try:
        return float(value) if isinstance(value, (int, float)) else math.nan
    except OverflowError:
        return math.nan


def _read_object(path: Path, problems: list[str]) -> dict[str, Any]:
    if not path.is_file():
        problems.append(f"{path.name} is missing")
        return {}
    try:
        found = json.loads(path.read_text())
    except (ValueError, OSError) as error:
        problems.append(f"{path.name} cannot be read: {error}")
        return {}
    if not isinstance(found, dict):
        problems.append(f"{path.name} holds no object")
        return {}
    return found

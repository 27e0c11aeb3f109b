"""What a run folder says about its run, however little is there yet and however long the run was."""

import collections
import functools
import math
import time
from pathlib import Path
from typing import Any

import numpy as np

from data_pipelines.errors import InputError
from infmae_jax.training.run_folder import CONFIG_NAME, RUN_INFO_NAME, read_object
from infmae_jax.training.writers import EVENTS_NAME, METRICS_NAME, read_events, read_metrics

MOST_ROWS = 20_000  # of metrics.jsonl; of a longer file as many are read, evenly spread
_RECENT_ROWS = 10
_ENDINGS = ("finished", "preempted", "interrupted", "stopped")
_SILENT_SECONDS = 600.0  # at least; a run that logs rarely may be silent for longer
_SILENT_ROWS = 10


class RunHistory:
    """The contents of a run folder, its metrics.jsonl read line by line in bounded memory.

    Args:
      run: run folder.

    Attributes:
      folder: the run folder.
      config, record: config.json and run_info.json; empty where missing or unreadable.
      rows: logged steps, steps growing.
      events: what happened, in order.
      pictures: PNG files in RUN/pictures, by name.
      problems: one line for each file that could not be read, or not read whole.
      now: unix seconds of reading.

    Raises:
      InputError: `run` holds none of the files of a run.
    """

    def __init__(self, run: str | Path):
        self.folder, self.now = Path(run).expanduser(), time.time()
        names = (CONFIG_NAME, RUN_INFO_NAME, METRICS_NAME, EVENTS_NAME)
        if not any((self.folder / name).is_file() for name in names):
            known = ", ".join(names)
            raise InputError(f"{run} is not a run folder: it has none of {known}; give the --workdir of a run")
        self.problems: list[str] = []
        self.config, self.record = self._read_object(CONFIG_NAME), self._read_object(RUN_INFO_NAME)
        found = read_metrics(self.folder, at_most=MOST_ROWS)
        if len(found) >= MOST_ROWS:
            self.problems.append(f"{METRICS_NAME} is long: {len(found)} rows, evenly spread, are shown")
        rows = {row["step"]: row for row in found}  # of two rows of a step the later
        self.rows = [rows[step] for step in sorted(rows)]
        self.events = read_events(self.folder)
        self.pictures = sorted((self.folder / "pictures").rglob("*.png"))

    def _read_object(self, name: str) -> dict[str, Any]:
        try:
            if (self.folder / name).is_file():
                return read_object(self.folder / name)
            self.problems.append(f"{name} is missing")
        except InputError as error:
            self.problems.append(str(error).replace(f"{self.folder}/", ""))
        return {}

    @functools.cached_property
    def series(self) -> dict[str, np.ndarray]:
        """Logged value -> (n, 2) float64, step and value, NaN for what is not a finite number."""
        found: dict[str, list[tuple[float, float]]] = {}
        for row in self.rows:
            for key, value in row.items():
                found.setdefault(key, []).append((row["step"], value if math.isfinite(value) else math.nan))
        return {key: np.array(pairs) for key, pairs in found.items()}

    def finite(self, key: str) -> np.ndarray:
        """(n, 2) as in `series`, of the finite values; n is 0 where nothing of this name was logged."""
        series = self.series.get(key, np.zeros((0, 2)))
        return series[np.isfinite(series[:, 1])]

    def recent(self, key: str) -> float | None:
        """Median over the last rows, None without any."""
        values = self.finite(key)[-_RECENT_ROWS:, 1]
        return float(np.median(values)) if len(values) else None

    @functools.cached_property
    def step(self) -> int:
        """Steps made, as far as the folder says."""
        at_end = [event["step"] for event in self.events[-1:] if event["event"] in (*_ENDINGS, "save")]
        # A row of a step is written once that is made, one of an evaluation says how many have been.
        made = [row["step"] + ("loss" in row) for row in self.rows[-1:]]
        return int(max([0, *made, *at_end]))

    @functools.cached_property
    def total_steps(self) -> int | None:
        """Steps of the whole run; None where the events do not say."""
        totals = [event["total_steps"] for event in self.events if type(event.get("total_steps")) is int]
        return totals[-1] if totals and 0 < totals[-1] < 1 << 53 else None

    @functools.cached_property
    def seen(self) -> tuple[float, float] | None:
        """Unix seconds of the first and the last row or event; None where nothing says."""
        times = [*self.finite("time")[:, 1], *(event["time"] for event in self.events)]
        return (min(times), max(times)) if times else None

    @functools.cached_property
    def counts(self) -> collections.Counter[str]:
        """How often each event happened; "skip" counts also updates whose events could not be written."""
        counts = collections.Counter(event["event"] for event in self.events)
        counts["skip"] = int(max(counts["skip"], self.finite("skipped_updates")[:, 1].max(initial=0)))
        return counts

    @functools.cached_property
    def status(self) -> tuple[str, str]:
        """What became of the run: "finished", "running", "silent", "preempted", "interrupted", "stopped" or "new", and
        a few words about it."""
        turns = [event for event in self.events if event["event"] in ("start", "resume", *_ENDINGS)]
        if turns and (word := turns[-1]["event"]) in _ENDINGS:
            if word in ("finished", "stopped"):
                return word, str(turns[-1].get("reason", ""))
            return word, f"at step {int(turns[-1]['step']):,}; the same command continues it"
        if self.seen is None:
            return ("silent", "nothing says since when") if self.rows else ("new", "nothing logged yet")
        gaps = np.diff(self.finite("time")[:, 1])
        silent = max(self.now - self.seen[1], 0.0)
        if silent > max(_SILENT_SECONDS, _SILENT_ROWS * np.median(gaps) if len(gaps) else 0.0):
            return "silent", f"no sign of life for {duration_text(silent)}: killed, or it hangs"
        return "running", f"last sign of life {duration_text(silent)} ago"


def duration_text(seconds: float) -> str:
    """12 s, 3 min, 4.5 h, 2.1 d."""
    for unit, size in (("d", 86400.0), ("h", 3600.0), ("min", 60.0)):
        if seconds >= 2 * size:
            return f"{seconds / size:.1f} {unit}" if seconds < 20 * size else f"{seconds / size:.0f} {unit}"
    return f"{seconds:.0f} s"

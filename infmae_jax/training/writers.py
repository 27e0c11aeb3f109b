"""What a run writes down while it trains: metrics.jsonl, events.jsonl, TensorBoard.

Losing a line must never lose the run: where a file refuses (full disk, folder gone), the failure is counted, the first
one is a warning, and each later line is tried anew. No line is ever left half-written.
"""

import contextlib
import json
import math
import os
import struct
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from absl import logging
from tensorboardX.proto.event_pb2 import Event, SessionLog
from tensorboardX.proto.summary_pb2 import Summary
from tensorboardX.record_writer import masked_crc32c

from infmae_jax.training.line_files import LONGEST_LINE, AppendOnlyFile, lines_from_the_end, read_lines

METRICS_NAME = "metrics.jsonl"
EVENTS_NAME = "events.jsonl"
_NON_FINITE = ("nan", "inf", "-inf")


def read_metrics(run: str | Path, at_most: int | None = None) -> list[dict[str, float]]:
    """The logged steps of a run, in order: finite or not, all values are numbers, and `step` is a whole one.

    Lines that are not whole (the process was killed) or hold no step, and values that are not numbers, are left out.

    Args:
      run: run folder.
      at_most: of a longer file, about this many rows, evenly spread over it, the last one included: the time and
        memory for a run of millions of steps stay those of a short one.
    """
    path = Path(run) / METRICS_NAME
    rows = []
    for line in read_lines(path, at_most):
        row = {key: value for key, value in _parse_line(line).items() if _is_number(value)}
        if _is_step(row.get("step")):
            rows.append(row)
    return rows


def read_events(run: str | Path) -> list[dict[str, Any]]:
    """All events of a run, in order: each has `time` (unix seconds), `step`, `event` (its name) and details."""
    events = map(_parse_line, read_lines(Path(run) / EVENTS_NAME))
    return [e for e in events if _is_step(e.get("step")) and _is_number(e.get("time")) and math.isfinite(e["time"])
            and isinstance(e.get("event"), str)]  # fmt: skip


class _Log(AppendOnlyFile, contextlib.AbstractContextManager):
    """A file that a run appends to; inside `with`, what the file refuses is counted, and the first one is a warning."""

    failures = 0

    def __exit__(self, kind, error, traceback) -> bool:
        if not isinstance(error, OSError):
            return False
        self.failures += 1
        if self.failures == 1:
            name = self.path.name
            logging.warning("%s: a write failed (%s); training goes on, later lines are tried anew", name, error)
        return True


class _Lines(_Log):
    """One JSON object a line; where steps grow, it may be rewound."""

    def write(self, row: Mapping[str, float]) -> None:
        self.append((_json(row) + "\n").encode())

    def rewind(self, step: int) -> None:
        end = 0
        if step > 0 and self.size:
            for line, line_end in lines_from_the_end(self.path):
                found = _parse_line(line).get("step")
                if _is_step(found) and found < step:
                    end = line_end
                    break
        self.truncate(end)


class _TensorBoard(_Log):
    """Event files in `folder`, one record a logged step.

    Written here and not by tensorboardX's writer, whose thread dies of a full disk and then blocks the loop.
    """

    def __init__(self, folder: Path):
        # A file for each process; TensorBoard reads them in the order of their names.
        super().__init__(folder / f"events.out.tfevents.{time.time_ns():019d}.{os.getpid()}")

    def write(self, row: Mapping[str, float]) -> None:
        scalars = {key: float(value) for key, value in row.items() if key not in ("step", "time")}
        values = [Summary.Value(tag=key, simple_value=value) for key, value in scalars.items()]
        self._append(step=int(row["step"]), wall_time=row["time"], summary=Summary(value=values))

    def rewind(self, step: int) -> None:
        # TensorBoard drops what it has of this step and later when it reads a session start there.
        self._append(step=step, session_log=SessionLog(status=SessionLog.START))

    def _append(self, **event: Any) -> None:
        data = _record(Event(**{"wall_time": time.time(), **event}))
        if self.size == 0:
            data = _record(Event(wall_time=time.time(), file_version="brain.Event:2")) + data
        self.append(data)


class _Writer:
    """Writes to files of a run; does nothing where `active` is False.

    Attributes:
      failures: writes that failed so far, over all files.
    """

    def __init__(self, active: bool, *logs: _Lines | _TensorBoard):
        self._logs = logs if active else ()

    @property
    def failures(self) -> int:
        return sum(log.failures for log in self._logs)

    def close(self) -> None:
        self._each(lambda log: log.close())

    def _each(self, act: Callable[[_Lines | _TensorBoard], None]) -> None:
        for log in self._logs:
            with log:
                act(log)


class EventLog(_Writer):
    """Appends what happens to a run to RUN/events.jsonl; does nothing where `active` is False.

    Numbers that JSON does not have are written as the texts "nan", "inf" and "-inf".
    """

    def __init__(self, run: str | Path, active: bool = True):
        super().__init__(active, _Lines(Path(run) / EVENTS_NAME))

    def write(self, event: str, step: int, **details: Any) -> None:
        """One line: the time, the step that it happened at, the event's name, and what is known of it."""
        row = {"time": time.time(), "step": int(step), "event": event, **details}
        self._each(lambda log: log.write(row))


class MetricsWriter(_Writer):
    """Writes logged steps to RUN/metrics.jsonl and RUN/tensorboard.

    Opening for a run resumed at `first_step` drops the rows of that step and later ones: they will be made again.
    Does nothing where `active` is False.

    Args:
      run: run folder.
      first_step: the step that will be made first.
      active: on one process of a job.
    """

    def __init__(self, run: str | Path, first_step: int, active: bool = True):
        super().__init__(active, _Lines(Path(run) / METRICS_NAME), _TensorBoard(Path(run) / "tensorboard"))
        self.rewind(first_step)

    def write(self, row: Mapping[str, float]) -> None:
        """One object a logged step; `row` has the key "step". The time of writing is added, as `time`."""
        stamped = {"step": row["step"], "time": time.time(), **row}
        self._each(lambda log: log.write(stamped))

    def rewind(self, step: int) -> None:
        """Drops the rows of `step` and later: the run goes back there, and they will be made again."""
        self._each(lambda log: log.rewind(step))


def _record(event: Any) -> bytes:
    """A protocol buffer as TFRecord: length, its checksum, data, their checksum."""
    data = event.SerializeToString()
    length = struct.pack("<Q", len(data))
    return b"".join([length, struct.pack("<I", masked_crc32c(length)), data, struct.pack("<I", masked_crc32c(data))])


def _json(row: Mapping[str, Any]) -> str:
    """NumPy scalars and arrays, paths and exceptions as JSON, with text for the numbers that it does not have."""
    text = json.dumps(row, default=lambda value: value.tolist() if hasattr(value, "tolist") else str(value))
    return json.dumps(json.loads(text, parse_constant=lambda name: repr(float(name))))


def _parse_line(line: bytes) -> dict[str, Any]:
    """What a line holds; empty where it is no JSON object, or one that nobody wrote with this module."""
    try:
        row = json.loads(line) if len(line) <= LONGEST_LINE else None
    except (ValueError, RecursionError):
        row = None
    row = row if isinstance(row, dict) else {}
    return {key: float(value) if value in _NON_FINITE else value for key, value in row.items()}


def _is_number(value: Any) -> bool:
    return isinstance(value, float) or (isinstance(value, int) and not isinstance(value, bool) and abs(value) < 2**63)


def _is_step(value: Any) -> bool:
    return _is_number(value) and isinstance(value, int) and value >= 0

"""Goodput: which share of the wall time makes steps, and where the rest goes, in this process and over restarts.

"Goodput" as in fleet accounting: useful time / all time. Its complement has names, the shares below.
"""

from __future__ import annotations

import dataclasses
import os
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import psutil

# What the time of one process is spent on. A step that is made again after a rollback, or whose update is skipped,
# counts as stepping here; `lost_time` finds that work in the events.
SHARES = {
    "stepping": "giving steps to the device and waiting for their results",
    "data_wait": "waiting for the next batch, its copy to the device included",
    "saving": "waiting for a checkpoint to let go of the device arrays",
    "compiling": "tracing and compiling programs",
    "restoring": "reading a checkpoint",
    "evaluating": "evaluators: measures and pictures",
    "other": "everything else: starting Python, opening files, making the model, writing logs",
}


class Goodput:
    """Splits the wall time since the start of the process into `SHARES`, which always sum to one.

        goodput = Goodput()
        with goodput.spend("data_wait"):
            batch = next(batches)

    Spans may be nested: time belongs to the innermost one alone. Not for use by several threads. A span costs about
    a microsecond.

    Args:
      clock: seconds that only grow.
      started: the clock at the start of the process; by default what the operating system says.
    """

    def __init__(self, clock: Callable[[], float] = time.perf_counter, started: float | None = None):
        self._clock = clock
        self._since = clock() - _process_age() if started is None else started
        self._seconds = dict.fromkeys(SHARES, 0.0)
        self._open = ["other"]
        self._spans = {name: _Span(self, name) for name in SHARES}

    def spend(self, name: str) -> _Span:
        """Context manager: the time inside belongs to share `name`; KeyError when there is no such share."""
        return self._spans[name]

    def seconds(self) -> dict[str, float]:
        """Seconds of every share until now, open spans included."""
        self._settle()
        return dict(self._seconds)

    def shares(self) -> dict[str, float]:
        """Every share of the wall time until now, 0 to 1."""
        seconds = self.seconds()
        total = sum(seconds.values()) or 1.0
        return {name: value / total for name, value in seconds.items()}

    @property
    def goodput(self) -> float:
        """Stepping as a share of the wall time, 0 to 1."""
        return self.shares()["stepping"]

    def _settle(self) -> None:
        now = self._clock()
        self._seconds[self._open[-1]] += now - self._since
        self._since = now

    def _enter(self, name: str) -> None:
        self._settle()
        self._open.append(name)

    def _leave(self) -> None:
        self._settle()
        self._open.pop()


class _Span:
    """Has no state of its own, so that entering one allocates nothing and may recur."""

    __slots__ = ("_goodput", "_name")

    def __init__(self, goodput: Goodput, name: str):
        self._goodput, self._name = goodput, name

    def __enter__(self) -> None:
        self._goodput._enter(self._name)

    def __exit__(self, *unused) -> None:
        self._goodput._leave()


def _process_age() -> float:
    return max(0.0, time.time() - psutil.Process(os.getpid()).create_time())


@dataclasses.dataclass(frozen=True)
class LostTime:
    """What failures cost a run, over all its processes.

    Attributes:
      restarts: times that a process went on with the run.
      rollbacks: times that the run went back to a checkpoint because its numbers were wrong.
      redone_seconds: work after the last checkpoint that had to be made again: from reaching the step that a process
        resumed at (or rolled back to) until the last sign of the process before it (or until the rollback).
      down_seconds: from the last sign of one process until the next had restored its state.
    """

    restarts: int
    rollbacks: int
    redone_seconds: float
    down_seconds: float


def lost_time(events: Sequence[Mapping[str, Any]]) -> LostTime:
    """Adds up what the events of a run (`metrics.read_events`) say about restarts and rollbacks.

    The last sign of a process is its last event, or its last logged step if that is later: a `resume` event carries it
    as `last_row_time`.
    """
    restarts = rollbacks = 0
    redone = down = 0.0
    reached: dict[int, float] = {}  # when the run was last at a state that it can come back to, by step
    previous = None
    for event in events:
        kind, at, step = event["event"], event["time"], event["step"]
        if kind in ("start", "resume") and previous is not None:
            row = event.get("last_row_time")
            last = max(previous, row) if isinstance(row, (int, float)) else previous
            last = min(last, at)  # clocks of two hosts may differ
            restarts += 1
            down += at - last
            redone += max(0.0, last - reached.get(step, last))
        elif kind == "rollback":
            step = event["to_step"] if isinstance(event.get("to_step"), int) else step
            rollbacks += 1
            redone += max(0.0, at - reached.get(step, at))
        if kind in ("start", "resume", "save", "rollback"):
            reached[step] = at
        previous = at
    return LostTime(restarts, rollbacks, redone, down)

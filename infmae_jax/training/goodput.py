"""Goodput: which share of the wall time of a process makes steps, and where the rest goes.

"Goodput" as in fleet accounting: useful time / all time. Its complement has names, the shares below.
"""

import contextlib
import time
from collections.abc import Callable, Iterator

import psutil

# What the time of one process is spent on. "stepping": giving steps to the device and waiting for their results, also
# for steps that are made again after a roll-back; "data_wait": waiting for the next batch, its copy to the device
# included; "saving": until a checkpoint lets go of the device arrays; "other": starting Python, opening files, logs.
SHARES = ("stepping", "data_wait", "saving", "compiling", "restoring", "evaluating", "other")


class Goodput:
    """Splits the wall time since the start of the process into `SHARES`, which always sum to one.

        goodput = Goodput()
        with goodput.spend("data_wait"):
            batch = next(batches)

    Spans may be nested: time belongs to the innermost one alone. Not for use by several threads.

    Args:
      clock: seconds that only grow.
      started: the clock at the start of the process; by default what the operating system says.
    """

    def __init__(self, clock: Callable[[], float] = time.perf_counter, started: float | None = None):
        self._clock = clock
        age = max(0.0, time.time() - psutil.Process().create_time())
        self._since = clock() - age if started is None else started
        self._seconds = dict.fromkeys(SHARES, 0.0)
        self._open = ["other"]

    @contextlib.contextmanager
    def spend(self, name: str) -> Iterator[None]:
        """The time inside belongs to share `name`; KeyError when there is no such share."""
        self._count()
        self._seconds[name] += 0.0
        self._open.append(name)
        try:
            yield
        finally:
            self._count()
            self._open.pop()

    def seconds(self) -> dict[str, float]:
        """Seconds of every share until now, open spans included."""
        self._count()
        return dict(self._seconds)

    def shares(self) -> dict[str, float]:
        """Every share of the wall time until now, 0 to 1; that of "stepping" is the goodput."""
        seconds = self.seconds()
        total = sum(seconds.values()) or 1.0
        return {name: value / total for name, value in seconds.items()}

    def _count(self) -> None:
        now = self._clock()
        self._seconds[self._open[-1]] += now - self._since
        self._since = now

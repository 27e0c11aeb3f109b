"""How the pipeline scales to a second core: one core, two threads, two worker processes, and what the machine allows.

Two processes that share nothing but the machine are the ceiling: where they do not make twice as much as one, cores are
halves of one core, or share what one of them uses up (memory bandwidth, power, the hypervisor's time).
"""

from __future__ import annotations

import contextlib
import dataclasses
import multiprocessing
import os
import time
from collections.abc import Iterator
from multiprocessing.connection import Connection

from data_pipelines.pipeline import PipelineConfig, TrainBatches, train_batches
from data_pipelines.workers import follow_parent

ONE, THREADS, WORKERS, APART = "1 core", "2 cores, 2 threads", "2 cores, 2 workers", "2 cores, nothing shared"
NOTES = {
    ONE: "wall time, mean of two cores",
    THREADS: "threads=2",
    WORKERS: "workers=2, threads=0",
    APART: "two independent processes, one a core: what the machine allows",
}
# Batches are handed out in order, so a core that is slowed for a moment holds the other up once its buffer is full.
_PREFETCH = 8
_WARM_BATCHES = 2 * _PREFETCH + 2


def two_core_rates(config: PipelineConfig, seconds: float, rounds: int) -> dict[str, list[float]]:
    """Images a second of wall time on the last two cores of this process, in a steady state.

    Args:
      config: what to read and how; its workers and threads are replaced.
      seconds: time for everything, starting not counted.
      rounds: turns that each way gets.

    Returns:
      A rate a round for `ONE`, `THREADS`, `WORKERS` and `APART`. Ratios are to be taken within a round.
    """
    alone = dataclasses.replace(config, threads=0, workers=0)
    share = seconds / rounds / 5  # `ONE` takes two turns
    rates: dict[str, list[float]] = {ONE: [], THREADS: [], WORKERS: [], APART: []}
    with contextlib.ExitStack() as stack:
        stack.enter_context(pinned(2))
        apart = [stack.enter_context(_Process(alone, core)) for core in cores()]
        threads = dataclasses.replace(alone, threads=2, prefetch=_PREFETCH)
        workers = dataclasses.replace(alone, workers=2, prefetch=_PREFETCH)
        ways = {
            name: stack.enter_context(train_batches(way)) for name, way in ((THREADS, threads), (WORKERS, workers))
        }
        for batches in ways.values():
            _rate(batches, share)
        for _ in range(rounds):
            rates[ONE].append(sum(process.rate(share) for process in apart) / len(apart))
            for process in apart:
                process.start(share)
            rates[APART].append(sum(process.result() for process in apart))
            for name, batches in ways.items():
                rates[name].append(_rate(batches, share))
    return rates


def wall_rate(config: PipelineConfig, seconds: float) -> float:
    """Images a second of wall time in a steady state."""
    with train_batches(config) as batches:
        return _rate(batches, seconds)


def _rate(batches: TrainBatches, seconds: float) -> float:
    """The rate of batches that are made ahead; afterwards waits until their buffers are full, so as to be idle."""
    # What was made ahead while nobody waited must not be counted.
    for _ in range(_WARM_BATCHES):
        next(batches)
    start, images, count = time.perf_counter(), 0, 0
    while images == 0 or time.perf_counter() - start < seconds:
        images += len(next(batches)["image"])
        count += 1
    rate = images / (time.perf_counter() - start)
    time.sleep(_WARM_BATCHES * images / count / rate)
    return rate


class _Process:
    """A pipeline without threads in a process of its own, on a core of its own; works when it is told to."""

    def __init__(self, config: PipelineConfig, core: int):
        context = multiprocessing.get_context("spawn")
        self._pipe, theirs = context.Pipe()
        self._process = context.Process(target=_serve, args=(config, core, theirs), daemon=True)
        self._process.start()
        theirs.close()

    def __enter__(self) -> _Process:
        self.rate(0.0)  # until it is ready
        return self

    def __exit__(self, *_: object) -> None:
        self._pipe.close()
        self._process.join()

    def start(self, seconds: float) -> None:
        self._pipe.send(seconds)

    def result(self) -> float:
        """Images a second, when it is done."""
        return self._pipe.recv()

    def rate(self, seconds: float) -> float:
        self.start(seconds)
        return self.result()


def _serve(config: PipelineConfig, core: int, pipe: Connection) -> None:
    follow_parent()
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, {core})
    with train_batches(config) as batches:
        for _ in range(_WARM_BATCHES):
            next(batches)
        with contextlib.suppress(EOFError):
            while True:
                seconds, start, images = pipe.recv(), time.perf_counter(), 0
                while images == 0 or time.perf_counter() - start < seconds:
                    images += len(next(batches)["image"])
                pipe.send(images / (time.perf_counter() - start))


def cores() -> list[int]:
    """Numbers of the cores that this process may use."""
    return sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else list(range(os.cpu_count() or 1))


@contextlib.contextmanager
def pinned(count: int) -> Iterator[None]:
    """Keeps this process, and what it starts meanwhile, on its last `count` cores; does nothing where it cannot."""
    if not hasattr(os, "sched_setaffinity"):
        yield
        return
    before = cores()
    os.sched_setaffinity(0, before[-count:])
    try:
        yield
    finally:
        os.sched_setaffinity(0, before)

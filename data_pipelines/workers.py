"""Work spread over processes: results as they finish, dead workers reported, no orphans."""

from __future__ import annotations

import concurrent.futures
import contextlib
import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures.process import BrokenProcessPool
from typing import Any

from data_pipelines.errors import InputError

# `run_all(function, argument tuples)` yields the results as they finish, in no fixed order.
RunAll = Callable[[Callable[..., Any], Sequence[tuple]], Iterator[Any]]


@contextlib.contextmanager
def worker_pool(workers: int | None, tasks: int) -> Iterator[RunAll]:
    """Yields a `RunAll` over `workers` processes.

    Args:
      workers: number of processes; None takes one a core; 0 or 1 works in this process, as does a single task.
      tasks: the most tasks that one call will get.

    Raises:
      InputError: (in `run_all`) a worker died.
    """
    workers = min(os.cpu_count() or 1 if workers is None else workers, tasks)
    if workers <= 1:
        yield lambda function, tasks: (function(*arguments) for arguments in tasks)
        return
    # Spawned, not forked: the record writer and the decoders run threads.
    context = multiprocessing.get_context("spawn")
    pool = concurrent.futures.ProcessPoolExecutor(workers, context, initializer=follow_parent)
    try:
        yield lambda function, tasks: _run_all(pool, function, tasks)
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def _run_all(
    pool: concurrent.futures.Executor, function: Callable[..., Any], tasks: Sequence[tuple]
) -> Iterator[Any]:
    try:
        futures = [pool.submit(function, *arguments) for arguments in tasks]
        for future in concurrent.futures.as_completed(futures):
            yield future.result()
    except BrokenProcessPool:
        raise InputError(
            "a worker process died (killed, or out of memory): run again to continue, with fewer --workers if memory "
            "is short"
        ) from None


def follow_parent() -> None:
    """Called in a worker process: leaves Ctrl-C to its parent, and ends it within a moment of its parent's death.

    However the parent died and whatever the worker does: a thread waits for it.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)

    def wait() -> None:
        multiprocessing.parent_process().join()
        os._exit(1)

    threading.Thread(target=wait, daemon=True).start()

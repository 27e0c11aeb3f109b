"""Work spread over processes: results as they finish, dead workers reported, no orphans."""

import concurrent.futures
import itertools
import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures.process import BrokenProcessPool
from typing import Any

from data_pipelines.errors import InputError


def run_all(workers: int | None, function: Callable[..., Any], tasks: Sequence[tuple]) -> Iterator[Any]:
    """Yields the results of a function as they finish, in no fixed order.

    Args:
      workers: number of processes; None takes one a core; 0 or 1 works in this process, as does a single task.
      function: importable by its name.
      tasks: its arguments, one tuple for each call.

    Raises:
      InputError: a worker died.
    """
    workers = min(os.cpu_count() or 1 if workers is None else workers, len(tasks))
    if workers <= 1:
        yield from itertools.starmap(function, tasks)
        return
    # Spawned, not forked: the record writer and the decoders run threads.
    context = multiprocessing.get_context("spawn")
    pool = concurrent.futures.ProcessPoolExecutor(workers, context, initializer=follow_parent)
    try:
        futures = [pool.submit(function, *arguments) for arguments in tasks]
        for future in concurrent.futures.as_completed(futures):
            yield future.result()
    except BrokenProcessPool:
        raise InputError(
            "a worker process died (killed, or out of memory): run again to continue, with fewer --workers if memory "
            "is short"
        ) from None
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def follow_parent() -> None:
    """Called in a worker process: leaves Ctrl-C to its parent, and ends it within a moment of its parent's death.

    However the parent died and whatever the worker does: a thread waits for it.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)

    def wait() -> None:
        multiprocessing.parent_process().join()
        os._exit(1)

    threading.Thread(target=wait, daemon=True).start()

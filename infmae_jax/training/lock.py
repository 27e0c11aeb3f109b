"""One run, one folder: a lock that the kernel releases however the process ends."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import os
import socket
import time
from collections.abc import Iterator
from pathlib import Path

from absl import logging

from data_pipelines.errors import InputError

LOCK_NAME = ".lock"


@contextlib.contextmanager
def workdir_lock(run: str | Path) -> Iterator[None]:
    """Keeps other runs out of the folder `run` (made if need be) while the block runs; of a job, process 0 takes it.

    Processes that this one starts do not hold the lock. A file system that has no locks is used without, with a
    warning.

    Raises:
      InputError: another process works in `run`, or it cannot be written to.
    """
    path = Path(run) / LOCK_NAME
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
    except OSError as error:
        raise InputError(
            f"{run} cannot be used as --workdir: {error.strerror or error}; make it writable or choose another"
        ) from error
    try:
        _lock(descriptor, run)
        yield
        _write(descriptor, "")
    finally:
        os.close(descriptor)


def _lock(descriptor: int, run: str | Path) -> None:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        raise InputError(
            f"{run} is in use by {_holder(descriptor)}; wait for it, end it, or choose another --workdir"
        ) from error
    except OSError as error:
        if error.errno not in (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL):
            raise
        logging.warning("%s is on a file system without locks: see to it that no second run uses it", run)
        return
    _write(descriptor, json.dumps({"host": socket.gethostname(), "pid": os.getpid(), "since": time.time()}) + "\n")


def _write(descriptor: int, text: str) -> None:
    with contextlib.suppress(OSError):  # a full disk: the lock holds all the same
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, text.encode(), 0)


def _holder(descriptor: int) -> str:
    """Who holds the lock, as far as its file says."""
    try:
        holder = json.loads(os.pread(descriptor, 4096, 0))
        since = time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime(holder["since"]))
        return f"process {holder['pid']} on {holder['host']} since {since}"
    except (ValueError, KeyError, TypeError):
        return "another process"

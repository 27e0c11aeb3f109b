"""Where images come from: folders and single files, each found file listed once, in an order that never varies."""

from __future__ import annotations

import dataclasses
import os
import stat
from collections.abc import Iterator, Sequence

from data_pipelines.errors import InputError


@dataclasses.dataclass(frozen=True)
class Source:
    """One found file.

    Attributes:
      key: posix path below its input root, with the root's name in front; unique in the listing.
      path: where the bytes are on disk.
      size: bytes.
      modified: modification time of the file on disk, nanoseconds.
    """

    key: str
    path: str
    size: int
    modified: int


@dataclasses.dataclass(frozen=True)
class Rejection:
    """One file that is not kept: its key, a reason (slug) and a detail for a person; one line."""

    key: str
    reason: str
    detail: str


@dataclasses.dataclass(frozen=True)
class Listing:
    """What was found below the inputs: readable files in reading order, and what could not even be opened."""

    sources: tuple[Source, ...]
    rejections: tuple[Rejection, ...]


class SourceUnreadable(Exception):
    """A listed file cannot be read; `reason` and `detail` as in `Rejection`."""

    def __init__(self, reason: str, detail: str):
        super().__init__(f"{reason}: {detail}")
        self.reason = reason
        self.detail = detail


def list_sources(inputs: Sequence[str | os.PathLike]) -> Listing:
    """Lists every file below the inputs (folders or files), sorted by path within an input.

    Symbolic links are followed; one that leads to a folder which was listed already (a loop among others) is not.

    Raises:
      InputError: an input does not exist.
    """
    found: list[Source | Rejection] = []
    roots_seen: dict[str, int] = {}
    folders_seen: set[tuple[int, int]] = set()
    for given in inputs:
        path = os.path.abspath(os.fspath(given))
        if not os.path.exists(path):
            raise InputError(f"input {os.fspath(given)} does not exist: check the path")
        name = os.path.basename(path) or "root"
        roots_seen[name] = roots_seen.get(name, 0) + 1
        root_key = name if roots_seen[name] == 1 else f"{name}~{roots_seen[name]}"
        found.extend(_walk(path, root_key, folders_seen))
    return Listing(
        sources=tuple(item for item in found if isinstance(item, Source)),
        rejections=tuple(item for item in found if isinstance(item, Rejection)),
    )


def _walk(path: str, key: str, folders_seen: set[tuple[int, int]]) -> Iterator[Source | Rejection]:
    """Yields what is at `path` and below, depth first, by sorted names."""
    try:
        status = os.stat(path)
    except OSError as error:
        reason = "symlink_loop" if os.path.islink(path) and "symbolic links" in str(error) else "unreadable"
        yield Rejection(key, reason, error.strerror or str(error))
        return
    if stat.S_ISREG(status.st_mode):
        yield Source(key, path, status.st_size, status.st_mtime_ns)
        return
    if not stat.S_ISDIR(status.st_mode):
        yield Rejection(key, "not_a_file", "a device, pipe or socket")
        return
    identity = (status.st_dev, status.st_ino)
    if identity in folders_seen:
        reason = "symlink_loop" if os.path.islink(path) else "listed_twice"
        yield Rejection(key, reason, f"leads to {os.path.realpath(path)}, which is listed already")
        return
    folders_seen.add(identity)
    try:
        names = sorted(os.listdir(path))
    except OSError as error:
        yield Rejection(key, "unreadable", error.strerror or str(error))
        return
    for name in names:
        yield from _walk(os.path.join(path, name), f"{key}/{name}", folders_seen)


def read_source(source: Source, max_bytes: int) -> bytes:
    """Returns the bytes of a listed file.

    Raises:
      SourceUnreadable: it is over `max_bytes`, vanished, or cannot be read.
    """
    if source.size > max_bytes:
        raise SourceUnreadable("file_too_large", f"{source.size} bytes is over the limit of {max_bytes}")
    try:
        with open(source.path, "rb") as file:
            return file.read(max_bytes)
    except OSError as error:
        raise SourceUnreadable("unreadable", error.strerror or str(error)) from error

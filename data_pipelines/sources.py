"""Where images come from: folders, globs, zip and tar files; every file listed once, in an order that never varies.

Members of archives are read in place, nothing is unpacked to disk. A compressed tar file can only be read from its
start, so it is listed in one pass and read in another, as one piece of work; zip and plain tar files are split like
folders. Archives inside archives are not opened.
"""

from __future__ import annotations

import dataclasses
import glob
import os
import re
import stat
from collections.abc import Iterator, Sequence

from data_pipelines.archives import ArchiveReader, Rejection, Source, SourceUnreadable, is_archive, list_archive
from data_pipelines.errors import InputError

__all__ = ["Listing", "Rejection", "Source", "SourceReader", "SourceUnreadable", "list_sources", "split_into_parts"]


@dataclasses.dataclass(frozen=True)
class Listing:
    """What was found below `inputs`: readable files in reading order, and what could not even be opened."""

    inputs: tuple[str, ...]
    sources: tuple[Source, ...]
    rejections: tuple[Rejection, ...]


def list_sources(inputs: Sequence[str | os.PathLike]) -> Listing:
    """Lists every file below the inputs, sorted by path within an input.

    Args:
      inputs: folders, image files, zip or tar files, or glob patterns (`**` for any depth). The key of a file starts
        with the name of its input; of a glob pattern, with the name of the folder before its first wildcard.

    Symbolic links are followed; one that leads to a folder which was listed already (a loop among others) is not.

    Raises:
      InputError: an input does not exist, or a pattern matches nothing.
    """
    found: list[Source | Rejection] = []
    roots_seen: dict[str, int] = {}
    folders_seen: set[tuple[int, int]] = set()
    for given in map(os.fspath, inputs):
        root, paths = _expand(given)
        name = _printable(os.path.basename(root)) or "root"
        roots_seen[name] = roots_seen.get(name, 0) + 1
        root_key = name if roots_seen[name] == 1 else f"{name}~{roots_seen[name]}"
        for path in paths:
            key = root_key if path == root else f"{root_key}/{_printable(os.path.relpath(path, root))}"
            found.extend(_walk(path, key, folders_seen))
    return Listing(
        inputs=tuple(map(os.fspath, inputs)),
        sources=tuple(_with_unique_keys(item for item in found if isinstance(item, Source))),
        rejections=tuple(item for item in found if isinstance(item, Rejection)),
    )


def _expand(given: str) -> tuple[str, list[str]]:
    """Returns the root of an input, and the paths to list: the root itself, or what a pattern matches."""
    path = os.path.abspath(given)
    if os.path.exists(path):
        return path, [path]
    if not glob.has_magic(given):
        raise InputError(f"input {given} does not exist: check the path")
    root = path
    while glob.has_magic(root):
        root = os.path.dirname(root)
    matches = sorted(glob.glob(path, recursive=True))
    if not matches:
        raise InputError(f"no file matches the pattern {given}: check it (quote it, so that the shell leaves it alone)")
    return root, matches


def _printable(path: str) -> str:
    """A file name may hold any bytes; a key is text that every list and picture can show."""
    text = path.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")
    return re.sub(r"[\x00-\x1f\x7f]", lambda match: f"\\x{ord(match[0]):02x}", text)


def _walk(path: str, key: str, folders_seen: set[tuple[int, int]]) -> Iterator[Source | Rejection]:
    """Yields what is at `path` and below, depth first, by sorted names."""
    waiting = [(path, key)]
    while waiting:
        path, key = waiting.pop()
        try:
            status = os.stat(path)
            if stat.S_ISDIR(status.st_mode):
                identity = (status.st_dev, status.st_ino)
                if identity in folders_seen:
                    reason = "symlink_loop" if os.path.islink(path) else "listed_twice"
                    yield Rejection(key, reason, f"leads to {_printable(os.path.realpath(path))}, listed already")
                    continue
                folders_seen.add(identity)
                names = sorted(os.listdir(path), reverse=True)
                waiting.extend((os.path.join(path, name), f"{key}/{_printable(name)}") for name in names)
            elif stat.S_ISREG(status.st_mode):
                source = Source(key, path, status.st_size, status.st_mtime_ns)
                if is_archive(path):
                    yield from list_archive(source)
                else:
                    yield source
            else:
                yield Rejection(key, "not_a_file", "a device, pipe or socket")
        except OSError as error:
            loop = os.path.islink(path) and "symbolic links" in str(error)
            yield Rejection(key, "symlink_loop" if loop else "unreadable", error.strerror or str(error))


def _with_unique_keys(sources: Iterator[Source]) -> Iterator[Source]:
    """Numbers the later ones of equal keys: an archive may hold one name twice, a pattern match a file twice."""
    seen: dict[str, int] = {}
    for source in sources:
        seen[source.key] = count = seen.get(source.key, 0) + 1
        yield source if count == 1 else dataclasses.replace(source, key=f"{source.key}~{count}")


def split_into_parts(sources: Sequence[Source], size: int) -> list[list[Source]]:
    """Splits a listing into runs of at most `size` files; the members of a compressed tar file stay together."""
    parts: list[list[Source]] = []
    for source in sources:
        last = parts[-1] if parts else []
        if source.sequential:
            joins = bool(last) and last[-1].sequential and last[-1].path == source.path
        else:
            joins = bool(last) and not last[-1].sequential and len(last) < size
        if joins:
            last.append(source)
        else:
            parts.append([source])
    return parts


class SourceReader:
    """Reads listed files one after the other; keeps the archive that it is in open. Close it, or use `with`."""

    def __init__(self) -> None:
        self._archive: ArchiveReader | None = None

    def __enter__(self) -> SourceReader:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def close(self) -> None:
        if self._archive is not None:
            self._archive.close()
            self._archive = None

    def read(self, source: Source, max_bytes: int) -> bytes:
        """Returns the bytes of a listed file.

        Raises:
          SourceUnreadable: it is over `max_bytes`, vanished, or cannot be read.
        """
        if source.size > max_bytes:
            raise SourceUnreadable("file_too_large", f"{source.size} bytes is over the limit of {max_bytes}")
        if not source.member:
            try:
                with open(source.path, "rb") as file:
                    return file.read(max_bytes)
            except OSError as error:
                raise SourceUnreadable("unreadable", error.strerror or str(error)) from error
        if self._archive is None or self._archive.path != source.path:
            self.close()
            self._archive = ArchiveReader(source.path)
        return self._archive.read(source)

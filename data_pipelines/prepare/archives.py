"""Files, and members of zip and tar files: listed and read in place; nothing is unpacked to disk.

An archive from a stranger costs bounded time and memory, whatever it says about itself:

    unpacked size    at most 1 GiB, or 200 times the archive's own size where that is more
    members          at most 100,000, or one for every 16 bytes of the archive
    names, headers   256 MiB in all, or the archive's own size; 1 MiB each; a path of 4,096 characters
    one member       never more than it declares, and never more than `Filters.max_file_bytes`

An archive over a limit is refused as `decompression_bomb`, one that cannot be listed as `archive_unreadable`.
"""

import bz2
import contextlib
import dataclasses
import errno
import functools
import gzip
import io
import lzma
import os
import tarfile
import zipfile
from collections.abc import Iterator
from typing import BinaryIO

from data_pipelines.commands import printable
from data_pipelines.errors import InputError
from data_pipelines.files import read_regular
from data_pipelines.refusals import ImageRefused

_SUFFIXES = (".zip", ".tar", ".tar.gz", ".tgz", ".tar.bz2", ".tbz2", ".tar.xz", ".txz")
_DECOMPRESSORS = {b"\x1f\x8b": gzip.open, b"BZh": bz2.open, b"\xfd7zXZ\0": lzma.open, b"\x5d\0\0\x80": lzma.open}

_MAX_EXPANSION, _ALWAYS_ALLOWED_BYTES = 200, 1 << 30
_MIN_MEMBER_BYTES, _ALWAYS_ALLOWED_MEMBERS = 16, 100_000
_HEADER_BYTES, _ONE_HEADER_BYTES, _PATH_LENGTH = 1 << 28, 1 << 20, 4096
_EMPTY_READS = 8  # at the end of a tar file; a loop that waits for more is a trap


@dataclasses.dataclass(frozen=True, slots=True)
class Source:
    """One found file, on disk or in an archive.

    Attributes:
      key: posix path below its input root, with the root's name in front; unique in a listing.
      path: the file on disk: the image itself, or the archive that holds it.
      size: bytes of the image file.
      modified: modification time of the file on disk, nanoseconds.
      member: name in the archive; empty for a file on disk.
      position: zip: index of the entry; tar: offset of the data in the unpacked tar file.
      sequential: the archive can only be read from its start (compressed tar).
    """

    key: str
    path: str
    size: int
    modified: int
    member: str = ""
    position: int = 0
    sequential: bool = False


@dataclasses.dataclass(frozen=True, slots=True)
class Rejection:
    """One file that is not kept: its key, a reason (slug) and a detail for a person, one line.

    `anchor` is the key of the kept image that a duplicate repeats, empty for other reasons.
    """

    key: str
    reason: str
    detail: str
    anchor: str = ""


class SourceUnreadable(ImageRefused):
    """A listed file cannot be read; `reason` and `detail` as in `Rejection`."""


class _OverLimit(Exception):
    """The archive is larger than the limits of this module."""


def is_archive(path: str) -> bool:
    """Whether the name of a file is that of a supported archive."""
    return path.lower().endswith(_SUFFIXES)


def list_archive(archive: Source) -> list[Source | Rejection]:
    """What is inside an archive, sorted by name (compressed tar: in the archive's order).

    Refused are members whose path would leave the archive, links and devices, and a whole archive that cannot be read
    or is over a limit of this module; folders are not mentioned.
    """
    most = max(_ALWAYS_ALLOWED_MEMBERS, archive.size // _MIN_MEMBER_BYTES)
    found: list[Source | Rejection] = []
    unpacked = 0
    try:
        for item in _zip_members(archive) if _is_zip(archive.path) else _tar_members(archive):
            found.append(item)
            unpacked += item.size if isinstance(item, Source) else 0
            _check_unpacked(archive.size, unpacked)
            if len(found) > most:
                raise _OverLimit(f"over {most} members")
    except _OverLimit as error:
        return [Rejection(archive.key, "decompression_bomb", f"the archive of {archive.size} bytes holds {error}")]
    except Exception as error:  # Damaged archives raise nearly anything; all of it is a refusal of this one archive.
        return [Rejection(archive.key, "archive_unreadable", _one_line(error))]
    if not any(isinstance(item, Source) and item.sequential for item in found):
        found.sort(key=lambda item: item.key)
    return found


def _is_zip(path: str) -> bool:
    return path.lower().endswith(".zip")


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split()) or type(error).__name__


def _check_unpacked(archive_bytes: int, unpacked: int) -> None:
    limit = max(_ALWAYS_ALLOWED_BYTES, _MAX_EXPANSION * archive_bytes)
    if unpacked > limit:
        raise _OverLimit(f"over {limit} bytes unpacked")


def _zip_members(archive: Source) -> Iterator[Source | Rejection]:
    for position, info in enumerate(_opened_zip(archive.path, archive.modified).infolist()):
        if not info.is_dir():
            refused = ("encrypted", "the member is encrypted") if info.flag_bits & 0x1 else None
            yield _member(archive, info.filename, info.file_size, position, False, refused)


def _tar_members(archive: Source) -> Iterator[Source | Rejection]:
    unpacked, sequential = _open_unpacked(archive.path)
    with unpacked, tarfile.open(fileobj=_BoundedFile(unpacked, archive.size), mode="r:") as opened:
        last = -1
        while (info := opened.next()) is not None:
            opened.members.clear()  # it would remember all of them
            if info.offset <= last or info.size < 0:
                raise tarfile.ReadError("a member points backwards")
            last = info.offset
            if not info.isdir():
                plain = info.isfile() and not info.issparse()
                refused = None if plain else ("not_a_file", "a link, device or sparse file in a tar file")
                yield _member(archive, info.name, info.size, info.offset_data, sequential, refused)


def _member(
    archive: Source, name: str, size: int, position: int, sequential: bool, refused: tuple[str, str] | None
) -> Source | Rejection:
    # A name may be absolute or climb out; backslashes and drive letters count as on Windows.
    key = f"{archive.key}/{printable(name[:_PATH_LENGTH])}"
    steps = name.replace("\\", "/").split("/")
    if len(name) > _PATH_LENGTH:
        return Rejection(key, "unsafe_path", f"the member's path has {len(name)} characters, over {_PATH_LENGTH}")
    if steps[0] == "" or steps[0].endswith(":") or ".." in steps:
        return Rejection(key, "unsafe_path", "the member's path leaves the archive")
    if refused is not None:
        return Rejection(key, *refused)
    return Source(key, archive.path, size, archive.modified, name, position, sequential)


@functools.lru_cache(maxsize=1)
def _opened_zip(path: str, modified: int) -> zipfile.ZipFile:
    """The zip file, its directory read once a process, not once for every part of it."""
    return zipfile.ZipFile(path)


def _open_unpacked(path: str) -> tuple[BinaryIO, bool]:
    """A tar file without its compression, by its first bytes; and whether it had one."""
    with open(path, "rb") as file:
        start = file.read(8)
    for magic, opener in _DECOMPRESSORS.items():
        if start.startswith(magic):
            return opener(path, "rb"), True
    return open(path, "rb"), False


class _BoundedFile(io.RawIOBase):
    """What `tarfile` reads headers from: it believes any size that a header declares, so reads are bounded here."""

    def __init__(self, file: BinaryIO, archive_bytes: int):
        self._file, self._archive_bytes = file, archive_bytes
        self._left, self._empty_reads = max(_HEADER_BYTES, archive_bytes), _EMPTY_READS

    def tell(self) -> int:
        return self._file.tell()

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        _check_unpacked(self._archive_bytes, offset)
        return self._file.seek(offset, whence)

    def read(self, size: int = -1) -> bytes:
        if not 0 <= size <= _ONE_HEADER_BYTES:
            raise _OverLimit(f"a header of over {_ONE_HEADER_BYTES} bytes")
        data = self._file.read(size)
        self._left -= len(data)
        self._empty_reads -= not data
        if self._left < 0:
            raise _OverLimit("too many bytes of names and headers")
        if self._empty_reads < 0:
            raise EOFError("the archive ends inside a member")
        return data


def _read_zip_member(source: Source) -> bytes:
    """Returns the bytes of a member of a zip file, at most one more than it declares."""
    opened = _opened_zip(source.path, source.modified)
    info = opened.infolist()[source.position]
    # Other methods than these unpack all that they are given at once: a little at a time.
    step = 1 << 20 if info.compress_type in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED) else 4096
    data = bytearray()
    with opened.open(info) as member:
        # One byte more than declared shows a member that lies about its size without unpacking all of it.
        while len(data) <= source.size and (block := member.read(min(step, source.size + 1 - len(data)))):
            data += block
    return bytes(data)


class SourceReader(contextlib.ExitStack):
    """Reads listed files one after the other; keeps the tar file that it is in open. Close it, or use `with`."""

    _tar: tuple[str, BinaryIO | None] = "", None

    def read(self, source: Source, max_bytes: int) -> bytes:
        """Returns the bytes of a listed file.

        Raises:
          SourceUnreadable: it is over `max_bytes`, vanished, cannot be read, or its archive is damaged there.
          InputError: this process may open no more files, which is no fault of this one.
        """
        if source.size > max_bytes:
            raise SourceUnreadable("file_too_large", f"{source.size} bytes is over the limit of {max_bytes}")
        try:
            data = self._read(source, max_bytes)
        # Of members as many kinds as there are decompressors.
        except Exception if source.member else (OSError, InputError) as error:
            if getattr(error, "errno", None) in (errno.EMFILE, errno.ENFILE):
                raise InputError("too many open files: raise the limit (ulimit -n) or lower --workers") from error
            archive = f"{os.path.basename(source.path)}: " if source.member else ""
            detail = archive + (getattr(error, "strerror", None) or _one_line(error))
            raise SourceUnreadable("unreadable", printable(detail)) from error
        if source.member and len(data) != source.size:
            raise SourceUnreadable("unreadable", f"{len(data)} bytes where the archive declares {source.size}")
        return data

    def _read(self, source: Source, max_bytes: int) -> bytes:
        if not source.member:
            return read_regular(source.path, max_bytes)
        if _is_zip(source.path):
            return _read_zip_member(source)
        if self._tar[0] != source.path or self._tar[1].closed:
            self.close()
            self._tar = source.path, self.enter_context(_open_unpacked(source.path)[0])
        self._tar[1].seek(source.position)
        return self._tar[1].read(source.size)

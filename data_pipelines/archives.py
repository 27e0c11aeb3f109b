"""Members of zip and tar files, listed and read in place; nothing is unpacked to disk."""

from __future__ import annotations

import dataclasses
import os
import tarfile
import zipfile
import zlib
from collections.abc import Iterator
from typing import BinaryIO

_ZIP_SUFFIXES = (".zip",)
_TAR_SUFFIXES = (".tar",)
_COMPRESSED_TAR_SUFFIXES = (".tar.gz", ".tgz", ".tar.bz2", ".tbz2", ".tar.xz", ".txz")

# An archive that unpacks to more than this many times its size, and more than a gigabyte, is a trap, not a collection.
_MAX_EXPANSION = 1000
_ALWAYS_ALLOWED_BYTES = 1 << 30

_ARCHIVE_ERRORS = (zipfile.BadZipFile, tarfile.TarError, OSError, EOFError, ValueError, NotImplementedError, zlib.error)


@dataclasses.dataclass(frozen=True, slots=True)
class Source:
    """One found file, on disk or in an archive.

    Attributes:
      key: posix path below its input root, with the root's name in front; unique in a listing.
      path: the file on disk: the image itself, or the archive that holds it.
      size: bytes of the image file.
      modified: modification time of the file on disk, nanoseconds.
      member: name in the archive; empty for a file on disk.
      position: zip: index of the entry; plain tar: byte offset of the data; compressed tar: index of the member.
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


class SourceUnreadable(Exception):
    """A listed file cannot be read; `reason` and `detail` as in `Rejection`."""

    def __init__(self, reason: str, detail: str):
        super().__init__(f"{reason}: {detail}")
        self.reason = reason
        self.detail = detail


def is_archive(path: str) -> bool:
    """Whether the name of a file is that of a supported archive."""
    return path.lower().endswith((*_ZIP_SUFFIXES, *_TAR_SUFFIXES, *_COMPRESSED_TAR_SUFFIXES))


def list_archive(archive: Source) -> Iterator[Source | Rejection]:
    """Yields the files inside an archive, sorted by name (compressed tar: in the archive's order).

    Refused are members whose path would leave the archive, links and devices, and a whole archive that cannot be read
    or declares an absurd unpacked size; folders are not mentioned.
    """
    found: list[Source | Rejection] = []
    limit = max(_ALWAYS_ALLOWED_BYTES, _MAX_EXPANSION * archive.size)
    unpacked = 0
    try:
        for item in _members(archive):
            unpacked += item.size if isinstance(item, Source) else 0
            if unpacked > limit:
                detail = f"the archive of {archive.size} bytes unpacks to over {limit} bytes"
                yield Rejection(archive.key, "decompression_bomb", detail)
                return
            found.append(item)
    except _ARCHIVE_ERRORS as error:
        detail = " ".join(str(error).split()) or type(error).__name__
        yield Rejection(archive.key, "archive_unreadable", detail)
        return
    if not any(isinstance(item, Source) and item.sequential for item in found):
        found.sort(key=lambda item: item.key)
    yield from found


def _members(archive: Source) -> Iterator[Source | Rejection]:
    if archive.path.lower().endswith(_ZIP_SUFFIXES):
        yield from _zip_members(archive)
    else:
        yield from _tar_members(archive)


def _zip_members(archive: Source) -> Iterator[Source | Rejection]:
    with zipfile.ZipFile(archive.path) as opened:
        for position, info in enumerate(opened.infolist()):
            if info.is_dir():
                continue
            key = f"{archive.key}/{_clean(info.filename)}"
            if _leaves_archive(info.filename):
                yield Rejection(key, "unsafe_path", "the member's path leaves the archive")
            elif info.flag_bits & 0x1:
                yield Rejection(key, "encrypted", "the member is encrypted")
            else:
                yield Source(key, archive.path, info.file_size, archive.modified, info.filename, position)


def _tar_members(archive: Source) -> Iterator[Source | Rejection]:
    sequential = archive.path.lower().endswith(_COMPRESSED_TAR_SUFFIXES)
    with _open_tar(archive.path, sequential) as opened:
        for index, info in _iterate(opened):
            if info.isdir():
                continue
            key = f"{archive.key}/{_clean(info.name)}"
            if _leaves_archive(info.name):
                yield Rejection(key, "unsafe_path", "the member's path leaves the archive")
            elif not info.isfile() or info.issparse():
                yield Rejection(key, "not_a_file", "a link, device or sparse file in a tar file")
            else:
                position = index if sequential else info.offset_data
                yield Source(key, archive.path, info.size, archive.modified, info.name, position, sequential)


def _open_tar(path: str, sequential: bool) -> tarfile.TarFile:
    return tarfile.open(path, "r|*" if sequential else "r:")


def _iterate(opened: tarfile.TarFile) -> Iterator[tuple[int, tarfile.TarInfo]]:
    """Yields (index, member) of a tar file without letting it remember all of them."""
    index = 0
    while (info := opened.next()) is not None:
        opened.members.clear()
        yield index, info
        index += 1


def _clean(name: str) -> str:
    """The member's name as part of a key."""
    text = name.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")
    return "".join(character if character.isprintable() else f"\\x{ord(character):02x}" for character in text)


def _leaves_archive(name: str) -> bool:
    """Whether a member's path is absolute or climbs out; backslashes and drive letters count as on Windows."""
    steps = name.replace("\\", "/").split("/")
    return steps[0] == "" or steps[0].endswith(":") or ".." in steps


class ArchiveReader:
    """Reads members of one archive; those of a compressed tar file in the archive's order."""

    def __init__(self, path: str):
        self.path = path
        self._zip: zipfile.ZipFile | None = None
        self._file: BinaryIO | None = None
        self._stream: tarfile.TarFile | None = None
        self._stream_members: Iterator[tuple[int, tarfile.TarInfo]] = iter(())

    def close(self) -> None:
        for opened in (self._zip, self._file, self._stream):
            if opened is not None:
                opened.close()

    def read(self, source: Source) -> bytes:
        """Returns the bytes of a member.

        Raises:
          SourceUnreadable: the archive is damaged at this member.
        """
        try:
            if source.sequential:
                data = self._read_from_stream(source)
            elif self.path.lower().endswith(_ZIP_SUFFIXES):
                data = self._read_from_zip(source)
            else:
                data = self._read_from_tar(source)
        except (*_ARCHIVE_ERRORS, RuntimeError) as error:  # zipfile raises RuntimeError for unsupported encryption.
            detail = " ".join(str(error).split()) or type(error).__name__
            raise SourceUnreadable("unreadable", f"{os.path.basename(self.path)}: {detail}") from error
        if len(data) != source.size:
            raise SourceUnreadable("unreadable", f"{len(data)} bytes where the archive declares {source.size}")
        return data

    def _read_from_zip(self, source: Source) -> bytes:
        if self._zip is None:
            self._zip = zipfile.ZipFile(self.path)
        with self._zip.open(self._zip.infolist()[source.position]) as member:
            # One byte more than declared shows a member that lies about its size without unpacking all of it.
            return member.read(source.size + 1)

    def _read_from_tar(self, source: Source) -> bytes:
        if self._file is None:
            self._file = open(self.path, "rb")  # noqa: SIM115 - closed by `close`
        self._file.seek(source.position)
        return self._file.read(source.size)

    def _read_from_stream(self, source: Source) -> bytes:
        if self._stream is None:
            self._stream = _open_tar(self.path, sequential=True)
            self._stream_members = _iterate(self._stream)
        for index, info in self._stream_members:
            if index == source.position:
                with self._stream.extractfile(info) as member:
                    return member.read(source.size)
        raise EOFError(f"member {source.position} is not there any more")

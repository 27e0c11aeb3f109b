"""Decoded images kept on a local disk, shared by all processes of a host and by later runs: `data.cache=FOLDER`.

Decoding takes most of the time of an image, and every epoch decodes the same ones. Each is kept when it is first
decoded, under its shard set's fingerprint and the intensity mapping, so a cache never has to be cleared for being out
of date, only for its size:

    FOLDER/<digest of fingerprint and mapping>/
        index     a header, then an entry a record: place, height, width and checksum of its pixels
        pixels    (H, W) uint8 images in the order in which they were first decoded

A half-written image is never read. Its entry is written after its pixels and carries a checksum of itself. Should the
machine crash, what was written earlier need not have reached the disk earlier; so an entry made under another boot
counts only after its pixels have been compared with their checksum, which is done once.

Pixels are read by `pread`, only the rows that are asked for, not through a memory map: measured, they take the same
time, but a map of a hundred gigabytes costs each process 200 MB of page tables, holds Python's lock while the disk is
read, and turns a disk's error into the end of the process.
"""

from __future__ import annotations

import dataclasses
import fcntl
import hashlib
import json
import os
import shutil
import struct
import tempfile
import threading
import uuid
import weakref
import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from absl import logging

from data_pipelines.augment import Box
from data_pipelines.errors import InputError
from data_pipelines.records import Manifest

_MAGIC = b"IRPIXEL1"
# Magic, number of boots seen, end of the pixels that are given away, this boot; then a CRC-32 of it all.
_HEADER = struct.Struct("<8sQQ16s")
# Offset of the pixels, height, width, boot in which it was written or checked, CRC-32 of the pixels; then its own.
_ENTRY = struct.Struct("<QIIII")
_CHECKSUM = struct.Struct("<I")
_SLOT = 64  # bytes for the header and for every 2 entries
_ENTRY_BYTES = 32
_BOOT_ID = Path("/proc/sys/kernel/random/boot_id")


@dataclasses.dataclass(frozen=True)
class CachedImage:
    """An image of the cache, read when it is asked for: `height` x `width` pixels."""

    height: int
    width: int
    _offset: int
    _cache: ImageCache

    def read(self, box: Box) -> np.ndarray:
        """The part inside a box, (box.height, box.width) uint8, a view of this thread's memory: use it before the next.

        Raises:
          InputError: the disk does not give it back.
        """
        rows = _thread_memory(box.height * self.width)
        self._cache.read_pixels(rows, self._offset + box.top * self.width)
        return rows.reshape(box.height, self.width)[:, box.left : box.left + box.width]


@dataclasses.dataclass(frozen=True)
class FreshImage:
    """An image that was decoded just now, in the form of a `CachedImage`: (H, W) uint8."""

    pixels: np.ndarray

    @property
    def height(self) -> int:
        return self.pixels.shape[0]

    @property
    def width(self) -> int:
        return self.pixels.shape[1]

    def read(self, box: Box) -> np.ndarray:
        """The part inside a box, (box.height, box.width) uint8, a view."""
        return box.of(self.pixels)


def open_caches(folder: str | os.PathLike, manifests: Sequence[Manifest], mapping: str) -> list[ImageCache]:
    """Opens or makes a cache for each shard set.

    Args:
      folder: holds the caches of any number of shard sets; made if it does not exist.
      manifests: of the shard sets.
      mapping: says all that the pixels depend on besides the record.

    Raises:
      InputError: the folder cannot be used, or its disk has too little room for what is not in the caches yet.
    """
    folder = os.path.expanduser(folder)
    try:
        caches = [ImageCache(folder, manifest, mapping) for manifest in manifests]
        free = shutil.disk_usage(folder).free
    except OSError as error:
        raise InputError(f"data.cache={folder} cannot be used ({error}); name another folder") from error
    missing = sum(max(0, _bytes_of(m) - cache.used_bytes) for m, cache in zip(manifests, caches, strict=True))
    if missing > free:
        raise InputError(
            f"data.cache={folder} needs {missing / 1e9:.3g} GB more and its disk has {free / 1e9:.3g} GB free; name a "
            "folder on another disk, or leave data.cache empty"
        )
    return caches


class ImageCache:
    """The cache of one shard set under one intensity mapping. Safe to pickle, threads and processes may share it."""

    def __init__(self, folder: str, manifest: Manifest, mapping: str):
        """See `open_caches`, which checks what the disk holds."""
        digest = hashlib.sha256(json.dumps([_MAGIC.decode(), manifest.fingerprint, mapping]).encode()).hexdigest()
        self._folder = os.path.join(folder, digest[:32])
        _make_files(Path(self._folder), manifest.count)
        self._open()
        self._boot = self._count_boot()

    @property
    def used_bytes(self) -> int:
        """Bytes of pixels kept so far."""
        return self._header()[1]

    def _open(self) -> None:
        self._index = os.open(os.path.join(self._folder, "index"), os.O_RDWR)
        self._pixels = os.open(os.path.join(self._folder, "pixels"), os.O_RDWR)
        self._closed = weakref.finalize(self, _close, self._index, self._pixels)
        self._lock = threading.Lock()
        self._storing = True

    def __getstate__(self) -> dict[str, Any]:
        return {"_folder": self._folder, "_boot": self._boot}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._open()

    def find(self, index: int) -> CachedImage | None:
        """Image `index` of the shard set, or None if it is not there (yet)."""
        entry = self._entry(index)
        if entry is None:
            return None
        offset, height, width, boot, checksum = entry
        if boot != self._boot:
            pixels = np.empty(height * width, np.uint8)
            if not _read_into(self._pixels, pixels, offset) or zlib.crc32(pixels) != checksum:
                return None
            self._mark(index, offset, height, width, checksum)
        return CachedImage(height, width, offset, self)

    def read_pixels(self, target: np.ndarray, start: int) -> None:
        """Fills (n,) uint8 `target` from byte `start` of all pixels on.

        Raises:
          InputError: the disk does not give them back.
        """
        if not _read_into(self._pixels, target, start):
            raise InputError(f"data.cache: pixels in {self._folder} cannot be read; delete the folder and start again")

    def store(self, index: int, pixels: np.ndarray) -> None:
        """Keeps (H, W) uint8 `pixels` as image `index`. On a full disk: warns, once, and keeps no more."""
        if not self._storing:
            return
        pixels = np.ascontiguousarray(pixels)
        try:
            with self._locked():
                boots, end, boot_id = self._header()
                _write(self._index, _with_checksum(_HEADER.pack(_MAGIC, boots, end + pixels.nbytes, boot_id)), 0)
            _write(self._pixels, memoryview(pixels).cast("B"), end)
            self._mark(index, end, *pixels.shape, zlib.crc32(pixels))
        except OSError as error:
            self._storing = False
            logging.warning("data.cache: no more images are kept in %s (%s)", self._folder, error)

    def _mark(self, index: int, offset: int, height: int, width: int, checksum: int) -> None:
        entry = _with_checksum(_ENTRY.pack(offset, height, width, self._boot, checksum))
        _write(self._index, entry, _SLOT + index * _ENTRY_BYTES)

    def _entry(self, index: int) -> tuple[int, ...] | None:
        content = os.pread(self._index, _ENTRY.size + _CHECKSUM.size, _SLOT + index * _ENTRY_BYTES)
        return _ENTRY.unpack_from(content) if _is_whole(content) else None

    def _header(self) -> tuple[int, int, bytes]:
        """Number of boots, end of the pixels, identity of the last boot."""
        content = os.pread(self._index, _HEADER.size + _CHECKSUM.size, 0)
        if not _is_whole(content) or not content.startswith(_MAGIC):
            raise InputError(f"data.cache: {self._folder}/index is damaged; delete {self._folder} and start again")
        return _HEADER.unpack_from(content)[1:]

    def _count_boot(self) -> int:
        """The number of this boot among those that this cache has seen."""
        try:
            identity = uuid.UUID(_BOOT_ID.read_text().strip()).bytes
        except (OSError, ValueError):
            identity = uuid.uuid4().bytes  # unknown: whatever is there gets checked
        with self._locked():
            boots, end, last = self._header()
            if identity != last:
                boots += 1
                # A crash may have kept pixels and lost the header that gave their place away.
                end = max(end, os.fstat(self._pixels).st_size)
                _write(self._index, _with_checksum(_HEADER.pack(_MAGIC, boots, end, identity)), 0)
        return boots

    @contextmanager
    def _locked(self) -> Iterator[None]:
        """Against threads, then against processes; a killed process leaves nothing locked."""
        with self._lock:
            fcntl.flock(self._index, fcntl.LOCK_EX)
            try:
                yield
            finally:
                fcntl.flock(self._index, fcntl.LOCK_UN)


def _make_files(folder: Path, count: int) -> None:
    """Makes an empty cache, whole or not at all; when another process was faster, its cache is as good."""
    if folder.exists():
        return
    folder.parent.mkdir(parents=True, exist_ok=True)
    beside = Path(tempfile.mkdtemp(prefix="making-", dir=folder.parent))
    (beside / "pixels").touch()
    with (beside / "index").open("wb") as file:
        file.write(_with_checksum(_HEADER.pack(_MAGIC, 0, 0, bytes(16))))
        file.truncate(_SLOT + count * _ENTRY_BYTES)
    try:
        beside.rename(folder)
    except OSError:
        shutil.rmtree(beside)
        if not folder.exists():
            raise


def _bytes_of(manifest: Manifest) -> int:
    """Decoded bytes of all images, from the manifest's sizes."""
    total = 0
    for size, count in manifest.sizes.items():
        width, height = map(int, size.split("x"))
        total += width * height * count
    return total


def _with_checksum(content: bytes) -> bytes:
    return content + _CHECKSUM.pack(zlib.crc32(content))


def _is_whole(content: bytes) -> bool:
    return content[-_CHECKSUM.size :] == _CHECKSUM.pack(zlib.crc32(content[: -_CHECKSUM.size]))


def _write(file: int, content: bytes | memoryview, start: int) -> None:
    view = memoryview(content)
    while view:
        written = os.pwrite(file, view, start)
        view, start = view[written:], start + written


def _read_into(file: int, target: np.ndarray, start: int) -> bool:
    """Fills (n,) uint8 `target` from byte `start` on; False if the file does not give that much."""
    view = memoryview(target)
    while view:
        try:
            count = os.preadv(file, [view], start)
        except OSError:
            return False
        if count == 0:
            return False
        view, start = view[count:], start + count
    return True


_memory = threading.local()


def _thread_memory(size: int) -> np.ndarray:
    """(size,) uint8 of this thread, overwritten by the next call: fresh memory costs a page fault every 4 kB."""
    memory = getattr(_memory, "block", None)
    if memory is None or memory.size < size:
        memory = _memory.block = np.empty(size, np.uint8)
    return memory[:size]


def _close(*files: int) -> None:
    for file in files:
        os.close(file)

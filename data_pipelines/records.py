"""What one stored example is, and what a shard set is: encode, decode, manifest, random access.

A shard set is a folder: `*.array_record` shards written with `group_size:1` (so that any record is one read),
`manifest.json`, and beside them the lists and pictures that `data_pipelines.prepare` writes.

A stored example is a short binary header, a JSON header and an encoded one-channel image:

    magic (4 bytes) | version u8 | JSON length u32 | image length u32 | CRC-32 of the JSON u32 | JSON (UTF-8) | image

Integers are little-endian. The image is a JPEG file (the source's own bytes, never a second compression) or a
lossless 8- or 16-bit PNG file. Its bytes are guarded by the hash that ArrayRecord keeps of every record on disk; a
second checksum of them here would cost 3 % of the reading time.
"""

from __future__ import annotations

import bisect
import dataclasses
import hashlib
import itertools
import json
import operator
import os
import struct
import zlib
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, SupportsIndex

from array_record.python import array_record_data_source, array_record_module
from etils import epath

from data_pipelines.errors import InputError

MANIFEST_NAME = "manifest.json"
MANIFEST_VERSION = 1
SHARD_SUFFIX = ".array_record"
# One record a group makes random access one read; the image bytes are compressed already.
WRITER_OPTIONS = "group_size:1,uncompressed"

_MAGIC = b"IRIM"
_TFDS_TAG = b"\x0a"  # first byte of every example that TensorFlow Datasets writes
_RECORD_VERSION = 1
_PREFIX = struct.Struct("<4sBIII")
_ENCODINGS = ("jpeg", "png")
_BIT_DEPTHS = (8, 16)
_HASH_BLOCK = 1 << 20


class CorruptRecord(ValueError):
    """The bytes are not a stored example of this project, or were damaged."""


@dataclasses.dataclass(frozen=True)
class Record:
    """One stored example.

    Attributes:
      key: posix path of the source relative to its input root, unique in the shard set.
      payload: the encoded one-channel image.
      encoding: "jpeg" or "png".
      height: pixel rows H of the decoded image.
      width: pixel columns W of the decoded image.
      bit_depth: 8 or 16, bits a pixel.
      attributes: JSON-able facts about the source, by name. `unit`, `scale` and `offset` are always usable through
        `source_units`: a stored integer v stands for v * scale + offset in the source's unit.
    """

    key: str
    payload: bytes
    encoding: str
    height: int
    width: int
    bit_depth: int
    attributes: Mapping[str, Any] = dataclasses.field(default_factory=dict)


def source_units(attributes: Mapping[str, Any]) -> tuple[float, float, str]:
    """Returns (scale, offset, unit) of a record: a stored integer v is v * scale + offset in the source's unit."""
    return float(attributes.get("scale", 1.0)), float(attributes.get("offset", 0.0)), attributes.get("unit", "count")


def encode_record(record: Record) -> bytes:
    """Returns the stored bytes of a record. The same record always gives the same bytes."""
    header = {
        "key": record.key,
        "encoding": record.encoding,
        "height": record.height,
        "width": record.width,
        "bit_depth": record.bit_depth,
        "attributes": dict(record.attributes),
    }
    header_bytes = json.dumps(header, sort_keys=True, separators=(",", ":")).encode()
    prefix = _PREFIX.pack(_MAGIC, _RECORD_VERSION, len(header_bytes), len(record.payload), zlib.crc32(header_bytes))
    return b"".join((prefix, header_bytes, record.payload))


def decode_record(data: bytes) -> Record:
    """Returns the record stored in `data`, by `encode_record` or by a builder of `data_pipelines.builders`.

    Raises:
      CorruptRecord: wrong magic or version, wrong length, or the header's checksum does not match.
    """
    if data.startswith(_TFDS_TAG):
        # Imported on demand: it needs this module, and most shard sets do not need it.
        from data_pipelines.tfds_examples import decode_example

        record = decode_example(data)
    else:
        record = _decode_stored(data)
    if record.encoding not in _ENCODINGS or record.bit_depth not in _BIT_DEPTHS:
        raise CorruptRecord(f"unknown encoding {record.encoding!r} or bit depth {record.bit_depth!r}")
    return record


def _decode_stored(data: bytes) -> Record:
    """The record in bytes of `encode_record`."""
    if len(data) < _PREFIX.size:
        raise CorruptRecord(f"a record of {len(data)} bytes is shorter than its header")
    magic, version, header_size, payload_size, checksum = _PREFIX.unpack_from(data)
    if magic != _MAGIC:
        raise CorruptRecord("the bytes do not start with a record's magic number")
    if version != _RECORD_VERSION:
        raise CorruptRecord(f"record version {version} is not supported (expected {_RECORD_VERSION})")
    payload_start = _PREFIX.size + header_size
    if payload_start + payload_size != len(data):
        raise CorruptRecord(f"the record has {len(data)} bytes, its header says {payload_start + payload_size}")
    header_bytes = data[_PREFIX.size : payload_start]
    if zlib.crc32(header_bytes) != checksum:
        raise CorruptRecord("the checksum of the record's header does not match")
    try:
        header = json.loads(header_bytes)
        return Record(payload=data[payload_start:], **header)
    except (ValueError, TypeError) as error:
        raise CorruptRecord(f"the record's header is not usable: {error}") from error


@dataclasses.dataclass(frozen=True)
class Shard:
    """One shard file: name inside the folder, number of records, size in bytes, SHA-256 in hexadecimal."""

    name: str
    count: int
    bytes: int
    sha256: str


@dataclasses.dataclass(frozen=True)
class Manifest:
    """What a shard set holds.

    Attributes:
      count: number of records.
      shards: the shard files in reading order.
      sizes: "WxH" -> number of records.
      bit_depths: "8" or "16" -> number of records.
      mean, std: mean and standard deviation over all pixels in [0, 1], after the default intensity mapping.
      entropy: mean over the images of the Shannon entropy of the 256-level histogram, bit.
      fingerprint: SHA-256 over the shard digests; equal fingerprints mean equal records in equal order.
      settings: what `prepare` was asked to do.
    """

    count: int
    shards: tuple[Shard, ...]
    sizes: Mapping[str, int]
    bit_depths: Mapping[str, int]
    mean: float
    std: float
    entropy: float
    fingerprint: str
    settings: Mapping[str, Any] = dataclasses.field(default_factory=dict)


def fingerprint_shards(shards: Iterable[Shard]) -> str:
    """Returns the SHA-256 (hexadecimal) over the digests of the shards in order."""
    return hashlib.sha256("\n".join(shard.sha256 for shard in shards).encode()).hexdigest()


def describe_shard(path: str | os.PathLike, count: int) -> Shard:
    """Returns the manifest entry of the finished shard file `path` that holds `count` records."""
    path = epath.Path(path)
    digest = hashlib.sha256()
    size = 0
    with path.open("rb") as file:
        while block := file.read(_HASH_BLOCK):
            digest.update(block)
            size += len(block)
    return Shard(name=path.name, count=count, bytes=size, sha256=digest.hexdigest())


def write_manifest(folder: str | os.PathLike, manifest: Manifest) -> None:
    """Writes `manifest.json` into `folder`: beside first, then renamed, so that it is never half there."""
    content = json.dumps({"version": MANIFEST_VERSION, **dataclasses.asdict(manifest)}, indent=1, sort_keys=True)
    beside = epath.Path(folder) / (MANIFEST_NAME + ".partial")
    beside.write_text(content + "\n")
    beside.rename(epath.Path(folder) / MANIFEST_NAME)


def read_manifest(folder: str | os.PathLike) -> Manifest:
    """Returns the manifest of a shard set; `folder` may be any path that epath opens.

    Raises:
      InputError: no manifest there, or it is not one of this project.
    """
    path = epath.Path(folder) / MANIFEST_NAME
    try:
        content = json.loads(path.read_text())
    except (FileNotFoundError, NotADirectoryError):
        raise InputError(
            f"{os.fspath(folder)} is not a shard set (no {MANIFEST_NAME} in it): "
            "make one with `python -m data_pipelines.prepare`"
        ) from None
    except (OSError, ValueError) as error:
        raise InputError(f"{path} cannot be read ({error}): prepare the shards again") from error
    if not isinstance(content, dict) or content.pop("version", None) != MANIFEST_VERSION:
        raise InputError(f"{path} is not a manifest of version {MANIFEST_VERSION}: prepare the shards again")
    try:
        shards = tuple(Shard(**shard) for shard in content.pop("shards"))
        return Manifest(shards=shards, **content)
    except (KeyError, TypeError) as error:
        raise InputError(f"{path} lacks or misnames a field ({error}): prepare the shards again") from error


def verify_shards(folder: str | os.PathLike) -> None:
    """Reads every shard and compares it with the manifest's digests.

    Raises:
      InputError: a shard is missing or differs; the message names it.
    """
    for shard in read_manifest(folder).shards:
        path = epath.Path(folder) / shard.name
        if not path.exists():
            raise InputError(f"{path} is missing: prepare the shards again")
        if describe_shard(path, shard.count) != shard:
            raise InputError(f"{path} differs from the digest in {MANIFEST_NAME}: prepare the shards again")


class RecordSource:
    """Random access to the stored bytes of one or more shard sets, in manifest order, one after the other.

    Works as a Grain source: `len(source)`, `source[i] -> bytes`. Safe to pickle (worker processes open their own
    files) and to read from several threads.
    """

    def __init__(self, folders: Sequence[str | os.PathLike]):
        self._paths: list[str] = []
        self._counts: list[int] = []
        for folder in folders:
            for shard in read_manifest(folder).shards:
                path = epath.Path(folder) / shard.name
                if not path.exists():
                    raise InputError(f"{path} is missing though {MANIFEST_NAME} lists it: prepare the shards again")
                self._paths.append(os.fspath(path))
                self._counts.append(shard.count)
        self._open()

    def _open(self) -> None:
        self._starts = [0, *itertools.accumulate(self._counts)]
        # The number of records is given, so that opening a large set does not read every shard's footer.
        self._source = array_record_data_source.ArrayRecordDataSource(
            [
                _ShardFile(filename=path, skip=0, take=count, examples_in_shard=count)
                for path, count in zip(self._paths, self._counts, strict=True)
            ]
        )

    def __getstate__(self) -> dict[str, Any]:
        return {"_paths": self._paths, "_counts": self._counts}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._open()

    def __len__(self) -> int:
        return self._starts[-1]

    def __getitem__(self, index: SupportsIndex) -> bytes:
        """Returns the stored bytes of record `index`.

        Raises:
          IndexError: no such record.
          CorruptRecord: the shard is damaged at this record; the message names both.
        """
        position = operator.index(index)
        if not -len(self) <= position < len(self):
            raise IndexError(f"record {position} of {len(self)}")
        position %= len(self)
        try:
            return self._source[position]
        except RuntimeError as error:
            shard = bisect.bisect_right(self._starts, position) - 1
            message = f"record {position - self._starts[shard]} of {self._paths[shard]} is damaged: {error}"
            raise CorruptRecord(message.replace("\n", " ")) from error

    def __repr__(self) -> str:
        return f"RecordSource({len(self)} records in {len(self._paths)} shards)"


@dataclasses.dataclass(frozen=True)
class _ShardFile:
    """The form in which array_record takes a file with a known number of records."""

    filename: str
    skip: int
    take: int
    examples_in_shard: int


def open_source(folders: Sequence[str | os.PathLike] | str | os.PathLike) -> RecordSource:
    """Returns random access to the raw record bytes of one shard set or several (see `decode_record`).

    Raises:
      InputError: a folder has no readable manifest, or a shard that it lists is missing.
    """
    if isinstance(folders, (str, os.PathLike)):
        folders = [folders]
    return RecordSource(folders)


def write_shard(path: str | os.PathLike, records: Iterable[bytes]) -> Shard:
    """Writes encoded records into one shard: beside first, then renamed. Returns its manifest entry."""
    path = epath.Path(path)
    beside = path.with_name(path.name + ".partial")
    writer = array_record_module.ArrayRecordWriter(os.fspath(beside), WRITER_OPTIONS)
    count = 0
    try:
        for record in records:
            writer.write(record)
            count += 1
    finally:
        writer.close()
    beside.rename(path)
    return describe_shard(path, count)

"""What a shard set is: a folder of ArrayRecord files and the manifest that lists them, by split.

`*.array_record` shards are written with `group_size:1`, so that any record is one read; `manifest.json` names them with
their digests. What a manifest says is checked before anything is done with it: it may come from a stranger.
"""

import bisect
import contextlib
import dataclasses
import errno
import functools
import hashlib
import itertools
import json
import math
import os
import re
import resource
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, SupportsIndex

from array_record.python import array_record_module
from etils import epath

from data_pipelines.commands import printable
from data_pipelines.errors import InputError, refusing
from data_pipelines.examples import CorruptExample
from data_pipelines.files import atomic_write

MANIFEST_NAME = "manifest.json"
MANIFEST_VERSION = 2
SHARD_SUFFIX = ".array_record"
# One record per group makes random access one read; the image bytes are compressed already.
WRITER_OPTIONS = "group_size:1,uncompressed"

# What ArrayRecord says, as a RuntimeError, of a full or failing disk.
WRITE_FAILED = "write() failed"

_READER_BUFFER = 1 << 15
_MOST_OPEN = 512
# TensorFlow Datasets writes NAME-SPLIT.array_record-00000-of-00001.
_SHARD_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.+-]{0,200}\.array_record(-\d+-of-\d+)?")
SPLIT_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,100}")
_DIGEST = re.compile(r"[0-9a-f]{64}")
_REMEDY = "prepare the shards again"


@dataclasses.dataclass(frozen=True)
class Shard:
    """One shard file: name inside the folder, number of records, size in bytes, SHA-256 in hexadecimal."""

    name: str
    count: int
    bytes: int
    sha256: str


@dataclasses.dataclass(frozen=True)
class Split:
    """A part of a set that is used as a whole: number of records, shard files in reading order."""

    count: int
    shards: tuple[Shard, ...]


@dataclasses.dataclass(frozen=True)
class Manifest:
    """What a shard set holds.

    Attributes:
      splits: by name, for example "train".
      classes: names in the order of their numbers, of "mask", of "objects" and of each label of whole images.
      sizes: "WxH" -> number of records.
      bit_depths: "8" or "16" -> number of records.
      mean, std: mean and standard deviation over all pixels in [0, 1], after the default intensity mapping.
      entropy: mean over the images of the Shannon entropy of the 256-level histogram, bit.
      fingerprint: see `fingerprint_splits`; equal fingerprints mean equal records in equal order.
      settings: what the set was made from and how.
    """

    splits: Mapping[str, Split]
    classes: Mapping[str, tuple[str, ...]]
    sizes: Mapping[str, int]
    bit_depths: Mapping[str, int]
    mean: float
    std: float
    entropy: float
    fingerprint: str
    settings: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    @property
    def count(self) -> int:
        """Number of records in all splits."""
        return sum(split.count for split in self.splits.values())

    @property
    def shards(self) -> tuple[Shard, ...]:
        """The shards of all splits."""
        return tuple(shard for name in sorted(self.splits) for shard in self.splits[name].shards)


def make_split(shards: Iterable[Shard]) -> Split:
    """Returns the split of the given shards, in reading order."""
    shards = tuple(shards)
    return Split(sum(shard.count for shard in shards), shards)


def fingerprint_splits(splits: Mapping[str, Split]) -> str:
    """Returns the SHA-256 (hexadecimal) over names of splits, counts and digests of their shards."""
    lines = [f"{name} {shard.count} {shard.sha256}" for name in sorted(splits) for shard in splits[name].shards]
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()


def describe_shard(path: str | os.PathLike, count: int) -> Shard:
    """Returns the manifest entry of the finished shard file `path` that holds `count` records."""
    path = epath.Path(path)
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256")
        return Shard(name=path.name, count=count, bytes=file.tell(), sha256=digest.hexdigest())


def write_shard(path: str | os.PathLike, examples: Iterable[bytes]) -> Shard:
    """Writes encoded examples into one shard, whole or not at all. Returns its manifest entry.

    Raises:
      OSError: the disk is full or failing.
    """
    count = 0
    with atomic_write(path) as partial:
        writer = array_record_module.ArrayRecordWriter(os.fspath(partial), WRITER_OPTIONS)
        try:
            with contextlib.closing(writer):
                for example in examples:
                    writer.write(example)
                    count += 1
        except RuntimeError as error:
            if WRITE_FAILED not in str(error):
                raise
            raise OSError(errno.EIO, str(error).split(";")[0]) from error
    return describe_shard(path, count)


def write_split(folder: str | os.PathLike, name: str, examples: Iterable[bytes], shard_bytes: int = 1 << 28) -> Split:
    """Writes encoded examples into the shards of a split; a shard is closed when it holds `shard_bytes` or more.

    Raises:
      InputError: the name of the split is no plain name of a file, and could lead out of the folder.
      OSError: the disk is full or failing.
    """
    if not SPLIT_NAME.fullmatch(name):
        raise InputError(f"the split {name!r} cannot be a file name: use letters, digits, dots and dashes")
    left = iter(examples)

    def filled(first: bytes) -> Iterator[bytes]:
        size = 0
        for example in itertools.chain([first], left):
            yield example
            size += len(example)
            if size >= shard_bytes:
                return

    path = os.path.join(folder, name)
    return make_split(
        write_shard(f"{path}-{number:05d}{SHARD_SUFFIX}", filled(first)) for number, first in enumerate(left)
    )


def write_manifest(folder: str | os.PathLike, manifest: Manifest) -> None:
    """Writes `manifest.json` into `folder`, whole or not at all."""
    content = json.dumps({"version": MANIFEST_VERSION, **dataclasses.asdict(manifest)}, indent=1, sort_keys=True)
    with atomic_write(os.path.join(folder, MANIFEST_NAME)) as partial:
        partial.write_text(content + "\n")


def read_manifest(folder: str | os.PathLike) -> Manifest:
    """Returns the manifest of a shard set; `folder` may be any path that epath opens.

    Raises:
      InputError: no manifest there, or it is not one of this project, or it contradicts itself.
    """
    path = epath.Path(folder) / MANIFEST_NAME
    with refusing(f"{path} cannot be read", _REMEDY, OSError, ValueError, RecursionError):
        try:
            content = json.loads(path.read_text(), parse_constant=_refuse_constant)
        except (FileNotFoundError, NotADirectoryError):
            raise InputError(
                f"{os.fspath(folder)} is not a shard set (no {MANIFEST_NAME} in it): "
                "make one with `python -m data_pipelines.prepare`"
            ) from None
    if not isinstance(content, dict) or content.pop("version", None) != MANIFEST_VERSION:
        raise InputError(f"{path} is not a manifest of version {MANIFEST_VERSION}: {_REMEDY}")
    with refusing(f"{path} is not usable", _REMEDY, KeyError, TypeError, ValueError, AttributeError, OverflowError):
        return _checked_manifest(content)


def _refuse_constant(text: str) -> None:
    raise ValueError(f"{text} is not a number of JSON")


def _require(condition: bool, what: str, value: Any) -> None:
    if not condition:
        raise ValueError(f"{what}: {str(value)[:80]!r}")


def _checked_manifest(content: dict[str, Any]) -> Manifest:
    """The manifest of JSON that may hold anything; what is wrong is a KeyError, TypeError or ValueError."""
    splits = {}
    for name, split in content.pop("splits").items():
        _require(bool(SPLIT_NAME.fullmatch(name)), "name of a split", name)
        splits[name] = Split(split["count"], tuple(_checked_shard(shard) for shard in split["shards"]))
        _require(splits[name].count == make_split(splits[name].shards).count, f"count of split {name}", split["count"])
    manifest = Manifest(
        splits=splits,
        classes={name: tuple(names) for name, names in content.pop("classes").items()},
        **content,
    )
    names = [shard.name for shard in manifest.shards]
    _require(len(set(names)) == len(names), "a shard is listed twice", names)
    _require(manifest.fingerprint == fingerprint_splits(splits), "fingerprint of other shards", manifest.fingerprint)
    for name in ("mean", "std", "entropy"):
        value = getattr(manifest, name)
        _require(type(value) in (int, float) and math.isfinite(value), name, value)
    for name in ("sizes", "bit_depths"):
        counts = getattr(manifest, name)
        _require(all(type(count) is int and count >= 0 for count in counts.values()), name, counts)
    for name, listed in manifest.classes.items():
        plain = all(isinstance(text, str) and printable(text) == text for text in listed)
        _require(plain, f"classes of {name}", listed)
    _require(isinstance(manifest.settings, dict), "settings", manifest.settings)
    return manifest


def _checked_shard(content: Mapping[str, Any]) -> Shard:
    shard = Shard(**content)
    _require(isinstance(shard.name, str) and bool(_SHARD_NAME.fullmatch(shard.name)), "name of a shard", shard.name)
    _require(type(shard.bytes) is int and shard.bytes >= 0, f"bytes of {shard.name}", shard.bytes)
    # Every record takes some bytes, so that a count is as true as the size, which is compared with the file's.
    _require(type(shard.count) is int and 0 <= shard.count <= shard.bytes, f"count of {shard.name}", shard.count)
    _require(isinstance(shard.sha256, str) and bool(_DIGEST.fullmatch(shard.sha256)), "digest", shard.sha256)
    return shard


def shard_path(folder: str | os.PathLike, shard: Shard) -> epath.Path:
    """Returns the path of a listed shard.

    Raises:
      InputError: it is not there, or its size is not the listed one.
    """
    path = epath.Path(folder) / shard.name
    try:
        size = path.stat().length
    except FileNotFoundError:
        raise InputError(f"{path} is missing though {MANIFEST_NAME} lists it: {_REMEDY}") from None
    if size != shard.bytes:
        raise InputError(f"{path} differs from {MANIFEST_NAME} ({size} bytes, not {shard.bytes}): {_REMEDY}")
    return path


def verify_shards(folder: str | os.PathLike) -> None:
    """Reads every shard of every split and compares it with the manifest's digests.

    Raises:
      InputError: a shard is missing or differs; the message names it.
    """
    for shard in read_manifest(folder).shards:
        path = shard_path(folder, shard)
        if describe_shard(path, shard.count) != shard:
            raise InputError(f"{path} differs from the digest in {MANIFEST_NAME}: {_REMEDY}")


def _find_split(folder: str | os.PathLike, split: str) -> Split:
    splits = read_manifest(folder).splits
    if split not in splits:
        known = ", ".join(sorted(splits)) or "none"
        raise InputError(f"shard set {os.fspath(folder)} has no split {split!r}: it has {known}")
    return splits[split]


class ShardReader:
    """Random access to the stored bytes of a split of one or more shard sets, in manifest order, one after the other.

    `len(reader)`, `reader[i] -> bytes`. Safe to pickle (worker processes open their own files) and to read from
    several threads. Shards are opened when they are needed and only so many at a time.

    Attributes:
      counts: number of records of each set.
    """

    def __init__(self, folders: Sequence[str | os.PathLike] | str | os.PathLike, split: str = "train"):
        """Opens local `folders`.

        Raises:
          InputError: a folder has no usable manifest or no such split, or a listed shard is missing or of another size.
        """
        folders = [folders] if isinstance(folders, (str, os.PathLike)) else folders
        splits = [_find_split(folder, split) for folder in folders]
        self.counts = [found.count for found in splits]
        self._shards = [
            (os.fspath(shard_path(folder, shard)), shard)
            for folder, found in zip(folders, splits, strict=True)
            for shard in found.shards
        ]
        self._starts = [0, *itertools.accumulate(shard.count for _, shard in self._shards)]
        self._damaged: set[int] = set()

    @functools.cached_property
    def _open_shard(self) -> Callable[[str, int], Any]:
        """`_open`, which keeps so many files open: a process's own, never pickled."""
        # Half of what the process may open; the rest is for all else that it does.
        limit = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
        most_open = _MOST_OPEN if limit == resource.RLIM_INFINITY else max(1, min(_MOST_OPEN, limit // 2))
        # What drops out of it is closed when the last thread has read from it.
        return functools.lru_cache(most_open)(_open)

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in vars(self).items() if name != "_open_shard"}

    def __len__(self) -> int:
        return self._starts[-1]

    def __getitem__(self, index: SupportsIndex) -> bytes:
        """Returns the stored bytes of record `index`.

        Raises:
          IndexError: no such record.
          CorruptExample: the shard is damaged at this record; the message names both.
          InputError: the shard cannot be read now: too many open files, a failing disk, no permission.
        """
        position = range(len(self))[index]
        number = bisect.bisect_right(self._starts, position) - 1
        place = position - self._starts[number]
        path, shard = self._shards[number]
        try:
            return self._open_shard(path, shard.count).read([place])[0]
        except RuntimeError as error:
            self._check_damage(number, error)
            raise CorruptExample(" ".join(f"record {place} of {path} is damaged: {error}".split())) from error

    def _check_damage(self, number: int, cause: Exception) -> None:
        """Passes when the file's bytes are not those of the manifest; everything else is not the record's fault.

        Raises:
          InputError: the file cannot be read, or is whole.
        """
        if number in self._damaged:
            return
        path, shard = self._shards[number]
        limit = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
        remedy = f"check the disk, permissions and the limit of open files ({limit}; raise it with `ulimit -n`)"
        with refusing(f"{path} cannot be read", remedy, OSError, RuntimeError):
            if describe_shard(path, shard.count) == shard:
                raise RuntimeError(f"though it is whole: {cause}")
        self._damaged.add(number)


def _open(path: str, count: int) -> Any:
    """The reader of a shard of so many records; a RuntimeError where they are not there."""
    reader = array_record_module.ArrayRecordReader(
        path, options="readahead_buffer_size:0", file_reader_buffer_size=_READER_BUFFER
    )
    # A file that cannot be opened looks like one without records.
    if reader.num_records() != count:
        raise RuntimeError(f"{reader.num_records()} records can be found, not {count}")
    return reader

"""Folders of images -> validated ArrayRecord shards, a manifest, and a reason for every file that was left out.

    python -m data_pipelines.prepare --input=DIR [--input=DIR ...] --output=SHARDS

Work happens in `SHARDS.partial` beside the output, which is renamed when everything is there. A run that was killed
continues from the parts it finished; the shards are the same for any number of workers and any number of kills.
"""

from __future__ import annotations

import concurrent.futures
import contextlib
import csv
import dataclasses
import fcntl
import hashlib
import json
import multiprocessing
import os
import shutil
import signal
import sys
import threading
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures.process import BrokenProcessPool
from typing import Any

from absl import flags
from array_record.python import array_record_data_source
from tqdm import tqdm

from data_pipelines.commands import run_command
from data_pipelines.curation import Filters
from data_pipelines.errors import InputError
from data_pipelines.parts import Candidate, examine_part, read_part, records_path, rows_path
from data_pipelines.records import (
    MANIFEST_NAME,
    Manifest,
    Shard,
    describe_shard,
    fingerprint_shards,
    read_manifest,
    write_manifest,
    write_shard,
)
from data_pipelines.sources import Listing, Rejection, Source, list_sources

REJECTED_NAME = "rejected.csv"
PART_SIZE = 256
# Changes of what is stored make old partial work unusable.
_WORK_VERSION = 1


@dataclasses.dataclass(frozen=True)
class PrepareConfig:
    """What `prepare` is asked to do, apart from where.

    Attributes:
      filters: see `Filters`.
      shard_bytes: a shard is closed when it holds at least this many bytes.
    """

    filters: Filters = dataclasses.field(default_factory=Filters)
    shard_bytes: int = 1 << 28


@dataclasses.dataclass(frozen=True)
class Report:
    """What became of the files: found = kept + the sum over `rejected` (reason -> count)."""

    output: str
    found: int
    kept: int
    rejected: dict[str, int]
    manifest: Manifest


def prepare(
    inputs: Sequence[str | os.PathLike],
    output: str | os.PathLike,
    config: PrepareConfig = PrepareConfig(),
    workers: int | None = None,
    progress: bool = True,
) -> Report:
    """Reads images below `inputs` and writes a shard set to the new folder `output`.

    Args:
      inputs: folders or files.
      output: must not exist, unless it is the finished result of the very same request (which is then returned).
      config: filters and sizes.
      workers: processes that decode; 0 works in this process; None takes one a core. The result does not depend on it.
      progress: show a progress bar with rate and time left on stderr.

    Raises:
      InputError: an input is missing or holds no usable image, the output is in the way, or a worker died.
    """
    output = os.path.abspath(os.fspath(output))
    if not inputs:
        raise InputError("no input given: pass --input=DIR")
    listing = list_sources(inputs)
    if not listing.sources:
        raise InputError(f"no files below {', '.join(map(os.fspath, inputs))}: check --input")
    plan = _plan_digest(listing, config)
    work = output + ".partial"
    finished = _finished_report(output, plan)
    if finished is not None:
        shutil.rmtree(work, ignore_errors=True)
        return finished
    os.makedirs(work, exist_ok=True)
    with _lock(work):
        _start_or_resume(work, plan)
        parts = [listing.sources[start : start + PART_SIZE] for start in range(0, len(listing.sources), PART_SIZE)]
        with _worker_pool(workers, len(parts)) as run_all:
            _examine_all(work, parts, config.filters, run_all, progress)
            candidates, rejections = _collect(work, len(parts), listing)
            if not candidates:
                shutil.rmtree(work)
                raise InputError(_nothing_kept(inputs, len(listing.sources), rejections))
            shards = _write_shards(work, candidates, config, run_all, progress)
        report = _write_lists(work, output, plan, candidates, rejections, shards, config)
    shutil.rmtree(work, ignore_errors=True)
    return report


def _plan_digest(listing: Listing, config: PrepareConfig) -> str:
    """Digest of everything that the result depends on: settings, found files with their sizes and dates."""
    content = [_WORK_VERSION, dataclasses.asdict(config), [dataclasses.astuple(source) for source in listing.sources]]
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def _finished_report(output: str, plan: str) -> Report | None:
    """The report of a finished `output`, if it is the result of this very request; None if there is no output."""
    if not os.path.lexists(output):
        return None
    if os.path.isdir(output) and not os.listdir(output):
        os.rmdir(output)
        return None
    with contextlib.suppress(InputError):
        manifest = read_manifest(output)
        if manifest.settings.get("plan") == plan:
            rejected = Counter(manifest.settings["rejected"])
            return Report(output, manifest.count + rejected.total(), manifest.count, dict(rejected), manifest)
    raise InputError(
        f"output {output} exists already and was made from other files or settings: remove it or choose another"
    )


@contextlib.contextmanager
def _lock(work: str) -> Iterator[None]:
    """Keeps a second run out of the same work folder; the lock goes with the process, however it ends."""
    with open(os.path.join(work, "lock"), "w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise InputError(f"another run is writing {work}: wait for it or choose another --output") from None
        yield


def _start_or_resume(work: str, plan: str) -> None:
    """Keeps the finished parts of an interrupted run of the same request, and throws away those of any other."""
    plan_file = os.path.join(work, "plan")
    known = None
    with contextlib.suppress(FileNotFoundError), open(plan_file) as file:
        known = file.read()
    if known != plan:
        for name in ("parts", "result"):
            shutil.rmtree(os.path.join(work, name), ignore_errors=True)
        _write_text(plan_file, plan)
    for name in ("parts", "result"):
        os.makedirs(os.path.join(work, name), exist_ok=True)


RunAll = Callable[[Callable[..., Any], Sequence[tuple]], Iterator[Any]]


@contextlib.contextmanager
def _worker_pool(workers: int | None, tasks: int) -> Iterator[RunAll]:
    """Yields `run_all(function, argument tuples)`, which yields results as they finish, in no fixed order."""
    workers = min(os.cpu_count() or 1 if workers is None else workers, tasks)
    if workers <= 1:
        yield lambda function, tasks: (function(*arguments) for arguments in tasks)
        return
    # Spawned, not forked: the record writer and the decoders run threads.
    context = multiprocessing.get_context("spawn")
    pool = concurrent.futures.ProcessPoolExecutor(workers, context, initializer=_start_worker)

    def run_all(function: Callable[..., Any], tasks: Sequence[tuple]) -> Iterator[Any]:
        waiting = {pool.submit(function, *arguments) for arguments in tasks}
        try:
            while waiting:
                done, waiting = concurrent.futures.wait(waiting, return_when=concurrent.futures.FIRST_COMPLETED)
                for future in done:
                    yield future.result()
        except BrokenProcessPool:
            raise InputError(
                "a worker process died (killed, or out of memory): run again to continue, with fewer --workers if "
                "memory is short"
            ) from None

    try:
        yield run_all
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def _start_worker() -> None:
    """Ctrl-C is the parent's to handle; a worker whose parent was killed must not live on."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)

    def follow_parent() -> None:
        multiprocessing.parent_process().join()
        os._exit(1)

    threading.Thread(target=follow_parent, daemon=True).start()


def _examine_all(
    work: str, parts: Sequence[Sequence[Source]], filters: Filters, run_all: RunAll, progress: bool
) -> None:
    """Examines the parts that are not done yet."""
    folder = os.path.join(work, "parts")
    done = {number for number in range(len(parts)) if os.path.exists(rows_path(folder, number))}
    tasks = [(folder, number, part, filters) for number, part in enumerate(parts) if number not in done]
    finished_files = sum(len(parts[number]) for number in done)
    with _bar("examining", "file", sum(map(len, parts)), finished_files, progress) as bar:
        for part_size in run_all(_examine_counted, tasks):
            bar.update(part_size)


def _examine_counted(folder: str, number: int, part: Sequence[Source], filters: Filters) -> int:
    examine_part(folder, number, part, filters)
    return len(part)


def _bar(task: str, unit: str, total: int, initial: int, progress: bool) -> tqdm:
    # A log file gets a line every half minute instead of a moving bar.
    interval = 0.2 if sys.stderr.isatty() else 30.0
    return tqdm(
        desc=task, unit=unit, total=total, initial=initial, disable=not progress, mininterval=interval, file=sys.stderr
    )


@dataclasses.dataclass(frozen=True)
class _Placed:
    """A candidate and where its record lies: part number and position in the part."""

    candidate: Candidate
    part: int
    position: int


def _collect(work: str, part_count: int, listing: Listing) -> tuple[list[_Placed], list[Rejection]]:
    """Returns the candidates and the rejections of all parts, in listing order."""
    placed: list[_Placed] = []
    rejections = list(listing.rejections)
    for number in range(part_count):
        part = read_part(os.path.join(work, "parts"), number)
        placed.extend(_Placed(candidate, number, i) for i, candidate in enumerate(part.candidates))
        rejections.extend(part.rejections)
    return placed, rejections


def _nothing_kept(inputs: Sequence[str | os.PathLike], found: int, rejections: Sequence[Rejection]) -> str:
    reasons = Counter(rejection.reason for rejection in rejections).most_common(3)
    listed = ", ".join(f"{reason} {count}" for reason, count in reasons)
    return f"none of the {found} files below {', '.join(map(os.fspath, inputs))} is usable ({listed}): check --input"


def _write_shards(
    work: str, placed: Sequence[_Placed], config: PrepareConfig, run_all: RunAll, progress: bool
) -> list[Shard]:
    """Copies the kept records into shards of about `shard_bytes`; finished shards of an earlier run stay."""
    groups: list[list[_Placed]] = [[]]
    size = 0
    for item in placed:
        if size >= config.shard_bytes:
            groups.append([])
            size = 0
        groups[-1].append(item)
        size += item.candidate.bytes
    tasks = [
        (work, f"images-{number:05d}-of-{len(groups):05d}.array_record", [(item.part, item.position) for item in group])
        for number, group in enumerate(groups)
    ]
    shards: list[Shard] = []
    with _bar("writing", "image", len(placed), 0, progress) as bar:
        for shard in run_all(_write_one_shard, tasks):
            shards.append(shard)
            bar.update(shard.count)
    return sorted(shards, key=lambda shard: shard.name)


def _write_one_shard(work: str, name: str, places: Sequence[tuple[int, int]]) -> Shard:
    path = os.path.join(work, "result", name)
    if os.path.exists(path):
        return describe_shard(path, len(places))
    return write_shard(path, _read_places(os.path.join(work, "parts"), places))


def _read_places(parts_folder: str, places: Sequence[tuple[int, int]]) -> Iterator[bytes]:
    """Yields the stored records at (part, position) places that are sorted by part; one part is open at a time."""
    opened, source = None, None
    for part, position in places:
        if part != opened:
            opened, source = part, array_record_data_source.ArrayRecordDataSource(records_path(parts_folder, part))
        yield source[position]


def _write_lists(
    work: str,
    output: str,
    plan: str,
    placed: Sequence[_Placed],
    rejections: Sequence[Rejection],
    shards: Sequence[Shard],
    config: PrepareConfig,
) -> Report:
    """Writes the list of rejected files and the manifest, then puts the finished folder in place."""
    result = os.path.join(work, "result")
    with open(os.path.join(result, REJECTED_NAME), "w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(("path", "reason", "detail"))
        writer.writerows(dataclasses.astuple(rejection) for rejection in sorted(rejections, key=lambda row: row.key))
    rejected = dict(Counter(rejection.reason for rejection in rejections).most_common())
    kept = [item.candidate for item in placed]
    settings = {"plan": plan, "rejected": rejected, "config": dataclasses.asdict(config)}
    manifest = describe_set(kept, shards, settings)
    write_manifest(result, manifest)
    os.rename(result, output)
    return Report(output, len(placed) + len(rejections), len(placed), rejected, manifest)


def describe_set(kept: Sequence[Candidate], shards: Sequence[Shard], settings: dict[str, Any]) -> Manifest:
    """Returns the manifest of the kept images: counts, sizes, and statistics under the default intensity mapping."""
    pixels = sum(candidate.height * candidate.width for candidate in kept)
    mean = sum(candidate.pixel_sum for candidate in kept) / pixels
    variance = sum(candidate.pixel_square_sum for candidate in kept) / pixels - mean**2
    return Manifest(
        count=len(kept),
        shards=tuple(shards),
        sizes=dict(Counter(f"{candidate.width}x{candidate.height}" for candidate in kept)),
        bit_depths=dict(Counter(str(candidate.bit_depth) for candidate in kept)),
        mean=mean,
        std=max(variance, 0.0) ** 0.5,
        entropy=sum(candidate.entropy for candidate in kept) / len(kept),
        fingerprint=fingerprint_shards(shards),
        settings=settings,
    )


def _write_text(path: str, text: str) -> None:
    with open(path + ".new", "w", encoding="utf-8") as file:
        file.write(text)
    os.replace(path + ".new", path)


def _define_flags() -> None:
    defaults = PrepareConfig()
    filters = defaults.filters
    flags.DEFINE_multi_string("input", [], "Folder or file of images; repeat for several.")
    flags.DEFINE_string("output", None, "New folder for the shards.")
    flags.DEFINE_integer("workers", None, "Processes; default one a core, 0 works in this process.", lower_bound=0)
    flags.DEFINE_integer("min_side", filters.min_side, "Drop images with both sides under this; 0 keeps all.", 0)
    flags.DEFINE_integer("min_levels", filters.min_levels, "Drop images of fewer gray levels; 0 keeps all.", 0)
    flags.DEFINE_bool("crop_borders", filters.crop_borders, "Cut off black borders.")
    flags.DEFINE_integer("max_pixels", filters.max_pixels, "Refuse pictures with more pixels.", 1)
    flags.DEFINE_integer("max_file_bytes", filters.max_file_bytes, "Refuse larger files.", 1)
    flags.DEFINE_integer("shard_bytes", defaults.shard_bytes, "Close a shard at this size.", 1)


def _config_from_flags() -> PrepareConfig:
    values = flags.FLAGS.flag_values_dict()
    filters = Filters(**{field.name: values[field.name] for field in dataclasses.fields(Filters)})
    return PrepareConfig(filters=filters, shard_bytes=values["shard_bytes"])


def main(arguments: Sequence[str]) -> None:
    """Runs `prepare` with the command line's flags and prints what became of the files."""
    if len(arguments) > 1:
        raise InputError(f"unexpected argument {arguments[1]!r}: folders are given as --input=DIR")
    if not flags.FLAGS.output:
        raise InputError("no output given: pass --output=SHARDS")
    report = prepare(flags.FLAGS.input, flags.FLAGS.output, _config_from_flags(), flags.FLAGS.workers)
    rejected = ", ".join(f"{reason} {count}" for reason, count in report.rejected.items())
    print(f"found {report.found} files, kept {report.kept}" + (f", rejected {rejected}" if rejected else ""))
    print(f"shards: {report.output} ({MANIFEST_NAME}, {REJECTED_NAME})")
    print(f"next: python -m data_pipelines.inspect {report.output}")


if __name__ == "__main__":
    _define_flags()
    run_command(main)

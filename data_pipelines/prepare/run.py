"""From inputs to a finished shard set.

Work happens in `SHARDS.partial` beside the output, which is moved into place when everything is there; meanwhile it
takes about the disk space of the images once more. A run that was killed continues from the parts it
finished. The shards are the same for any number of workers and of kills.
"""

from __future__ import annotations

import contextlib
import dataclasses
import fcntl
import hashlib
import json
import os
import shutil
import time
from collections import Counter
from collections.abc import Container, Iterator, Sequence

import numpy as np

from data_pipelines.commands import progress_bar
from data_pipelines.errors import InputError
from data_pipelines.files import atomic_write, local_path, writing
from data_pipelines.prepare.collect import Collection, collect, examine_part, rows_path
from data_pipelines.prepare.curate import Filters
from data_pipelines.prepare.duplicates import DuplicateRule, find_exact_duplicates, find_near_duplicates
from data_pipelines.prepare.inputs import PLAN_NAME, Listing, Rejection, Source, list_sources, split_into_parts
from data_pipelines.prepare.results import write_results
from data_pipelines.shards import Manifest, read_manifest, write_split
from data_pipelines.workers import worker_pool

PART_SIZE = 256
ENCODINGS = ("source", "raw")
# Changes of what is stored make old partial work unusable.
_WORK_VERSION = 4


@dataclasses.dataclass(frozen=True)
class PrepareConfig:
    """What `prepare` is asked to do, apart from where.

    Attributes:
      filters: what one image must satisfy.
      duplicates: when two images are the same scene.
      encoding: "source" stores the source's own bytes where they are a one-channel JPEG, else PNG; "raw" stores the
        pixels uncompressed, which costs two to ten times the space and saves the decoding at each step of training.
      shard_bytes: a shard is closed when it holds at least this many bytes.
      pictures: draw contact sheets and histograms.
    """

    filters: Filters = dataclasses.field(default_factory=Filters)
    duplicates: DuplicateRule = dataclasses.field(default_factory=DuplicateRule)
    encoding: str = "source"
    shard_bytes: int = 1 << 28
    pictures: bool = True


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
    """Reads the images of `inputs` and writes a shard set to the new folder `output`.

    Args:
      inputs: folders, glob patterns, image files, zip or tar files (see `inputs.list_sources`).
      output: must not exist, unless it is the finished result of the very same request (which is then returned). It
        may lie inside an input; it is never taken for one.
      config: filters and sizes.
      workers: processes that decode; 0 or 1 works in this process; None takes one per core. No effect on the result.
      progress: show progress bars with rate and time left on stderr.

    Raises:
      InputError: an input is missing or holds no usable image, the output is in the way or cannot be written, or a
        worker died.
    """
    output = local_path(output, "output")
    if not inputs:
        raise InputError("no input given: pass --input=DIR")
    if config.encoding not in ENCODINGS:
        raise InputError(f"encoding {config.encoding!r} is unknown: choose {' or '.join(ENCODINGS)}")
    work = output + ".partial"
    listing = list_sources(inputs, without=(output, work))
    if not listing.sources:
        raise InputError(_nothing_kept(listing, listing.rejections))
    plan = _plan_digest(listing, config)
    finished = _finished_report(output, plan)
    if finished is not None:
        shutil.rmtree(work, ignore_errors=True)
        return finished
    with writing(output):
        os.makedirs(work, exist_ok=True)
        with _lock(work):
            _start_or_resume(work, plan)
            manifest = _fill(work, listing, plan, config, workers, progress)
            os.rename(os.path.join(work, "result"), output)
    shutil.rmtree(work, ignore_errors=True)
    return _report(output, manifest)


def _fill(
    work: str, listing: Listing, plan: str, config: PrepareConfig, workers: int | None, progress: bool
) -> Manifest:
    """Makes everything of the output in `work`/result from the parts, those that an interrupted run left included."""
    started = time.monotonic()
    parts = split_into_parts(listing.sources, PART_SIZE)
    _examine_all(work, parts, config, workers, progress)
    collection = collect(os.path.join(work, "parts"), len(parts))
    rejections = [*listing.rejections, *collection.rejections]
    if not collection.candidates:
        shutil.rmtree(work)
        raise InputError(_nothing_kept(listing, rejections))
    kept, duplicates = _remove_duplicates(collection, config.duplicates, progress)
    result = os.path.join(work, "result")
    shutil.rmtree(result, ignore_errors=True)
    os.makedirs(result)

    def stored() -> Iterator[bytes]:
        for example in collection.stored(kept):
            yield example
            bar.update(1)

    with progress_bar("writing", len(kept), "image", active=progress) as bar:
        split = write_split(result, "train", stored(), config.shard_bytes)
    return write_results(
        result,
        listing,
        collection,
        kept,
        [*rejections, *duplicates],
        split,
        settings={"plan": plan, "config": dataclasses.asdict(config)},
        pictures=config.pictures,
        seconds=time.monotonic() - started,
    )


def _report(output: str, manifest: Manifest) -> Report:
    rejected = dict(manifest.settings["rejected"])
    return Report(output, manifest.count + sum(rejected.values()), manifest.count, rejected, manifest)


def _plan_digest(listing: Listing, config: PrepareConfig) -> str:
    """Digest of everything that the result depends on: settings, found files with their sizes and dates."""
    digest = hashlib.sha256(json.dumps([_WORK_VERSION, dataclasses.asdict(config)], sort_keys=True).encode())
    for source in listing.sources:
        digest.update(json.dumps(dataclasses.astuple(source)).encode())
    return digest.hexdigest()


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
            return _report(output, manifest)
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
    plan_file, parts = os.path.join(work, PLAN_NAME), os.path.join(work, "parts")
    known = None
    with contextlib.suppress(FileNotFoundError), open(plan_file) as file:
        known = file.read()
    if known != plan:
        shutil.rmtree(parts, ignore_errors=True)
        with atomic_write(plan_file) as path:
            path.write_text(plan)
    os.makedirs(parts, exist_ok=True)


def _examine_all(
    work: str, parts: Sequence[Sequence[Source]], config: PrepareConfig, workers: int | None, progress: bool
) -> None:
    """Examines the parts that are not done yet."""
    folder = os.path.join(work, "parts")
    done = {number for number in range(len(parts)) if os.path.exists(rows_path(folder, number))}
    tasks = [
        (folder, number, part, config.filters, config.encoding)
        for number, part in enumerate(parts)
        if number not in done
    ]
    finished_files = sum(len(parts[number]) for number in done)
    with (
        worker_pool(workers, len(tasks)) as run_all,
        progress_bar("examining", sum(map(len, parts)), "file", finished_files, progress) as bar,
    ):
        for examined in run_all(examine_part, tasks):
            bar.update(examined)


def _nothing_kept(listing: Listing, rejections: Sequence[Rejection]) -> str:
    if not rejections:
        return f"no files below {', '.join(listing.inputs)}: check --input"
    reasons = Counter(rejection.reason for rejection in rejections).most_common(3)
    listed = ", ".join(f"{reason} {count}" for reason, count in reasons)
    return f"none of the {len(rejections)} files below {', '.join(listing.inputs)} is usable ({listed}): check --input"


def _remove_duplicates(
    collection: Collection, rule: DuplicateRule, progress: bool
) -> tuple[list[int], list[Rejection]]:
    """Returns the indices of the kept candidates, and a row for each removed one."""
    candidates = collection.candidates
    rows: dict[int, Rejection] = {}
    if rule.exact:
        for found in find_exact_duplicates([candidate.content for candidate in candidates]):
            anchor = candidates[found.anchor].key
            rows[found.index] = Rejection(candidates[found.index].key, "exact_duplicate", "equal pixels", anchor)
    if rule.near:
        distinct = _by_quality(collection, rows)
        with progress_bar("comparing", len(distinct), "image", active=progress) as bar:
            near = find_near_duplicates(collection.codes[distinct], collection.features[distinct], rule, bar.update)
        for found in near:
            index, anchor = int(distinct[found.index]), candidates[distinct[found.anchor]].key
            detail = f"similarity {found.similarity:.3f}"
            rows[index] = Rejection(candidates[index].key, "near_duplicate", detail, anchor)
    rows = _with_kept_anchors(rows)
    return [index for index in range(len(candidates)) if index not in rows], [rows[index] for index in sorted(rows)]


def _by_quality(collection: Collection, removed: Container[int]) -> np.ndarray:
    """The candidates that are left, best first: of a scene, the deepest and largest image is to be the anchor."""
    candidates = collection.candidates
    left = [index for index in range(len(candidates)) if index not in removed]
    left.sort(key=lambda index: (-candidates[index].bit_depth, -candidates[index].height * candidates[index].width))
    return np.array(left, np.intp)


def _with_kept_anchors(rows: dict[int, Rejection]) -> dict[int, Rejection]:
    """Names the kept anchor where an exact duplicate's first image was itself removed as a near-duplicate."""
    anchors = {row.key: row.anchor for row in rows.values()}
    return {
        index: dataclasses.replace(
            row, anchor=anchors[row.anchor], detail=f"equal pixels to {row.anchor}, a near-duplicate"
        )
        if row.anchor in anchors
        else row
        for index, row in rows.items()
    }

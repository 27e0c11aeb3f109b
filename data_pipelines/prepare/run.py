"""From inputs to a finished shard set.

Work happens in `SHARDS.partial` beside the output, which is moved into place when everything is there; meanwhile it
takes about the disk space of the images once more. A run that was killed continues from the parts it
finished. The shards are the same for any number of workers and of kills.
"""

import contextlib
import dataclasses
import fcntl
import hashlib
import json
import os
import shutil
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path

from data_pipelines.commands import progress_bar
from data_pipelines.errors import InputError
from data_pipelines.files import PLAN_NAME, atomic_write, is_free, local_path, writing
from data_pipelines.prepare.archives import Rejection
from data_pipelines.prepare.collect import ROWS, Collection, examine_part, part_path
from data_pipelines.prepare.curate import Filters
from data_pipelines.prepare.duplicates import DuplicateRule, find_near_duplicates
from data_pipelines.prepare.inputs import Listing, list_sources, split_into_parts
from data_pipelines.prepare.results import draw_pictures, write_rejected, write_report, write_set_manifest
from data_pipelines.shards import Manifest, read_manifest, write_split
from data_pipelines.workers import run_all

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


def prepare(
    inputs: Sequence[str | os.PathLike],
    output: str | os.PathLike,
    config: PrepareConfig = PrepareConfig(),
    workers: int | None = None,
) -> Manifest:
    """Reads the images of `inputs` and writes a shard set to the new folder `output`.

    Args:
      inputs: folders, glob patterns, image files, zip or tar files (see `inputs.list_sources`).
      output: must not exist, unless it is the finished result of the very same request (which is then returned). It
        may lie inside an input; it is never taken for one.
      config: filters and sizes.
      workers: processes that decode; 0 or 1 works in this process; None takes one per core. No effect on the result.

    Returns:
      The manifest of the set; its settings count the files that are not in it by reason, as `rejected`.

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
    if (manifest := _finished(output, plan)) is None:
        with writing(output), _work_folder(work, plan):
            manifest = _fill(work, listing, plan, config, workers)
            os.rename(os.path.join(work, "result"), output)
    shutil.rmtree(work, ignore_errors=True)
    return manifest


def _fill(work: str, listing: Listing, plan: str, config: PrepareConfig, workers: int | None) -> Manifest:
    """Makes everything of the output in `work`/result from the parts, those that an interrupted run left included."""
    parts, folder = split_into_parts(listing.sources), os.path.join(work, "parts")
    tasks = [
        (folder, number, part, config.filters, config.encoding)
        for number, part in enumerate(parts)
        if not os.path.exists(part_path(folder, number, ROWS))
    ]
    total, left = len(listing.sources), sum(len(part) for _, _, part, _, _ in tasks)
    with progress_bar("examining", total, "file", total - left) as bar:
        for examined in run_all(workers, examine_part, tasks):
            bar.update(examined)
    collection = Collection(folder, len(parts))
    rejections = [*listing.rejections, *collection.rejections]
    if not collection.candidates:
        shutil.rmtree(work)
        raise InputError(_nothing_kept(listing, rejections))
    kept, duplicates = _remove_duplicates(collection, config.duplicates)
    rejections = sorted([*rejections, *duplicates], key=lambda rejection: rejection.key)
    result = os.path.join(work, "result")
    shutil.rmtree(result, ignore_errors=True)
    os.makedirs(result)

    def stored() -> Iterator[bytes]:
        for example in collection.stored(kept):
            yield example
            bar.update(1)

    with progress_bar("writing", len(kept), "image") as bar:
        splits = {"train": write_split(result, "train", stored(), config.shard_bytes)}
    rejected = write_rejected(result, rejections)
    settings = {"plan": plan, "config": dataclasses.asdict(config), "rejected": rejected}
    write_report(result, collection, len(kept), rejections, settings)
    if config.pictures:
        draw_pictures(result, listing, collection, kept, rejections)
    return write_set_manifest(result, [collection.candidates[index] for index in kept], splits, {}, settings)


def _plan_digest(listing: Listing, config: PrepareConfig) -> str:
    """Digest of everything that the result depends on: settings, found files with their sizes and dates."""
    digest = hashlib.sha256(json.dumps([_WORK_VERSION, dataclasses.asdict(config)], sort_keys=True).encode())
    for source in listing.sources:
        digest.update(json.dumps(dataclasses.astuple(source)).encode())
    return digest.hexdigest()


def _finished(output: str, plan: str) -> Manifest | None:
    """The manifest of a finished `output`, if it is the result of this very request; None if there is no output."""
    if is_free(output):
        return None
    with contextlib.suppress(InputError):
        manifest = read_manifest(output)
        if manifest.settings.get("plan") == plan:
            return manifest
    raise InputError(
        f"output {output} exists already and was made from other files or settings: remove it or choose another"
    )


@contextlib.contextmanager
def _work_folder(work: str, plan: str) -> Iterator[None]:
    """Keeps a second run out of the folder, and in it what an interrupted run of the same request finished.

    The lock goes with the process, however it ends.
    """
    parts, plan_file = os.path.join(work, "parts"), Path(work, PLAN_NAME)
    os.makedirs(parts, exist_ok=True)
    with open(os.path.join(work, "lock"), "w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise InputError(f"another run is writing {work}: wait for it or choose another --output") from None
        if not plan_file.exists() or plan_file.read_text() != plan:
            shutil.rmtree(parts)
            os.makedirs(parts)
            with atomic_write(plan_file) as path:
                path.write_text(plan)
        yield


def _nothing_kept(listing: Listing, rejections: Sequence[Rejection]) -> str:
    if not rejections:
        return f"no files below {', '.join(listing.inputs)}: check --input"
    reasons = Counter(rejection.reason for rejection in rejections).most_common(3)
    listed = ", ".join(f"{reason} {count}" for reason, count in reasons)
    return f"none of the {len(rejections)} files below {', '.join(listing.inputs)} is usable ({listed}): check --input"


def _remove_duplicates(collection: Collection, rule: DuplicateRule) -> tuple[list[int], list[Rejection]]:
    """Returns the indices of the kept candidates, and a row for each removed one."""
    candidates = collection.candidates
    rows: dict[int, Rejection] = {}

    def remove(index: int, anchor: int, reason: str, detail: str) -> None:
        rows[index] = Rejection(candidates[index].key, reason, detail, candidates[anchor].key)

    if rule.exact:
        first: dict[str, int] = {}
        for index, candidate in enumerate(candidates):
            if (anchor := first.setdefault(candidate.content, index)) != index:
                remove(index, anchor, "exact_duplicate", "equal pixels")
    if rule.near:
        distinct = [index for index in range(len(candidates)) if index not in rows]
        # Best first: of a scene, the deepest and largest image is to be the anchor.
        distinct.sort(key=lambda place: (-candidates[place].bit_depth, -candidates[place].pixels))
        near = find_near_duplicates(collection.codes[distinct], collection.features[distinct], rule)
        with progress_bar("comparing", len(distinct), "image") as bar:
            for index, (anchor, similarity) in zip(distinct, near, strict=True):
                bar.update(1)
                if distinct[anchor] != index:
                    remove(index, distinct[anchor], "near_duplicate", f"similarity {similarity:.3f}")
    anchors = {row.key: row.anchor for row in rows.values()}
    for index, row in rows.items():
        if row.anchor in anchors:  # the first of equal images was itself removed as a near-duplicate
            detail = f"equal pixels to {row.anchor}, a near-duplicate"
            rows[index] = dataclasses.replace(row, anchor=anchors[row.anchor], detail=detail)
    return [index for index in range(len(candidates)) if index not in rows], [rows[index] for index in sorted(rows)]

"""Infrared images of any origin -> validated, de-duplicated ArrayRecord shards and a reason for every file left out.

    python -m data_pipelines.prepare --input=DIR [--input='DIR/**/*.tif' --input=FILE.zip ...] --output=SHARDS

List the files, examine them in parallel parts (decode, filter, fingerprint), find the duplicates, write the shards,
then the lists and pictures. Work happens in `SHARDS.partial` beside the output, which is moved into place when
everything is there; meanwhile it takes about the disk space of the images once more. A run that was killed continues
from the parts and shards it finished. The shards are the same for any number of workers and of kills.

With `--dedup_checkpoint=RUN` a near-duplicate must also look alike to an encoder that this project trained. This
package does not know encoders: `prepare` takes a function that embeds images, and only the command below, asked for
such a run, imports the package that makes one.
"""

from __future__ import annotations

import contextlib
import dataclasses
import fcntl
import hashlib
import importlib
import json
import os
import shutil
import sys
import time
from collections import Counter
from collections.abc import Container, Iterator, Sequence
from typing import Any

import numpy as np
from absl import flags
from tqdm import tqdm

from data_pipelines.collection import Collection, Embed, collect, confirm_by_embedding
from data_pipelines.commands import run_command
from data_pipelines.curation import Filters
from data_pipelines.duplicates import DuplicateRule, find_exact_duplicates, find_near_duplicates
from data_pipelines.errors import InputError
from data_pipelines.parts import examine_part, rows_path
from data_pipelines.shards import MANIFEST_NAME, Manifest, Shard, describe_shard, read_manifest, write_shard
from data_pipelines.report import PICTURES_NAME, REPORT_NAME
from data_pipelines.results import REJECTED_NAME, write_results
from data_pipelines.sources import Listing, Rejection, Source, list_sources, split_into_parts
from data_pipelines.workers import RunAll, worker_pool

PART_SIZE = 256
# Changes of what is stored make old partial work unusable.
_WORK_VERSION = 2


@dataclasses.dataclass(frozen=True)
class PrepareConfig:
    """What `prepare` is asked to do, apart from where.

    Attributes:
      filters: what one image must satisfy.
      duplicates: when two images are the same scene.
      dedup_checkpoint: name of the encoder whose features must agree; empty for none.
      dedup_threshold: cosine similarity of that encoder's features above which they agree (0.85: DuGI-MAE).
      shard_bytes: a shard is closed when it holds at least this many bytes.
      pictures: draw contact sheets and histograms.
    """

    filters: Filters = dataclasses.field(default_factory=Filters)
    duplicates: DuplicateRule = dataclasses.field(default_factory=DuplicateRule)
    dedup_checkpoint: str = ""
    dedup_threshold: float = 0.85
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
    embed: Embed | None = None,
) -> Report:
    """Reads the images of `inputs` and writes a shard set to the new folder `output`.

    Args:
      inputs: folders, glob patterns, image files, zip or tar files (see `sources.list_sources`).
      output: must not exist, unless it is the finished result of the very same request (which is then returned).
      config: filters and sizes.
      workers: processes that decode; 0 or 1 works in this process; None takes one a core. No effect on the result.
      progress: show progress bars with rate and time left on stderr.
      embed: list of (H, W) uint8 images -> (n, D) features; near-duplicates must then agree in these too.

    Raises:
      InputError: an input is missing or holds no usable image, the output is in the way, or a worker died.
    """
    output = os.path.abspath(os.fspath(output))
    if not inputs:
        raise InputError("no input given: pass --input=DIR")
    listing = list_sources(inputs)
    if not listing.sources:
        raise InputError(f"no files below {', '.join(listing.inputs)}: check --input")
    plan = _plan_digest(listing, config)
    work = output + ".partial"
    finished = _finished_report(output, plan)
    if finished is not None:
        shutil.rmtree(work, ignore_errors=True)
        return finished
    os.makedirs(work, exist_ok=True)
    with _lock(work):
        _start_or_resume(work, plan)
        manifest = _fill(work, listing, plan, config, workers, progress, embed)
        os.rename(os.path.join(work, "result"), output)
    shutil.rmtree(work, ignore_errors=True)
    return _report(output, manifest)


def _fill(
    work: str,
    listing: Listing,
    plan: str,
    config: PrepareConfig,
    workers: int | None,
    progress: bool,
    embed: Embed | None,
) -> Manifest:
    """Makes everything of the output in `work`/result, starting from what an interrupted run left there."""
    started = time.monotonic()
    parts = split_into_parts(listing.sources, PART_SIZE)
    with worker_pool(workers, len(parts)) as run_all:
        _examine_all(work, parts, config.filters, run_all, progress)
        collection = collect(os.path.join(work, "parts"), len(parts))
        rejections = [*listing.rejections, *collection.rejections]
        if not collection.candidates:
            shutil.rmtree(work)
            raise InputError(_nothing_kept(listing, rejections))
        kept, duplicates = _remove_duplicates(collection, config, embed, progress)
        shards = _write_shards(work, collection, kept, config, run_all, progress)
    return write_results(
        os.path.join(work, "result"),
        listing,
        collection,
        kept,
        [*rejections, *duplicates],
        shards,
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
    plan_file = os.path.join(work, "plan")
    known = None
    with contextlib.suppress(FileNotFoundError), open(plan_file) as file:
        known = file.read()
    if known != plan:
        for name in ("parts", "result"):
            shutil.rmtree(os.path.join(work, name), ignore_errors=True)
        with open(plan_file + ".new", "w") as file:
            file.write(plan)
        os.replace(plan_file + ".new", plan_file)
    for name in ("parts", "result"):
        os.makedirs(os.path.join(work, name), exist_ok=True)


def _examine_all(
    work: str, parts: Sequence[Sequence[Source]], filters: Filters, run_all: RunAll, progress: bool
) -> None:
    """Examines the parts that are not done yet."""
    folder = os.path.join(work, "parts")
    done = {number for number in range(len(parts)) if os.path.exists(rows_path(folder, number))}
    tasks = [(folder, number, part, filters) for number, part in enumerate(parts) if number not in done]
    finished_files = sum(len(parts[number]) for number in done)
    with _bar("examining", "file", sum(map(len, parts)), progress, finished_files) as bar:
        for examined in run_all(examine_part, tasks):
            bar.update(examined)


def _bar(task: str, unit: str, total: int, progress: bool, initial: int = 0) -> tqdm:
    # A log file gets a line every half minute instead of a moving bar.
    interval = 0.2 if sys.stderr.isatty() else 30.0
    return tqdm(
        desc=task, unit=unit, total=total, initial=initial, disable=not progress, mininterval=interval, file=sys.stderr
    )


def _nothing_kept(listing: Listing, rejections: Sequence[Rejection]) -> str:
    reasons = Counter(rejection.reason for rejection in rejections).most_common(3)
    listed = ", ".join(f"{reason} {count}" for reason, count in reasons)
    return f"none of the {len(rejections)} files below {', '.join(listing.inputs)} is usable ({listed}): check --input"


def _remove_duplicates(
    collection: Collection, config: PrepareConfig, embed: Embed | None, progress: bool
) -> tuple[list[int], list[Rejection]]:
    """Returns the indices of the kept candidates, and a row for each removed one."""
    rule, candidates = config.duplicates, collection.candidates
    rows: dict[int, Rejection] = {}
    if rule.exact:
        for found in find_exact_duplicates([candidate.content for candidate in candidates]):
            anchor = candidates[found.anchor].key
            rows[found.index] = Rejection(candidates[found.index].key, "exact_duplicate", "equal pixels", anchor)
    if rule.near:
        distinct = _by_quality(collection, rows)
        confirm = confirm_by_embedding(collection, distinct, embed, config.dedup_threshold) if embed else None
        with _bar("comparing", "image", len(distinct), progress) as bar:
            near = find_near_duplicates(
                collection.codes[distinct], collection.features[distinct], rule, confirm, bar.update
            )
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


def _write_shards(
    work: str,
    collection: Collection,
    kept: Sequence[int],
    config: PrepareConfig,
    run_all: RunAll,
    progress: bool,
) -> list[Shard]:
    """Copies the kept records into shards of about `shard_bytes`; finished shards of an earlier run stay."""
    groups: list[list[int]] = [[]]
    size = 0
    for index in kept:
        if size >= config.shard_bytes:
            groups.append([])
            size = 0
        groups[-1].append(index)
        size += collection.candidates[index].bytes
    tasks = [
        (
            os.path.join(work, "result", f"images-{number:05d}-of-{len(groups):05d}.array_record"),
            collection.picked(group),
        )
        for number, group in enumerate(groups)
    ]
    shards: list[Shard] = []
    with _bar("writing", "image", len(kept), progress) as bar:
        for shard in run_all(_write_one_shard, tasks):
            shards.append(shard)
            bar.update(shard.count)
    return sorted(shards, key=lambda shard: shard.name)


def _write_one_shard(path: str, records: Sequence[bytes]) -> Shard:
    if os.path.exists(path):
        return describe_shard(path, len(records))
    return write_shard(path, records)


def _define_flags() -> None:
    defaults = PrepareConfig()
    filters, rule = defaults.filters, defaults.duplicates
    flags.DEFINE_multi_string("input", [], "Folder, glob pattern, image, zip or tar file; repeat for several.")
    flags.DEFINE_string("output", None, "New folder for the shards.")
    flags.DEFINE_integer("workers", None, "Processes; default one a core, 0 works in this process.", 0)
    flags.DEFINE_integer("min_side", filters.min_side, "Drop images with both sides under this; 0 keeps all.", 0)
    flags.DEFINE_integer("min_levels", filters.min_levels, "Drop images of fewer gray levels; 0 keeps all.", 0)
    flags.DEFINE_bool("crop_borders", filters.crop_borders, "Cut off black borders.")
    flags.DEFINE_integer("max_pixels", filters.max_pixels, "Refuse pictures with more pixels.", 1)
    flags.DEFINE_integer("max_file_bytes", filters.max_file_bytes, "Refuse larger files.", 1)
    flags.DEFINE_bool("exact_duplicates", rule.exact, "Remove images whose pixels equal an earlier one's.")
    flags.DEFINE_bool("near_duplicates", rule.near, "Remove images of the same scene as an earlier one.")
    flags.DEFINE_integer("duplicate_radius", rule.radius, "Bits in which perceptual hashes may differ.", 0, 64)
    flags.DEFINE_float("duplicate_threshold", rule.threshold, "Cosine similarity that makes a near-duplicate.", -1, 1)
    flags.DEFINE_string("dedup_checkpoint", "", "Run whose encoder must find near-duplicates alike, too.")
    flags.DEFINE_float("dedup_threshold", defaults.dedup_threshold, "Cosine similarity for that encoder.", -1, 1)
    flags.DEFINE_integer("shard_bytes", defaults.shard_bytes, "Close a shard at this size.", 1)
    flags.DEFINE_bool("pictures", defaults.pictures, "Draw contact sheets and histograms.")


def _config_from_flags(values: dict[str, Any]) -> PrepareConfig:
    return PrepareConfig(
        filters=Filters(**{field.name: values[field.name] for field in dataclasses.fields(Filters)}),
        duplicates=DuplicateRule(
            exact=values["exact_duplicates"],
            near=values["near_duplicates"],
            radius=values["duplicate_radius"],
            threshold=values["duplicate_threshold"],
        ),
        dedup_checkpoint=values["dedup_checkpoint"],
        dedup_threshold=values["dedup_threshold"],
        shard_bytes=values["shard_bytes"],
        pictures=values["pictures"],
    )


def main(arguments: Sequence[str]) -> None:
    """Runs `prepare` with the command line's flags and prints what became of the files."""
    if len(arguments) > 1:
        raise InputError(f"unexpected argument {arguments[1]!r}: inputs are given as --input=DIR, patterns quoted")
    values = flags.FLAGS.flag_values_dict()
    if not values["output"]:
        raise InputError("no output given: pass --output=SHARDS")
    embed = None
    if values["dedup_checkpoint"]:
        embed = importlib.import_module("infmae_jax.evaluation.embedding").image_embedding(values["dedup_checkpoint"])
    report = prepare(values["input"], values["output"], _config_from_flags(values), values["workers"], embed=embed)
    rejected = ", ".join(f"{reason} {count}" for reason, count in report.rejected.items())
    print(f"found {report.found} files, kept {report.kept}" + (f", rejected {rejected}" if rejected else ""))
    print(f"shards: {report.output} ({MANIFEST_NAME}, {REJECTED_NAME}, {REPORT_NAME}, {PICTURES_NAME}/)")
    print(f"next: python -m data_pipelines.inspect {report.output}")


if __name__ == "__main__":
    _define_flags()
    run_command(main)

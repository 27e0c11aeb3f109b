"""Builds a data set and makes it readable by this project's pipeline: `manifest.json` beside the shards of TFDS.

The version folder (`DATA_DIR/NAME/CONFIG/VERSION`) then is a shard set like those of `data_pipelines.prepare`: name it
in `data.shards`, or open it with `tfds.builder_from_directory` or `tfds.data_source`.
"""

from __future__ import annotations

import csv
import dataclasses
import os
import tempfile
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import tensorflow_datasets as tfds
from array_record.python import array_record_data_source

from data_pipelines.builders.common import InfraredBuilder, examine
from data_pipelines.builders.image_folder import ImageFolder
from data_pipelines.decode import ImageRefused, decode_record_pixels
from data_pipelines.errors import InputError
from data_pipelines.intensity import to_uint8
from data_pipelines.records import (
    MANIFEST_NAME,
    Manifest,
    decode_record,
    describe_shard,
    fingerprint_shards,
    read_manifest,
    write_manifest,
)
from data_pipelines.sources import Rejection, SourceReader, SourceUnreadable

REJECTED_NAME = "rejected.csv"


@dataclasses.dataclass(frozen=True)
class Built:
    """A built data set: its version folder, images a split, files left out (reason -> count)."""

    folder: Path
    counts: dict[str, int]
    rejected: dict[str, int]


def build(
    name: str,
    data_dir: str | os.PathLike,
    source: str | os.PathLike | None = None,
    *,
    beam_options: Sequence[str] | None = None,
    shards: int | None = None,
    split: str = "train",
    **builder_options: Any,
) -> Built:
    """Builds a registered data set.

    Args:
      name: of the builder, with its config if it has several: "image_folder", "image_folder/gray16".
      data_dir: TFDS data folder; the set goes below it.
      source: folder of the user's files (`manual_dir`); None for builders that need none.
      beam_options: build with Apache Beam and these pipeline options, for example ["runner=DirectRunner"]; None builds
        in this process.
      shards: shards a split; None leaves it to TFDS (by size).
      split: the split that the pipeline reads.
      **builder_options: for the builder, for example `config`.

    Returns:
      What was built, or was there already from the same source.

    Raises:
      InputError: no such builder, unusable files, or a set made from other files is in the way.
    """
    if source is not None and not Path(source).is_dir():
        raise InputError(f"{source} is not a folder: give the folder of your files or archives")
    if beam_options is not None:
        _require_beam()
    try:
        builder = tfds.builder(name, data_dir=data_dir, beam=beam_options is not None, **builder_options)
    except (tfds.core.DatasetNotFoundError, ValueError) as error:
        raise InputError(f"data set {name!r} is unknown: {str(error).splitlines()[0]}") from error
    needs_source = builder.MANUAL_DOWNLOAD_INSTRUCTIONS is not None
    if needs_source != (source is not None):
        raise InputError(f"data set {name} {'needs' if needs_source else 'takes no'} folder of files (--input)")
    if needs_source and not any(Path(source).iterdir()):
        raise InputError(f"{source} is empty: put your files there")
    folder = Path(builder.data_dir)
    settings = {"builder": builder.info.full_name, "split": split, "source": source and str(Path(source).resolve())}
    finished = _finished(folder, settings)
    if finished is None:
        _generate(builder, source, beam_options, shards)
        if split not in builder.info.splits:
            raise InputError(f"{folder} has no split {split}: choose one of {', '.join(builder.info.splits)}")
        rejections = _rejections(builder, Path(source)) if isinstance(builder, ImageFolder) else []
        rejected = dict(Counter(rejection.reason for rejection in rejections).most_common())
        _write_rejected(folder, rejections)
        write_manifest(folder, describe_split(folder, builder.info.splits[split], {**settings, "rejected": rejected}))
        finished = rejected
    counts = {name: info.num_examples for name, info in builder.info.splits.items()}
    return Built(folder, counts, finished)


def describe_split(folder: Path, info: tfds.core.SplitInfo, settings: dict[str, Any]) -> Manifest:
    """The manifest of one split of a built set, from a pass over its images."""
    shards = [
        describe_shard(path, count) for path, count in zip(info.filepaths, info.shard_lengths, strict=True) if count
    ]
    source = array_record_data_source.ArrayRecordDataSource([os.fspath(folder / shard.name) for shard in shards])
    sizes, depths = Counter(), Counter()
    total, entropies = np.zeros(256, np.int64), []
    for index in range(len(source)):
        record = decode_record(source[index])
        histogram = np.bincount(to_uint8(decode_record_pixels(record)).ravel(), minlength=256)
        share = histogram[histogram > 0] / histogram.sum()
        entropies.append(float(-(share * np.log2(share)).sum()))
        total += histogram
        sizes[f"{record.width}x{record.height}"] += 1
        depths[str(record.bit_depth)] += 1
    levels = np.arange(256) / 255
    mean = float(total @ levels / total.sum())
    variance = float(total @ levels**2 / total.sum() - mean**2)
    return Manifest(
        count=info.num_examples,
        shards=tuple(shards),
        sizes=dict(sizes),
        bit_depths=dict(depths),
        mean=mean,
        std=max(variance, 0.0) ** 0.5,
        entropy=float(np.mean(entropies)),
        fingerprint=fingerprint_shards(shards),
        settings=settings,
    )


def _require_beam() -> None:
    try:
        import apache_beam  # noqa: F401
    except ImportError as error:
        raise InputError("Apache Beam is not installed: pip install 'infmae-jax[beam]'") from error


def _finished(folder: Path, settings: dict[str, Any]) -> dict[str, int] | None:
    """Reason -> count of a set that is there already; None if there is none.

    Raises:
      InputError: it was made from something else.
    """
    if not (folder / MANIFEST_NAME).exists():
        return None
    made = dict(read_manifest(folder).settings)
    rejected = made.pop("rejected", {})
    if made != settings:
        raise InputError(
            f"{folder} was made from {made.get('source')}, split {made.get('split')}: choose another --data_dir"
        )
    return rejected


def _generate(
    builder: InfraredBuilder, source: str | os.PathLike | None, beam_options: Sequence[str] | None, shards: int | None
) -> None:
    config = tfds.download.DownloadConfig(manual_dir=source, num_shards=shards)
    if beam_options is not None:
        from apache_beam.options.pipeline_options import PipelineOptions

        options = PipelineOptions(flags=[f"--{option}" for option in beam_options])
        config = dataclasses.replace(config, beam_options=options)
    try:
        # Nothing is downloaded, yet TFDS wants a place for it: not one that stays in the user's data folder.
        with tempfile.TemporaryDirectory() as downloads:
            builder.download_and_prepare(download_dir=downloads, download_config=config)
    except Exception as error:
        mistake = _input_error(error)
        raise error if mistake is None else mistake from error


def _input_error(error: BaseException | None) -> InputError | None:
    """The user's mistake in a chain of exceptions: TFDS and Beam raise their own around it."""
    while error is not None:
        if isinstance(error, InputError):
            return error
        error = error.__cause__ or error.__context__
    return None


def _rejections(builder: ImageFolder, source: Path) -> list[Rejection]:
    """Why each file of the source that is not in the built set is not."""
    rejections = []
    for split, listing in builder.listings(source).items():
        kept = {example["key"].decode() for example in builder.as_data_source(split, decoders=_NO_IMAGES)}
        rejections += listing.rejections
        with SourceReader() as reader:
            for item in listing.sources:
                if item.key in kept:
                    continue
                try:
                    examine(reader, item, builder.filters, builder.builder_config.bit_depth)
                    rejections.append(Rejection(item.key, "changed", "usable now, was not when the set was built"))
                except (SourceUnreadable, ImageRefused) as refusal:
                    rejections.append(Rejection(item.key, refusal.reason, refusal.detail))
    return rejections


def _write_rejected(folder: Path, rejections: Sequence[Rejection]) -> None:
    with open(folder / REJECTED_NAME, "w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(("path", "reason", "detail"))
        writer.writerows(dataclasses.astuple(rejection) for rejection in sorted(rejections, key=lambda row: row.key))


_NO_IMAGES = {"image": tfds.decode.SkipDecoding()}

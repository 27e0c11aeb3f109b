"""The files beside the shards: the manifest, the list of rejected files, the report and its pictures."""

from __future__ import annotations

import csv
import dataclasses
import os
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from data_pipelines.collection import Collection
from data_pipelines.decode import ImageRefused, decode_image
from data_pipelines.parts import Candidate
from data_pipelines.shards import Manifest, Shard, fingerprint_splits, make_split, write_manifest
from data_pipelines.report import (
    PICTURES_NAME,
    Tile,
    duplicate_figures,
    spread,
    write_contact_sheet,
    write_histograms,
    write_report,
)
from data_pipelines.sources import Listing, Rejection, Source, SourceReader, SourceUnreadable

REJECTED_NAME = "rejected.csv"

# A picture is drawn from the file again; larger ones are not worth the memory.
_MAX_SHEET_FILE_BYTES = 1 << 26


def write_results(
    folder: str,
    listing: Listing,
    collection: Collection,
    kept: Sequence[int],
    rejections: Sequence[Rejection],
    shards: Sequence[Shard],
    settings: Mapping[str, Any],
    pictures: bool,
    seconds: float,
) -> Manifest:
    """Writes everything but the shards into `folder`, the manifest last, and returns the manifest.

    Args:
      folder: where the shards are.
      listing: the found files.
      collection: the examined files.
      kept: indices of the kept candidates.
      rejections: every file that is not kept.
      shards: the shards in order.
      settings: stored in the manifest; the counts of rejected files are added.
      pictures: draw contact sheets and histograms.
      seconds: duration of this run so far.
    """
    rejections = sorted(rejections, key=lambda rejection: rejection.key)
    rejected = dict(Counter(rejection.reason for rejection in rejections).most_common())
    images = [collection.candidates[index] for index in kept]
    manifest = describe_set(images, shards, {**settings, "rejected": rejected})
    with open(os.path.join(folder, REJECTED_NAME), "w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(("path", "reason", "detail", "anchor"))
        writer.writerows(dataclasses.astuple(rejection) for rejection in rejections)
    if pictures:
        _draw_pictures(os.path.join(folder, PICTURES_NAME), listing, collection, kept, rejections)
    write_report(
        folder,
        {
            "found": len(images) + len(rejections),
            "kept": len(images),
            "rejected": rejected,
            "kinds_before_duplicates": dict(sorted(collection.kinds.items())),
            "duplicates": duplicate_figures(rejections),
            "sizes": dict(manifest.sizes),
            "bit_depths": dict(manifest.bit_depths),
            "mean": manifest.mean,
            "std": manifest.std,
            "entropy": manifest.entropy,
            "seconds_of_last_run": round(seconds, 2),
            "settings": dict(settings),
        },
    )
    write_manifest(folder, manifest)
    return manifest


def describe_set(kept: Sequence[Candidate], shards: Sequence[Shard], settings: dict[str, Any]) -> Manifest:
    """Returns the manifest of the kept images: counts, sizes, and statistics under the default intensity mapping."""
    pixels = sum(image.height * image.width for image in kept)
    mean = sum(image.pixel_sum for image in kept) / pixels
    variance = sum(image.pixel_square_sum for image in kept) / pixels - mean**2
    splits = {"train": make_split(shards)}
    return Manifest(
        splits=splits,
        classes={},
        sizes=dict(Counter(f"{image.width}x{image.height}" for image in kept)),
        bit_depths=dict(Counter(str(image.bit_depth) for image in kept)),
        mean=mean,
        std=max(variance, 0.0) ** 0.5,
        entropy=sum(image.entropy for image in kept) / len(kept),
        fingerprint=fingerprint_splits(splits),
        settings=settings,
    )


def _draw_pictures(
    folder: str, listing: Listing, collection: Collection, kept: Sequence[int], rejections: Sequence[Rejection]
) -> None:
    """Draws a sheet of kept images, one for each reason of rejection, and the histograms."""
    index_of = {candidate.key: index for index, candidate in enumerate(collection.candidates)}
    tiles = []
    for index in spread(kept):
        image = collection.candidates[index]
        facts = f"{image.width}x{image.height}, {image.bit_depth} bit, H {image.entropy:.1f}"
        tiles.append(Tile((collection.pixels(index),), (image.key,), facts))
    write_contact_sheet(
        os.path.join(folder, "kept.png"), f"kept: {len(kept)} images (H: entropy of the gray levels, bit)", tiles
    )

    by_reason: dict[str, list[Rejection]] = {}
    for rejection in rejections:
        by_reason.setdefault(rejection.reason, []).append(rejection)
    for reason, group in by_reason.items():
        path = os.path.join(folder, f"rejected_{reason}.png")
        if group[0].anchor:
            # The least similar first: the ones that a person should judge the threshold by.
            doubtful = sorted(group, key=lambda rejection: (rejection.detail, rejection.key))[:24]
            pairs = [_duplicate_tile(collection, index_of, rejection) for rejection in doubtful]
            title = f"{reason}: {len(group)} images, the least similar first; kept anchor left, removed image right"
            write_contact_sheet(path, title, pairs)
        else:
            write_contact_sheet(path, f"{reason}: {len(group)} files", _source_tiles(listing, spread(group)))

    is_kept = np.zeros(len(collection.candidates), bool)
    is_kept[np.asarray(kept, np.intp)] = True
    removed = [candidate for candidate, keep in zip(collection.candidates, is_kept, strict=True) if not keep]
    images = [collection.candidates[index] for index in kept]
    write_histograms(os.path.join(folder, "histograms.png"), images, removed)


def _duplicate_tile(collection: Collection, index_of: Mapping[str, int], rejection: Rejection) -> Tile:
    images = tuple(collection.pixels(index_of[key]) for key in (rejection.anchor, rejection.key))
    return Tile(images, (rejection.anchor, rejection.key), rejection.detail)


def _source_tiles(listing: Listing, rejections: Sequence[Rejection]) -> list[Tile]:
    """Tiles of rejected files, with their pictures where they have one."""
    sources = {source.key: source for source in listing.sources}
    tiles = []
    for rejection in sorted(rejections, key=lambda item: _reading_order(sources.get(item.key))):
        image = None
        source = sources.get(rejection.key)
        if source is not None and not source.sequential:
            try:
                with SourceReader() as reader:
                    image = decode_image(reader.read(source, _MAX_SHEET_FILE_BYTES)).pixels
            except (ImageRefused, SourceUnreadable):
                pass
        tiles.append(Tile((image,), (rejection.key,), rejection.detail))
    return tiles


def _reading_order(source: Source | None) -> tuple[str, int]:
    return (source.path, source.position) if source is not None else ("", 0)

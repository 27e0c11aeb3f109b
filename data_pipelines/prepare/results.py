"""The files beside the shards: manifest, rejected.csv, report.json, contact sheets, histograms."""

import dataclasses
import json
import os
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from PIL import Image

from data_pipelines.decode import ImageRefused, decode_image
from data_pipelines.files import atomic_write, write_csv
from data_pipelines.intensity import Intensity
from data_pipelines.prepare.archives import Rejection, Source, SourceReader
from data_pipelines.prepare.collect import Candidate, Collection
from data_pipelines.prepare.inputs import Listing
from data_pipelines.shards import Manifest, Split, fingerprint_splits, write_manifest
from data_pipelines.sheets import Tile, draw_sheet, spread

REJECTED_NAME = "rejected.csv"
REPORT_NAME = "report.json"
PICTURES_NAME = "pictures"

# A picture is drawn from the file again; larger ones are not worth the memory.
_MAX_SHEET_FILE_BYTES = 1 << 26
_TILE = (150, 122)
_CAPTION_CHARACTERS = 25
_COLUMNS, _MAX_TILES = 8, 48


def write_report(
    folder: str, collection: Collection, kept: int, rejections: Sequence[Rejection], settings: Mapping[str, Any]
) -> None:
    """Writes how many files were kept and left out, why, of what kinds, and how large the groups of duplicates are."""
    scenes = Counter(rejection.anchor for rejection in rejections if rejection.anchor)
    largest = max(scenes.values(), default=0)
    report = {
        "found": kept + len(rejections),
        "kept": kept,
        "kinds_before_duplicates": dict(sorted(collection.kinds.items())),
        "duplicates": {"removed": scenes.total(), "scenes": len(scenes), "largest_scene": largest},
        **settings,
    }
    with atomic_write(os.path.join(folder, REPORT_NAME)) as path:
        path.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")


def write_rejected(folder: str | os.PathLike, rejections: Sequence[Rejection]) -> dict[str, int]:
    """Writes the list of files left out: path, reason, detail, anchor. Returns reason -> count, most first."""
    header = "path", "reason", "detail", "anchor"
    write_csv(os.path.join(folder, REJECTED_NAME), header, map(dataclasses.astuple, rejections))
    return dict(Counter(rejection.reason for rejection in rejections).most_common())


def write_set_manifest(
    folder: str | os.PathLike,
    images: Sequence[Candidate],
    splits: Mapping[str, Split],
    classes: Mapping[str, Sequence[str]],
    settings: Mapping[str, Any],
) -> Manifest:
    """Writes and returns a set's manifest: counts, sizes, statistics of its images under the default mapping."""
    pixels = max(sum(image.pixels for image in images), 1)
    mean = sum(image.pixel_sum for image in images) / pixels
    variance = sum(image.pixel_square_sum for image in images) / pixels - mean**2
    manifest = Manifest(
        splits=splits,
        classes={name: tuple(names) for name, names in classes.items()},
        sizes=dict(Counter(f"{image.width}x{image.height}" for image in images)),
        bit_depths=dict(Counter(str(image.bit_depth) for image in images)),
        mean=mean,
        std=max(variance, 0.0) ** 0.5,
        entropy=sum(image.entropy for image in images) / max(len(images), 1),
        fingerprint=fingerprint_splits(splits),
        settings=settings,
    )
    write_manifest(folder, manifest)
    return manifest


def draw_pictures(
    folder: str, listing: Listing, collection: Collection, kept: Sequence[int], rejections: Sequence[Rejection]
) -> None:
    """Draws a sheet of kept images, one for each reason of rejection, and the histograms."""
    folder = os.path.join(folder, PICTURES_NAME)
    os.makedirs(folder)
    images = [collection.candidates[index] for index in kept]
    size = "{0.width}x{0.height}, {0.bit_depth} bit, H {0.entropy:.1f}"
    shown = [(image.key, size.format(image)) for image in spread(images, _MAX_TILES)]
    # Name of each sheet -> its title, key and note of each of its pictures.
    sheets = {"kept": (f"kept: {len(kept)} images (H: entropy of the gray levels, bit)", shown)}
    for reason in sorted({rejection.reason for rejection in rejections}):
        group = [rejection for rejection in rejections if rejection.reason == reason]
        if group[0].anchor:
            title = f"{reason}: {len(group)} images, the least similar first; kept anchor left, removed image right"
            # The least similar first: the ones that a person should judge the threshold by.
            doubtful = sorted(group, key=lambda rejection: (rejection.detail, rejection.key))[: _MAX_TILES // 2]
            shown = [(key, rejection.detail) for rejection in doubtful for key in (rejection.anchor, rejection.key)]
        else:
            title = f"{reason}: {len(group)} files"
            shown = [(rejection.key, rejection.detail) for rejection in spread(group, _MAX_TILES)]
        sheets[f"rejected_{reason}"] = title, shown
    stored = {candidate.key: index for index, candidate in enumerate(collection.candidates)}
    sources = {source.key: source for source in listing.sources}
    with SourceReader() as reader:
        for name, (title, shown) in sheets.items():
            tiles = []
            for key, note in shown:
                found = collection.pixels(stored[key]) if key in stored else _read_again(reader, sources.get(key))
                tiles.append(_tile(found, key, note))
            rows = [tiles[start : start + _COLUMNS] for start in range(0, len(tiles), _COLUMNS)]
            draw_sheet([title], rows).save(os.path.join(folder, f"{name}.png"), optimize=True)
    chosen = set(kept)
    removed = [image for index, image in enumerate(collection.candidates) if index not in chosen]
    _write_histograms(os.path.join(folder, "histograms.png"), images, removed)


def _read_again(reader: SourceReader, source: Source | None) -> np.ndarray | None:
    """The picture of a rejected file, where it has one that is quickly read."""
    if source is None or source.sequential:
        return None
    try:
        return decode_image(reader.read(source, _MAX_SHEET_FILE_BYTES)).pixels
    except ImageRefused:
        return None


def _tile(image: np.ndarray | None, path: str, note: str) -> Tile:
    """A picture with the end of its path and the start of a note; dark where nothing could be decoded."""
    tile = Image.new("L", _TILE, 60)
    if image is not None:
        gray = Image.fromarray(np.ascontiguousarray(Intensity().apply(image)))
        gray.thumbnail(_TILE, Image.Resampling.BOX)
        tile.paste(gray)
    shown = path if len(path) <= _CAPTION_CHARACTERS else f"…{path[1 - _CAPTION_CHARACTERS :]}"
    return tile, f"{shown}\n{note[:_CAPTION_CHARACTERS]}"


def _write_histograms(path: str, kept: Sequence[Candidate], removed: Sequence[Candidate]) -> None:
    """Draws the distributions of resolution, mean intensity and entropy, kept images and removed duplicates."""
    from matplotlib.figure import Figure

    measures: dict[str, Callable[[Candidate], float]] = {
        "image side: square root of the pixels, px": lambda image: image.pixels**0.5,
        "mean intensity, 0 black to 1 white": lambda image: image.pixel_sum / image.pixels,
        "entropy of the gray levels, bit": lambda image: image.entropy,
    }
    labels = [f"kept, {len(kept)}", f"removed duplicates, {len(removed)}"]
    figure = Figure(figsize=(13, 3.6), layout="constrained")
    for axes, (name, measure) in zip(figure.subplots(1, 3), measures.items(), strict=True):
        groups = [[measure(image) for image in group] for group in (kept, removed)]
        axes.hist(groups, 40, label=labels, histtype="step", log=True)
        axes.set(xlabel=name, ylabel="images")
        axes.legend(fontsize=8)
    figure.savefig(path, dpi=100)

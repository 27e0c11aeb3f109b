"""The files beside the shards: manifest, rejected.csv, report.json, contact sheets, histograms."""

from __future__ import annotations

import csv
import dataclasses
import json
import os
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from data_pipelines.commands import csv_cell
from data_pipelines.decode import ImageRefused, decode_image
from data_pipelines.files import atomic_write
from data_pipelines.intensity import to_uint8
from data_pipelines.prepare.collect import Candidate, Collection
from data_pipelines.prepare.inputs import Listing, Rejection, Source, SourceReader, SourceUnreadable
from data_pipelines.shards import Manifest, Split, fingerprint_splits, write_manifest

REJECTED_NAME = "rejected.csv"
REPORT_NAME = "report.json"
PICTURES_NAME = "pictures"

# A picture is drawn from the file again; larger ones are not worth the memory.
_MAX_SHEET_FILE_BYTES = 1 << 26
_TILE_WIDTH, _TILE_HEIGHT = 152, 122
_CAPTION_HEIGHT = 28
_GAP = 6
_COLUMNS = 8
_MAX_TILES = 48
_CAPTION_CHARACTERS = 25
_PAGE = (24, 24, 24)
_INK = (230, 230, 230)
_MISSING = (60, 40, 40)


@dataclasses.dataclass(frozen=True)
class Tile:
    """One place on a contact sheet.

    Attributes:
      images: pictures side by side, (H, W) uint8 or uint16, or None where there is none.
      paths: the path under each picture; its end is shown if it is too long.
      note: a line below; its start is shown if it is too long.
    """

    images: tuple[np.ndarray | None, ...]
    paths: tuple[str, ...]
    note: str


def write_results(
    folder: str,
    listing: Listing,
    collection: Collection,
    kept: Sequence[int],
    rejections: Sequence[Rejection],
    split: Split,
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
      split: the written shards, the split "train".
      settings: stored in the manifest; the counts of rejected files are added.
      pictures: draw contact sheets and histograms.
      seconds: duration of this run so far.
    """
    rejections = sorted(rejections, key=lambda rejection: rejection.key)
    rejected = dict(Counter(rejection.reason for rejection in rejections).most_common())
    images = [collection.candidates[index] for index in kept]
    manifest = describe_set(images, {"train": split}, {}, {**settings, "rejected": rejected})
    write_rejected(os.path.join(folder, REJECTED_NAME), rejections)
    if pictures:
        _draw_pictures(os.path.join(folder, PICTURES_NAME), listing, collection, kept, rejections)
    report = {
        "found": len(images) + len(rejections),
        "kept": len(images),
        "rejected": rejected,
        "kinds_before_duplicates": dict(sorted(collection.kinds.items())),
        "duplicates": _duplicate_figures(rejections),
        "sizes": dict(manifest.sizes),
        "bit_depths": dict(manifest.bit_depths),
        "mean": manifest.mean,
        "std": manifest.std,
        "entropy": manifest.entropy,
        "seconds_of_last_run": round(seconds, 2),
        "settings": dict(settings),
    }
    with atomic_write(os.path.join(folder, REPORT_NAME)) as path:
        path.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    write_manifest(folder, manifest)
    return manifest


def write_rejected(path: str | os.PathLike, rejections: Iterable[Rejection]) -> None:
    """Writes the list of files left out: path, reason, detail, anchor."""
    with atomic_write(path) as beside, open(beside, "w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(("path", "reason", "detail", "anchor"))
        writer.writerows(map(csv_cell, dataclasses.astuple(rejection)) for rejection in rejections)


def describe_set(
    images: Sequence[Candidate],
    splits: Mapping[str, Split],
    classes: Mapping[str, Sequence[str]],
    settings: Mapping[str, Any],
) -> Manifest:
    """Returns the manifest of a set: counts, sizes, statistics of its images under the default intensity mapping."""
    pixels = max(sum(image.height * image.width for image in images), 1)
    mean = sum(image.pixel_sum for image in images) / pixels
    variance = sum(image.pixel_square_sum for image in images) / pixels - mean**2
    return Manifest(
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


def _draw_pictures(
    folder: str, listing: Listing, collection: Collection, kept: Sequence[int], rejections: Sequence[Rejection]
) -> None:
    """Draws a sheet of kept images, one for each reason of rejection, and the histograms."""
    index_of = {candidate.key: index for index, candidate in enumerate(collection.candidates)}
    tiles = []
    for index in _spread(kept):
        image = collection.candidates[index]
        facts = f"{image.width}x{image.height}, {image.bit_depth} bit, H {image.entropy:.1f}"
        tiles.append(Tile((collection.pixels(index),), (image.key,), facts))
    _write_contact_sheet(
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
            _write_contact_sheet(path, title, pairs)
        else:
            _write_contact_sheet(path, f"{reason}: {len(group)} files", _source_tiles(listing, _spread(group)))

    is_kept = np.zeros(len(collection.candidates), bool)
    is_kept[np.asarray(kept, np.intp)] = True
    removed = [candidate for candidate, keep in zip(collection.candidates, is_kept, strict=True) if not keep]
    images = [collection.candidates[index] for index in kept]
    _write_histograms(os.path.join(folder, "histograms.png"), images, removed)


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


def _duplicate_figures(rejections: Sequence[Rejection]) -> dict[str, int]:
    """How many images were removed as duplicates, of how many scenes, and the most of one scene."""
    scenes = Counter(rejection.anchor for rejection in rejections if rejection.anchor)
    return {"removed": scenes.total(), "scenes": len(scenes), "largest_scene": max(scenes.values(), default=0)}


def _spread(items: Sequence[Any], count: int = _MAX_TILES) -> list[Any]:
    """At most `count` items, evenly spaced from first to last."""
    if len(items) <= count:
        return list(items)
    return [items[round(i * (len(items) - 1) / (count - 1))] for i in range(count)]


def _write_contact_sheet(path: str, title: str, tiles: Sequence[Tile]) -> None:
    """Draws tiles into one PNG, under a title."""
    side_by_side = max(len(tile.images) for tile in tiles)
    columns = min(_COLUMNS // side_by_side, len(tiles))
    width = side_by_side * _TILE_WIDTH
    rows = -(-len(tiles) // columns)
    page = Image.new(
        "RGB",
        (max(columns * (width + _GAP) + _GAP, 640), _CAPTION_HEIGHT + rows * (_TILE_HEIGHT + _CAPTION_HEIGHT + _GAP)),
        _PAGE,
    )
    draw = ImageDraw.Draw(page)
    draw.text((_GAP, _GAP), title, _INK, font=ImageFont.load_default(15))
    small = ImageFont.load_default(10)
    for place, tile in enumerate(tiles):
        left = _GAP + place % columns * (width + _GAP)
        top = _CAPTION_HEIGHT + place // columns * (_TILE_HEIGHT + _CAPTION_HEIGHT + _GAP)
        below = top + _TILE_HEIGHT + 1
        for position, (image, text) in enumerate(zip(tile.images, tile.paths, strict=True)):
            page.paste(_thumbnail(image), (left + position * _TILE_WIDTH, top))
            shown = text if len(text) <= _CAPTION_CHARACTERS else f"…{text[1 - _CAPTION_CHARACTERS :]}"
            draw.text((left + position * _TILE_WIDTH, below), shown, _INK, font=small)
        limit = _CAPTION_CHARACTERS * side_by_side
        note = tile.note if len(tile.note) <= limit else f"{tile.note[: limit - 1]}…"
        draw.text((left, below + 13), note, _INK, font=small)
    os.makedirs(os.path.dirname(path), exist_ok=True)
    page.save(path, optimize=True)


def _thumbnail(image: np.ndarray | None) -> Image.Image:
    """An image on a tile, its sides in proportion; a dull red tile where nothing could be decoded."""
    tile = Image.new("RGB", (_TILE_WIDTH - 2, _TILE_HEIGHT), _PAGE if image is not None else _MISSING)
    if image is None:
        ImageDraw.Draw(tile).text((8, 8), "no picture", _INK, font=ImageFont.load_default(11))
        return tile
    gray = Image.fromarray(np.ascontiguousarray(to_uint8(image)))
    # The longer side fills the tile, the shorter one keeps at least a pixel.
    scale = min(tile.width / gray.width, tile.height / gray.height)
    size = max(round(gray.width * scale), 1), max(round(gray.height * scale), 1)
    method = Image.Resampling.BOX if scale < 1 else Image.Resampling.NEAREST
    gray = gray.resize(size, method)
    tile.paste(gray, ((tile.width - gray.width) // 2, (tile.height - gray.height) // 2))
    return tile


def _write_histograms(path: str, kept: Sequence[Candidate], removed: Sequence[Candidate]) -> None:
    """Draws the distributions of resolution, mean intensity and entropy, kept images and removed duplicates."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    measures: list[tuple[str, Callable[[Candidate], float]]] = [
        ("image side: square root of the pixels, px", lambda image: (image.height * image.width) ** 0.5),
        ("mean intensity, 0 black to 1 white", lambda image: image.pixel_sum / (image.height * image.width)),
        ("entropy of the gray levels, bit", lambda image: image.entropy),
    ]
    figure = Figure(figsize=(13, 3.6), layout="constrained")
    FigureCanvasAgg(figure)
    for axes, (name, measure) in zip(figure.subplots(1, 3), measures, strict=True):
        groups = [[measure(image) for image in group] for group in (kept, removed)]
        bins = np.histogram_bin_edges(np.concatenate(groups), bins=40)
        axes.hist(groups[0], bins, label=f"kept, {len(kept)}", color="tab:blue")
        if removed:
            axes.hist(groups[1], bins, label=f"removed duplicates, {len(removed)}", color="tab:orange", histtype="step")
        axes.set_xlabel(name)
        axes.set_ylabel("images")
        axes.set_yscale("log")
        axes.legend(fontsize=8)
    os.makedirs(os.path.dirname(path), exist_ok=True)
    figure.savefig(path, dpi=100)

"""What a preparation did, for people: report.json, contact sheets of kept and rejected images, histograms."""

from __future__ import annotations

import dataclasses
import json
import os
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from data_pipelines.intensity import to_uint8
from data_pipelines.parts import Candidate
from data_pipelines.sources import Rejection

REPORT_NAME = "report.json"
PICTURES_NAME = "pictures"

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


def write_report(folder: str, content: Mapping[str, Any]) -> None:
    """Writes report.json."""
    with open(os.path.join(folder, REPORT_NAME), "w", encoding="utf-8") as file:
        json.dump(content, file, indent=1)
        file.write("\n")


def duplicate_figures(rejections: Sequence[Rejection]) -> dict[str, int]:
    """How many images were removed as duplicates, of how many scenes, and the most of one scene."""
    scenes = Counter(rejection.anchor for rejection in rejections if rejection.anchor)
    return {"removed": scenes.total(), "scenes": len(scenes), "largest_scene": max(scenes.values(), default=0)}


def spread(items: Sequence[Any], count: int = _MAX_TILES) -> list[Any]:
    """At most `count` items, evenly spaced from first to last."""
    if len(items) <= count:
        return list(items)
    return [items[round(i * (len(items) - 1) / (count - 1))] for i in range(count)]


def write_contact_sheet(path: str, title: str, tiles: Sequence[Tile]) -> None:
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


def write_histograms(path: str, kept: Sequence[Candidate], removed: Sequence[Candidate]) -> None:
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

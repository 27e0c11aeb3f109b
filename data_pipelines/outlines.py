"""Outlines of objects (COCO polygons or run-length codes) as small masks over their boxes.

Coordinates are pixels of the stored image, (0, 0) the outer corner of the first pixel, as in `transforms.Geometry`.
"""

import json
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from data_pipelines.examples import CorruptExample
from data_pipelines.transforms import Geometry

# Of an outline from a stranger's file, so that none takes long or much memory.
MOST_POINTS, _MOST_PIXELS, _LARGEST = 20_000, 1 << 28, 1e9
_LONGEST_TEXT = 4 << 20
_LONGEST_NUMBER = 12  # groups of five bits
_CORNER = 1.0  # pixels: how near to a corner of the box a point counts as that corner


def outline(text: str, box: np.ndarray) -> list | dict | None:
    """The stored outline of an object, or None where there is none or it is nothing but its box.

    Args:
      text: JSON as in `examples.Objects.segmentations`, "" for none.
      box: (4,) x0, y0, x1, y1.

    Raises:
      CorruptExample: not polygons or a run-length code, or one too large.
    """
    if len(text) > _LONGEST_TEXT:
        raise CorruptExample(f"an outline is a text of {len(text)} characters")
    try:
        found = json.loads(text or "[]")
        if isinstance(found, Mapping):
            if not found["counts"]:
                return None
            _runs(found)
            return found
        polygons = [np.asarray(polygon, np.float64).reshape(-1, 2) for polygon in found]
        if sum(map(len, polygons)) > MOST_POINTS:
            raise CorruptExample(f"an outline has over {MOST_POINTS} points")
        if not all((np.abs(points) < _LARGEST).all() for points in polygons):
            raise ValueError("a point is not finite")
    except (ValueError, TypeError, KeyError, ArithmeticError, RecursionError) as error:
        if isinstance(error, CorruptExample):
            raise
        raise CorruptExample(f"an outline is neither polygons nor a run-length code: {text[:60]}") from error
    if not polygons or (len(polygons) == 1 and _is_box(polygons[0], np.asarray(box, np.float64))):
        return None
    return found


def _is_box(points: np.ndarray, box: np.ndarray) -> bool:
    corners = np.abs(points[:, None, :] - box.reshape(2, 2)).min(axis=1) <= _CORNER
    return len(points) in (4, 5) and bool(corners.all())


def mask_in_box(found: Sequence | Mapping[str, Any], geometry: Geometry, box: np.ndarray, side: int) -> np.ndarray:
    """What of an object's box on the canvas is the object.

    Args:
      found: as from `outline`.
      geometry: how the image came to lie on the canvas.
      box: (4,) x0, y0, x1, y1 on the canvas, clipped.
      side: S; the box is divided into S x S cells.

    Returns:
      (S, S) uint8: 1 where the centre of a cell lies inside (of any of several polygons), else 0.
    """
    shares = (np.arange(side) + 0.5) / side
    places = np.stack([box[0] + shares * (box[2] - box[0]), box[1] + shares * (box[3] - box[1])], axis=-1)
    x, y = geometry.points_back(places).T
    if isinstance(found, Mapping):
        pixels = decode_rle(found)
        rows, columns = (
            np.clip(np.floor(at).astype(int), 0, extent - 1) for at, extent in zip((y, x), pixels.shape, strict=True)
        )
        return pixels[rows[:, None], columns].astype(np.uint8)
    inside = np.zeros((side, side), bool)
    for polygon in found:
        inside |= _inside(np.asarray(polygon, np.float64).reshape(-1, 2), x, y)
    return inside.astype(np.uint8)


def _inside(polygon: np.ndarray, x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """(rows, columns) bool: which points of the grid x, y lie in a polygon, by the even-odd rule."""
    (x0, y0), (x1, y1) = polygon.T, np.roll(polygon, -1, axis=0).T
    crosses = (y0 <= y[:, None]) != (y1 <= y[:, None])
    slope = (x1 - x0) / np.where(y1 == y0, 1.0, y1 - y0)
    at = np.where(crosses, x0 + (y[:, None] - y0) * slope, -np.inf)
    return (at[:, None, :] > x[None, :, None]).sum(axis=-1) % 2 == 1


def decode_rle(code: Mapping[str, Any]) -> np.ndarray:
    """(H, W) bool of COCO's run-length code: runs of 0 and 1 in turn, column by column, as numbers or as text.

    Raises:
      CorruptExample: the runs do not fill the size.
    """
    height, width = map(int, code["size"])
    runs = _runs(code)
    values = np.arange(len(runs)) % 2 == 1
    return np.repeat(values, runs).reshape(width, height).T


def _runs(code: Mapping[str, Any]) -> list[int]:
    """The runs of a code; CorruptExample where they do not fill its size, or it is too large."""
    height, width = map(int, code["size"])
    counts = code["counts"]
    if min(height, width) < 1 or height * width > _MOST_PIXELS:
        raise CorruptExample(f"a run-length code is of {height}x{width} pixels")
    runs = _runs_of_text(counts) if isinstance(counts, str) else [int(count) for count in counts]
    if min(runs, default=0) < 0 or sum(runs) != height * width:
        raise CorruptExample(f"a run-length code of {height}x{width} has {sum(runs)} pixels")
    return runs


def _runs_of_text(text: str) -> list[int]:
    """COCO's compressed code: numbers in groups of five bits, from the fourth on differences to the one two before."""
    runs: list[int] = []
    value = shift = 0
    for character in text:
        group = ord(character) - 48
        value |= (group & 31) << shift
        shift += 5
        if not 0 <= group < 64 or shift > 5 * _LONGEST_NUMBER:
            raise CorruptExample("a run-length code holds other characters or numbers without end")
        if not group & 32:
            if group & 16:
                value -= 1 << shift
            runs.append(value + (runs[-2] if len(runs) > 2 else 0))
            value = shift = 0
    return runs


def encode_rle(mask: np.ndarray) -> dict[str, Any]:
    """COCO's compressed run-length code of a mask, (H, W) bool."""
    changes = np.flatnonzero(np.diff(mask.T.reshape(-1), prepend=False))
    runs = np.diff(changes, prepend=0, append=mask.size).tolist()
    text = []
    for place, run in enumerate(runs):
        value, more = run - (runs[place - 2] if place > 2 else 0), True
        while more:
            group, value = value & 31, value >> 5
            more = value != (-1 if group & 16 else 0)
            text.append(chr(48 + (group | 32 * more)))
    return {"size": list(mask.shape), "counts": "".join(text)}

"""Boxes in images of any size: looked at whole, or by overlapping tiles whose boxes are brought together.

An object on a seam is in two tiles, whole in at most one of them if the overlap is as large as the object. A box that
touches the inner edge of its tile is left out where another tile has more of the same object; what is then still there
twice is removed by non-maximum suppression within each class.
"""

from collections.abc import Callable, Iterable, Iterator
from typing import TypeVar

import numpy as np

from infmae_jax.evaluation.detection import Boxes, pairwise_iou
from infmae_jax.evaluation.windows import BatchSize, Tile, Windows, on_canvases, tiles_of

T = TypeVar("T")
Detect = Callable[[np.ndarray, np.ndarray], list[Boxes]]  # ((N,H,W) uint8, (N,2) int32 true sizes) -> N of Boxes
_AT_SEAM = 2.0  # pixels from the edge of a tile within which a box touches it
_SAME = 0.5  # share of the smaller box inside the other one, from which on they are of one object
_RIVAL = 0.5  # share of a box's score that a box which sees more must have
_OVERLAP = 0.5  # IoU above which the lower of two boxes of a class from different tiles is removed


def detections(
    images: Iterable[T],
    pixels: Callable[[T], np.ndarray],
    detect: Detect,
    windows: Windows,
    batch_size: BatchSize,
    most: int,
) -> Iterator[tuple[T, Boxes]]:
    """Finds the boxes of images, those of one canvas together; their order may change.

    Args:
      images: of any kind.
      pixels: (h,w) uint8 of one.
      detect: of a batch on one canvas.
      windows: size and stride of tiles.
      batch_size: N; what is missing is filled up.
      most: boxes that are kept of an image.

    Yields:
      Each image with its boxes, in its own pixels.
    """
    waiting: dict[int, tuple[T, list[Tile], dict[Tile, Boxes]]] = {}

    def parts() -> Iterator[tuple[int, Tile, np.ndarray]]:
        for number, image in enumerate(images):
            whole = pixels(image)
            tiles = tiles_of(*whole.shape, windows)
            waiting[number] = image, tiles, {}
            for tile in tiles:
                yield number, tile, whole[tile.top : tile.top + tile.height, tile.left : tile.left + tile.width]

    for group, batch, sizes in on_canvases(parts(), lambda part: part[2], batch_size):
        for (number, tile, _), found in zip(group, detect(batch, sizes), strict=False):
            image, tiles, known = waiting[number]
            known[tile] = found
            if len(known) == len(tiles):
                del waiting[number]
                yield image, joined([(tile, known[tile]) for tile in tiles], most)


def joined(parts: list[tuple[Tile, Boxes]], most: int) -> Boxes:
    """The boxes of an image's tiles as those of the image, best first, at most so many."""
    if len(parts) == 1:
        return parts[0][1]
    moved = [found._replace(boxes=found.boxes + np.float32([t.left, t.top, t.left, t.top])) for t, found in parts]
    masks = None if moved[0].masks is None else np.concatenate([found.masks for found in moved])
    whole = Boxes(*(np.concatenate([found[field] for found in moved]) for field in range(3)), masks)
    origin = np.repeat(np.arange(len(parts)), [len(found.boxes) for found in moved])
    height, width = (max(t[axis] + t[axis + 2] for t, _ in parts) for axis in (0, 1))
    cut = [_cut(found.boxes, tile, height, width) for (tile, _), found in zip(parts, moved, strict=True)]
    kept = _kept(whole, origin, np.concatenate(cut))
    return whole.only(kept[np.argsort(-whole.scores[kept], kind="stable")][:most])


def _cut(boxes: np.ndarray, tile: Tile, height: int, width: int) -> np.ndarray:
    """(n,) bool: which boxes, in pixels of the image, touch an edge of their tile that is not one of the image."""
    edges = np.array([tile.left, tile.top, tile.left + tile.width, tile.top + tile.height])
    near = (boxes - edges) * (1, 1, -1, -1) < _AT_SEAM
    return (near & (edges != (0, 0, width, height))).any(axis=1)


def _kept(whole: Boxes, origin: np.ndarray, cut: np.ndarray) -> np.ndarray:
    """Indices of the boxes that stay; `origin`: the number of each box's tile."""
    boxes, scores = whole.boxes.astype(np.float64), whole.scores
    areas = np.prod(boxes[:, 2:] - boxes[:, :2], axis=-1)

    def rivals(place: int) -> np.ndarray:
        return (whole.classes == whole.classes[place]) & (origin != origin[place])

    hidden = np.zeros(len(boxes), bool)
    for place in np.flatnonzero(cut).tolist():
        others = boxes[rivals(place) & (areas > areas[place]) & (scores >= _RIVAL * scores[place])]
        sides = np.minimum(boxes[place, 2:], others[:, 2:]) - np.maximum(boxes[place, :2], others[:, :2])
        hidden[place] = (np.prod(np.maximum(sides, 0), axis=-1) >= _SAME * areas[place]).any()
    kept = np.zeros(len(boxes), bool)
    for place in np.argsort(-scores, kind="stable").tolist():
        others = boxes[rivals(place) & kept]
        kept[place] = not hidden[place] and not (pairwise_iou(boxes[place : place + 1], others) > _OVERLAP).any()
    return np.flatnonzero(kept)

"""Anchors: the boxes that a region proposal network starts from, and sizes for them that suit a data set."""

import itertools
from collections.abc import Sequence

import numpy as np

STRIDES = (4, 8, 16, 32, 64)  # of the pyramid's levels P2 to P6
_MOST_BOXES = 4000  # that sizes are proposed from: more change nothing but the time
_SMALLEST, _LARGEST = 4.0, 64.0  # of the finest level


def level_anchors(rows: int, columns: int, stride: int, size: float, ratios: Sequence[float]) -> np.ndarray:
    """(rows * columns * len(ratios), 4) float32 anchors of one level, in the order row, column, ratio.

    Each has the area size ** 2 and ratio = height / width, with its centre on the cell's first corner, as in
    detectron2.
    """
    widths = size / np.sqrt(np.asarray(ratios, np.float64))
    heights = widths * ratios
    shapes = np.stack([-widths, -heights, widths, heights], axis=-1) / 2
    y, x = np.meshgrid(np.arange(rows) * stride, np.arange(columns) * stride, indexing="ij")
    corners = np.stack([x, y, x, y], axis=-1).reshape(-1, 1, 4)
    return (corners + shapes[None]).reshape(-1, 4).astype(np.float32)


def propose_sizes(boxes: np.ndarray, ratios: Sequence[float] = (0.5, 1.0, 2.0)) -> tuple[float, ...]:
    """One anchor size for each level: the geometric row that overlaps training boxes best on average.

    Infrared objects are small, and the published sizes (32 to 512) leave most of them without any anchor of IoU 0.7.
    A box is compared with the anchors of every level as if it lay a quarter of the level's stride from one in both
    directions, which is the mean: so a coarse level is no use to small boxes, however small its anchors.

    Args:
      boxes: (n,4) x0, y0, x1, y1 in pixels of the training images; empty ones do not count.
      ratios: height / width of the anchors.

    Returns:
      Sizes in pixels, of strides 4 to 64, rounded to whole numbers.

    Raises:
      ValueError: there is no box.
    """
    sides = np.asarray(boxes, np.float64).reshape(-1, 4)
    sides = sides[:, 2:] - sides[:, :2]
    sides = sides[(sides > 0).all(axis=1)]
    if not len(sides):
        raise ValueError("there is no box to propose anchor sizes from; set head.anchor_sizes")
    sides = sides[np.lexsort(sides.T)][:: -(-len(sides) // _MOST_BOXES)]
    rows = []
    for first, factor in itertools.product(np.geomspace(_SMALLEST, _LARGEST, 17), (1.4, 1.6, 1.8, 2.0)):
        sizes = first * factor ** np.arange(len(STRIDES))
        best = np.max([_mean_overlap(sides, *level, ratios) for level in zip(sizes, STRIDES, strict=True)], axis=0)
        rows.append((best.mean(), sizes))
    return tuple(float(max(round(size), 1)) for size in max(rows, key=lambda row: row[0])[1])


def _mean_overlap(sides: np.ndarray, size: float, stride: int, ratios: Sequence[float]) -> np.ndarray:
    """(n,2) widths and heights -> (n,) IoU with the best anchor of a level, a quarter of a stride away."""
    found = []
    for ratio in ratios:
        anchor = np.array([[size / ratio**0.5, size * ratio**0.5]])
        shared = np.minimum(np.minimum(anchor, sides), np.maximum((anchor + sides - stride / 2) / 2, 0)).prod(axis=1)
        found.append(shared / (anchor.prod() + sides.prod(axis=1) - shared))
    return np.max(found, axis=0)

"""Exact and near duplicates: an anchor image for each scene, the others of the scene removed.

InfMAE (Inf30 construction) keeps one anchor per scene; DuGI-MAE calls an image a duplicate of the anchor when the
cosine similarity of their features exceeds 0.85. Here images are taken in an order of preference (see `prepare`: depth,
then size, then listing order); the first of a scene is its anchor, and a later one is removed when, for one anchor,

1. their 64-bit perceptual hashes differ in at most `radius` bits (the cheap test, on every pair), and
2. the cosine similarity of their small-image features exceeds `threshold`.

Images are compared with anchors only, never with removed images, so a slow pan is not swallowed step by step.

The small-image feature is the Laplacian of Gaussian (sigma one cell) of a 16 x 16 thumbnail: gain and offset cancel,
smooth skies do not make two scenes alike, and a crop of 2 % moves it by a third of a cell. It is kept in the basis of
the discrete cosine transform, where the filter is a weight for each coefficient. The threshold of 0.95 was chosen on
pictures of animals in one stall, where the time stamps tell which pairs are one scene: 99 % of copies cropped by 2 %
are above it, and 5 % of the pairs above it are more than a minute apart.

Cost: the hash test is N * A / 2 comparisons for N images and A anchors, quadratic but 3e8 per second and core; the
memory is 8 + 512 bytes per image.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterator, Sequence

import numpy as np
from PIL import Image
from scipy import fft

HASH_SIDE = 8
FEATURE_SIDE = 16
FEATURE_SIZE = FEATURE_SIDE * FEATURE_SIDE

_THUMBNAIL_SIDE = 32
_FEATURE_SIGMA = 1.0  # cells of the 16 x 16 thumbnail
# Sizes at which the comparison's buffers stay in a core's cache.
_IMAGE_BLOCK = 64
_ANCHOR_BLOCK = 8192


@dataclasses.dataclass(frozen=True)
class DuplicateRule:
    """When a later image counts as the same scene as an anchor.

    Attributes:
      exact: remove images whose pixels equal an earlier image's.
      near: remove near-duplicates by the anchor rule at the top of this module.
      radius: largest number of differing bits among the 64 of the perceptual hashes.
      threshold: cosine similarity of the small-image features above which two images are the same scene.
    """

    exact: bool = True
    near: bool = True
    radius: int = 12
    threshold: float = 0.95


@dataclasses.dataclass(frozen=True)
class Duplicate:
    """Image `index` is removed for `anchor` (an earlier index); `similarity` is the cosine, 1.0 for equal pixels."""

    index: int
    anchor: int
    similarity: float


def fingerprint_image(pixels: np.ndarray) -> tuple[np.uint64, np.ndarray]:
    """Returns the perceptual hash and the small-image feature of (H, W) uint8 or uint16 pixels.

    The hash has one bit for each of the 8 x 8 lowest DCT coefficients of a 32 x 32 thumbnail: set where it is above
    their median (the mean's coefficient counts as 0). The feature is (256,) float16 of unit length, or zeros for an
    image without any structure.
    """
    image = Image.fromarray(pixels if pixels.dtype == np.uint8 else pixels.astype(np.float32))
    small = np.asarray(image.resize((_THUMBNAIL_SIDE, _THUMBNAIL_SIDE), Image.Resampling.BOX), np.float32)
    low = fft.dctn(small - small.mean(), norm="ortho")[:HASH_SIDE, :HASH_SIDE].ravel()
    bits = low > np.median(low[1:])
    code = np.packbits(bits, bitorder="little").view("<u8")[0]

    cells = small.reshape(FEATURE_SIDE, 2, FEATURE_SIDE, 2).mean((1, 3))
    feature = (fft.dctn(cells - cells.mean(), norm="ortho") * _laplacian_of_gaussian()).ravel()
    length = float(np.linalg.norm(feature))
    return code, (feature / length if length > 0 else feature).astype(np.float16)


@functools.cache
def _laplacian_of_gaussian() -> np.ndarray:
    """The filter's gain at each DCT frequency: eigenvalue of the grid's Laplacian times a Gaussian's transform."""
    frequency = np.pi * np.arange(FEATURE_SIDE) / FEATURE_SIDE
    laplacian = 2 - 2 * np.cos(frequency)
    gaussian = np.exp(-0.5 * (_FEATURE_SIGMA * frequency) ** 2)
    return ((laplacian[:, None] + laplacian[None, :]) * gaussian[:, None] * gaussian[None, :]).astype(np.float32)


def find_exact_duplicates(contents: Sequence[str]) -> list[Duplicate]:
    """Returns the later ones of equal content digests, each with the first of its kind as anchor."""
    first: dict[str, int] = {}
    found = []
    for index, content in enumerate(contents):
        anchor = first.setdefault(content, index)
        if anchor != index:
            found.append(Duplicate(index, anchor, 1.0))
    return found


def find_near_duplicates(
    codes: np.ndarray,
    features: np.ndarray,
    rule: DuplicateRule,
    on_progress: Callable[[int], None] | None = None,
) -> list[Duplicate]:
    """Applies the anchor rule to images in order.

    Args:
      codes: (N,) uint64 perceptual hashes.
      features: (N, D) unit vectors.
      rule: radius and threshold.
      on_progress: called with the number of images done since the last call.

    Returns:
      The removed images in order. Of several anchors that claim an image, the most similar one is named.
    """
    anchors = np.empty(len(codes), np.intp)
    anchor_codes = np.empty(len(codes), np.uint64)
    count = 0
    found: list[Duplicate] = []
    for start in range(0, len(codes), _IMAGE_BLOCK):
        block = np.arange(start, min(start + _IMAGE_BLOCK, len(codes)))
        earlier = _close_codes(codes[block], anchor_codes[:count], rule.radius)
        # Inside the block every pair is a candidate pair; which of them are anchors is decided in order below.
        rows, columns = _close_pairs(codes[block], codes[block], rule.radius)
        inside = columns < rows
        images = np.concatenate([block[earlier[0]], block[rows[inside]]])
        others = np.concatenate([anchors[earlier[1]], block[columns[inside]]])
        images, others, similarity = _similar_pairs(images, others, features, rule.threshold)
        claims: dict[int, list[tuple[float, int]]] = {}
        for image, other, value in zip(images.tolist(), others.tolist(), similarity.tolist(), strict=True):
            claims.setdefault(image, []).append((value, -other))
        removed: set[int] = set()
        for image in block.tolist():
            valid = [claim for claim in claims.get(image, ()) if -claim[1] not in removed]
            if valid:
                value, other = max(valid)
                found.append(Duplicate(image, -other, value))
                removed.add(image)
            else:
                anchors[count], anchor_codes[count] = image, codes[image]
                count += 1
        if on_progress is not None:
            on_progress(len(block))
    return found


def _close_codes(codes: np.ndarray, anchor_codes: np.ndarray, radius: int) -> tuple[np.ndarray, np.ndarray]:
    """Positions (image, anchor) of all pairs of hashes within `radius`, searched in blocks of anchors."""
    rows, columns = [np.empty(0, np.intp)], [np.empty(0, np.intp)]
    for start in range(0, len(anchor_codes), _ANCHOR_BLOCK):
        row, column = _close_pairs(codes, anchor_codes[start : start + _ANCHOR_BLOCK], radius)
        rows.append(row)
        columns.append(column + start)
    return np.concatenate(rows), np.concatenate(columns)


def _close_pairs(codes: np.ndarray, others: np.ndarray, radius: int) -> tuple[np.ndarray, np.ndarray]:
    difference, bits, close = _buffers()
    size = len(codes) * len(others)
    difference, bits, close = (buffer[:size].reshape(len(codes), len(others)) for buffer in (difference, bits, close))
    np.bitwise_xor(codes[:, None], others[None, :], out=difference)
    np.bitwise_count(difference, out=bits)
    np.less_equal(bits, radius, out=close)
    return np.nonzero(close)


@functools.cache
def _buffers() -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    # Made once: allocating them for every block costs more than the comparison.
    size = _IMAGE_BLOCK * _ANCHOR_BLOCK
    return np.empty(size, np.uint64), np.empty(size, np.uint8), np.empty(size, bool)


def _similar_pairs(
    images: np.ndarray, others: np.ndarray, features: np.ndarray, threshold: float
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The pairs whose features are similar enough, with their similarities."""
    similarity = np.empty(len(images), np.float32)
    for pairs in _slices(len(images)):
        similarity[pairs] = np.einsum(
            "nd,nd->n", features[images[pairs]].astype(np.float32), features[others[pairs]].astype(np.float32)
        )
    np.minimum(similarity, 1.0, out=similarity)  # half-precision vectors are not quite of unit length
    passed = similarity > threshold
    return images[passed], others[passed], similarity[passed]


def _slices(size: int, step: int = 1 << 15) -> Iterator[slice]:
    """Slices that bound the memory for gathered features."""
    return (slice(start, min(start + step, size)) for start in range(0, size, step))

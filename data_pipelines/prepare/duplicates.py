"""Exact and near duplicates: an anchor image for each scene, the others of the scene removed.

InfMAE (Inf30 construction) keeps one anchor per scene; DuGI-MAE calls an image a duplicate of the anchor when the
cosine similarity of their features exceeds 0.85. Here images are taken in an order of preference (see `prepare`: depth,
then size, then listing order); the first of a scene is its anchor, and a later one is removed when, for one anchor,

1. their 64-bit perceptual hashes differ in at most `radius` bits (the cheap test, on every pair), and
2. the cosine similarity of their small-image features exceeds `threshold`.

Images are compared with anchors only, never with removed images, so a slow pan is not swallowed step by step.

The small-image feature is the Laplacian of Gaussian (sigma one cell) of a 16 x 16 thumbnail: gain and offset cancel,
smooth skies do not make two scenes alike, and a crop of 2 % moves it by a third of a cell. The threshold of 0.95 was
chosen on pictures of animals in one stall, where the time stamps tell which pairs are one scene: 99 % of copies cropped
by 2 % are above it, and 5 % of the pairs above it are more than a minute apart.

Cost: the hash test is N * A / 2 comparisons for N images and A anchors, quadratic but 1e9 per second and core; the
memory is 8 + 512 bytes per image.
"""

import dataclasses
from collections.abc import Iterator

import numpy as np
from PIL import Image
from scipy import fft, ndimage

HASH_SIDE = 8
FEATURE_SIDE = 16
FEATURE_SIZE = FEATURE_SIDE * FEATURE_SIDE

_THUMBNAIL_SIDE = 32
_FEATURE_SIGMA = 1.0  # cells of the 16 x 16 thumbnail


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
    feature = ndimage.laplace(ndimage.gaussian_filter(cells - cells.mean(), _FEATURE_SIGMA)).ravel()
    length = float(np.linalg.norm(feature))
    return code, (feature / length if length > 0 else feature).astype(np.float16)


def find_near_duplicates(codes: np.ndarray, features: np.ndarray, rule: DuplicateRule) -> Iterator[tuple[int, float]]:
    """Applies the anchor rule to images in order.

    Args:
      codes: (N,) uint64 perceptual hashes.
      features: (N, D) unit vectors.
      rule: radius and threshold.

    Yields:
      Of each image, its anchor (an earlier index, or its own of an image that is kept) and the cosine of their
      features. Of several anchors that claim an image, the most similar one is named.
    """
    anchors, anchor_codes, count = np.empty(len(codes), np.intp), np.empty(len(codes), np.uint64), 0
    for index, code in enumerate(codes):
        close = anchors[:count][np.bitwise_count(anchor_codes[:count] ^ code) <= rule.radius]
        known, feature = features[close].astype(np.float32), features[index].astype(np.float32)
        # Half-precision vectors are not quite of unit length.
        similarity = np.minimum(np.einsum("nd,d->n", known, feature), 1)
        if len(close) and (best := float(similarity.max())) > rule.threshold:
            yield int(close[similarity.argmax()]), best
        else:
            anchors[count], anchor_codes[count] = index, code
            count += 1
            yield index, 1.0

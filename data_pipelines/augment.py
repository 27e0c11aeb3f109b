"""Crops, flips, infrared augmentations and the normalisation constants. Images are (H, W) uint8 gray levels.

Every random choice comes from the generator that is passed in, in a fixed order, so an image, a generator state and
a config determine the result on any machine.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from data_pipelines.errors import InputError
from data_pipelines.resample import resize

# Mean and standard deviation of infrared gray levels scaled to [0, 1], as InfMAE was trained with.
MEAN = 0.425
STD = 0.200
# The evaluation view shows the central 224 of 256: ImageNet's convention, which linear probing follows.
EVALUATION_MARGIN = 256 / 224
CROP_ATTEMPTS = 10
MID_GRAY = 127.5


@dataclass(frozen=True)
class Box:
    """A rectangle of pixels: first row and column, rows, columns."""

    top: int
    left: int
    height: int
    width: int

    def of(self, image: np.ndarray) -> np.ndarray:
        """The view of `image` (H, W) inside the box."""
        return image[self.top : self.top + self.height, self.left : self.left + self.width]


@dataclass(frozen=True)
class InfraredAugment:
    """What differs between thermal cameras and not between scenes. 0 switches an augmentation off.

    Attributes:
      gain: contrast about mid-gray is multiplied by a factor drawn log-uniformly from [1 / (1 + gain), 1 + gain].
      offset: a brightness drawn uniformly from [-offset, offset] gray levels is added.
      invert: probability of swapping white-hot and black-hot.
      column_noise: column fixed-pattern noise: a normal value a column, its standard deviation drawn uniformly from
        [0, column_noise] gray levels.
      blur: Gaussian blur, standard deviation drawn uniformly from [0, blur] pixels of the crop.
    """

    gain: float = 0.0
    offset: float = 0.0
    invert: float = 0.0
    column_noise: float = 0.0
    blur: float = 0.0

    def __post_init__(self):
        for name in ("gain", "offset", "invert", "column_noise", "blur"):
            if not 0 <= getattr(self, name) < math.inf:
                raise InputError(f"augment.{name}={getattr(self, name)} must be 0 (off) or a positive number")
        if self.invert > 1:
            raise InputError(f"augment.invert={self.invert} is a probability; use a value from 0 to 1")


def crop_box(
    rng: np.random.Generator,
    height: int,
    width: int,
    scale: tuple[float, float] = (0.2, 1.0),
    ratio: tuple[float, float] = (3 / 4, 4 / 3),
) -> Box:
    """Draws the box of a RandomResizedCrop.

    The area is uniform in `scale` times the image's, the aspect ratio (width / height) log-uniform in `ratio`, the
    place uniform; boxes that do not fit are drawn again, ten times at most, then the largest centred box within
    `ratio` is taken (torchvision's definition).

    Args:
      rng: source of randomness.
      height, width: of the image, pixels.
      scale: smallest and largest share of the image's area.
      ratio: smallest and largest aspect ratio.

    Returns:
      A box inside the image, at least one pixel a side.
    """
    # `rng.uniform` gives the same numbers in three times the time.
    least, most = math.log(ratio[0]), math.log(ratio[1])
    for _ in range(CROP_ATTEMPTS):
        area = height * width * (scale[0] + (scale[1] - scale[0]) * rng.random())
        aspect = math.exp(least + (most - least) * rng.random())
        box_width = round(math.sqrt(area * aspect))
        box_height = round(math.sqrt(area / aspect))
        if 0 < box_width <= width and 0 < box_height <= height:
            top = int(rng.integers(height - box_height + 1))
            left = int(rng.integers(width - box_width + 1))
            return Box(top, left, box_height, box_width)
    aspect = min(max(width / height, ratio[0]), ratio[1])
    box_width = max(1, min(width, round(height * aspect)))
    box_height = max(1, min(height, round(width / aspect)))
    return Box((height - box_height) // 2, (width - box_width) // 2, box_height, box_width)


def random_resized_crop(
    image: np.ndarray,
    rng: np.random.Generator,
    size: tuple[int, int],
    scale: tuple[float, float] = (0.2, 1.0),
    ratio: tuple[float, float] = (3 / 4, 4 / 3),
) -> np.ndarray:
    """A random part of the image (see `crop_box`), resized by antialiased bicubic: (size[0], size[1]) uint8."""
    return resize(crop_box(rng, *image.shape, scale, ratio).of(image), size)


def resize_box(image: np.ndarray, box: Box, shrunk: int, size: tuple[int, int]) -> np.ndarray:
    """Resizes a part of an image that may have been decoded at a fraction of its size.

    Args:
      image: (H, W) uint8, or (ceil(H / shrunk), ceil(W / shrunk)).
      box: in pixels of the whole image.
      shrunk: 1 for the whole image; else how many of its pixels a side make one of `image`.
      size: rows and columns of the result.

    Returns:
      (size[0], size[1]) uint8.
    """
    if shrunk == 1:
        return resize(box.of(image), size)
    outer = Box(box.top // shrunk, box.left // shrunk, -(-box.height // shrunk) + 1, -(-box.width // shrunk) + 1)
    part = outer.of(image)
    edges = [box.top / shrunk - outer.top, box.left / shrunk - outer.left, box.height / shrunk, box.width / shrunk]
    return resize(part, size, tuple(edges))


def flip(image: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Mirrors left and right with probability 1/2: (H, W) -> (H, W), a view."""
    return image[:, ::-1] if rng.random() < 0.5 else image


def center_crop_resize(image: np.ndarray, size: tuple[int, int], stretch: bool = False) -> np.ndarray:
    """The evaluation view, without randomness.

    Args:
      image: (H, W) uint8.
      size: rows and columns of the result.
      stretch: False: scale until the image covers `size` times 256/224, then cut the centre; the aspect ratio is kept
        and the rim is lost. True: squeeze the whole image into `size`; nothing is lost but the aspect ratio.

    Returns:
      (size[0], size[1]) uint8.
    """
    if stretch:
        return resize(image, size)
    height, width = image.shape
    factor = EVALUATION_MARGIN * max(size[0] / height, size[1] / width)
    scaled = resize(image, (max(size[0], round(height * factor)), max(size[1], round(width * factor))))
    box = Box((scaled.shape[0] - size[0]) // 2, (scaled.shape[1] - size[1]) // 2, *size)
    return box.of(scaled)


def infrared_augment(image: np.ndarray, rng: np.random.Generator, config: InfraredAugment) -> np.ndarray:
    """Applies the augmentations that `config` switches on: blur, column noise, then gain, offset and polarity.

    The order is that of the light's path: optics, detector columns, then the camera's mapping to gray levels.

    Args:
      image: (H, W) uint8.
      rng: source of randomness; an augmentation that is off draws nothing.
      config: which ones, how strong.

    Returns:
      (H, W) uint8; the image itself when all are off.
    """
    if config == InfraredAugment():
        return image
    pixels = image.astype(np.float32)
    if config.blur:
        pixels = _gaussian_blur(pixels, rng.uniform(0, config.blur))
    if config.column_noise:
        deviation = rng.uniform(0, config.column_noise)
        pixels = pixels + rng.normal(0.0, deviation, (1, pixels.shape[1])).astype(np.float32)
    if config.gain:
        limit = math.log1p(config.gain)
        pixels = (pixels - MID_GRAY) * math.exp(rng.uniform(-limit, limit)) + MID_GRAY
    if config.offset:
        pixels = pixels + rng.uniform(-config.offset, config.offset)
    if config.invert and rng.random() < config.invert:
        pixels = 2 * MID_GRAY - pixels
    return np.clip(np.rint(pixels), 0, 255).astype(np.uint8)


def _gaussian_blur(pixels: np.ndarray, sigma: float) -> np.ndarray:
    """Separable Gaussian on (H, W) float32, edges repeated, cut at three standard deviations."""
    radius = math.ceil(3 * sigma)
    if radius == 0:
        return pixels
    taps = np.exp(-0.5 * (np.arange(-radius, radius + 1) / sigma) ** 2)
    taps = (taps / taps.sum()).astype(np.float32)
    for axis in (0, 1):
        extent = pixels.shape[axis]
        padded = np.pad(pixels, [(radius, radius) if a == axis else (0, 0) for a in (0, 1)], mode="edge")
        windows = (padded.take(np.arange(k, k + extent), axis) * tap for k, tap in enumerate(taps))
        pixels = sum(windows)
    return pixels

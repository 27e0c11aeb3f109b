"""What happens to an image and its labels: crop, resize, flip and pad in one place; infrared augmentations.

Images are (H, W) uint8 gray levels.

Every random choice comes from the generator that is passed in, in a fixed order, so an image, a generator state and
a config determine the result on any machine.
"""

import math
from dataclasses import dataclass
from typing import Self

import numpy as np
from scipy import ndimage

from data_pipelines.errors import InputError
from data_pipelines.examples import IGNORE
from data_pipelines.resample import resize

# Mean and standard deviation of infrared gray levels scaled to [0, 1], as InfMAE was trained with.
MEAN = 0.425
STD = 0.200
# The evaluation view shows the central 224 of 256: ImageNet's convention, which linear probing follows.
EVALUATION_MARGIN = 256 / 224
CROP_ATTEMPTS = 10
MID_GRAY = 127.5
# Padding: the mean, which is 0 after normalisation.
PAD_GRAY = round(255 * MEAN)


@dataclass(frozen=True)
class Crop:
    """A part of an image, in pixels: first row and column, rows, columns."""

    top: int
    left: int
    height: int
    width: int

    def of(self, image: np.ndarray) -> np.ndarray:
        """The view of `image` (H, W) inside the part."""
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
        for name, value in vars(self).items():
            if not 0 <= value < math.inf:
                raise InputError(f"augment.{name}={value} must be 0 (off) or a positive number")
        if self.invert > 1:
            raise InputError(f"augment.invert={self.invert} is a probability; use a value from 0 to 1")


def draw_crop(
    rng: np.random.Generator,
    height: int,
    width: int,
    scale: tuple[float, float] = (0.2, 1.0),
    ratio: tuple[float, float] = (3 / 4, 4 / 3),
) -> Crop:
    """Draws the part of a RandomResizedCrop.

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
            return Crop(top, left, box_height, box_width)
    aspect = min(max(width / height, ratio[0]), ratio[1])
    box_width = max(1, min(width, round(height * aspect)))
    box_height = max(1, min(height, round(width / aspect)))
    return Crop((height - box_height) // 2, (width - box_width) // 2, box_height, box_width)


def nearest_pixels(start: int, extent: int, count: int) -> np.ndarray:
    """Which of the pixels [start, start + extent) lie under the centres of `count` pixels covering the same."""
    # Integers, so that a centre on the border of two pixels falls alike on every machine.
    return start + (2 * np.arange(count) + 1) * extent // (2 * count)


@dataclass(frozen=True)
class Geometry:
    """How a part of an image comes to lie on a canvas: cut, resized, placed (what sticks out is cut), mirrored.

    The same for pixels, class masks, boxes and polygons. Coordinates are in pixels, (0, 0) is the outer corner of the
    first pixel.

    Attributes:
      crop: the part of the image.
      size: rows and columns that the part is resized to.
      canvas: rows and columns of the result.
      offset: row and column of the canvas at which the resized part begins; may be negative.
      mirrored: left and right of the canvas change places.
    """

    crop: Crop
    size: tuple[int, int]
    canvas: tuple[int, int]
    offset: tuple[int, int] = (0, 0)
    mirrored: bool = False

    @classmethod
    def zoomed(
        cls,
        rng: np.random.Generator,
        height: int,
        width: int,
        canvas: tuple[int, int],
        zoom: tuple[float, float],
        flip: bool = True,
        point: tuple[int, int] | None = None,
    ) -> Self:
        """A random part of the image that fills the canvas, enlarged by a factor uniform in `zoom`.

        Where the enlarged image is smaller than the canvas, all of it lies in the first corner (as mmsegmentation's
        resize, crop and pad do). With `point`, a row and column of the image, the part contains that pixel.
        """
        factor = rng.uniform(*zoom)
        part, first, size = [], [], []
        for axis, (extent, room) in enumerate(zip((height, width), canvas, strict=True)):
            length = min(extent, max(1, round(room / factor)))
            least, most = 0, extent - length
            if point is not None:
                least, most = max(0, point[axis] - length + 1), min(point[axis], most)
            first.append(int(rng.integers(least, most + 1)))
            part.append(length)
            size.append(min(room, max(1, round(length * factor))))
        return cls(Crop(*first, *part), tuple(size), canvas, mirrored=flip and rng.random() < 0.5)

    @classmethod
    def center(cls, height: int, width: int, size: tuple[int, int]) -> Self:
        """The evaluation view: the image is scaled until it covers `size` times 256/224, the rim is cut off."""
        factor = EVALUATION_MARGIN * max(size[0] / height, size[1] / width)
        scaled = max(size[0], round(height * factor)), max(size[1], round(width * factor))
        offset = -((scaled[0] - size[0]) // 2), -((scaled[1] - size[1]) // 2)
        return cls(Crop(0, 0, height, width), scaled, size, offset)

    @classmethod
    def stretch(cls, height: int, width: int, size: tuple[int, int]) -> Self:
        """The whole image squeezed into `size`: nothing is lost but the aspect ratio."""
        return cls(Crop(0, 0, height, width), size, size)

    @classmethod
    def fit(cls, height: int, width: int, canvas: tuple[int, int]) -> Self:
        """The whole image as large as the canvas allows, in its first corner; the rest of the canvas is padding."""
        factor = min(canvas[0] / height, canvas[1] / width)
        size = min(canvas[0], max(1, round(height * factor))), min(canvas[1], max(1, round(width * factor)))
        return cls(Crop(0, 0, height, width), size, canvas)

    def image(self, image: np.ndarray) -> np.ndarray:
        """(H, W) uint8 -> `canvas` uint8 by antialiased bicubic, `PAD_GRAY` where the image does not reach."""
        return self._place(resize(self.crop.of(image), self.size), PAD_GRAY)

    def mask(self, mask: np.ndarray) -> np.ndarray:
        """(H, W) uint8 class numbers -> `canvas` uint8 by the nearest pixel, `IGNORE` outside of the image."""
        rows = nearest_pixels(self.crop.top, self.crop.height, self.size[0])
        columns = nearest_pixels(self.crop.left, self.crop.width, self.size[1])
        return self._place(mask[rows[:, None], columns], IGNORE)

    def _place(self, part: np.ndarray, fill: int) -> np.ndarray:
        if self.size != self.canvas or self.offset != (0, 0):
            whole = np.full(self.canvas, fill, part.dtype)
            (top, bottom), (left, right) = self._reach()
            row, column = self.offset
            whole[top:bottom, left:right] = part[top - row : bottom - row, left - column : right - column]
            part = whole
        return part[:, ::-1] if self.mirrored else part

    def _reach(self) -> list[tuple[int, int]]:
        """First and end row, first and end column of the canvas (before mirroring) that the image reaches."""
        return [
            (min(max(start, 0), canvas), min(max(start + extent, 0), canvas))
            for start, extent, canvas in zip(self.offset, self.size, self.canvas, strict=True)
        ]

    def points(self, points: np.ndarray) -> np.ndarray:
        """(..., 2) x, y in the image -> (..., 2) float64 on the canvas, unclipped: also the corners of polygons."""
        out = (np.asarray(points, np.float64) - self._start()) * self._factor() + self.offset[::-1]
        if self.mirrored:
            out[..., 0] = self.canvas[1] - out[..., 0]
        return out

    def points_back(self, points: np.ndarray) -> np.ndarray:
        """(..., 2) x, y on the canvas -> (..., 2) float64 in the image: for predictions."""
        out = np.array(points, np.float64)
        if self.mirrored:
            out[..., 0] = self.canvas[1] - out[..., 0]
        return (out - self.offset[::-1]) / self._factor() + self._start()

    def boxes(self, boxes: np.ndarray, min_visible: float = 0.0) -> tuple[np.ndarray, np.ndarray]:
        """Boxes on the canvas, clipped to what the image reaches.

        Args:
          boxes: (n, 4) x0, y0, x1, y1 in the image.
          min_visible: share of a box's area that must be left for it to be valid.

        Returns:
          (n, 4) float32, and (n,) bool: which of them are left at all, with a positive width and height.
        """
        corners = self.points(np.asarray(boxes, np.float64).reshape(-1, 2, 2))
        corners = np.stack([corners.min(1), corners.max(1)], axis=1)
        (top, bottom), (left, right) = self._reach()
        if self.mirrored:
            left, right = self.canvas[1] - right, self.canvas[1] - left
        clipped = np.clip(corners, (left, top), (right, bottom)).astype(np.float32)
        whole, visible = (np.prod(each[:, 1] - each[:, 0], axis=-1) for each in (corners, clipped))
        valid = (clipped[:, 1] > clipped[:, 0]).all(-1) & (visible >= min_visible * whole)
        return clipped.reshape(-1, 4), valid

    def _start(self) -> tuple[int, int]:
        return self.crop.left, self.crop.top

    def _factor(self) -> np.ndarray:
        """Pixels of the canvas per pixel of the image, x and y."""
        return np.array([self.size[1] / self.crop.width, self.size[0] / self.crop.height])


def center_crop_resize(image: np.ndarray, size: tuple[int, int], stretch: bool = False) -> np.ndarray:
    """The evaluation view of (H, W) uint8, without randomness: `Geometry.center`, or `Geometry.stretch` if asked."""
    return (Geometry.stretch if stretch else Geometry.center)(*image.shape, size).image(image)


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
        pixels = ndimage.gaussian_filter(pixels, rng.uniform(0, config.blur), mode="nearest", truncate=3)
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

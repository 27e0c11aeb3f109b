"""Which images are worth keeping: the filters that look at one image alone."""

from __future__ import annotations

import dataclasses

import numpy as np

from data_pipelines.decode import DecodedImage, ImageRefused

FILTER_REASONS = {
    "too_small": "both sides are under the smallest size (InfMAE, Inf30 construction)",
    "constant": "every pixel has the same value",
    "too_few_levels": "so few gray levels that it is a mask or a drawing",
}

# A black frame from a camera or a recorder is flat and dark, but JPEG leaves ripples in it.
_BORDER_LEVEL = 16
_MIN_BORDER = 2


@dataclasses.dataclass(frozen=True)
class Filters:
    """The filters and their limits.

    Attributes:
      min_side: an image is dropped when both sides are under this many pixels; 0 turns the filter off.
      min_levels: an image is dropped when it has fewer distinct values; 0 turns the filter off.
      crop_borders: cut off black borders.
      max_pixels: larger pictures are not unpacked.
      max_file_bytes: larger files are not read.
    """

    min_side: int = 20
    min_levels: int = 3
    crop_borders: bool = True
    max_pixels: int = 1 << 26
    max_file_bytes: int = 1 << 29


def apply_filters(image: DecodedImage, filters: Filters) -> DecodedImage:
    """Returns the image, its black borders cropped if asked for.

    Raises:
      ImageRefused: with a reason of `FILTER_REASONS`.
    """
    _check_size(image.pixels, filters.min_side)
    levels = count_levels(image.pixels)
    if filters.min_levels > 0 and levels == 1:
        raise ImageRefused("constant", f"every pixel is {image.pixels.flat[0]}")
    if levels < filters.min_levels:
        raise ImageRefused("too_few_levels", f"{levels} distinct values, at least {filters.min_levels} wanted")
    if filters.crop_borders:
        image = crop_black_borders(image)
        _check_size(image.pixels, filters.min_side)
    return image


def _check_size(pixels: np.ndarray, min_side: int) -> None:
    height, width = pixels.shape
    if height < min_side and width < min_side:
        raise ImageRefused("too_small", f"{width}x{height}, both sides under {min_side} px")


def count_levels(pixels: np.ndarray) -> int:
    """Number of distinct values in (H, W) unsigned integer pixels."""
    return int(np.count_nonzero(np.bincount(pixels.ravel())))


def crop_black_borders(image: DecodedImage) -> DecodedImage:
    """Cuts off rows and columns at the edges that are black throughout (DuGI-MAE, data set construction).

    Black means at most 16 of 255 for 8-bit images, where compression ripples, and exactly 0 for 16-bit ones, where
    small counts can be a scene. At least two black rows or columns make a border. The box that is left is kept in the
    attributes as `border_crop`: [top, left, height, width] in pixels of the upright source.
    """
    level = _BORDER_LEVEL if image.pixels.dtype == np.uint8 else 0
    bright = image.pixels > level
    top, bottom = _content_range(bright.any(axis=1))
    left, right = _content_range(bright.any(axis=0))
    height, width = image.pixels.shape
    if bottom <= top or right <= left or (top, left, bottom, right) == (0, 0, height, width):
        return image
    return DecodedImage(
        np.ascontiguousarray(image.pixels[top:bottom, left:right]),
        {**image.attributes, "border_crop": [top, left, bottom - top, right - left]},
    )


def _content_range(has_content: np.ndarray) -> tuple[int, int]:
    """First and one-past-last position with content; a border of one line is left in place."""
    if not has_content.any():
        return 0, 0
    start = int(np.argmax(has_content))
    trailing = int(np.argmax(has_content[::-1]))
    start = start if start >= _MIN_BORDER else 0
    trailing = trailing if trailing >= _MIN_BORDER else 0
    return start, len(has_content) - trailing

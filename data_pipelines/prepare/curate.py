"""Which images are worth keeping: the filters that look at one image alone."""

import dataclasses

import numpy as np

from data_pipelines.decode import MAX_FILE_BYTES, MAX_PIXELS, DecodedImage, ImageRefused
from data_pipelines.intensity import count_values

# A recorder's black frame is flat, up to the black level of video (16) and ripples of compression, and ends in a step;
# a night sky or a dark wall does not.
_BORDER_LEVEL = 20.0
_BORDER_DEVIATION = 2.0
_BORDER_DRIFT = 2.0
_BORDER_STEP = 8.0
_STEP_LINES = 8  # a block of JPEG, in which ripples may hide the step
_MIN_BORDER = 4


@dataclasses.dataclass(frozen=True)
class Filters:
    """The filters and their limits.

    Attributes:
      min_side: an image is dropped when both sides are under this many pixels; 0 turns the filter off.
      min_levels: an image is dropped when it has fewer distinct values, as class masks do (the poorest of 6,000 real
        8-bit images has 105); 0 turns the filter off.
      crop_borders: cut off black borders.
      bit_depth: 8 or 16: an image of another depth is dropped; 0 turns the filter off.
      max_pixels: larger pictures are not unpacked.
      max_file_bytes: larger files are not read.
    """

    min_side: int = 20
    min_levels: int = 16
    crop_borders: bool = True
    bit_depth: int = 0
    max_pixels: int = MAX_PIXELS
    max_file_bytes: int = MAX_FILE_BYTES


def apply_filters(image: DecodedImage, filters: Filters) -> DecodedImage:
    """Returns the image, its black borders cropped if asked for.

    Raises:
      ImageRefused: `too_small`, `constant`, `too_few_levels` (a mask or a drawing) or `bit_depth`.
    """
    depth = 8 * image.pixels.dtype.itemsize
    if filters.bit_depth not in (0, depth):
        raise ImageRefused("bit_depth", f"{depth} bit per pixel, not {filters.bit_depth}; make a set of its own")
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
    return int(np.count_nonzero(count_values(pixels)))


def crop_black_borders(image: DecodedImage) -> DecodedImage:
    """Cuts off black rows and columns at the edges (DuGI-MAE, data set construction).

    Of an 8-bit image, a border is four or more lines of at most level 20 with a standard deviation of at most 2 each,
    whose means stay within 2 levels of the first, and that end in a step: within 8 lines the mean rises by 8 levels. Of
    a 16-bit image, where small counts can be a scene, it is four or more lines of zeros. A strip of a scene that is as
    flat and dark as that is cut off, too; it holds nothing. The box that is left is kept in the attributes as
    `border_crop`: [top, left, height, width] in pixels of the upright source.
    """
    height, width = image.pixels.shape
    top = _border_width(image.pixels)
    bottom = height - _border_width(image.pixels[::-1])
    if bottom <= top:
        return image
    # Columns are judged without the rows that are cut off: a frame has all four sides.
    columns = image.pixels[top:bottom].T
    left = _border_width(columns)
    right = width - _border_width(columns[::-1])
    if right <= left or (top, left, bottom, right) == (0, 0, height, width):
        return image
    return DecodedImage(
        np.ascontiguousarray(image.pixels[top:bottom, left:right]),
        {**image.attributes, "border_crop": [top, left, bottom - top, right - left]},
    )


def _border_width(lines: np.ndarray) -> int:
    """Number of border lines at the start of (L, P) pixels."""
    if lines.dtype == np.uint8:
        if lines[:_MIN_BORDER].mean() > _BORDER_LEVEL:  # the common case, without looking at the whole image
            return 0
        means, deviations = lines.mean(axis=1), lines.std(axis=1)
        is_black = (means <= _BORDER_LEVEL) & (deviations <= _BORDER_DEVIATION)
        is_black &= np.abs(means - means[0]) <= _BORDER_DRIFT
    else:
        is_black = ~lines.any(axis=1)
    count = int(np.argmin(is_black))  # 0 where all lines are black
    if count < _MIN_BORDER:
        return 0
    if lines.dtype == np.uint8 and means[count : count + _STEP_LINES].max() - means[:count].max() < _BORDER_STEP:
        return 0
    return count

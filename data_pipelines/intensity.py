"""Stored integers -> the network's 8-bit range: the named intensity mappings.

Shards keep what the sensor said (8 or 16 bit); how that becomes 0..255 is a choice made at read time:

    auto          8-bit images as they are, 16-bit ones by percentile(0.1, 99.9): the default
    full_range    0..255 or 0..65535 of the stored type onto 0..255; 8-bit images are unchanged
    min_max       the image's own lowest and highest value onto 0 and 255
    percentile    the image's own percentiles `low` and `high` (per cent) onto 0 and 255, outside clipped
    fixed         `low` and `high` in the source's unit (kelvin, counts, ...) onto 0 and 255, outside clipped;
                  the same temperature is the same gray in every frame
"""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from data_pipelines.errors import InputError
from data_pipelines.examples import source_units

MAPPINGS = ("auto", "full_range", "min_max", "percentile", "fixed")

_AUTO_PERCENTILES = (0.1, 99.9)
_DEFAULT_LOW, _DEFAULT_HIGH = 1.0, 99.0
_COUNTED_BLOCK = 1 << 22


@dataclasses.dataclass(frozen=True)
class Intensity:
    """How stored 8- or 16-bit values become the network's 8 bit.

    Attributes:
      mapping: `auto`, `full_range`, `min_max`, `percentile` or `fixed`.
      low, high: `percentile`: the percentiles (1 and 99 by default); `fixed`: bounds in the source's unit (required).
    """

    mapping: str = "auto"
    low: float | None = None
    high: float | None = None

    def __post_init__(self):
        # Unusable arguments must end a run before its first batch.
        self.apply(np.zeros((1, 1), np.uint8))

    def apply(self, pixels: np.ndarray, attributes: Mapping[str, Any] | None = None) -> np.ndarray:
        """Maps stored pixels to the network's 8-bit range (the mappings are described at the top of this module).

        Args:
          pixels: (H, W) uint8 or uint16.
          attributes: of the example, with scale and offset of the source's unit; used by `fixed` only.

        Returns:
          (H, W) uint8. An image without contrast maps to zeros (except under `full_range`, `fixed` and 8-bit `auto`).

        Raises:
          InputError: unknown mapping or unusable bounds.
        """
        low, high = self.low, self.high
        if self.mapping in ("auto", "full_range") and pixels.dtype == np.uint8:
            return pixels
        if self.mapping == "auto":
            return _map_percentiles(pixels, *_AUTO_PERCENTILES)
        if self.mapping == "full_range":
            return _map_linearly(pixels, 0.0, 65535.0)
        if self.mapping == "min_max":
            return _map_linearly(pixels, float(pixels.min()), float(pixels.max()))
        if self.mapping == "percentile":
            low, high = (_DEFAULT_LOW if low is None else low), (_DEFAULT_HIGH if high is None else high)
            if not 0 <= low < high <= 100:
                raise InputError(f"percentile({low:g}, {high:g}): give 0 <= low < high <= 100")
            return _map_percentiles(pixels, low, high)
        if self.mapping == "fixed":
            if low is None or high is None or not -math.inf < low < high < math.inf:
                raise InputError(f"fixed({low}, {high}): give finite low < high in the source's unit")
            scale, offset, _ = source_units(attributes or {})
            return _map_linearly(pixels, (low - offset) / scale, (high - offset) / scale)
        raise InputError(f"unknown intensity mapping {self.mapping!r}: choose one of {', '.join(MAPPINGS)}")


def count_values(pixels: np.ndarray) -> np.ndarray:
    """Returns the histogram of (H, W) uint8 or uint16 pixels over all values of the type, (256,) or (65536,) int64.

    Block by block: NumPy's counting copies its input to 64-bit integers, which for the largest pictures that are
    accepted would be half a gigabyte a worker.
    """
    flat = pixels.reshape(-1)
    size = int(np.iinfo(pixels.dtype).max) + 1
    counts = np.zeros(size, np.int64)
    for start in range(0, flat.size, _COUNTED_BLOCK):
        counts += np.bincount(flat[start : start + _COUNTED_BLOCK], minlength=size)
    return counts


def _map_percentiles(pixels: np.ndarray, low: float, high: float) -> np.ndarray:
    """Percentiles from the histogram of the integer values: a sort of the pixels would cost ten times as much."""
    cumulative = np.cumsum(count_values(pixels))
    # At least one pixel: the 0th percentile is the lowest value that occurs, not 0.
    ranks = np.maximum(np.array([low, high]) / 100 * pixels.size, 1)
    first, last = np.searchsorted(cumulative, ranks, side="left")
    if first == last:
        # Nearly constant images: fall back to the full spread, which at least keeps the outliers visible.
        first, last = pixels.min(), pixels.max()
    return _map_linearly(pixels, float(first), float(last))


def _map_linearly(pixels: np.ndarray, low: float, high: float) -> np.ndarray:
    """`low` -> 0 and `high` -> 255, rounded to nearest, clipped; by table, as there are few distinct values."""
    if high <= low:
        return np.zeros(pixels.shape, np.uint8)
    values = np.arange(int(np.iinfo(pixels.dtype).max) + 1, dtype=np.float64)
    table = np.clip(np.rint((values - low) * 255.0 / (high - low)), 0, 255).astype(np.uint8)
    return table[pixels]

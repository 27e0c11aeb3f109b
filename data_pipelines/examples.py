"""Random access to the images of shard sets: bytes -> checked 8-bit pixels, damaged records replaced, never hidden."""

from __future__ import annotations

import bisect
import dataclasses
import itertools
from collections.abc import Callable, Iterable
from typing import TypeVar

import numpy as np
import simplejpeg

from data_pipelines.decode import decode_record_pixels
from data_pipelines.image_cache import CachedImage, FreshImage, ImageCache, open_caches
from data_pipelines.intensity import to_uint8
from data_pipelines.records import CorruptRecord, Record, decode_record, open_source, read_manifest, source_units

T = TypeVar("T")

# A hole of more damaged records than this is not damage of records but of a disk.
MAX_SUBSTITUTES = 100


@dataclasses.dataclass(frozen=True)
class Intensity:
    """How stored 8- or 16-bit values become the network's 8 bit; see `data_pipelines.intensity`.

    Attributes:
      mapping: `auto`, `full_range`, `min_max`, `percentile`, `fixed` or `clahe`.
      low, high: the mapping's arguments (percentiles, bounds in source units, clip limit); None is its default.
    """

    mapping: str = "auto"
    low: float | None = None
    high: float | None = None

    def __post_init__(self):
        # Unusable arguments must end a run before its first batch.
        to_uint8(np.zeros((1, 1), np.uint8), self.mapping, self.low, self.high)

    def apply(self, pixels: np.ndarray, record: Record) -> np.ndarray:
        """(H, W) stored integers of `record` -> (H, W) uint8."""
        if self.mapping != "fixed":
            return to_uint8(pixels, self.mapping, self.low, self.high)
        scale, offset, _ = source_units(record.attributes)
        return to_uint8(pixels, self.mapping, self.low, self.high, scale, offset)


class ExampleSource:
    """The images of one or more shard sets, in manifest order. Safe to pickle and to read from several threads."""

    def __init__(self, folders: tuple[str, ...], intensity: Intensity, cache: str = ""):
        """Sets in local `folders`; decoded images are kept in the folder `cache` (see `data_pipelines.image_cache`)."""
        self._source = open_source(folders)
        self._intensity = intensity
        manifests = [read_manifest(folder) for folder in folders]
        self._starts = [0, *itertools.accumulate(manifest.count for manifest in manifests)]
        self._caches = open_caches(cache, manifests, repr(intensity)) if cache else []

    def __len__(self) -> int:
        return len(self._source)

    def record(self, index: int) -> Record:
        """The stored example `index`, to be given to `image`.

        Raises:
          CorruptRecord: the record is damaged.
        """
        return decode_record(self._source[index])

    def _open(self, index: int) -> Record | CachedImage | FreshImage:
        if not self._caches:
            return self.record(index)
        cache, place = self._cache_of(index)
        image = cache.find(place)
        if image is None:
            image = FreshImage(self.image(self.record(index)))
            cache.store(place, image.pixels)
        return image

    def _cache_of(self, index: int) -> tuple[ImageCache, int]:
        """The cache of a record's shard set, and the record's place in it."""
        number = bisect.bisect_right(self._starts, index) - 1
        return self._caches[number], index - self._starts[number]

    def image(self, record: Record, half: bool = False) -> np.ndarray:
        """Decodes a record.

        Args:
          record: what `record` returned.
          half: decode a JPEG at half its size, which skips most of the inverse transform; others as usual.

        Returns:
          (H, W) uint8, or (ceil(H / 2), ceil(W / 2)).

        Raises:
          CorruptRecord: the payload is damaged.
        """
        pixels = _half_pixels(record) if half and record.encoding == "jpeg" else decode_record_pixels(record)
        return self._intensity.apply(pixels, record)

    def open_ahead(self, indices: Iterable[int]) -> list[Record | CachedImage | None]:
        """Examples to be given to `read`: records or cached images, None where one is damaged or not in the cache yet.

        Several at once cost a third of what each costs between images, whose pixels drive all else out of the CPU's
        caches.
        """
        examples: list[Record | CachedImage | None] = []
        for index in indices:
            try:
                if self._caches:
                    cache, place = self._cache_of(index)
                    examples.append(cache.find(place))
                else:
                    examples.append(self.record(index))
            except CorruptRecord:
                examples.append(None)  # `read` meets it again and deals with it
        return examples

    def read(
        self, index: int, make: Callable[..., T], opened: Record | CachedImage | None = None
    ) -> tuple[T, int]:
        """Makes something of record `index`; when it is damaged, of the next good one: a function of the shards alone.

        Args:
          index: which record.
          make: decodes the `Record` it is given (with a cache: takes a `CachedImage` or `FreshImage`, which has neither
            key nor payload); called again with the next one when it raises `CorruptRecord`.
          opened: what `open_ahead` gave for `index`.

        Returns:
          What `make` returned, and -1, or `index` when this comes from a substitute.

        Raises:
          CorruptRecord: so many records in a row are damaged that none takes its place.
        """
        errors: list[CorruptRecord] = []
        for candidate in range(index, index + min(MAX_SUBSTITUTES + 1, len(self))):
            try:
                ahead = opened if candidate == index else None
                example = self._open(candidate % len(self)) if ahead is None else ahead
                return make(example), index if errors else -1
            except CorruptRecord as error:
                errors.append(error)
        raise CorruptRecord(f"record {index} and the {len(errors) - 1} after it are damaged: {errors[0]}") from errors[
            0
        ]

    def damage(self, index: int) -> str:
        """Says in one line what is wrong with the damaged record `index`."""
        try:
            self.image(self.record(index))
        except CorruptRecord as error:
            return f"record {index}: {error}"
        return f"record {index}: damaged when it was read, whole now"


def _half_pixels(record: Record) -> np.ndarray:
    height, width = -(-record.height // 2), -(-record.width // 2)
    try:
        # The decoder takes the smallest of its scales that is at least as large.
        pixels = simplejpeg.decode_jpeg(record.payload, colorspace="GRAY", min_height=height, min_width=width)[..., 0]
    except ValueError as error:
        raise CorruptRecord(f"{record.key}: the stored image does not decode ({error})") from error
    if pixels.shape != (height, width):
        raise CorruptRecord(f"{record.key}: half of {record.width}x{record.height} decodes to shape {pixels.shape}")
    return pixels

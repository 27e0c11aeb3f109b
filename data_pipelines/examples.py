"""Random access to the images of shard sets: bytes -> checked 8-bit pixels, damaged records replaced, never hidden."""

from __future__ import annotations

import dataclasses

import numpy as np

from data_pipelines.decode import decode_record_pixels
from data_pipelines.intensity import to_uint8
from data_pipelines.records import CorruptRecord, Record, decode_record, open_source, source_units

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


@dataclasses.dataclass(frozen=True)
class Example:
    """One image as read.

    Attributes:
      record: what the image was decoded from.
      image: (H, W) uint8.
      corrupt: index of the record that was asked for when it is damaged and this is its substitute, else -1.
    """

    record: Record
    image: np.ndarray
    corrupt: int


class ExampleSource:
    """The images of one or more shard sets, in manifest order. Safe to pickle and to read from several threads."""

    def __init__(self, folders: tuple[str, ...], intensity: Intensity):
        self._source = open_source(folders)
        self._intensity = intensity

    def __len__(self) -> int:
        return len(self._source)

    def record(self, index: int) -> Record:
        """The stored example `index`, undecoded.

        Raises:
          CorruptRecord: the record is damaged.
        """
        return decode_record(self._source[index])

    def image(self, record: Record) -> np.ndarray:
        """(H, W) uint8 of a record.

        Raises:
          CorruptRecord: the payload is damaged.
        """
        return self._intensity.apply(decode_record_pixels(record), record)

    def read(self, index: int) -> Example:
        """Record `index`; when it is damaged, the next good one: a function of the shards alone.

        Raises:
          CorruptRecord: so many records in a row are damaged that none takes its place.
        """
        errors: list[CorruptRecord] = []
        for candidate in range(index, index + min(MAX_SUBSTITUTES + 1, len(self))):
            try:
                record = self.record(candidate % len(self))
                return Example(record, self.image(record), index if errors else -1)
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

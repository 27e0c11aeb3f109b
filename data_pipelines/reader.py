"""Random access to the examples of shard sets, and which of them stands in for a damaged one."""

from collections.abc import Iterator

from data_pipelines.examples import CorruptExample, Example, decode_example, decode_mask, decode_pixels
from data_pipelines.shards import ShardReader

# A hole of more damaged records than this is not damage of records but of a disk.
MAX_SUBSTITUTES = 100


class ExampleReader(ShardReader):
    """The examples of a split of one or more shard sets, in manifest order, as `ShardReader` gives their bytes."""

    def __getitem__(self, index: int) -> Example:
        """The stored example `index`.

        Raises:
          CorruptExample: its record is damaged.
        """
        return decode_example(super().__getitem__(index))

    def candidates(self, index: int) -> Iterator[int]:
        """The index itself, then those whose examples stand in for it when it is damaged: a function of the shards."""
        return (candidate % len(self) for candidate in range(index, index + min(MAX_SUBSTITUTES + 1, len(self))))

    def first_whole(self, index: int) -> Example:
        """The example `index`, or the one that stands in for it.

        Raises:
          CorruptExample: all candidates are damaged.
        """
        for candidate in self.candidates(index):
            try:
                example = self[candidate]
                decode_pixels(example)
                return example
            except CorruptExample:
                continue
        raise self.all_damaged(index)

    def damage(self, index: int) -> str:
        """Says in one line what is wrong with the example `index`, which was damaged when it was read."""
        try:
            example = self[index]
            decode_pixels(example)
            if example.mask is not None:
                decode_mask(example)
        except CorruptExample as error:
            return f"record {index}: {error}"
        return f"record {index}: damaged when it was read, whole now"

    def all_damaged(self, index: int) -> CorruptExample:
        """The error that says that nothing can stand in for the damaged example `index`."""
        count = min(MAX_SUBSTITUTES, len(self) - 1)
        return CorruptExample(f"record {index} and the {count} after it are damaged: {self.damage(index)}")

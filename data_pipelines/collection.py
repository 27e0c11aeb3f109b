"""All examined parts together: candidates in listing order, their fingerprints, and access to their stored records."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Callable, Iterator, Sequence

import numpy as np
from array_record.python import array_record_data_source

from data_pipelines.duplicates import Confirm
from data_pipelines.intensity import to_uint8
from data_pipelines.parts import Candidate, read_part, records_path
from data_pipelines.examples import decode_example, decode_pixels
from data_pipelines.sources import Rejection

# List of (H, W) uint8 images, all of any sizes -> (n, D) float features.
Embed = Callable[[list[np.ndarray]], np.ndarray]


@dataclasses.dataclass(frozen=True)
class PickedRecords:
    """The stored records at some (part, position) places that are sorted by part, read one part after the other."""

    folder: str
    places: tuple[tuple[int, int], ...]

    def __len__(self) -> int:
        return len(self.places)

    def __iter__(self) -> Iterator[bytes]:
        opened, source = None, None
        for part, position in self.places:
            if part != opened:
                opened, source = part, array_record_data_source.ArrayRecordDataSource(records_path(self.folder, part))
            yield source[position]


@dataclasses.dataclass(frozen=True)
class Collection:
    """Every examined file of a collection.

    Attributes:
      folder: where the parts are.
      candidates: the N images that passed their own filters, in listing order.
      rejections: the files that did not.
      kinds: counts of what the sources were, see `parts.Part`.
      codes: (N,) uint64 perceptual hashes.
      features: (N, D) float16 small-image features.
      places: (N, 2) part number and position in the part of each candidate's record.
    """

    folder: str
    candidates: tuple[Candidate, ...]
    rejections: tuple[Rejection, ...]
    kinds: Counter[str]
    codes: np.ndarray
    features: np.ndarray
    places: np.ndarray

    def picked(self, indices: Sequence[int]) -> PickedRecords:
        """The stored records of some candidates, given in increasing order."""
        return PickedRecords(self.folder, tuple(map(tuple, self.places[np.asarray(indices, np.intp)].tolist())))

    def pixels(self, index: int) -> np.ndarray:
        """The stored pixels of one candidate, (H, W) uint8 or uint16."""
        (stored,) = self.picked([index])
        return decode_pixels(decode_example(stored))


def collect(folder: str, part_count: int) -> Collection:
    """Reads the rows and fingerprints of all parts, in order."""
    parts = [read_part(folder, number) for number in range(part_count)]
    return Collection(
        folder=folder,
        candidates=tuple(candidate for part in parts for candidate in part.candidates),
        rejections=tuple(rejection for part in parts for rejection in part.rejections),
        kinds=sum((part.kinds for part in parts), Counter()),
        codes=np.concatenate([part.codes for part in parts]),
        features=np.concatenate([part.features for part in parts]),
        places=np.array(
            [(number, position) for number, part in enumerate(parts) for position in range(len(part.candidates))],
            np.int64,
        ).reshape(-1, 2),
    )


def confirm_by_embedding(collection: Collection, indices: np.ndarray, embed: Embed, threshold: float) -> Confirm:
    """Returns a test that two images also look alike to an encoder.

    Args:
      collection: where the images are.
      indices: (M,) candidates of the collection that the pairs to confirm refer to.
      embed: the encoder's features.
      threshold: cosine similarity above which a pair is confirmed.

    Only images that some pair asks for are embedded, each once.
    """
    known: dict[int, np.ndarray] = {}

    def confirm(images: np.ndarray, others: np.ndarray) -> np.ndarray:
        asked = sorted({*images.tolist(), *others.tolist()} - known.keys())
        if asked:
            vectors = np.asarray(embed([to_uint8(collection.pixels(indices[i])) for i in asked]), np.float32)
            lengths = np.linalg.norm(vectors, axis=1, keepdims=True)
            known.update(zip(asked, vectors / np.maximum(lengths, 1e-12), strict=True))
        return (
            np.array([known[i] @ known[j] for i, j in zip(images.tolist(), others.tolist(), strict=True)]) > threshold
        )

    return confirm

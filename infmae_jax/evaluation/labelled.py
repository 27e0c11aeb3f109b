"""The labelled images of a split at their stored size, each host its share: with masks, or with objects."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from absl import logging

from data_pipelines.examples import CorruptExample, decode_mask, decode_pixels, objects_of
from data_pipelines.intensity import Intensity
from data_pipelines.reader import ExampleReader
from data_pipelines.remote import local_folders
from infmae_jax.evaluation.windows import readable

_LABELS = {"mask": decode_mask, "objects": objects_of}


class LabelledImage(NamedTuple):
    """An image with its labels.

    Attributes:
      number: its place in the split.
      key: its name.
      pixels: (h,w) uint8 as the model sees it.
      labels: mask (h,w) uint8, the classes of its pixels, 255 = ignore; or its `Objects`.
      attributes: what its source says of it.
    """

    number: int
    key: str
    pixels: np.ndarray
    labels: Any
    attributes: Mapping[str, Any]


class LabelledImages:
    """Iterates over the `LabelledImage`s of this host's share of a split, in order, read ahead in threads.

    Attributes:
      damaged: records that could not be read, and were left out, in one line each.
    """

    def __init__(self, shards: Sequence[str], split: str, intensity: Intensity, kind: str):
        """`kind` of labels: "mask" or "objects". InputError where the shards have no such split."""
        self._reader = ExampleReader(local_folders(shards), split)
        self._intensity, self._kind = intensity, kind
        self.damaged: list[str] = []

    def __iter__(self) -> Iterator[LabelledImage]:
        host, hosts, count = jax.process_index(), jax.process_count(), len(self._reader)
        share = range(host * count // hosts, (host + 1) * count // hosts)
        return readable(self._read, share, CorruptExample, self._leave_out)

    def _leave_out(self, number: int, error: Exception) -> None:
        self.damaged.append(f"record {number}: {error}")
        logging.warning("damaged record left out of the evaluation: %s", self.damaged[-1])

    def _read(self, number: int) -> LabelledImage:
        """InputError where it has no labels of the kind."""
        example = self._reader[number]
        labels = _LABELS[self._kind](example)
        pixels = self._intensity.apply(decode_pixels(example), example.attributes)
        return LabelledImage(number, example.key, pixels, labels, example.attributes)

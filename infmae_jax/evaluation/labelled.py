"""The labelled images of a split at their stored size, in batches of one canvas, each host its share."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence

import jax
import numpy as np
from absl import logging

from data_pipelines.errors import InputError
from data_pipelines.examples import IGNORE, CorruptExample, decode_mask, decode_pixels
from data_pipelines.intensity import Intensity
from data_pipelines.reader import ExampleReader
from data_pipelines.remote import local_folders
from infmae_jax.evaluation.windows import BatchSize, ahead, canvas_of, in_groups, on_canvas


@dataclasses.dataclass(frozen=True, eq=False)
class LabelledImage:
    """image (h,w) uint8 as the model sees it, and mask (h,w) uint8, the classes of its pixels, 255 = ignore."""

    key: str
    image: np.ndarray
    mask: np.ndarray


class LabelledImages:
    """Iterates over (images (N,H,W) uint8, masks (N,H,W) uint8, their `LabelledImage`s) of this host's share.

    N is what `batch_size` says of a canvas: what is missing is filled up with pixels that do not count.

    Attributes:
      damaged: records that could not be read, and were left out, in one line each.
    """

    def __init__(self, shards: Sequence[str], split: str, intensity: Intensity, batch_size: BatchSize):
        """Raises InputError where the shards have no such split."""
        self._reader = ExampleReader(local_folders(shards), split)
        self._intensity, self._size = intensity, batch_size
        host, hosts, count = jax.process_index(), jax.process_count(), len(self._reader)
        self._share = range(host * count // hosts, (host + 1) * count // hosts)
        self.damaged: list[str] = []

    def __iter__(self) -> Iterator[tuple[np.ndarray, np.ndarray, list[LabelledImage]]]:
        for group in in_groups(self._images(), lambda found: canvas_of(*found.image.shape), self._size):
            canvas = canvas_of(*group[0].image.shape)
            spare = self._size(canvas) - len(group)
            images = [on_canvas(found.image, canvas) for found in group] + [np.zeros(canvas, np.uint8)] * spare
            masks = [on_canvas(found.mask, canvas, IGNORE) for found in group]
            yield np.stack(images), np.stack([*masks, *[np.full(canvas, IGNORE, np.uint8)] * spare]), group

    def _images(self) -> Iterator[LabelledImage]:
        for found in ahead(self._read, self._share):
            if isinstance(found, str):
                logging.warning("damaged record left out of the evaluation: %s", found)
                self.damaged.append(found)
            else:
                yield found

    def _read(self, index: int) -> LabelledImage | str:
        try:
            example = self._reader[index]
            if example.mask is None:
                raise InputError(f"{example.key} has no class mask: choose a shard set with masks")
            image = self._intensity.apply(decode_pixels(example), example.attributes)
            return LabelledImage(example.key, image, decode_mask(example))
        except CorruptExample as error:
            return f"record {index}: {error}"

"""The labelled images of a split at their stored size, each host its share: with masks, or with objects."""

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from typing import TypeVar

import jax
import numpy as np
from absl import logging

from data_pipelines.errors import InputError
from data_pipelines.examples import IGNORE, CorruptExample, Example, Objects, decode_mask, decode_pixels
from data_pipelines.intensity import Intensity
from data_pipelines.reader import ExampleReader
from data_pipelines.remote import local_folders
from infmae_jax.evaluation.windows import BatchSize, canvas_of, in_groups, on_canvas, readable

T = TypeVar("T")


class HostShare:
    """This host's share of the examples of a split.

    Attributes:
      damaged: records that could not be read, and were left out, in one line each.
    """

    def __init__(self, shards: Sequence[str], split: str):
        """Raises InputError where the shards have no such split."""
        self._reader = ExampleReader(local_folders(shards), split)
        host, hosts, count = jax.process_index(), jax.process_count(), len(self._reader)
        self._share = range(host * count // hosts, (host + 1) * count // hosts)
        self.damaged: list[str] = []

    def each(self, make: Callable[[int, Example], T]) -> Iterator[T]:
        """What `make` makes of each whole example and its number in the split, ahead in threads, in order."""

        def leave_out(index: int, error: Exception) -> None:
            self.damaged.append(f"record {index}: {error}")
            logging.warning("damaged record left out of the evaluation: %s", self.damaged[-1])

        return readable(lambda index: make(index, self._reader[index]), self._share, CorruptExample, leave_out)


@dataclasses.dataclass(frozen=True, eq=False)
class ImageWithObjects:
    """pixels (h,w) uint8 as the model sees it, its number in the split, its objects, and what its source says of it."""

    number: int
    key: str
    pixels: np.ndarray
    objects: Objects
    attributes: dict


def images_with_objects(share: HostShare, intensity: Intensity) -> Iterator[ImageWithObjects]:
    """The images of a share; InputError for one without a list of objects."""

    def make(number: int, example: Example) -> ImageWithObjects:
        if example.objects is None:
            raise InputError(f"{example.key} has no list of objects: choose a shard set with boxes")
        pixels = intensity.apply(decode_pixels(example), example.attributes)
        return ImageWithObjects(number, example.key, pixels, example.objects, dict(example.attributes))

    return share.each(make)


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
      damaged: see `HostShare`.
    """

    def __init__(self, shards: Sequence[str], split: str, intensity: Intensity, batch_size: BatchSize):
        """Raises InputError where the shards have no such split."""
        self._share, self._intensity, self._size = HostShare(shards, split), intensity, batch_size

    @property
    def damaged(self) -> list[str]:
        return self._share.damaged

    def __iter__(self) -> Iterator[tuple[np.ndarray, np.ndarray, list[LabelledImage]]]:
        for group in in_groups(self._share.each(self._read), lambda found: canvas_of(*found.image.shape), self._size):
            canvas = canvas_of(*group[0].image.shape)
            spare = self._size(canvas) - len(group)
            images = [on_canvas(found.image, canvas) for found in group] + [np.zeros(canvas, np.uint8)] * spare
            masks = [on_canvas(found.mask, canvas, IGNORE) for found in group]
            yield np.stack(images), np.stack([*masks, *[np.full(canvas, IGNORE, np.uint8)] * spare]), group

    def _read(self, _: int, example: Example) -> LabelledImage:
        if example.mask is None:
            raise InputError(f"{example.key} has no class mask: choose a shard set with masks")
        image = self._intensity.apply(decode_pixels(example), example.attributes)
        return LabelledImage(example.key, image, decode_mask(example))

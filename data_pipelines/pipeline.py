"""Shards -> batches of crops and visible tokens.

    step -> sample positions of this host -> record indices (a new order every epoch, shard sets mixed)
    -> read, decode, crop, augment, mask (random) -> batch -> Grain: slice at the step, threads, worker processes

The batch of a step is a function of (config, step, host) and nothing else: randomness comes from the global position
of a sample, hosts take neighbouring parts of the global batch, workers get whole batches, and a resumed run starts by
slicing, not from saved iterator state. So hosts, workers, threads and restarts change nothing but speed.

Grain's part is to run that function ahead of time. Its elements are batches because its bookkeeping (measured: 120 us
an element for shuffle, repeat and random map) would otherwise cost a tenth of the time that an image takes.

Shape letters: B batch (global), b = B / hosts, H W pixel rows and columns, K visible tokens.
"""

from __future__ import annotations

import dataclasses
import functools
import signal
import sys
import weakref
from collections.abc import Iterator, Sequence
from typing import Any, Self

import grain
import numpy as np
from absl import flags, logging

from data_pipelines.augment import (
    Box,
    InfraredAugment,
    center_crop_resize,
    crop_box,
    flip,
    infrared_augment,
    resize,
    resize_box,
)
from data_pipelines.commands import EXIT_LOST
from data_pipelines.errors import InputError
from data_pipelines.examples import ExampleSource, Intensity
from data_pipelines.image_cache import CachedImage, FreshImage
from data_pipelines.masking import MaskConfig, num_visible, select_visible, token_grid, token_scores
from data_pipelines.order import RecordOrder
from data_pipelines.records import CorruptRecord, Record, read_manifest
from data_pipelines.remote import local_folders
from data_pipelines.workers import follow_parent

# The share of damaged records is judged over at least this many samples, so that one early record is not "100 %".
MIN_SAMPLES_JUDGED = 1000
DECODINGS = ("exact", "fast")


class WorkerDied(InputError):
    """A worker process ended by itself: killed, most often for memory, or crashed."""

    exit_code = EXIT_LOST


class DamagedShards(InputError):
    """More records are damaged than the config allows."""


@dataclasses.dataclass(frozen=True)
class PipelineConfig:
    """Where samples come from and what happens to them.

    Attributes:
      shards: folders of shard sets made by `data_pipelines.prepare`; URLs are copied first (`data_pipelines.remote`).
      weights: share of each shard set among the samples, any positive scale; empty: the sets are joined, every record
        once an epoch.
      image_size: rows and columns of a crop, multiples of the mask's patch side.
      batch_size: global, over all hosts.
      seed: of order, crops, augmentation and random masks; 0 to 2**32 - 1.
      scale, ratio: of the random crop: shares of the area, aspect ratios (width / height).
      flip: mirror left and right half of the time.
      augment: infrared augmentations, off by default.
      mask: which tokens stay visible.
      intensity: stored integers to 8 bit.
      decoding: "exact", or "fast": crops larger than `image_size` are cut from JPEGs decoded at half their size. Same
        boxes, softer pixels (README, "Data").
      cache: folder on a local disk in which decoded images are kept for later epochs, other processes and later runs
        (one byte a pixel of the shards); changes no pixel. Empty: none are kept.
      max_corrupt: stop when damaged records are more than this share of the samples (of 1,000 samples at least); until
        then the next good record takes a damaged one's place and is counted.
      workers: reading processes; 0 reads in this one.
      threads: a reading process; decoding and resizing run without Python's lock.
      prefetch: batches that each reading process keeps ready.
    """

    shards: tuple[str, ...] = ()
    weights: tuple[float, ...] = ()
    image_size: tuple[int, int] = (224, 224)
    batch_size: int = 256
    seed: int = 0
    scale: tuple[float, float] = (0.2, 1.0)
    ratio: tuple[float, float] = (3 / 4, 4 / 3)
    flip: bool = True
    augment: InfraredAugment = dataclasses.field(default_factory=InfraredAugment)
    mask: MaskConfig = dataclasses.field(default_factory=MaskConfig)
    intensity: Intensity = dataclasses.field(default_factory=Intensity)
    decoding: str = "exact"
    cache: str = ""
    max_corrupt: float = 0.01
    workers: int = 0
    threads: int = 2
    prefetch: int = 4

    def __post_init__(self):
        rows, columns = token_grid(*self.image_size, self.mask.patch)
        num_visible(self.mask, rows * columns)
        if self.weights and len(self.weights) != len(self.shards):
            raise InputError(
                f"data.weights has {len(self.weights)} values for {len(self.shards)} shard sets; give one each"
            )
        if not all(0 < weight < float("inf") for weight in self.weights):
            raise InputError(f"data.weights={self.weights} must be positive; leave out the sets that you do not want")
        if not 0 < self.scale[0] <= self.scale[1] <= 1 or not 0 < self.ratio[0] <= self.ratio[1]:
            raise InputError(
                f"data.scale={self.scale} must lie in (0, 1], data.ratio={self.ratio} above 0, both in ascending order"
            )
        for name, least in (("batch_size", 1), ("seed", 0), ("workers", 0), ("threads", 0), ("prefetch", 1)):
            if getattr(self, name) < least:
                raise InputError(f"data.{name}={getattr(self, name)} must be at least {least}")
        if self.decoding not in DECODINGS:
            raise InputError(f"data.decoding={self.decoding!r} is unknown; choose one of {', '.join(DECODINGS)}")
        if self.cache and self.decoding != "exact":
            raise InputError("data.cache keeps whole images, data.decoding='fast' makes half ones; choose one of them")
        if self.seed >= 2**32:
            raise InputError(f"data.seed={self.seed} must be below 2**32")
        if not 0 <= self.max_corrupt <= 1:
            raise InputError(f"data.max_corrupt={self.max_corrupt} is a share; use a value from 0 to 1")


class TrainBatches:
    """Endless iterator over one host's batches; `close()` it, or use it as a context manager.

    Attributes:
      samples: number of samples given out.
      substituted: how many of them stand in for a damaged record.
    """

    def __init__(self, batches: Any, source: ExampleSource, config: PipelineConfig):
        self._source, self._config = source, config
        self._open = [batches]
        # A program that ends without closing would otherwise tear workers down after the modules that they need.
        self._closed = weakref.finalize(self, _close, self._open)
        self._named: set[int] = set()
        self.samples = 0
        self.substituted = 0

    def __iter__(self) -> Iterator[dict[str, np.ndarray]]:
        return self

    def __next__(self) -> dict[str, np.ndarray]:
        """The next batch: `image` (b, H, W, 1) uint8, `ids_keep` (b, K) int32.

        Raises:
          DamagedShards: too many damaged records; names one.
          WorkerDied: a reading process is gone.
        """
        try:
            batch = next(self._open[0])
        except IndexError:
            raise ValueError("these batches are closed") from None
        except CorruptRecord as error:
            raise DamagedShards(f"{error}; prepare the shards again") from error
        except RuntimeError as error:
            if "terminated unexpectedly" not in str(error):
                raise
            raise WorkerDied(
                f"one of the {self._config.workers} data workers died ({error}); if memory ran out, lower "
                "data.workers, data.prefetch or data.batch_size"
            ) from error
        if self._config.workers:
            # Arrays of workers live in shared memory that goes with the iterator; a batch must outlive it.
            batch = {name: np.array(value) for name, value in batch.items()}
        corrupt = batch.pop("corrupt")
        self.samples += len(corrupt)
        self._count_damage([int(index) for index in corrupt if index >= 0])
        return batch

    def _count_damage(self, indices: list[int]) -> None:
        for index in indices:
            self.substituted += 1
            if index not in self._named:
                self._named.add(index)
                logging.warning("damaged record replaced by the next good one: %s", self._source.damage(index))
        if indices and self.substituted > self._config.max_corrupt * max(self.samples, MIN_SAMPLES_JUDGED):
            raise DamagedShards(
                f"{self.substituted} of {self.samples} samples came from damaged records, more than "
                f"data.max_corrupt={self._config.max_corrupt:g} allows; the last is "
                f"{self._source.damage(indices[-1])}; prepare the shards again"
            )

    def close(self) -> None:
        """Stops threads and worker processes; again is harmless."""
        self._closed()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _close(iterators: list[Any]) -> None:
    while iterators:
        iterators.pop().close()


def train_batches(
    config: PipelineConfig, start_step: int = 0, process_index: int = 0, process_count: int = 1
) -> TrainBatches:
    """The batches of one host from `start_step` on, for ever.

    The global batch of step s is that of all hosts, concatenated in process order: the same samples in the same order
    for any number of hosts and workers.

    Args:
      config: what to read and how.
      start_step: first global step.
      process_index, process_count: this host among all.

    Raises:
      InputError: shards missing or unreadable, or a batch that the hosts cannot share evenly.
    """
    if config.batch_size % process_count:
        raise InputError(
            f"data.batch_size={config.batch_size} cannot be shared by {process_count} hosts; use a multiple of them"
        )
    maker = _BatchMaker(config, process_index, process_count)
    # A thread makes a whole batch, so a buffer below the number of threads would idle some.
    buffered = max(config.prefetch, config.threads)
    dataset = grain.MapDataset.source(maker)[start_step:].to_iter_dataset(
        grain.ReadOptions(num_threads=config.threads, prefetch_buffer_size=buffered)
    )
    if config.workers:
        if not flags.FLAGS.is_parsed():
            flags.FLAGS.mark_as_parsed()  # Grain reads absl flags to start workers; outside absl's `app.run` none exist
        dataset = dataset.mp_prefetch(
            grain.MultiprocessingOptions(config.workers, per_worker_buffer_size=config.prefetch), _start_worker
        )
    return TrainBatches(iter(dataset), maker.source, config)


def _start_worker(number: int, count: int) -> None:
    """A cluster's scheduler signals all processes of a job; when to end is the parent's to decide."""
    del number, count
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    follow_parent()


def num_examples(config: PipelineConfig) -> int:
    """Number of records in all shard sets: the length of an epoch.

    Raises:
      InputError: a shard set is missing, unreadable or empty.
    """
    return sum(_counts(config))


def record_indices(config: PipelineConfig, step: int) -> np.ndarray:
    """Indices of the records, into the joined shard sets, in the global batch of a step: (B,) int64."""
    return _order(config).indices(step * config.batch_size, config.batch_size)


def sample_generator(config: PipelineConfig, position: int) -> np.random.Generator:
    """The source of all randomness of the sample at a global position; the box of its crop is drawn first."""
    return np.random.default_rng([config.seed, position])


def record_keys(config: PipelineConfig, step: int) -> list[str]:
    """Keys of the records in the global batch of a step, in order (of a damaged record: of its substitute)."""
    source = _uncached(config)

    def key(record: Record) -> str:
        source.image(record)
        return record.key

    return [source.read(int(index), key)[0] for index in record_indices(config, step)]


def fixed_batch(config: PipelineConfig, count: int) -> dict[str, np.ndarray]:
    """The same images every time, without augmentation (centre crop): for pictures.

    Args:
      config: what to read.
      count: number of images, spread evenly over the records.

    Returns:
      `image` (count, H, W, 1) uint8 and `ids_keep` (count, K) int32.
    """
    source = _uncached(config)
    indices = np.linspace(0, len(source) - 1, count).astype(int)
    images = [source.read(int(index), source.image)[0] for index in indices]
    views = np.stack([center_crop_resize(image, config.image_size) for image in images])
    generators = [np.random.default_rng([config.seed, int(index)]) for index in indices]
    return {"image": views[..., None], "ids_keep": _visible(views, generators, config.mask)}


def _uncached(config: PipelineConfig) -> ExampleSource:
    _counts(config)
    return ExampleSource(local_folders(config.shards), config.intensity)


def _counts(config: PipelineConfig) -> list[int]:
    if not config.shards:
        raise InputError("data.shards is empty; name a folder made by `python -m data_pipelines.prepare`")
    counts = [read_manifest(folder).count for folder in local_folders(config.shards)]
    for folder, count in zip(config.shards, counts, strict=True):
        if count == 0:
            raise InputError(f"shard set {folder} holds no records; prepare it again or leave it out")
    return counts


def _order(config: PipelineConfig) -> RecordOrder:
    return RecordOrder(_counts(config), config.weights, config.seed)


class _BatchMaker:
    """Random access to one host's batches by step, as a Grain source. Holds files, not pixels: cheap to pickle."""

    def __init__(self, config: PipelineConfig, process_index: int, process_count: int):
        self._config, self._order = config, _order(config)
        self.source = ExampleSource(local_folders(config.shards), config.intensity, config.cache)
        self._size = config.batch_size // process_count
        self._offset = process_index * self._size

    def __len__(self) -> int:
        return sys.maxsize

    def __getitem__(self, step: int) -> dict[str, np.ndarray]:
        """`image` (b, H, W, 1) uint8, `ids_keep` (b, K) int32, `corrupt` (b,) int64 (see `ExampleSource.read`)."""
        config = self._config
        first = int(step) * config.batch_size + self._offset
        images = np.empty((self._size, *config.image_size), np.uint8)
        corrupt = np.empty(self._size, np.int64)
        generators = []
        indices = self._order.indices(first, self._size).tolist()
        examples = self.source.open_ahead(indices)
        drawn = [[] if each is None else [self._draw(each, first + place)] for place, each in enumerate(examples)]
        for place, index in enumerate(indices):
            make = functools.partial(self._crop, position=first + place, drawn=drawn[place])
            (images[place], rng), corrupt[place] = self.source.read(index, make, examples[place])
            generators.append(rng)
        return {"image": images[..., None], "ids_keep": _visible(images, generators, config.mask), "corrupt": corrupt}

    def _draw(self, example: Record | CachedImage | FreshImage, position: int) -> tuple[np.random.Generator, Box]:
        """The generator of a sample, and the box of its crop."""
        rng, config = sample_generator(self._config, position), self._config
        return rng, crop_box(rng, example.height, example.width, config.scale, config.ratio)

    def _crop(
        self,
        example: Record | CachedImage | FreshImage,
        position: int,
        drawn: list[tuple[np.random.Generator, Box]],
    ) -> tuple[np.ndarray, np.random.Generator]:
        """The augmented crop of an example, `image_size` uint8, and the sample's generator after it.

        `drawn`: holds what `_draw` gave for the sample, or nothing. It is taken out: what stands in for a damaged
        record must not depend on how far the damaged one came.
        """
        config = self._config
        rng, box = drawn.pop() if drawn else self._draw(example, position)
        if isinstance(example, Record):
            larger = box.height >= config.image_size[0] and box.width >= config.image_size[1]
            image = self.source.image(example, half=config.decoding == "fast" and larger)
            shrunk = 1 if image.shape == (example.height, example.width) else 2
            crop = resize_box(image, box, shrunk, config.image_size)
        else:
            crop = resize(example.read(box), config.image_size)
        if config.flip:
            crop = flip(crop, rng)
        return infrared_augment(crop, rng, config.augment), rng


def _visible(images: np.ndarray, generators: Sequence[np.random.Generator], mask: MaskConfig) -> np.ndarray:
    """(B, H, W) uint8 and a generator a sample -> (B, K) int32."""
    scores = token_scores(images, mask)
    if mask.selection == "random":
        return np.stack([select_visible(score, mask, rng) for score, rng in zip(scores, generators, strict=True)])
    return select_visible(scores, mask)

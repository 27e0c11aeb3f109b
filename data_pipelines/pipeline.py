"""Shards -> batches of crops and visible tokens.

    step -> sample positions of this host -> record indices (a new order every epoch, shard sets mixed)
    -> read, decode, crop, augment, mask (random) -> batch -> Grain: slice at the step, threads, worker processes

The batch of a step is a function of (config, step, host) and nothing else: randomness comes from the global position
of a sample, hosts take neighbouring parts of the global batch, workers get whole batches, and a resumed run starts by
slicing, not from saved iterator state. So hosts, workers, threads and restarts change nothing but speed.

Shape letters: B batch (global), b = B / hosts, H W pixel rows and columns, K visible tokens.
"""

from __future__ import annotations

import dataclasses
import math
import sys

import numpy as np
from absl import logging

from data_pipelines.batches import Batches, DamagedShards
from data_pipelines.errors import InputError
from data_pipelines.examples import CorruptExample, Example
from data_pipelines.intensity import Intensity
from data_pipelines.masking import MaskConfig, num_visible, token_grid
from data_pipelines.order import RecordOrder
from data_pipelines.reader import ExampleReader
from data_pipelines.remote import local_folders
from data_pipelines.shards import split_counts
from data_pipelines.transforms import Geometry, InfraredAugment
from data_pipelines.views import PretrainView, View

# The share of damaged records is judged over at least this many samples, so that one early record is not "100 %".
MIN_SAMPLES_JUDGED = 1000


@dataclasses.dataclass(frozen=True)
class PipelineConfig:
    """Where samples come from and what happens to them.

    Attributes:
      shards: folders of shard sets made by `data_pipelines.prepare`; URLs are copied first (`data_pipelines.remote`).
      split: which split of the shard sets.
      weights: share of each shard set among the samples, any positive scale; empty: the sets are joined, every record
        once an epoch.
      image_size: rows and columns of a crop, multiples of 16.
      batch_size: global, over all hosts.
      seed: of order, crops, augmentation and random masks; 0 to 2**32 - 1.
      scale, ratio: of the random crop: shares of the area, aspect ratios (width / height).
      flip: mirror left and right half of the time.
      augment: infrared augmentations, off by default.
      mask: which tokens stay visible.
      intensity: stored integers to 8 bit.
      max_corrupt: stop when damaged records are more than this share of the samples (of 1,000 samples at least); until
        then the next good record takes a damaged one's place and is counted.
      workers: reading processes; 0 reads in this one.
      threads: a reading process; decoding and resizing run without Python's lock.
      prefetch: batches that each reading process keeps ready.
    """

    shards: tuple[str, ...] = ()
    split: str = "train"
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
    max_corrupt: float = 0.01
    workers: int = 0
    threads: int = 2
    prefetch: int = 4

    def __post_init__(self):
        rows, columns = token_grid(*self.image_size)
        num_visible(self.mask, rows * columns)
        if self.weights and len(self.weights) != len(self.shards):
            raise InputError(
                f"data.weights has {len(self.weights)} values for {len(self.shards)} shard sets; give one each"
            )
        if not all(0 < weight < math.inf for weight in self.weights):
            raise InputError(f"data.weights={self.weights} must be positive; leave out the sets that you do not want")
        if not 0 < self.scale[0] <= self.scale[1] <= 1 or not 0 < self.ratio[0] <= self.ratio[1] < math.inf:
            raise InputError(
                f"data.scale={self.scale} must lie in (0, 1], data.ratio={self.ratio} above 0, both in ascending order"
            )
        for name, (least, most) in _RANGES.items():
            if not least <= getattr(self, name) <= most:
                raise InputError(f"data.{name}={getattr(self, name)} must be from {least} to {most}")


# Upper ends are far above what makes sense: they catch slips before memory runs out.
_RANGES = {
    "batch_size": (1, 2**20), "seed": (0, 2**32 - 1), "max_corrupt": (0, 1), "workers": (0, 1024), "threads": (0, 1024),
    "prefetch": (1, 1024),
}  # fmt: skip


class TrainBatches(Batches):
    """Endless.

    Attributes:
      samples: number of samples given out.
      substituted: how many of them stand in for a damaged record.
    """

    def __init__(self, maker: _TrainMaker, start: int):
        super().__init__(maker, start)
        self._reader = maker.reader
        self._named: set[int] = set()
        self.samples = 0
        self.substituted = 0

    def __next__(self) -> dict[str, np.ndarray]:
        """The next batch: the arrays of the view's `spec` with a leading dimension b.

        Raises:
          DamagedShards: too many damaged records; names one.
          WorkerDied: a reading process is gone.
          InputError: the shards cannot be read now, or an example lacks what the view asks for.
        """
        batch = self._next()
        corrupt = batch.pop("corrupt")
        self.samples += len(corrupt)
        self._count_damage([int(index) for index in corrupt if index >= 0])
        return batch

    def _count_damage(self, indices: list[int]) -> None:
        for index in indices:
            self.substituted += 1
            if index not in self._named:
                self._named.add(index)
                logging.warning("damaged record replaced by the next good one: %s", self._damage(index))
        if indices and self.substituted > self._config.max_corrupt * max(self.samples, MIN_SAMPLES_JUDGED):
            raise DamagedShards(
                f"{self.substituted} of {self.samples} samples came from damaged records, more than "
                f"data.max_corrupt={self._config.max_corrupt:g} allows; the last is "
                f"{self._damage(indices[-1])}; prepare the shards again"
            )

    def _damage(self, index: int) -> str:
        return self._reader.damage(index) or f"record {index}: damaged when it was read, whole now"


class EvalBatches(Batches):
    """Every example once, in file order; finite.

    Attributes:
      damaged: number of damaged records met so far, left out as not `valid`.
    """

    def __init__(self, maker: _EvalMaker):
        super().__init__(maker)
        self._reader, self._count = maker.reader, len(maker)
        self.damaged = 0

    def __len__(self) -> int:
        """Number of batches, the same on all hosts."""
        return self._count

    def __next__(self) -> dict[str, np.ndarray]:
        """The next batch: the arrays of the view's `spec`, `valid` (b,) bool and `index` (b,) int64, -1 for padding.

        Raises:
          StopIteration: all examples have been given out.
          DamagedShards: more damaged records than `max_corrupt` allows; names one.
          WorkerDied, InputError: as `TrainBatches`.
        """
        batch = self._next()
        missing = batch["index"][~batch["valid"] & (batch["index"] >= 0)]
        self.damaged += len(missing)
        if len(missing) and self.damaged > self._config.max_corrupt * len(self._reader):
            raise DamagedShards(
                f"{self._reader.damage(int(missing[-1]))}; data.max_corrupt={self._config.max_corrupt:g} of "
                f"{len(self._reader)} examples allows no more than {self.damaged - 1}: prepare the shards again"
            )
        return batch


def train_batches(
    config: PipelineConfig,
    start_step: int = 0,
    process_index: int = 0,
    process_count: int = 1,
    view: View | None = None,
) -> TrainBatches:
    """The batches of one host from `start_step` on, without end.

    The global batch of step s is that of all hosts, concatenated in process order: the same samples in the same order
    for any number of hosts and workers.

    Args:
      config: what to read and how.
      start_step: first global step.
      process_index, process_count: this host among all.
      view: what a sample is; by default `pretrain_view(config)`.

    Raises:
      InputError: shards missing or unreadable, or a batch that the hosts cannot share evenly.
    """
    return TrainBatches(_TrainMaker(config, view or pretrain_view(config), process_index, process_count), start_step)


def eval_batches(
    config: PipelineConfig, split: str, view: View, process_index: int = 0, process_count: int = 1
) -> EvalBatches:
    """Every example of a split once, in file order: for evaluation.

    Each host gets a contiguous share and as many batches as every other host; samples beyond its share are zeros and
    not `valid`. The batch of a step is a function of (config, split, step, host).

    Args:
      config: where to read; order, weights and seed do not matter, except that random views and masks draw from the
        seed and the example's index.
      split: name of the split.
      view: what a sample is.
      process_index, process_count: this host among all.

    Raises:
      InputError: as `train_batches`.
    """
    return EvalBatches(_EvalMaker(dataclasses.replace(config, split=split), view, process_index, process_count))


def pretrain_view(config: PipelineConfig, centered: bool = False) -> PretrainView:
    """The view that the config describes: random crops, or the evaluation view of whole images."""
    whole, augment = ("center", InfraredAugment()) if centered else ("", config.augment)
    crop = config.image_size, whole, config.scale, config.ratio, config.flip
    return PretrainView(*crop, augment, config.intensity, config.mask)


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
    reader = _reader(config)
    return [reader.first_whole(int(index)).key for index in record_indices(config, step)]


def fixed_batch(config: PipelineConfig, count: int) -> dict[str, np.ndarray]:
    """The same images every time, without augmentation (centre crop): for pictures.

    Args:
      config: what to read.
      count: number of images, spread evenly over the records.

    Returns:
      `image` (count, H, W, 1) uint8 and `ids_keep` (count, K) int32.
    """
    reader, view = _reader(config), pretrain_view(config, centered=True)
    indices = np.linspace(0, len(reader) - 1, count).astype(int).tolist()
    generators = [np.random.default_rng([config.seed, index]) for index in indices]
    batch = _empty(view, count)
    for place, (index, rng) in enumerate(zip(indices, generators, strict=True)):
        example = reader.first_whole(index)
        _store(batch, place, view.sample(example, view.geometry(example.height, example.width, rng), rng))
    view.finish(batch, generators)
    return batch


def _reader(config: PipelineConfig) -> ExampleReader:
    _counts(config)
    return ExampleReader(local_folders(config.shards), config.split)


def _counts(config: PipelineConfig) -> list[int]:
    if not config.shards:
        raise InputError("data.shards is empty; name a folder made by `python -m data_pipelines.prepare`")
    return split_counts(local_folders(config.shards), config.split)


def _order(config: PipelineConfig) -> RecordOrder:
    return RecordOrder(_counts(config), config.weights, config.seed)


def _empty(view: View, count: int) -> dict[str, np.ndarray]:
    return {name: np.zeros((count, *shape), dtype) for name, (shape, dtype) in view.spec.items()}


def _store(batch: dict[str, np.ndarray], place: int, sample: dict[str, np.ndarray]) -> None:
    for name, value in sample.items():
        batch[name][place] = value


class _Maker:
    """Random access to one host's batches by step, as a Grain source. Holds files, not pixels: cheap to pickle."""

    def __init__(self, config: PipelineConfig, view: View, process_index: int, process_count: int):
        if config.batch_size % process_count:
            raise InputError(
                f"data.batch_size={config.batch_size} cannot be shared by {process_count} hosts; use a multiple of them"
            )
        self.config, self.view, self.reader = config, view, _reader(config)
        self.size = config.batch_size // process_count

    @property
    def batch_bytes(self) -> int:
        return self.size * sum(math.prod(shape) * np.dtype(dtype).itemsize for shape, dtype in self.view.spec.values())


class _TrainMaker(_Maker):
    def __init__(self, config: PipelineConfig, view: View, process_index: int, process_count: int):
        super().__init__(config, view, process_index, process_count)
        self._order = _order(config)
        self._offset = process_index * self.size

    def __len__(self) -> int:
        return sys.maxsize

    def __getitem__(self, step: int) -> dict[str, np.ndarray]:
        """The view's arrays, and `corrupt` (b,) int64: the index of the damaged record that was replaced, or -1."""
        first = int(step) * self.config.batch_size + self._offset
        batch = _empty(self.view, self.size) | {"corrupt": np.full(self.size, -1, np.int64)}
        generators = []
        indices = self._order.indices(first, self.size).tolist()
        # Several at once cost a third of what they cost between images, whose pixels drive all else out of the caches.
        ahead = [self._draw_ahead(index, first + place) for place, index in enumerate(indices)]
        for place, index in enumerate(indices):
            for candidate in self.reader.candidates(index):
                try:
                    drawn = ahead[place] if candidate == index else None
                    example, geometry, rng = drawn or self._draw(candidate, first + place)
                    _store(batch, place, self.view.sample(example, geometry, rng))
                    break
                except CorruptExample:
                    batch["corrupt"][place] = index
            else:
                raise self.reader.all_damaged(index)
            generators.append(rng)
        self.view.finish(batch, generators)
        return batch


    def _draw(self, index: int, position: int) -> tuple[Example, Geometry, np.random.Generator]:
        """An example, where its sample lies, and the generator after that.

        The generator begins anew: a substitute must not depend on how far the damaged one came.
        """
        example, rng = self.reader[index], sample_generator(self.config, position)
        return example, self.view.geometry(example.height, example.width, rng), rng

    def _draw_ahead(self, index: int, position: int) -> tuple[Example, Geometry, np.random.Generator] | None:
        try:
            return self._draw(index, position)
        except CorruptExample:
            return None  # met again, and dealt with, in its turn


class _EvalMaker(_Maker):
    def __init__(self, config: PipelineConfig, view: View, process_index: int, process_count: int):
        super().__init__(config, view, process_index, process_count)
        count = len(self.reader)
        self._share = range(process_index * count // process_count, (process_index + 1) * count // process_count)
        self._largest_share = -(-count // process_count)

    def __len__(self) -> int:
        return -(-self._largest_share // self.size)

    def __getitem__(self, step: int) -> dict[str, np.ndarray]:
        """The view's arrays, `valid` (b,) bool and `index` (b,) int64, -1 for padding."""
        indices = self._share[step * self.size : (step + 1) * self.size]
        batch = _empty(self.view, self.size)
        batch |= {"valid": np.zeros(self.size, np.bool_), "index": np.full(self.size, -1, np.int64)}
        batch["index"][: len(indices)] = indices
        generators = [np.random.default_rng([self.config.seed, max(index, 0)]) for index in batch["index"].tolist()]
        for place, index in enumerate(indices):
            try:
                example, rng = self.reader[index], generators[place]
                geometry = self.view.geometry(example.height, example.width, rng)
                _store(batch, place, self.view.sample(example, geometry, rng))
                batch["valid"][place] = True
            except CorruptExample:
                continue  # stays zeros and not valid; `EvalBatches` counts it
        self.view.finish(batch, generators)
        return batch

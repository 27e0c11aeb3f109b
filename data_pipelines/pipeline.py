"""Shards -> batches of crops and visible tokens.

    step -> sample positions of this host -> record indices (a new order every epoch, shard sets mixed)
    -> read, decode, crop, augment, mask (random) -> batch -> Grain: slice at the step, threads, worker processes

The batch of a step is a function of (config, step, host) and nothing else: randomness comes from the global position
of a sample, hosts take neighbouring parts of the global batch, workers get whole batches, and a resumed run starts by
slicing, not from saved iterator state. So hosts, workers, threads and restarts change nothing but speed.

Shape letters: B batch (global), b = B / hosts, H W pixel rows and columns, K visible tokens.
"""

import contextlib
import dataclasses
import functools
import math
import sys
from collections.abc import Iterator, Sequence

import numpy as np

from data_pipelines.batches import Batches
from data_pipelines.errors import InputError
from data_pipelines.examples import CorruptExample, Example
from data_pipelines.intensity import Intensity
from data_pipelines.masking import MaskConfig, num_visible, token_grid
from data_pipelines.order import RecordOrder
from data_pipelines.reader import ExampleReader
from data_pipelines.remote import local_folders
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


def train_batches(
    config: PipelineConfig,
    start_step: int = 0,
    process_index: int = 0,
    process_count: int = 1,
    view: View | None = None,
) -> Batches:
    """The batches of one host from `start_step` on, without end: the arrays of the view's `spec`.

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
    return Batches(_TrainMaker(config, view or pretrain_view(config), process_index, process_count), start_step)


def eval_batches(
    config: PipelineConfig, split: str, view: View, process_index: int = 0, process_count: int = 1
) -> Batches:
    """Every example of a split once, in file order: for evaluation.

    Each host gets a contiguous share and as many batches as every other host; samples beyond its share are zeros and
    not `valid`. The batch of a step is a function of (config, split, step, host).

    Beside the arrays of the view's `spec`, batches have `valid` (b,) bool and `index` (b,) int64, -1 for padding.
    Damaged records are zeros and not `valid`, either; more than `max_corrupt` of the split end the evaluation.

    Args:
      config: where to read; order, weights and seed do not matter, except that random views and masks draw from the
        seed and the example's index.
      split: name of the split.
      view: what a sample is.
      process_index, process_count: this host among all.

    Raises:
      InputError: as `train_batches`.
    """
    return Batches(_EvalMaker(dataclasses.replace(config, split=split), view, process_index, process_count))


def pretrain_view(config: PipelineConfig, centered: bool = False) -> PretrainView:
    """The view that the config describes: random crops, or the evaluation view of whole images."""
    whole, augment = ("center", InfraredAugment()) if centered else ("", config.augment)
    crop = config.image_size, whole, config.scale, config.ratio, config.flip
    return PretrainView(*crop, augment, config.intensity, mask=config.mask)


def num_examples(config: PipelineConfig) -> int:
    """Number of records in all shard sets: the length of an epoch.

    Raises:
      InputError: a shard set is missing, unreadable or empty.
    """
    return len(_reader(config))


def batch_examples(config: PipelineConfig, step: int) -> Iterator[Example]:
    """The examples of the global batch of a step, in order (of a damaged record: its substitute)."""
    reader = _reader(config)
    order = RecordOrder(reader.counts, config.weights, config.seed)
    return map(reader.first_whole, order.indices(step * config.batch_size, config.batch_size).tolist())


def sample_generator(config: PipelineConfig, position: int) -> np.random.Generator:
    """The source of all randomness of the sample at a global position; the box of its crop is drawn first."""
    return np.random.default_rng([config.seed, position])


def record_keys(config: PipelineConfig, step: int) -> list[str]:
    """Keys of the records in the global batch of a step, in order (of a damaged record: of its substitute)."""
    return [example.key for example in batch_examples(config, step)]


def fixed_batch(config: PipelineConfig, count: int) -> dict[str, np.ndarray]:
    """The same images every time, without augmentation (centre crop): for pictures.

    Args:
      config: what to read.
      count: number of images, spread evenly over the records.

    Returns:
      `image` (count, H, W, 1) uint8 and `ids_keep` (count, K) int32.
    """
    maker = _Maker(dataclasses.replace(config, batch_size=count), pretrain_view(config, centered=True), 0, 1)
    indices = np.linspace(0, len(maker.reader) - 1, count).astype(int).tolist()
    return maker.make(indices, indices, substitute=True)[0]


def _reader(config: PipelineConfig) -> ExampleReader:
    if not config.shards:
        raise InputError("data.shards is empty; name a folder made by `python -m data_pipelines.prepare`")
    reader = ExampleReader(local_folders(config.shards), config.split)
    if 0 in reader.counts:
        empty = config.shards[reader.counts.index(0)]
        raise InputError(f"shard set {empty} holds no records; prepare it again or leave it out")
    return reader


class _Maker:
    """Makes the batches of one host. Holds files, not pixels: cheap to pickle."""

    def __init__(self, config: PipelineConfig, view: View, process_index: int, process_count: int):
        if config.batch_size % process_count:
            raise InputError(
                f"data.batch_size={config.batch_size} cannot be shared by {process_count} hosts; use a multiple of them"
            )
        self.config, self.view, self.reader = config, view, _reader(config)
        self.size = config.batch_size // process_count
        self._process_index, self._process_count = process_index, process_count
        sample_bytes = (math.prod(shape) * np.dtype(dtype).itemsize for shape, dtype in view.spec.values())
        self.batch_bytes = self.size * sum(sample_bytes)

    def make(
        self, indices: Sequence[int], positions: Sequence[int], substitute: bool
    ) -> tuple[dict[str, np.ndarray], np.ndarray]:
        """Returns the view's arrays of some examples, zeros behind them, and of which example each sample was made.

        Args:
          indices: of the examples, at most `size`.
          positions: of the samples, `size` of them: give their generators.
          substitute: the next whole example takes the place of a damaged one; else that stays zeros.

        Returns:
          The batch, and (size,) int64 indices of examples, -1 where there is none.
        """
        batch = {name: np.zeros((self.size, *shape), dtype) for name, (shape, dtype) in self.view.spec.items()}
        used = np.full(self.size, -1, np.int64)
        generators: list[np.random.Generator | None] = [None] * self.size
        # Several at once cost a third of what they cost between images, whose pixels drive all else out of the caches.
        ahead = {}
        for place, (index, position) in enumerate(zip(indices, positions, strict=False)):
            with contextlib.suppress(CorruptExample):  # met again, and dealt with, in its turn
                ahead[place] = self._draw(index, position)
        for place, index in enumerate(indices):
            for candidate in self.reader.candidates(index) if substitute else [index]:
                try:
                    example, geometry, rng = ahead.pop(place, None) or self._draw(candidate, positions[place])
                    for name, value in self.view.sample(example, geometry, rng).items():
                        batch[name][place] = value
                    used[place], generators[place] = candidate, rng
                    break
                except CorruptExample:
                    continue
            else:
                if substitute:
                    raise self.reader.all_damaged(index)
        # Of padding and of damaged examples, too: what is made for a whole batch is made of them as well.
        pairs = zip(generators, positions, strict=True)
        self.view.finish(batch, [rng or sample_generator(self.config, position) for rng, position in pairs])
        return batch, used

    def _draw(self, index: int, position: int) -> tuple[Example, Geometry, np.random.Generator]:
        """An example, where its sample lies, and the generator after that.

        The generator begins anew: a substitute must not depend on how far the damaged one came.
        """
        example, rng = self.reader[index], sample_generator(self.config, position)
        return example, self.view.geometry(example.height, example.width, rng), rng


class _TrainMaker(_Maker):
    """Random access to endless batches by step, as a Grain source."""

    def __len__(self) -> int:
        return sys.maxsize

    @functools.cached_property
    def _order(self) -> RecordOrder:
        return RecordOrder(self.reader.counts, self.config.weights, self.config.seed)

    def __getitem__(self, step: int) -> dict[str, np.ndarray]:
        """The view's arrays, and `corrupt` (b,) int64: the index of the damaged record that was replaced, or -1."""
        first = int(step) * self.config.batch_size + self._process_index * self.size
        indices = self._order.indices(first, self.size)
        batch, used = self.make(indices.tolist(), range(first, first + self.size), substitute=True)
        return batch | {"corrupt": np.where(used == indices, -1, indices)}

    def judged(self, samples: int) -> int:
        return max(samples, MIN_SAMPLES_JUDGED)


class _EvalMaker(_Maker):
    """Random access to the batches of a host's share of the examples, as a Grain source."""

    def __len__(self) -> int:
        return -(-len(self.reader) // self._process_count // self.size)

    def __getitem__(self, step: int) -> dict[str, np.ndarray]:
        """The view's arrays, `valid`, `index`, and `corrupt` (b,) int64: the index of the damaged record, or -1."""
        starts = (np.arange(2) + self._process_index) * len(self.reader) // self._process_count
        indices = range(*starts.tolist())[step * self.size : (step + 1) * self.size]
        index = np.full(self.size, -1, np.int64)
        index[: len(indices)] = indices
        batch, used = self.make(indices, np.maximum(index, 0).tolist(), substitute=False)
        return batch | {"valid": used >= 0, "index": index, "corrupt": np.where(used == index, -1, index)}

    def judged(self, samples: int) -> int:
        return len(self.reader)

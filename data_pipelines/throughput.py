"""How many images a second a core makes: this pipeline, the classic one, and the parts. For `infmae_jax.bench data`.

Rows are measured in turns, a short slice each, over several rounds, so that whatever else the machine does hits all of
them alike; ratios are those of the same round. "A core" is one second of CPU time of a process pinned to one core
(waiting is not counted; records come from the page cache). The rows of several cores count wall time and get turns of
some seconds: within less, what threads and workers made ahead hides what they sustain.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import io
import tempfile
import time
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from PIL import Image

from data_pipelines import scaling
from data_pipelines.augment import MEAN, STD, crop_box, random_resized_crop
from data_pipelines.decode import decode_record_pixels
from data_pipelines.errors import InputError
from data_pipelines.examples import ExampleSource, Intensity
from data_pipelines.masking import mask_from_ids, select_visible, token_scores
from data_pipelines.order import RecordOrder
from data_pipelines.pipeline import PipelineConfig, TrainBatches, num_examples, train_batches
from data_pipelines.records import Record
from data_pipelines.remote import local_folders

Row = dict[str, Any]
# Enough different images that no cache below main memory holds them.
POOL = 256
WARM_SAMPLES = 2000
# A cache of larger sets would take too long to fill.
MOST_CACHED = 6000


def run(
    shards: Sequence[str], workers: int = 0, seconds: float = 60.0, batch_size: int = 64, rounds: int = 15
) -> list[Row]:
    """Measures the input pipeline on shards.

    Args:
      shards: shard sets.
      workers: also measure this many worker processes on all cores, if more than the 2 that are measured on two cores.
      seconds: time for all rows together.
      batch_size: images a batch.
      rounds: turns that each row gets.

    Returns:
      Rows with the keys `name`, `images_per_second` (median of the rounds), `low` and `high` (first and last decile),
      `per` ("core" or "machine"), `versus` (a ratio to another row, median of the rounds, or None), `versus_row` (that
      row's name) and `note`. The rows "… against exact" and "pipeline against Pillow" hold `mean_difference`,
      `max_difference` (gray levels), `pixels_changed` and `kept_tokens_changed` (shares) in place of the rates. The
      cached mode is left out for sets of more than 6,000 records.

    Raises:
      InputError: unusable shards.
    """
    config = PipelineConfig(tuple(shards), batch_size=batch_size, threads=0)
    if num_examples(config) < 2:
        raise InputError(f"{shards[0]} holds too few records to measure; prepare a set of some hundred images")
    share = 0.4 if len(scaling.cores()) > 1 or workers > 2 else 1.0
    rows = _per_core_rows(config, seconds * share, rounds)
    if share < 1.0:
        rows += _machine_rows(config, workers, seconds * (1 - share), max(3, rounds // 4))
    return [*rows, _difference_to_pillow(config), *_differences_of_ways(config)]


def classic_batch(payloads: Sequence[bytes], rng: np.random.Generator, size: tuple[int, int]) -> np.ndarray:
    """What pipelines for colour photographs do, in their usual library's steps and precision.

    Pillow's RGB decoder, bicubic RandomResizedCrop and flip on the Pillow image, ToTensor (channels first, float32,
    /255), Normalize, collate.

    Args:
      payloads: encoded images.
      rng: source of randomness.
      size: rows and columns of a crop.

    Returns:
      (B, 3, size[0], size[1]) float32.
    """
    samples = []
    for payload in payloads:
        image = Image.open(io.BytesIO(payload)).convert("RGB")
        box = crop_box(rng, image.height, image.width)
        image = image.crop((box.left, box.top, box.left + box.width, box.top + box.height))
        image = image.resize((size[1], size[0]), Image.Resampling.BICUBIC)
        if rng.random() < 0.5:
            image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        sample = np.ascontiguousarray(np.array(image).transpose(2, 0, 1)).astype(np.float32)
        sample /= np.float32(255)
        sample -= np.float32(MEAN)
        sample /= np.float32(STD)
        samples.append(sample)
    return np.stack(samples)


@dataclasses.dataclass(frozen=True)
class _Pool:
    """Some records of the shards at each stage of the work."""

    records: list[Record]
    images: list[np.ndarray]
    crops: np.ndarray

    @classmethod
    def load(cls, source: ExampleSource, config: PipelineConfig) -> _Pool:
        indices = np.random.default_rng(0).permutation(len(source))[:POOL]
        records = [source.read(int(index), lambda record: record)[0] for index in indices]
        images = [source.image(record) for record in records]
        rng = np.random.default_rng(0)
        crops = [random_resized_crop(image, rng, config.image_size) for image in images]
        return cls(records, images, np.stack(crops))


def _stages(config: PipelineConfig, source: ExampleSource, pool: _Pool) -> dict[str, Callable[[], int]]:
    """One call does some work and returns for how many images."""
    rng = np.random.default_rng(0)
    order = RecordOrder([len(source)], (), 0)
    position = 0

    def classic() -> int:
        nonlocal position
        indices = order.indices(position, config.batch_size)
        position += len(indices)
        classic_batch([source.record(int(index)).payload for index in indices], rng, config.image_size)
        return len(indices)

    def each(work: Callable[[Any], Any], items: Sequence[Any]) -> Callable[[], int]:
        turn = 0

        def some() -> int:
            nonlocal turn
            for _ in range(config.batch_size):
                work(items[turn % len(items)])
                turn += 1
            return config.batch_size

        return some

    def masks() -> int:
        select_visible(token_scores(pool.crops, config.mask), config.mask)
        return len(pool.crops)

    return {
        "classic": classic,
        "decode": each(decode_record_pixels, pool.records),
        "decode fast": each(lambda record: source.image(record, half=True), pool.records),
        "crop": each(lambda image: random_resized_crop(image, rng, config.image_size), pool.images),
        "mask": masks,
    }


def _per_core_rows(config: PipelineConfig, seconds: float, rounds: int) -> list[Row]:
    source = ExampleSource(local_folders(config.shards), Intensity())
    with contextlib.ExitStack() as stack:
        stack.enter_context(scaling.pinned(1))
        ways = {
            name: stack.enter_context(train_batches(way))
            for name, way in _ways(config, stack.enter_context(_cache_folder())).items()
        }
        # The steady state of a long run: weights of the usual crop sizes made, an epoch of images in the cache.
        for name, batches in ways.items():
            samples = len(source) if name == "pipeline cached" else min(4 * len(source), WARM_SAMPLES)
            while batches.samples < samples:
                next(batches)
        stages = {
            **{name: functools.partial(_count_next, batches) for name, batches in ways.items()},
            **_stages(config, source, _Pool.load(source, config)),
        }
        rates = _take_turns(stages, seconds, rounds)
    versus = dict.fromkeys(ways, "classic") | {"mask": "pipeline"}
    notes = {
        "pipeline": "shards to batches, crops within one level of Pillow's",
        "pipeline fast": "decoding='fast'",
        "pipeline cached": "cache=FOLDER, after the first epoch",
        "classic": "Pillow RGB, bicubic RandomResizedCrop, ToTensor, Normalize, float32",
        "crop": "of decoded images",
        "mask": f"{config.mask.score}, {config.mask.selection}, of crops",
    }
    return [_row(name, "core", rates, versus.get(name), notes.get(name, "")) for name in stages]


def _ways(config: PipelineConfig, cache: str) -> dict[str, PipelineConfig]:
    """The pipeline's named modes: exact, fast and, for sets that it fills quickly, cached."""
    ways = {"pipeline": config, "pipeline fast": dataclasses.replace(config, decoding="fast")}
    if num_examples(config) <= MOST_CACHED:
        ways["pipeline cached"] = dataclasses.replace(config, cache=cache)
    return ways


def _cache_folder() -> tempfile.TemporaryDirectory:
    return tempfile.TemporaryDirectory(prefix="infmae-bench-")


def _count_next(batches: TrainBatches) -> int:
    return len(next(batches)["image"])


def _machine_rows(config: PipelineConfig, workers: int, seconds: float, rounds: int) -> list[Row]:
    """One core against two; and worker processes on all cores."""
    rows = []
    if len(scaling.cores()) > 1:
        rates = scaling.two_core_rates(config, seconds, rounds)
        for name in rates:
            rows.append(_row(name, "machine", rates, None if name == scaling.ONE else scaling.ONE, scaling.NOTES[name]))
    if workers > 2:
        name, turns = f"{workers} workers", max(2, rounds // 4)
        spread = dataclasses.replace(config, threads=0, workers=workers)
        rates = {name: [scaling.wall_rate(spread, seconds / turns / 4) for _ in range(turns)]}
        note = f"{workers} worker processes on {len(scaling.cores())} cores, wall time"
        rows.append(_row(name, "machine", rates, None, note))
    return rows


def _take_turns(stages: dict[str, Callable[[], int]], seconds: float, rounds: int) -> dict[str, list[float]]:
    """Images a CPU second of every stage in every round, after a round that does not count (it fills caches)."""
    slice_seconds = seconds / (len(stages) * (rounds + 1))
    rates: dict[str, list[float]] = {name: [] for name in stages}
    for number in range(rounds + 1):
        for name, stage in stages.items():
            end, start, images = time.perf_counter() + slice_seconds, time.process_time(), 0
            while images == 0 or time.perf_counter() < end:
                images += stage()
            if number:
                rates[name].append(images / (time.process_time() - start))
    return rates


def _row(name: str, per: str, rates: dict[str, list[float]], versus: str | None, note: str) -> Row:
    low, median, high = np.quantile(rates[name], [0.1, 0.5, 0.9])
    ratio = float(np.median(np.divide(rates[name], rates[versus]))) if versus else None
    return {
        "name": name, "images_per_second": float(median), "low": float(low), "high": float(high), "per": per,
        "versus": ratio, "versus_row": versus, "note": note,
    }  # fmt: skip


def _difference_to_pillow(config: PipelineConfig) -> Row:
    """Our crops against Pillow's of the same boxes."""
    source = ExampleSource(local_folders(config.shards), Intensity())
    pool = _Pool.load(source, config)
    rng, height, width = np.random.default_rng(1), *config.image_size
    ours, theirs = [], []
    for image in pool.images:
        seed = int(rng.integers(2**32))
        box = crop_box(np.random.default_rng(seed), *image.shape)
        ours.append(random_resized_crop(image, np.random.default_rng(seed), config.image_size))
        theirs.append(np.asarray(Image.fromarray(box.of(image)).resize((width, height), Image.Resampling.BICUBIC)))
    return _difference("pipeline against Pillow", np.stack(ours), np.stack(theirs), config)


def _differences_of_ways(config: PipelineConfig) -> list[Row]:
    """Batches of the other modes against the exact ones: the same boxes, so pixels and tokens can be compared."""
    with _cache_folder() as cache:
        ways = _ways(dataclasses.replace(config, batch_size=POOL), cache)
        if "pipeline cached" in ways:
            _first_batch(ways["pipeline cached"])  # fills the cache
        exact, *others = ((name, _first_batch(way)) for name, way in ways.items())
    return [_difference(f"{name} against exact", images, exact[1], config) for name, images in others]


def _first_batch(config: PipelineConfig) -> np.ndarray:
    with train_batches(config) as batches:
        return next(batches)["image"][..., 0]


def _difference(name: str, images: np.ndarray, reference: np.ndarray, config: PipelineConfig) -> Row:
    levels = np.abs(images.astype(np.int16) - reference)
    ids = [select_visible(token_scores(pixels, config.mask), config.mask) for pixels in (images, reference)]
    tokens = token_scores(reference, config.mask).shape[-1]
    ours, theirs = (mask_from_ids(kept, tokens) == 0 for kept in ids)
    return {
        "name": name,
        "mean_difference": float(levels.mean()),
        "max_difference": int(levels.max()),
        "pixels_changed": float((levels > 0).mean()),
        "kept_tokens_changed": float((theirs & ~ours).sum() / theirs.sum()),
        "note": f"{len(images)} crops, gray levels",
    }

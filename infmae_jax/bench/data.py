"""Images per second of the input pipeline, against a classic Pillow RGB pipeline (of shards of any encoding).

Rows are measured in turns, a short slice each, over several rounds, so that whatever else the machine does hits all of
them alike; ratios are those of the same round. "Per core" is per second of CPU time, best with `taskset -c 0` in front
(records come from the page cache). Worker processes are counted by wall time on all cores.
"""

import contextlib
import dataclasses
import functools
import io
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from PIL import Image

from data_pipelines.errors import InputError
from data_pipelines.examples import Example, decode_pixels
from data_pipelines.masking import select_visible, token_scores
from data_pipelines.pipeline import PipelineConfig, num_examples, train_batches
from data_pipelines.reader import ExampleReader
from data_pipelines.remote import local_folders
from data_pipelines.transforms import MEAN, STD, draw_crop
from infmae_jax import embedded
from infmae_jax.bench import timing
from infmae_jax.bench.results import report
from infmae_jax.tasks.pretrain import EmbeddedConfig, PretrainConfig

POOL = 512  # different images: no cache below main memory holds them
_WARM_SAMPLES = 2000  # until the weights of the usual crop sizes are made
_SCENES, _QUICK_SCENES = 256, 32  # where the config has no shards


def data(config: PretrainConfig, workers: int, seconds: float, quick: bool = False) -> dict[str, Any]:
    """Measures the pipeline on the config's shards, see `measure`; `quick` only shows that it runs."""
    scenes = EmbeddedConfig(images=_QUICK_SCENES if quick else _SCENES)
    with tempfile.TemporaryDirectory(prefix="infmae-bench-") as folder:
        with contextlib.redirect_stdout(sys.stderr):  # standard output is for the report
            with_shards = embedded.with_shards(dataclasses.replace(config, embedded=scenes), folder)
        rows = measure(with_shards.data.shards, workers, seconds, *((16, 3) if quick else ()))
    origin = ",".join(config.data.shards) or f"{scenes.images} synthetic scenes"
    return report("data", {"shards": origin, "workers": workers, "seconds": seconds}, rows)


def measure(
    folders: Sequence[str], workers: int, seconds: float, batch_size: int = 64, rounds: int = 15
) -> list[dict[str, Any]]:
    """Rows of `name`, `images_per_second` (median, `low` and `high`: deciles), `step_ms` (of a batch), `per`, `versus`
    (ratio to classic).

    Raises:
      InputError: unusable shards, or too few images.
    """
    config = PipelineConfig(tuple(folders), batch_size=batch_size, threads=0)
    if num_examples(config) < 2:
        raise InputError(f"{folders[0]} holds too few records to measure; prepare a set of some hundred images")
    reader = ExampleReader(local_folders(config.shards))
    examples = [reader.first_whole(int(i)) for i in np.random.default_rng(0).permutation(len(reader))[:POOL]]
    with train_batches(config) as batches:
        while batches.samples < min(4 * len(reader), _WARM_SAMPLES):
            crops = next(batches)["image"][..., 0]
        stages = {"pipeline": functools.partial(next, batches), **_parts(config, examples, crops)}
        rows = _rows(stages, batch_size, seconds if workers == 0 else seconds / 2, rounds, "core")
    if workers:
        with train_batches(dataclasses.replace(config, workers=workers)) as batches:
            stages = {f"{workers} workers": functools.partial(next, batches)}
            rows += _rows(stages, batch_size, seconds / 2, 3, "machine")
    return rows


def classic_batch(images: Sequence[bytes], rng: np.random.Generator, size: tuple[int, int]) -> np.ndarray:
    """What pipelines for colour photographs do: Pillow RGB, bicubic RandomResizedCrop, flip, ToTensor, Normalize.

    Returns:
      (B, 3, size[0], size[1]) float32.
    """
    samples = []
    for data in images:
        image = Image.open(io.BytesIO(data)).convert("RGB")
        box = draw_crop(rng, image.height, image.width)
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


def _parts(config: PipelineConfig, examples: Sequence[Example], crops: np.ndarray) -> dict[str, Callable[[], Any]]:
    """One call does some work for a batch."""
    rng, order = np.random.default_rng(0), np.random.default_rng(1)

    def some() -> list[Example]:
        return [examples[i] for i in order.integers(len(examples), size=config.batch_size)]

    return {
        "classic": lambda: classic_batch([example.image for example in some()], rng, config.image_size),
        "decode": lambda: [decode_pixels(example) for example in some()],
        "mask": lambda: select_visible(token_scores(crops, config.mask), config.mask),
    }


def _rows(
    stages: dict[str, Callable[[], Any]], batch_size: int, seconds: float, rounds: int, per: str
) -> list[dict[str, Any]]:
    """Measures stages, each call of which is for a batch: by CPU time `per` core, or wall time `per` machine."""

    def repeated(stage: Callable[[], Any]) -> timing.Call:
        return lambda times: [stage() for _ in range(times)]

    calls = {name: repeated(stage) for name, stage in stages.items()}
    clock = time.process_time if per == "core" else time.perf_counter
    measured = timing.take_turns(calls, rounds, seconds / len(stages) / (rounds + 1), clock)
    return [
        {"name": name, **timing.rate_row(measured[name], batch_size), "per": per}
        | ({"versus": timing.ratio(measured["classic"], measured[name])} if "classic" in measured else {})
        for name in stages
    ]

"""The fine-tuning tasks by name, and fine-tuned runs read back."""

import dataclasses
import os
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from data_pipelines.errors import InputError
from infmae_jax.evaluation.windows import MULTIPLE
from infmae_jax.interop.load import require_fit
from infmae_jax.tasks.detect import DetectConfig, DetectionModel, DetectTask
from infmae_jax.tasks.finetune import FineTuneConfig
from infmae_jax.tasks.segment import SegmentationModel, SegmentConfig, SegmentTask
from infmae_jax.tasks.small_target import SmallTargetConfig, SmallTargetModel, SmallTargetTask
from infmae_jax.training.checkpoint import restore_params
from infmae_jax.training.config import from_config
from infmae_jax.training.run_folder import CONFIG_NAME, read_config
from infmae_jax.training.storage import best_checkpoint


class Kind(NamedTuple):
    """A fine-tuning task: its config, what trains, and what evaluates and predicts."""

    config: type[FineTuneConfig]
    task: type
    model: type


KINDS = {
    "detect": Kind(DetectConfig, DetectTask, DetectionModel),
    "segment": Kind(SegmentConfig, SegmentTask, SegmentationModel),
    "small_target": Kind(SmallTargetConfig, SmallTargetTask, SmallTargetModel),
}


class FineTuned(NamedTuple):
    """A fine-tuned model: its kind's `model`, parameters as NumPy arrays, and the checkpoint they come from."""

    model: Any
    params: Any
    step: int


def kind_of(config: Any, where: str) -> Kind:
    """Of a run's or a file's config; InputError where it is not that of a fine-tuning task."""
    name = str(config.get("task", "")) if hasattr(config, "get") else ""
    if name not in KINDS:
        raise InputError(
            f"{where} is not of fine-tuning: give one of configs/segment, detect or small_target, or a run of one; its "
            f"task is {name or 'none'!r}"
        )
    return KINDS[name]


def is_finetuned(run: str | Path) -> bool:
    """Whether it is the folder of a fine-tuning run."""
    run = Path(run).expanduser()
    return (run / CONFIG_NAME).is_file() and str(read_config(run).get("task")) in KINDS


def load_finetuned(
    run: str | Path,
    step: int | None = None,
    tile: tuple[int, int] | None = None,
    overlap: int | None = None,
    threshold: float | None = None,
) -> FineTuned:
    """A fine-tuned run: its checkpoint `step`, or the best one on its validation split, or else the latest.

    Args:
      run: its folder.
      step: of a checkpoint.
      tile: rows and columns of the windows by which images are looked at, in place of the run's own.
      overlap: pixels that neighbouring ones share, a third by default.
      threshold: of small targets, in place of the run's own.

    Raises:
      InputError: not the folder of a fine-tuning run, no whole checkpoint, or what the task does not have.
    """
    run = Path(run).expanduser()
    stored = read_config(run)
    kind = kind_of(stored, f"{run}")
    known = {field.name for field in dataclasses.fields(kind.config)}
    config = from_config(kind.config, {key: value for key, value in stored.items() if key in known})
    shards = tuple(_found(name, run) for name in config.data.shards)
    config = dataclasses.replace(config, data=dataclasses.replace(config.data, shards=shards))
    config = _looked_at(config, tile, overlap, threshold)
    if step is None:
        step = best_checkpoint(run, config.best_metric, config.best_mode)
    model, restored = kind.model(config), restore_params(run, step=step)
    images = jax.ShapeDtypeStruct((1, 64, 64, 1), np.uint8)
    blocks = sum(config.encoder.depths)
    require_fit(run, restored.params, blocks, lambda: jax.eval_shape(model.init, jax.random.key(0), images))
    return FineTuned(model, restored.params, restored.step)


def _looked_at(
    config: FineTuneConfig, tile: tuple[int, int] | None, overlap: int | None, threshold: float | None
) -> FineTuneConfig:
    if overlap is not None and tile is None:
        raise InputError("--overlap belongs to --tile: give it, or leave it out")
    if tile is not None:
        if 0 in tile or any(side % MULTIPLE for side in tile) or not 0 <= (overlap or 0) < min(tile):
            shared = "" if overlap is None else f" --overlap={overlap}"
            raise InputError(
                f"--tile={tile[0]},{tile[1]}{shared}: give rows,columns, multiples of {MULTIPLE}, and less overlap"
            )
        config = dataclasses.replace(config, windows=config.windows.tiled(tile, overlap))
    if threshold is not None:
        if not hasattr(config, "threshold"):
            raise InputError(f"--threshold is for small targets; this is a run of {config.task}")
        if not 0 < threshold < 1:
            raise InputError(f"--threshold={threshold:g} is a probability: give one between 0 and 1")
        config = dataclasses.replace(config, threshold=threshold)
    return config


def _found(shards: str, run: Path) -> str:
    """Shards as a run's config names them: relative to the run where they could be (see `run_folder.claim`)."""
    inside = os.path.normpath(run / shards)
    return inside if os.path.isdir(inside) else shards

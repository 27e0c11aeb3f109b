"""Every way a trained model is stored, read and written through one pair of functions."""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np

from data_pipelines.errors import InputError
from data_pipelines.masking import MaskConfig
from infmae_jax.interop import published, runs, safetensors_file, stablehlo, torch_file

READABLE = ("torch", "safetensors", "run")
WRITABLE = ("run", "torch", "safetensors", "jax-export")
_SCORE_FILTERS_FILE = "score_filters.safetensors"


def detect(path: str | os.PathLike) -> str:
    """Which of `READABLE` a path is, by its kind and first bytes; InputError if there is nothing."""
    path = Path(path)
    if path.is_dir():
        return "run"
    if not path.exists():
        raise InputError(f"{path} does not exist; give a run folder, a .pth or a .safetensors file")
    return "safetensors" if path.suffix == ".safetensors" else "torch"


def read(path: str | os.PathLike, source: str, step: int | None = None, **architecture: Any) -> published.Checkpoint:
    """Reads a trained model.

    Args:
      path: a file, or a run folder.
      source: one of `READABLE`.
      step: which checkpoint of a run; the latest by default.
      **architecture: `heads`, `decoder_heads`, `norm_pix_loss` of a published file, which does not say them.

    Raises:
      InputError: the path is missing, damaged or something else; the line names the path and what is wrong.
    """
    if source == "run":
        return _read_run(path, step)
    if not Path(path).is_file():
        raise InputError(f"{path} is not a file; give the checkpoint file itself")
    reader = torch_file if source == "torch" else safetensors_file
    tensors, extras = reader.read_checkpoint(path)
    try:
        return published.from_state(tensors, extras.get(published.METADATA_KEY), **architecture)
    except InputError as error:
        raise InputError(f"{path}: {error}") from error


def write(
    path: str | os.PathLike, target: str, checkpoint: published.Checkpoint, image_size: tuple[int, int], origin: dict
) -> None:
    """Writes a trained model; the path appears whole or not at all.

    Args:
      path: a file, or for "run" a folder; must not exist.
      target: one of `WRITABLE`.
      checkpoint: the model.
      image_size: pixel rows and columns that "jax-export" takes.
      origin: where the model comes from, noted in a run's config.

    Raises:
      InputError: the path exists, or the format cannot hold the model.
    """
    with _whole_or_nothing(Path(path)) as partial:
        if target == "run":
            _write_run(partial, checkpoint, origin)
        elif target == "jax-export":
            partial.write_bytes(stablehlo.export_features(checkpoint.model, checkpoint.params, image_size))
        else:
            writer = torch_file if target == "torch" else safetensors_file
            tensors, metadata = published.to_state(checkpoint)
            writer.write_checkpoint(partial, tensors, {published.METADATA_KEY: metadata})


@contextlib.contextmanager
def _whole_or_nothing(path: Path) -> Iterator[Path]:
    """A path beside `path` to write to; it takes the place of `path` when the block ends well, else it is removed."""
    if path.exists():
        raise InputError(f"{path} already exists; remove it or choose another --output")
    partial = path.with_name(f".{path.name}.partial-{os.getpid()}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield partial
        partial.rename(path)
    except OSError as error:
        raise InputError(f"{path} cannot be written: {error.strerror or error}") from error
    finally:
        if partial.is_dir():
            shutil.rmtree(partial)
        else:
            partial.unlink(missing_ok=True)


def _read_run(path: str | os.PathLike, step: int | None) -> published.Checkpoint:
    restored = runs.read_run(path, step=step)
    params = jax.tree.map(lambda array: np.asarray(array, np.float32), restored.params)
    filters = _read_score_filters(Path(path), restored.mask)
    return published.Checkpoint(restored.model, restored.mask, tuple(restored.image_size), params, filters)


def _read_score_filters(run: Path, mask: MaskConfig) -> tuple[np.ndarray, np.ndarray] | None:
    """The published scoring convolution that came with an imported run, if it still is what the run masks with."""
    file = run / _SCORE_FILTERS_FILE
    if not file.exists():
        return None
    tensors, _ = safetensors_file.read_checkpoint(file)
    filters = tensors["weight"], tensors["bias"]
    return filters if published.published_mask(filters) == mask else None


def _write_run(run: Path, checkpoint: published.Checkpoint, origin: dict) -> None:
    runs.write_run(run, checkpoint.model, checkpoint.mask, checkpoint.image_size, checkpoint.params, origin)
    if checkpoint.score_filters is not None:
        tensors = dict(zip(("weight", "bias"), checkpoint.score_filters, strict=True))
        safetensors_file.write_checkpoint(run / _SCORE_FILTERS_FILE, tensors, {})

"""What a run folder holds besides its training state: its config, and weights for use on the host.

RUN/config.json     what the run is: sections `model` and `data` (with `data.mask`), whatever the source
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
from absl import logging

from data_pipelines.errors import InputError
from data_pipelines.masking import MaskConfig
from infmae_jax.models.config import InfMAEConfig
from infmae_jax.training import digests, storage

CONFIG_NAME = "config.json"


@dataclasses.dataclass(frozen=True)
class Restored:
    """Weights of a run and the config that it was made with. `params` is a tree of float32 NumPy arrays."""

    config: dict[str, Any]
    params: dict[str, Any]
    step: int


def read_config(run: str | Path) -> dict[str, Any]:
    """The config that a run folder was made with; InputError when `run` is not a run folder."""
    path = Path(run) / CONFIG_NAME
    if not path.is_file():
        raise InputError(f"{run} is not a run folder: it has no {CONFIG_NAME}; give the --workdir of a pretraining run")
    try:
        return json.loads(path.read_text())
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path} is not valid JSON ({error}); restore it or start a new run") from error


def write_config(run: str | Path, config: Mapping[str, Any]) -> None:
    """Writes RUN/config.json beside and renames it into place."""
    path = Path(run) / CONFIG_NAME
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(".tmp")
    temporary.write_text(json.dumps(config, indent=1) + "\n")
    temporary.replace(path)


def restore_params(run: str | Path, subtree: str | None = None, step: int | None = None) -> Restored:
    """Weights of a run, on the host, whatever mesh or optimizer they were saved with, compared with their digests.

    Args:
      run: run folder.
      subtree: restore only this part of the parameters, "encoder" or "decoder".
      step: checkpoint; by default the latest that is not damaged.

    Raises:
      InputError: no run, no checkpoint, or only damaged ones.
    """
    config = read_config(run)
    steps = storage.steps_of(run)
    if not (Path(run) / storage.FOLDER).is_dir():
        raise InputError(f"{run} has no checkpoints yet: let the run reach its first checkpoint")
    if not steps or (step is not None and step not in steps):
        raise InputError(f"{run} has no checkpoint{'' if step is None else f' {step}'}; it has {steps or 'none'}")
    with storage.quiet():
        step, params = _newest_whole(run, steps[::-1] if step is None else [step], subtree)
    return Restored(config, params, step)


def write_run(
    run: str | Path,
    model: InfMAEConfig,
    mask: MaskConfig,
    image_size: tuple[int, int],
    params: Mapping[str, Any],
    source: Mapping[str, Any],
) -> None:
    """Makes a run folder of given weights (checkpoint 0), to be used like one of our own.

    Args:
      params: tree of NumPy arrays.
      source: where the weights come from, kept in the config.
    """
    items = {"params": jax.tree.map(np.asarray, dict(params))}
    record = storage.make_record(0, digests.host_digests(items), {}, {})
    (Path(run) / storage.FOLDER).mkdir(parents=True, exist_ok=True)
    storage.start_save(run, 0, items, record)()
    data = {"mask": dataclasses.asdict(mask), "image_size": image_size}
    write_config(run, {"model": dataclasses.asdict(model), "data": data, "source": dict(source)})


def _newest_whole(run: str | Path, steps: list[int], subtree: str | None) -> tuple[int, dict[str, Any]]:
    """The first of `steps` that is not damaged, and its parameters."""
    damaged = []
    for step in steps:
        path = storage.checkpoint_path(run, step)
        try:
            record = storage.read_record(path)
            arrays = storage.empty_arrays(record, "params")
            wanted = {key: tree for key, tree in arrays.items() if subtree in (None, key)}
            items = storage.load(path, record, {"params": wanted})
            storage.verify(items, record["digests"])
            return step, items["params"]
        except storage.Damaged as error:
            logging.warning("checkpoint %s is damaged: %s", path, error)
            damaged.append(f"{step} ({error})")
    raise InputError(f"{run} has only damaged checkpoints: {', '.join(damaged)}; restore one from a copy")

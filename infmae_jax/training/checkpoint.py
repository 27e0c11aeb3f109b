"""Checkpoints: the one place that knows Orbax, and what a run folder holds.

RUN/config.json     what the run is: sections `model` and `data` (with `data.mask`), whatever the source
RUN/checkpoints/S   the state before batch S: items `params` and `optimizer`
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
from orbax.checkpoint import v1 as ocp

from data_pipelines.errors import InputError
from data_pipelines.masking import MaskConfig
from infmae_jax.models.infmae import InfMAE, InfMAEConfig
from infmae_jax.training.config import from_config
from infmae_jax.training.state import TrainState

CONFIG_NAME = "config.json"
FOLDER = "checkpoints"


@dataclasses.dataclass(frozen=True)
class Restored:
    """Weights and what is needed to use them. `params` is a tree of float32 NumPy arrays."""

    model: InfMAEConfig
    mask: MaskConfig
    image_size: tuple[int, int]
    params: dict[str, Any]
    step: int


class Checkpointer:
    """Saves and restores the training state of one run, asynchronously, keeping the latest `keep`."""

    def __init__(self, run: str | Path, keep: int = 3):
        self._orbax = ocp.training.Checkpointer(
            Path(run).absolute() / FOLDER,
            save_decision_policy=ocp.training.save_decision_policies.FixedIntervalPolicy(1),
            preservation_policy=ocp.training.preservation_policies.LatestN(keep),
            cleanup_tmp_directories=True,
        )

    def latest_step(self) -> int | None:
        latest = self._orbax.latest
        return None if latest is None else latest.step

    def save(self, state: TrainState, step: int) -> None:
        """Starts saving `state` as checkpoint `step`; returns when the device arrays may be changed."""
        if self.latest_step() != step:
            items = {"params": state.params, "optimizer": state.opt_state}
            self._orbax.save_checkpointables_async(step, items, force=True)

    def restore(self, abstract: TrainState, step: int) -> TrainState:
        """The state of checkpoint `step` with the shapes, dtypes and shardings of `abstract`."""
        wanted = {"params": abstract.params, "optimizer": abstract.opt_state}
        found = self._orbax.load_checkpointables(step, wanted)
        count = jax.device_put(np.int32(step), abstract.step.sharding)
        return TrainState(step=count, params=found["params"], opt_state=found["optimizer"])

    def __enter__(self) -> Checkpointer:
        return self

    def __exit__(self, *unused) -> None:
        """Waits for saves in flight and reports their errors."""
        self._orbax.close()


def read_config(run: str | Path) -> dict[str, Any]:
    """The config that a run folder was made with; InputError when `run` is not a run folder."""
    path = Path(run) / CONFIG_NAME
    if not path.is_file():
        raise InputError(f"{run} is not a run folder: it has no {CONFIG_NAME}; give the --workdir of a pretraining run")
    try:
        return json.loads(path.read_text())
    except ValueError as error:
        raise InputError(f"{path} is not valid JSON ({error}); restore it or start a new run") from error


def write_config(run: str | Path, config: Mapping[str, Any]) -> None:
    """Writes RUN/config.json beside and renames it into place."""
    path = Path(run) / CONFIG_NAME
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(".tmp")
    temporary.write_text(json.dumps(config, indent=1) + "\n")
    temporary.replace(path)


def restore_params(run: str | Path, subtree: str | None = None, step: int | None = None) -> Restored:
    """Weights of a run, on the host, whatever mesh or optimizer they were saved with.

    Args:
      run: run folder.
      subtree: restore only this part of the parameters, "encoder" or "decoder".
      step: checkpoint; by default the latest.

    Raises:
      InputError: no run, no checkpoint, or parameters that do not fit the run's own config.
    """
    config = read_config(run)
    model = from_config(InfMAEConfig, config["model"])
    folder = Path(run).absolute() / FOLDER
    context = ocp.Context()
    context.pytree.loading.partial_load = True
    if not folder.is_dir():
        raise InputError(f"{run} has no checkpoints yet: let the run reach its first checkpoint")
    with context, ocp.training.Checkpointer(folder) as orbax:
        steps = [checkpoint.step for checkpoint in orbax.checkpoints]
        if not steps or (step is not None and step not in steps):
            raise InputError(f"{run} has no checkpoint{'' if step is None else f' {step}'}; it has {steps or 'none'}")
        step = max(steps) if step is None else step
        saved = orbax.checkpointables_metadata(step).metadata["params"]
        wanted = {key: saved[key] for key in saved if subtree in (None, key)}
        host = jax.tree.map(lambda leaf: np.empty(leaf.shape, leaf.dtype), wanted)
        params = orbax.load_checkpointables(step, {"params": host})["params"]
    _check_shapes(params, model, run)
    data = config.get("data", {})
    mask = from_config(MaskConfig, data.get("mask", {}), "data.mask.")
    return Restored(model, mask, tuple(data.get("image_size", (224, 224))), params, step)


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
      source: where the weights come from, kept in the config.
    """
    checkpoints = Path(run).absolute() / FOLDER
    with ocp.training.Checkpointer(checkpoints, cleanup_tmp_directories=True) as orbax:
        orbax.save_checkpointables(0, {"params": params}, force=True)
    data = {"mask": dataclasses.asdict(mask), "image_size": image_size}
    write_config(run, {"model": dataclasses.asdict(model), "data": data, "source": dict(source)})


def abstract_params(model: InfMAEConfig) -> dict[str, Any]:
    """Shapes and dtypes of a model's parameters, without computing anything."""
    images = jax.ShapeDtypeStruct((1, 32, 32, 1), np.float32)
    ids_keep = jax.ShapeDtypeStruct((1, 1), np.int32)
    return jax.eval_shape(InfMAE(model).init, jax.random.key(0), images, ids_keep)["params"]


def _check_shapes(params: Mapping[str, Any], model: InfMAEConfig, run: str | Path) -> None:
    expected = abstract_params(model)
    for key, tree in params.items():
        want = {jax.tree_util.keystr(p): v.shape for p, v in jax.tree_util.tree_leaves_with_path(expected.get(key, {}))}
        have = {jax.tree_util.keystr(p): v.shape for p, v in jax.tree_util.tree_leaves_with_path(tree)}
        wrong = sorted(name for name in want.keys() | have.keys() if want.get(name) != have.get(name))
        if wrong:
            raise InputError(
                f"checkpoint of {run} does not fit its config: {key}{wrong[0]} is {have.get(wrong[0])}, "
                f"expected {want.get(wrong[0])}; use the checkpoint of the same variant"
            )

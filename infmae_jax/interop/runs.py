"""Trained models in run folders: weights with the architecture, mask and image size that the run's config names."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax

from data_pipelines.errors import InputError
from data_pipelines.masking import MaskConfig
from infmae_jax.models.infmae import InfMAEConfig, abstract_params
from infmae_jax.training import checkpoint
from infmae_jax.training.config import from_config


@dataclasses.dataclass(frozen=True)
class TrainedRun:
    """Weights and what is needed to use them. `params` is a tree of float32 NumPy arrays."""

    model: InfMAEConfig
    mask: MaskConfig
    image_size: tuple[int, int]
    params: dict[str, Any]
    step: int


def read_run(run: str | Path, subtree: str | None = None, step: int | None = None) -> TrainedRun:
    """See `checkpoint.restore_params`; InputError also where the weights do not fit the run's config."""
    restored = checkpoint.restore_params(run, subtree, step)
    data = restored.config.get("data", {})
    model = from_config(InfMAEConfig, restored.config["model"])
    _check_shapes(restored.params, model, run)
    mask = from_config(MaskConfig, data.get("mask", {}), "data.mask.")
    return TrainedRun(model, mask, tuple(data.get("image_size", (224, 224))), restored.params, restored.step)


def write_run(
    run: str | Path, model: InfMAEConfig, mask: MaskConfig, image_size: tuple[int, int], params: Mapping[str, Any],
    source: Mapping[str, Any],
) -> None:  # fmt: skip
    """Makes a run folder of given weights (NumPy arrays); `source`, where they come from, is kept in its config."""
    data = {"mask": dataclasses.asdict(mask), "image_size": image_size}
    checkpoint.write_run(run, {"model": dataclasses.asdict(model), "data": data, "source": dict(source)}, params)


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

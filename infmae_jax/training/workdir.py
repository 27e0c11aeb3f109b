"""What a run folder must be before training starts in it."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from data_pipelines.errors import InputError
from infmae_jax.training import checkpoint
from infmae_jax.training.config import PretrainConfig, differences, to_config


def claim(workdir: Path, config: PretrainConfig, data_record: dict[str, Any], resuming: bool, primary: bool) -> None:
    """Writes the resolved config and data set; of a run that is resumed, checks that they are still the same."""
    mine = {**to_config(config).to_dict(), "data_set": data_record}
    if resuming:
        changed = differences(checkpoint.read_config(workdir), mine)
        if changed:
            raise InputError(
                f"{workdir} holds a run with another config, which cannot be resumed: {'; '.join(changed)}. "
                "Use the same values, or another --workdir"
            )
    elif primary:
        checkpoint.write_config(workdir, mine)


def initial_params(config: PretrainConfig, shardings: Any) -> Any:
    """Weights of the run `config.init_from`, which must have the same architecture."""
    restored = checkpoint.restore_params(config.init_from)
    changed = differences(restored.config["model"], dataclasses.asdict(config.model), "model.")
    free = tuple(f"model.encoder.{key}" for key in ("dtype", "remat", "depthwise", "visible_only", "attention"))
    changed = [line for line in changed if not line.startswith(free)]
    if changed:
        raise InputError(f"init_from={config.init_from} is another model: {'; '.join(changed)}")
    return jax.tree.map(lambda x, s: jax.device_put(jnp.asarray(x), s), restored.params, shardings)

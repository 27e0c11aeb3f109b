"""What a run folder must be before training starts in it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from data_pipelines.errors import InputError
from infmae_jax.training import checkpoint
from infmae_jax.training.config import RunConfig, differences, to_config


def claim(workdir: Path, config: RunConfig, data_record: dict[str, Any], resuming: bool, primary: bool) -> None:
    """Writes the resolved config and data set; of a run that is resumed, checks that they are still the same."""
    mine = {**to_config(config).to_dict(), "data_set": data_record}
    if resuming:
        changed = differences(checkpoint.read_config(workdir), mine, config.FREE_KEYS)
        if changed:
            raise InputError(
                f"{workdir} holds a run with another config, which cannot be resumed: {'; '.join(changed)}. "
                "Use the same values, or another --workdir"
            )
    elif primary:
        checkpoint.write_config(workdir, mine)

"""The host's side: `data_pipelines.throughput` on the config's shards."""

from __future__ import annotations

from typing import Any

from data_pipelines import throughput
from infmae_jax.benchmarks import shards
from infmae_jax.benchmarks.report import report
from infmae_jax.tasks.pretrain import PretrainConfig

_SCENES, _QUICK_SCENES = 256, 32  # where the config has no shards


def input_pipeline(config: PretrainConfig, workers: int, seconds: float, quick: bool = False) -> dict[str, Any]:
    """Images a second of the pipeline, of its parts and of the classic one, see `throughput.run`.

    Args:
      quick: few scenes and rounds, to see that it runs.

    Raises:
      InputError: unusable shards.
    """
    size = {"batch_size": 16, "rounds": 3} if quick else {}
    with shards.scratch(config, _QUICK_SCENES if quick else _SCENES) as (with_shards, _):
        rows = throughput.run(with_shards.data.shards, workers, seconds, **size)
    settings = {"shards": shards.origin(config), "workers": workers, "seconds": seconds}
    return report("data", settings, rows)

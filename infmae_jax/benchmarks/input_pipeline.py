"""The host's side: `data_pipelines.throughput` on the config's shards."""

from __future__ import annotations

from typing import Any

from data_pipelines import throughput
from infmae_jax.benchmarks import shards
from infmae_jax.benchmarks.report import report
from infmae_jax.training.config import PretrainConfig

_SCENES = 128


def input_pipeline(config: PretrainConfig, workers: int, seconds: float) -> dict[str, Any]:
    """Images a second of the pipeline, of its parts and of the classic one, see `throughput.run`.

    Raises:
      InputError: unusable shards.
    """
    with shards.scratch(config, _SCENES) as (with_shards, _):
        rows = throughput.run(with_shards.data.shards, workers, seconds)
    settings = {"shards": shards.origin(config), "workers": workers, "seconds": seconds}
    return report("data", settings, rows)

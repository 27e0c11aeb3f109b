"""The host's side: `data_pipelines.throughput` on the config's shards."""

from __future__ import annotations

import contextlib
import dataclasses
import sys
import tempfile
from typing import Any

from data_pipelines import throughput
from infmae_jax import embedded
from infmae_jax.bench.results import report
from infmae_jax.tasks.pretrain import EmbeddedConfig, PretrainConfig

_SCENES, _QUICK_SCENES = 256, 32  # where the config has no shards


def data(config: PretrainConfig, workers: int, seconds: float, quick: bool = False) -> dict[str, Any]:
    """Images per second of the pipeline, of its parts and of the classic one, see `throughput.run`.

    Args:
      quick: few scenes and rounds, to see that it runs.

    Raises:
      InputError: unusable shards.
    """
    size = {"batch_size": 16, "rounds": 3} if quick else {}
    scenes = EmbeddedConfig(images=_QUICK_SCENES if quick else _SCENES)
    with tempfile.TemporaryDirectory(prefix="infmae-bench-") as folder:
        with contextlib.redirect_stdout(sys.stderr):  # standard output is for the report
            shards = embedded.with_shards(dataclasses.replace(config, embedded=scenes), folder).data.shards
        rows = throughput.run(shards, workers, seconds, **size)
    settings = {"shards": ", ".join(config.data.shards) or "synthetic scenes", "workers": workers, "seconds": seconds}
    return report("data", settings, rows)

"""This host's batches of a data set: the pipeline as `training.task.Batches`."""

import dataclasses

import jax
import numpy as np

from data_pipelines import pipeline
from data_pipelines.pipeline import PipelineConfig
from data_pipelines.views import View
from infmae_jax.training.task import Position

ORDER_STRIDE = 0x9E3779B1  # between the data seeds of a run's orders: far from the small seeds that people choose


class PipelineBatches:
    """The training batches from a position on; every data order but the first has another seed."""

    def __init__(self, data: PipelineConfig, at: Position, view: View | None = None):
        """`view`: what a sample is; by default that of pretraining."""
        seed = (data.seed + at.order * ORDER_STRIDE) % 2**32 if at.order else data.seed
        self._data = dataclasses.replace(data, seed=seed)
        hosts = jax.process_index(), jax.process_count()
        self._batches = pipeline.train_batches(self._data, at.step, *hosts, view=view)
        self.close = self._batches.close

    @property
    def substituted(self) -> int:
        return self._batches.damaged

    def __next__(self) -> dict[str, np.ndarray]:
        return next(self._batches)

    def keys(self, step: int) -> list[str]:
        return pipeline.record_keys(self._data, step)

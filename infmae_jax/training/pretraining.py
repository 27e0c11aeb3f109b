"""The pretraining task: masked reconstruction of infrared images."""

from __future__ import annotations

import dataclasses
import functools
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from data_pipelines import masking, pipeline, shards
from data_pipelines.remote import local_folders
from infmae_jax import pictures
from infmae_jax.models import patches
from infmae_jax.models.infmae import InfMAE
from infmae_jax.training.config import PretrainConfig

_PICTURE_ROWS = 6
_ORDER_STRIDE = 0x9E3779B1  # between the data seeds of a run's orders: far from the small seeds that people choose


class PretrainTask:
    """See `task.Task`. A batch is image (B,H,W,1) uint8 and ids_keep (B,K) int32; masks come from the host."""

    def __init__(self, config: PretrainConfig):
        """Opens the shards; InputError when they are missing or the sizes do not fit the model."""
        data = config.data
        height, width = data.image_size
        self.config = config
        self.model = InfMAE(config.model)
        self.batch_size = data.batch_size
        self.num_examples = pipeline.num_examples(data)
        visible = masking.num_visible(data.mask, (height // patches.PATCH) * (width // patches.PATCH))
        self.batch_spec = {
            "image": ((data.batch_size, height, width, 1), np.uint8),
            "ids_keep": ((data.batch_size, visible), np.int32),
        }
        self.data_record = {
            "images": self.num_examples,
            "fingerprints": [shards.read_manifest(folder).fingerprint for folder in local_folders(data.shards)],
        }

    def init(self, key: jax.Array) -> Any:
        shapes = {name: (1, *shape[1:]) for name, (shape, _) in self.batch_spec.items()}
        ids_keep = jnp.broadcast_to(jnp.arange(shapes["ids_keep"][1]), shapes["ids_keep"])
        return self.model.init(key, jnp.zeros(shapes["image"]), ids_keep)["params"]

    def loss(self, params: Any, batch: dict[str, jax.Array], key: jax.Array) -> tuple[jax.Array, dict[str, jax.Array]]:
        del key  # all randomness of pretraining is in the crops
        out = self.model.apply({"params": params}, patches.normalize(batch["image"]), batch["ids_keep"])
        return out.loss, {}

    def batches(self, start_step: int, order: int) -> pipeline.TrainBatches:
        return pipeline.train_batches(self._ordered(order), start_step, jax.process_index(), jax.process_count())

    def record_keys(self, step: int, order: int) -> list[str]:
        return pipeline.record_keys(self._ordered(order), step)

    def _ordered(self, order: int) -> pipeline.PipelineConfig:
        """The data config with another seed for every order but the first."""
        data = self.config.data
        return dataclasses.replace(data, seed=(data.seed + order * _ORDER_STRIDE) % 2**32) if order else data

    def picture(self, params: Any, path: Path | None) -> np.ndarray | None:
        batch = self._picture_batch
        everywhere = NamedSharding(jax.tree.leaves(params)[0].sharding.mesh, PartitionSpec())
        pred = jax.device_get(self._predict(params, batch["image"], batch["ids_keep"], everywhere))
        if path is None:
            return None
        images = batch["image"][..., 0]
        return pictures.reconstruction_panel(
            images,
            batch["ids_keep"],
            pred,
            masking.token_scores(images, self.config.data.mask),
            norm_pix=self.config.model.norm_pix_loss,
            path=path,
            colormap=self.config.colormap,
        )

    @functools.cached_property
    def _picture_batch(self) -> dict[str, np.ndarray]:
        return pipeline.fixed_batch(self.config.data, _PICTURE_ROWS)

    @functools.cached_property
    def _predict(self):
        def predict(params, images, ids_keep, layout):
            pred = self.model.apply({"params": params}, patches.normalize(images), ids_keep).pred
            return jax.lax.with_sharding_constraint(pred, layout)  # whole on every host, whatever cuts the weights

        return jax.jit(predict, static_argnames="layout")

"""The training step that `pretrain` runs, on one device and a synthetic batch that is there already."""

from __future__ import annotations

import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from data_pipelines.masking import num_visible
from infmae_jax.models import patches
from infmae_jax.models.infmae import InfMAE
from infmae_jax.tasks.pretrain import PretrainConfig
from infmae_jax.training import sharding
from infmae_jax.training.config import MeshConfig
from infmae_jax.training.optimizer import make_optimizer, peak_learning_rate
from infmae_jax.training.state import TrainState
from infmae_jax.training.step import make_train_step, stop_flag
from infmae_jax.training.task import Loss

_GIB = 2**30


def visible_tokens(config: PretrainConfig) -> int:
    """K, the tokens that the config's mask keeps of an image."""
    h, w = patches.token_grid(*config.data.image_size)
    return num_visible(config.data.mask, h * w)


def batch_spec(config: PretrainConfig, batch: int) -> dict[str, jax.ShapeDtypeStruct]:
    """image (B,H,W,1) uint8 and ids_keep (B,K) int32."""
    return {
        "image": jax.ShapeDtypeStruct((batch, *config.data.image_size, 1), jnp.uint8),
        "ids_keep": jax.ShapeDtypeStruct((batch, visible_tokens(config)), jnp.int32),
    }


def synthetic_batch(config: PretrainConfig, batch: int) -> dict[str, np.ndarray]:
    """Such a batch: noise, and random tokens without repeats."""
    rng = np.random.default_rng(0)
    spec = batch_spec(config, batch)
    h, w = patches.token_grid(*config.data.image_size)
    kept = [rng.permutation(h * w)[: spec["ids_keep"].shape[1]] for _ in range(batch)]
    return {"image": rng.integers(0, 256, spec["image"].shape, np.uint8), "ids_keep": np.stack(kept).astype(np.int32)}


def learning_rate(config: PretrainConfig, batch: int) -> float:
    """Constant in measurements: the peak of the config's schedule."""
    return peak_learning_rate(config.optimizer, batch)


class TrainingProgram:
    """The compiled step of a config for batches of a size; no arrays are made until `start`.

    Attributes:
      compile_seconds: tracing and compiling, without the persistent cache.
      memory_gib: of the device while it steps, by the compiled program: state, batch and temporaries.
    """

    def __init__(self, config: PretrainConfig, batch: int):
        self.config, self.batch = config, batch
        self._model = InfMAE(config.model)
        self._mesh = sharding.make_mesh(MeshConfig(), jax.devices()[:1])
        self._optimizer = make_optimizer(config.optimizer)
        shapes = jax.eval_shape(self._create, jax.random.key(config.seed))
        self._shardings = sharding.state_shardings(shapes, self._mesh)
        rate = learning_rate(config, batch)
        step = make_train_step(
            self._loss, self._optimizer, lambda _: jnp.float32(rate), self._mesh, self._shardings, config.seed,
            config.optimizer.accumulate,
        )  # fmt: skip
        self._stop = stop_flag(self._mesh, 0)
        since = time.perf_counter()
        self._compiled = step.lower(shapes, batch_spec(config, batch), self._stop).compile()
        self.compile_seconds = time.perf_counter() - since
        memory = self._compiled.memory_analysis()
        # The new state takes the place of the old one.
        self.memory_gib = (memory.argument_size_in_bytes + memory.temp_size_in_bytes) / _GIB

    @property
    def text(self) -> str:
        """The compiled program, for reading."""
        return self._compiled.as_text()

    def start(self, params: Any | None = None) -> None:
        """Makes the state, with these weights or random ones, and the batch."""
        self.state = jax.jit(self._create, out_shardings=self._shardings)(jax.random.key(self.config.seed))
        if params is not None:
            params = jax.tree.map(jax.device_put, params, self._shardings.params)
            self.state = self.state.replace(params=params)
        self._batch = sharding.place_batch(synthetic_batch(self.config, self.batch), self._mesh)

    def __call__(self, times: int = 1) -> float:
        """Makes so many updates, waits for the last one and returns its loss."""
        for _ in range(times):
            self.state, metrics = self._compiled(self.state, self._batch, self._stop)
        return float(metrics["loss"])

    def stop(self) -> None:
        """Gives the state's memory back."""
        for leaf in jax.tree.leaves((self.state, self._batch)):
            leaf.delete()

    def _create(self, key: jax.Array) -> TrainState:
        ids_keep = jnp.arange(visible_tokens(self.config))[None]
        params = self._model.init(key, jnp.zeros((1, *self.config.data.image_size, 1)), ids_keep)["params"]
        return TrainState.create(params, self._optimizer)

    def _loss(self, params: Any, batch: dict[str, jax.Array], key: jax.Array) -> Loss:
        del key
        images = patches.normalize(batch["image"])
        return Loss(self._model.apply({"params": params}, images, batch["ids_keep"]).loss * len(images), len(images), {})

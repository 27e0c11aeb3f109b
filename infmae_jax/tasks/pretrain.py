"""Pretraining: masked reconstruction of infrared images."""

import dataclasses
import functools
from typing import Annotated, Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from data_pipelines import masking, pipeline, shards
from data_pipelines.pipeline import PipelineConfig
from data_pipelines.remote import local_folders
from infmae_jax import pictures
from infmae_jax.interop.load import graft, load
from infmae_jax.models import patches
from infmae_jax.models.config import InfMAEConfig, variant
from infmae_jax.models.infmae import InfMAE
from infmae_jax.tasks.batches import PipelineBatches
from infmae_jax.training.config import Count, Duration, RunConfig
from infmae_jax.training.task import Evaluator, Loss, Position, Task

_PICTURE_ROWS = 6


@dataclasses.dataclass(frozen=True)
class EmbeddedConfig:
    """The embedded synthetic data set, made when `images` > 0: pretraining data, and a labelled set to probe with."""

    images: Count = 0
    height: Annotated[int, "[16, inf)"] = 256
    width: Annotated[int, "[16, inf)"] = 320
    probe_images: Count = 0


@dataclasses.dataclass(frozen=True)
class PretrainConfig(RunConfig):
    """A pretraining run.

    Attributes:
      init_from: a run folder or checkpoint file whose weights start this run; empty: random.
      picture_every: duration between pictures of reconstructions; "0 steps" is never.
      colormap: of pictures, "inferno" or "gray".
      embedded: see there.
    """

    model: InfMAEConfig = variant("base")
    data: PipelineConfig = PipelineConfig()
    init_from: str = ""
    picture_every: Duration = "10 epochs"
    colormap: Annotated[str, "inferno, gray"] = "inferno"
    embedded: EmbeddedConfig = EmbeddedConfig()

    # Shard sets may move: their fingerprints are compared.
    FREE_KEYS: ClassVar[tuple[str, ...]] = (
        *RunConfig.FREE_KEYS, "data.shards", "data.workers", "data.threads", "data.prefetch",
        "data.max_corrupt", "picture_every", "colormap", "model.encoder.attention", "model.encoder.depthwise",
        "model.encoder.remat",
    )  # fmt: skip


class PretrainTask(Task):
    """See `training.task.Task`. A batch is image (B,H,W,1) uint8 and ids_keep (B,K) int32, masks made on the host.

    Opens shards only where they are needed: compiling and measuring need none.
    """

    name = "pretrain"

    def __init__(self, config: PretrainConfig):
        """InputError when the sizes do not fit the model."""
        data = config.data
        visible = masking.num_visible(data.mask, np.prod(patches.token_grid(*data.image_size)))
        self.config = config
        self.model = InfMAE(config.model)
        self.batch_size = data.batch_size
        self.dtype = config.model.encoder.dtype
        self.batch_spec = {
            "image": ((data.batch_size, *data.image_size, 1), np.uint8),
            "ids_keep": ((data.batch_size, visible), np.int32),
        }

    @functools.cached_property
    def num_examples(self) -> int:
        """InputError when the shards are missing or empty."""
        return pipeline.num_examples(self.config.data)

    @functools.cached_property
    def fingerprint(self) -> dict[str, Any]:
        folders = local_folders(self.config.data.shards)
        return {
            "images": self.num_examples,
            "fingerprints": [shards.read_manifest(folder).fingerprint for folder in folders],
        }

    def init(self, key: jax.Array) -> Any:
        shapes = {name: (1, *shape[1:]) for name, (shape, _) in self.batch_spec.items()}
        ids_keep = jnp.broadcast_to(jnp.arange(shapes["ids_keep"][1]), shapes["ids_keep"])
        return self.model.init(key, jnp.zeros(shapes["image"]), ids_keep)["params"]

    def initial(self, shapes: Any) -> Any | None:
        """Weights of `init_from`: its encoder, and its decoder where that fits; what was taken is printed."""
        if not self.config.init_from:
            return None
        fresh = jax.device_get(jax.jit(self.init)(jax.random.key(self.config.seed)))
        params, account = graft(fresh, load(self.config.init_from), self.config.model.encoder)
        if jax.process_index() == 0:
            print(f"{self.config.init_from}: {account}", flush=True)
        return params

    def loss(self, params: Any, batch: dict[str, jax.Array], key: jax.Array) -> Loss:
        del key  # all randomness of pretraining is in the crops
        out = self.model.apply({"params": params}, patches.normalize(batch["image"]), batch["ids_keep"])
        samples = len(batch["image"])
        return Loss(out.loss * samples, samples, {})

    def train_batches(self, at: Position) -> PipelineBatches:
        return PipelineBatches(self.config.data, at)

    def evaluators(self) -> dict[str, Evaluator]:
        return {"reconstruction": Evaluator(self.config.picture_every, self._picture)}

    def _picture(self, params: Any) -> dict[str, np.ndarray]:
        batch = self._picture_batch
        everywhere = NamedSharding(jax.tree.leaves(params)[0].sharding.mesh, PartitionSpec())
        pred = jax.device_get(self._predict(params, batch["image"], batch["ids_keep"], everywhere))
        images = batch["image"][..., 0]
        scores = masking.token_scores(images, self.config.data.mask)
        norm_pix, colormap = self.config.model.norm_pix_loss, self.config.colormap
        panel = pictures.reconstruction_panel(images, batch["ids_keep"], pred, scores, norm_pix, colormap=colormap)
        return {"reconstruction": panel}

    @functools.cached_property
    def _picture_batch(self) -> dict[str, np.ndarray]:
        return pipeline.fixed_batch(self.config.data, _PICTURE_ROWS)

    @functools.cached_property
    def _predict(self):
        def predict(params, images, ids_keep, layout):
            pred = self.model.apply({"params": params}, patches.normalize(images), ids_keep).pred
            return jax.lax.with_sharding_constraint(pred, layout)  # whole on every host, whatever cuts the weights

        return jax.jit(predict, static_argnames="layout")

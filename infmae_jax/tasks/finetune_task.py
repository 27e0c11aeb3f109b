"""What all fine-tuning tasks train and predict with: an encoder from a checkpoint under a new head, a learning rate for
each layer, labelled batches, measures of the validation split."""

import functools
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, ClassVar, TypeVar

import jax
import numpy as np
import PIL.Image

from data_pipelines import pipeline
from data_pipelines.errors import InputError
from data_pipelines.files import atomic_write
from data_pipelines.views import LabelledView
from infmae_jax.evaluation.windows import batch_size_of, on_canvases, on_every_device, one_behind, over_devices
from infmae_jax.interop.load import graft
from infmae_jax.interop.trained_model import TrainedModel
from infmae_jax.models.config import EncoderConfig
from infmae_jax.models.patches import normalize
from infmae_jax.tasks.batches import PipelineBatches
from infmae_jax.tasks.finetune import FineTuneConfig, fingerprint_of
from infmae_jax.training.task import Evaluator, Group, Position, Task

Image = TypeVar("Image")


class FineTuneModel:
    """What a fine-tuning run computes, apart from its weights.

    A subclass defines `evaluate`, `report`, `compute` and `write`; see `SegmentationModel`.

    Attributes:
      config: with architecture and classes filled in, see `resolved`.
      classes: their names.
      module: the Flax module.
    """

    module: Any

    def __init__(self, config: FineTuneConfig):
        """`config`: with classes and architecture filled in, see `resolved`; InputError for an encoder without the
        maps that the head reads."""
        try:
            config.head.check_encoder(config.encoder)
        except ValueError as error:
            raise InputError(f"{config.checkpoint}: {error}") from error
        self.config, self.classes = config, config.classes

    def init(self, key: jax.Array, images: Any) -> Any:
        """First parameters; `images` (N,H,W,1) uint8 say which layers there are, their sides do not matter."""
        return self.module.init(key, normalize(images))["params"]

    def predictions(
        self, params: Any, images: Iterable[Image], pixels: Callable[[Image], np.ndarray]
    ) -> Iterator[tuple[Image, Any]]:
        """Images with what the model finds in them, those of one canvas together: their order may change.

        Here that is the part of `compute`'s array that belongs to the image, for models with a value for every pixel.

        Args:
          images: of any kind; `pixels` gives the (h,w) uint8 of one.
        """
        placed, size = on_every_device(params), batch_size_of(self.config.windows)
        batches = on_canvases(images, pixels, size)
        begun = ((group, self.compute(placed, over_devices(batch))) for group, batch, _ in batches)
        for group, computed in one_behind(begun):
            for image, found in zip(group, np.asarray(computed), strict=False):
                height, width = pixels(image).shape
                yield image, found[:height, :width]

    def compute(self, params: Any, images: jax.Array) -> Any:
        """(N,H,W) uint8 on a canvas -> what is found, on the devices."""
        raise NotImplementedError

    @staticmethod
    def save(folder: Path, name: str, drawn: dict[str, PIL.Image.Image], **options: Any) -> dict[str, str]:
        """Writes pictures of a predicted image as PNG, each kind into a folder of its own.

        Args:
          drawn: by kind.
          options: of Pillow.

        Returns:
          By kind, the file's path inside `folder`.
        """
        files = {kind: f"{kind}/{name}.png" for kind in drawn}
        for kind, picture in drawn.items():
            with atomic_write(folder / files[kind]) as path:
                picture.save(path, "PNG", **options)
        return files

    def finish(self, folder: Path, rows: Sequence[dict[str, Any]]) -> None:
        """Writes what is of all predicted images together, where the task has such files.

        `rows`: of `predictions.jsonl`, by name; what `write` returned for each image is among it.
        """


class FineTuneTask(Task):
    """See `training.task.Task`. The parameters are those of a Flax module, the encoder below "encoder".

    A subclass sets the attributes and defines `loss`.

    Attributes:
      model: what is trained.
      view: what of an example is used, and how.
      measures: names in the metrics -> names in the scores of `model.evaluate`, for the validation split.
    """

    model: FineTuneModel
    view: LabelledView
    measures: ClassVar[dict[str, str]]

    def __init__(self, config: FineTuneConfig, trained: TrainedModel):
        """Both from `resolved`."""
        self.config, self.trained = config, trained
        self.batch_size, self.dtype = config.data.batch_size, config.encoder.dtype
        self.batch_spec = {k: ((self.batch_size, *shape), dtype) for k, (shape, dtype) in self.view.spec.items()}

    @functools.cached_property
    def num_examples(self) -> int:
        return pipeline.num_examples(self.config.data.pipeline)

    @functools.cached_property
    def fingerprint(self) -> dict[str, Any]:
        return fingerprint_of(self.config)

    def init(self, key: jax.Array) -> Any:
        shape, dtype = self.batch_spec["image"]
        return self.model.init(key, np.zeros((1, *shape[1:]), dtype))

    def initial(self, shapes: Any) -> Any:
        """The encoder of the checkpoint under a new head; what was taken is printed."""
        params, account = graft(shapes, self.trained, self.config.encoder)
        new = jax.jit(lambda key: {name: self.init(key)[name] for name in account.new})
        params |= jax.device_get(new(jax.random.key(self.config.seed)))
        if jax.process_index() == 0:
            print(f"{self.config.checkpoint}: {account}", flush=True)
        return params

    def group(self, path: str) -> Group:
        """Learning-rate factor layer_decay ** (layers + 1 - layer); the convolution stages and embeddings are layer 0,
        transformer block i is layer i + 1, heads and what follows the blocks have factor 1."""
        encoder = self.config.encoder
        if not path.startswith("encoder/"):
            return Group()
        if self.config.freeze == "encoder":
            return Group(frozen=True)
        return Group(learning_rate=self.config.layer_decay ** (encoder.depths[-1] + 1 - layer_of(path, encoder)))

    def train_batches(self, at: Position) -> PipelineBatches:
        return PipelineBatches(self.config.data.pipeline, at, self.view)

    def evaluators(self) -> dict[str, Evaluator]:
        return {"val": Evaluator(self.config.evaluate_every, self._evaluate)}

    def _evaluate(self, params: Any) -> dict[str, Any]:
        found = self.model.evaluate(params, self.config.data.shards, self.config.data.val_split)
        scores = found.pop("scores")
        numbers = {ours: scores[name] for ours, name in self.measures.items() if scores[name] is not None}
        return {**numbers, "val_scores": scores, **{f"val_{name}": picture for name, picture in found.items()}}

    def noise(self, key: jax.Array) -> dict[str, jax.Array]:
        """Random streams of dropout and, where the encoder trains, of drop path."""
        names = ("dropout", "drop_path") if self.config.freeze == "none" else ("dropout",)
        return dict(zip(names, jax.random.split(key, len(names)), strict=True))


def layer_of(path: str, encoder: EncoderConfig) -> int:
    """The layer, from 0, of an encoder's parameter such as "encoder/blocks3_4/attn/qkv/kernel"."""
    part = path.split("/")[1]
    blocks = "blocks3" if encoder.kind == "hybrid" else "blocks"
    if found := re.fullmatch(rf"{blocks}_(\d+)", part):
        return int(found[1]) + 1
    if part.startswith(("patch_embed", "cls_token", "blocks1", "blocks2")):
        return 0
    return encoder.depths[-1] + 1

"""Semantic segmentation: a class for every pixel of an infrared image, by UperNet or FCN on the encoder's maps."""

import dataclasses
import functools
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, ClassVar, Self

import jax
import jax.numpy as jnp
import numpy as np
import optax

from data_pipelines.errors import InputError
from data_pipelines.examples import IGNORE, decode_mask
from data_pipelines.reader import ExampleReader
from data_pipelines.remote import local_folders
from infmae_jax import pictures
from infmae_jax.evaluation import segmentation
from infmae_jax.evaluation.hosts import summed
from infmae_jax.evaluation.labelled import LabelledImages
from infmae_jax.evaluation.windows import Windows, ahead, window_scores
from infmae_jax.evaluation.worst import Worst
from infmae_jax.interop.trained_model import TrainedModel
from infmae_jax.models.config import SegmentationHeadConfig
from infmae_jax.models.heads.segmentation import Segmenter, resize
from infmae_jax.models.patches import normalize
from infmae_jax.tasks.finetune import FineTuneConfig
from infmae_jax.tasks.finetune_task import FineTuneModel, FineTuneTask
from infmae_jax.training.task import Loss

_MOST_WEIGHT = 10.0  # of a class before weights are scaled: a class of a few pixels must not be all that counts


@dataclasses.dataclass(frozen=True)
class SegmentLossConfig:
    """Cross-entropy over the pixels that have a class.

    Attributes:
      mean_over: "valid" divides by the pixels with a class; "all" by all, ignored and padding included (as
        mmsegmentation does by default).
      class_weights: a number for each class, none for 1, or "auto": inverse to the class's share of the training
        pixels, capped, 1 on average over pixels.
    """

    mean_over: Annotated[str, "valid, all"] = "valid"
    class_weights: tuple[str, ...] = ()


@dataclasses.dataclass(frozen=True)
class SegmentConfig(FineTuneConfig):
    """A segmentation run.

    Attributes:
      head: decode head and auxiliary head.
      loss: see there.
      background: class that the second mean of the measures leaves out; -1: none.
    """

    task: str = "segment"
    best_metric: str = "val_miou"
    head: SegmentationHeadConfig = SegmentationHeadConfig()
    loss: SegmentLossConfig = SegmentLossConfig()
    background: Annotated[int, "[-1, 254]"] = 0

    LABELS: ClassVar[str] = "mask"
    FREE_KEYS: ClassVar[tuple[str, ...]] = (*FineTuneConfig.FREE_KEYS, "windows.", "background")

    def completed(self) -> Self:
        """With numbers for "auto" class weights; InputError where the weights do not fit the classes."""
        weights = self.loss.class_weights
        if weights == ("auto",) and not self.data.shards:
            weights = ()
        elif weights == ("auto",):
            weights = tuple(f"{weight:.4g}" for weight in balanced_weights(self._pixels_of_classes()))
        try:
            fit = not weights or (len(weights) == len(self.classes) and all(0 <= float(w) < 1e6 for w in weights))
        except ValueError:
            fit = False
        if not fit:
            raise InputError(
                f"loss.class_weights={','.join(weights)}: give auto, or a number of at least 0 for each of the "
                f"{len(self.classes)} classes"
            )
        return dataclasses.replace(self, loss=dataclasses.replace(self.loss, class_weights=weights))

    def _pixels_of_classes(self) -> np.ndarray:
        """(classes,) int64: pixels of the training split."""
        reader = ExampleReader(local_folders(self.data.shards), self.data.train_split)
        counts = np.zeros(256, np.int64)
        for found in ahead(lambda index: np.bincount(decode_mask(reader.first_whole(index)).reshape(-1), minlength=256),
                           range(len(reader))):  # fmt: skip
            counts += found
        return counts[: len(self.classes)]


def balanced_weights(pixels: np.ndarray) -> np.ndarray:
    """(classes,) pixel counts -> weights inverse to them, capped, whose mean over all pixels is 1; 0 for no pixels."""
    shares = pixels / max(pixels.sum(), 1)
    inverse = np.where(pixels > 0, 1 / np.maximum(shares * np.count_nonzero(pixels), 1e-12), 0.0)
    capped = np.minimum(inverse, _MOST_WEIGHT)
    return capped / max((shares * capped).sum(), 1e-12)


class SegmentTask(FineTuneTask):
    """See `training.task.Task`. A batch is image (B,H,W,1) uint8 and mask (B,H,W) uint8, 255 = ignore."""

    name = "segment"
    measures = {"val_miou": "mIoU", "val_macc": "mAcc", "val_aacc": "aAcc"}

    def __init__(self, config: SegmentConfig, trained: TrainedModel):
        self.view = config.data.view(mask=True)
        super().__init__(config, trained)
        self.model = SegmentationModel(config)

    def loss(self, params: Any, batch: dict[str, jax.Array], key: jax.Array) -> Loss:
        out = self.model.module.apply({"params": params}, normalize(batch["image"]), rngs=self.noise(key))
        labels = batch["mask"].astype(jnp.int32)
        valid = labels != IGNORE
        weights = jnp.asarray(self._class_weights)[jnp.where(valid, labels, 0)] * valid

        def cross_entropy(logits: jax.Array) -> jax.Array:
            found = optax.softmax_cross_entropy_with_integer_labels(logits, jnp.where(valid, labels, 0))
            return (found * weights).sum()

        logits = resize(out["logits"], labels.shape[1:])
        total = cross_entropy(logits)
        if "auxiliary" in out:
            total += self.config.head.auxiliary_weight * cross_entropy(resize(out["auxiliary"], labels.shape[1:]))
        right = ((logits.argmax(axis=-1) == labels) & valid).sum()
        count = valid.sum() if self.config.loss.mean_over == "valid" else labels.size
        return Loss(total, count, {"pixel_accuracy": right})

    @functools.cached_property
    def _class_weights(self) -> np.ndarray:
        """(classes,) float32."""
        given, count = self.config.loss.class_weights, len(self.config.classes)
        return np.array([float(weight) for weight in given] or [1.0] * count, np.float32)


class SegmentationModel(FineTuneModel):
    """What a segmentation run computes, apart from its weights."""

    def __init__(self, config: SegmentConfig):
        """`config`: with classes and architecture filled in, see `finetune.resolved`."""
        super().__init__(config)
        self.module = Segmenter(config.encoder, config.head, len(config.classes))

    @property
    def protocol(self) -> str:
        """How evaluation looks at images: what makes its numbers comparable."""
        return f"{self.config.windows}; stored size, one scale, no mirroring; pixels of class 255 do not count"

    def evaluate(self, params: Any, shards: Sequence[str], split: str, thorough: bool = False) -> dict[str, Any]:
        """Measures of a split, every image at its stored size; the same scores on all hosts.

        Args:
          thorough: also measure the boundary F1, which takes longer than all else on the host.

        Returns:
          scores: see `evaluation.segmentation.scores`, and `protocol`, `confusion`, `images`, `damaged` (left out).
          worst: picture of the images with the smallest share of right pixels, of this host.

        Raises:
          InputError: no such split, or an example without mask.
        """
        labelled, count = LabelledImages(shards, split, self.config.data.intensity, "mask"), len(self.classes)
        totals = np.zeros(count * count + 2, np.int64)  # confusion matrix, images, damaged
        edges = np.zeros((count, 4), np.int64)
        worst: Worst[tuple[str, np.ndarray, np.ndarray, np.ndarray]] = Worst()
        for image, classes in self.predictions(params, labelled, lambda image: image.pixels):
            matrix = segmentation.confusion(image.labels, classes, count)
            totals[:-2] += matrix.reshape(-1)
            totals[-2] += 1
            if thorough:
                edges += segmentation.boundary_counts(image.labels, classes, count)
            right = float(np.trace(matrix) / matrix.sum()) if matrix.any() else 1.0
            worst.add(right, (image.key, image.pixels, image.labels, classes))
        totals[-1] = len(labelled.damaged)
        totals, edges = summed(totals), summed(edges)
        matrix = totals[:-2].reshape(count, count)
        background = self.config.background if self.config.background >= 0 else None
        scores = segmentation.scores(matrix, self.classes, background)
        known = {"images": int(totals[-2]), "damaged": int(totals[-1]), "protocol": self.protocol}
        if thorough:
            known["boundary_f1"] = segmentation.boundary_f1(edges)
        drawn = pictures.segmentation_panel(worst.items(), self.classes)
        return {"scores": {**scores, **known, "confusion": matrix.tolist()}, "worst": drawn}

    def report(self, scores: dict[str, Any]) -> tuple[str, dict[str, np.ndarray]]:
        """The scores as a table for people, and as pictures by name."""
        confusion = pictures.confusion_matrix(np.array(scores["confusion"]), self.classes)
        return segmentation.table_text(scores, self.protocol), {"confusion": confusion}

    def compute(self, params: Any, images: jax.Array) -> jax.Array:
        """(N,H,W) uint8 on a canvas -> (N,H,W) uint8 class numbers, on the devices."""
        return _predicted(self.module, self.config.windows, params, images)

    def write(self, folder: Path, name: str, image: np.ndarray, classes: np.ndarray) -> dict[str, Any]:
        """Writes the prediction of one image, class numbers and a picture, and returns what is to be noted of it."""
        overlay = pictures.class_overlay(image, classes, self.classes)
        files = self.save(folder, name, {"classes": pictures.class_map(classes), "overlays": overlay})
        numbers, pixels = np.unique(classes, return_counts=True)
        shares = {self.classes[n]: round(p / classes.size, 6) for n, p in zip(numbers, pixels.tolist(), strict=True)}
        return {"class_map": files["classes"], "overlay": files["overlays"], "shares": shares}


def _scores(module: Segmenter, params: Any, pixels: jax.Array) -> jax.Array:
    logits = module.apply({"params": params}, pixels, auxiliary=False)["logits"]
    return resize(logits, pixels.shape[1:3])


@functools.partial(jax.jit, static_argnums=(0, 1))
def _predicted(module: Segmenter, how: Windows, params: Any, images: jax.Array) -> jax.Array:
    scores = window_scores(functools.partial(_scores, module), params, images, how)
    return scores.argmax(axis=-1).astype(jnp.uint8)

"""Infrared small-target detection: which pixels belong to targets of a few pixels, and which targets there are."""

import dataclasses
import functools
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
import optax
from PIL import Image

from data_pipelines.examples import IGNORE
from data_pipelines.files import write_csv
from data_pipelines.remote import local_folders
from data_pipelines.shards import read_manifest
from data_pipelines.transforms import InfraredAugment
from infmae_jax import pictures
from infmae_jax.evaluation import small_targets
from infmae_jax.evaluation.hosts import summed
from infmae_jax.evaluation.labelled import LabelledImages
from infmae_jax.evaluation.windows import Windows, window_scores
from infmae_jax.evaluation.worst import Worst
from infmae_jax.interop.trained_model import TrainedModel
from infmae_jax.models.config import SmallTargetHeadConfig
from infmae_jax.models.heads.segmentation import resize
from infmae_jax.models.heads.small_targets import TargetDetector
from infmae_jax.models.patches import normalize
from infmae_jax.tasks.finetune import FineTuneConfig, LabelledData
from infmae_jax.tasks.finetune_task import FineTuneModel, FineTuneTask
from infmae_jax.training.task import Loss

CLASSES = 2
LOSSES = ("soft_iou_bce", "sls", "focal")
_COLUMNS = ("row", "column", "area", "peak")  # of targets.csv
_FOCAL_ALPHA, _FOCAL_GAMMA = 0.75, 2.0
_DEEP_WEIGHT = 0.5  # of each coarser prediction in the loss
_LEAST_IOU = 1e-6  # so that no logarithm meets 0


@dataclasses.dataclass(frozen=True)
class SmallTargetConfig(FineTuneConfig):
    """A small-target run.

    Attributes:
      head: the decoder.
      loss: "soft_iou_bce": -log of the soft IoU of each image, plus the mean cross-entropy of its pixels; "sls": scale
        and location sensitive (MSHNet, CVPR 2024); "focal".
      threshold: probability above which a pixel is target in measures and predictions.
      windows: how images are looked at in evaluation and prediction: whole, by default.
      data: crops contain a target with probability `focus` at least; with `flip` they are mirrored both ways and
        transposed at random.
    """

    task: str = "small_target"
    best_metric: str = "val_iou"
    head: SmallTargetHeadConfig = SmallTargetHeadConfig()
    loss: Annotated[str, ", ".join(LOSSES)] = "soft_iou_bce"
    threshold: Annotated[float, "(0, 1)"] = small_targets.THRESHOLD
    windows: Windows = Windows((0, 0))
    data: LabelledData = LabelledData(zoom=(1.0, 1.0), focus=0.5, augment=InfraredAugment(gain=0.3, offset=20.0))

    LABELS: ClassVar[str] = "mask"
    SYNTHETIC_MASK: ClassVar[str] = "targets"
    FREE_KEYS: ClassVar[tuple[str, ...]] = (*FineTuneConfig.FREE_KEYS, "windows.", "threshold")


class SmallTargetTask(FineTuneTask):
    """See `training.task.Task`. A batch is image (B,H,W,1) uint8 and mask (B,H,W) uint8: 1 target, 255 = ignore."""

    name = "small_target"
    measures = {"val_iou": "IoU", "val_niou": "nIoU", "val_pd": "Pd", "val_fa": "Fa", "val_auc": "AUC"}

    def __init__(self, config: SmallTargetConfig, trained: TrainedModel):
        """Both from `resolved`; InputError where the masks are not of background and target."""
        self.view = config.data.view(mask=True)
        super().__init__(config, trained)
        self.model = SmallTargetModel(config)

    def loss(self, params: Any, batch: dict[str, jax.Array], key: jax.Array) -> Loss:
        turn, noise = jax.random.split(key)
        images, masks = batch["image"][..., 0], batch["mask"]
        if self.config.data.flip:
            images, masks = turned(turn, images, masks)
        logits = self.model.module.apply({"params": params}, normalize(images)[..., None], rngs=self.noise(noise))
        valid, target = masks != IGNORE, (masks == 1).astype(jnp.float32)
        measure = _LOSSES[self.config.loss]
        total, weights = jnp.zeros(len(images)), 0.0
        for level, found in enumerate(logits):
            weight = _DEEP_WEIGHT if level else 1.0
            whole = resize(found[..., None], masks.shape[1:])[..., 0]
            total += weight * measure(whole, target, valid)
            weights += weight
        return Loss((total / weights).sum(), len(images), {"soft_iou": soft_iou(logits[0], target, valid).sum()})


def turned(key: jax.Array, images: jax.Array, masks: jax.Array) -> tuple[jax.Array, jax.Array]:
    """(B,H,W) each: every sample upside down half of the time and, where H = W, transposed half of the time."""
    down, across = jax.random.bernoulli(key, 0.5, (2, len(images), 1, 1))

    def turn(x: jax.Array) -> jax.Array:
        x = jnp.where(down, x[:, ::-1], x)
        return jnp.where(across, jnp.swapaxes(x, 1, 2), x) if x.shape[1] == x.shape[2] else x

    return turn(images), turn(masks)


def soft_iou(logits: jax.Array, target: jax.Array, valid: jax.Array) -> jax.Array:
    """(B,H,W) each -> (B,): intersection over union of probabilities (Rahman and Wang 2016); 1 / (1 + their sum) where
    an image has no target.

    The usual 1 added to both sums everywhere outweighs a target of a few pixels: most is then gained by predicting
    nothing, and nothing is what such a loss learns.
    """
    p = jax.nn.sigmoid(logits) * valid
    both, either = (p * target).sum(axis=(1, 2)), (p + target - p * target).sum(axis=(1, 2))
    empty = jnp.where(target.any(axis=(1, 2)), 0.0, 1.0)
    return (both + empty) / (either + empty)


def _soft_iou_bce(logits: jax.Array, target: jax.Array, valid: jax.Array) -> jax.Array:
    """The logarithm (Yu et al. 2016) pulls at a target however little is found of it. 1 - IoU no longer does once all
    probabilities are small, and images without target make them so."""
    entropy = optax.sigmoid_binary_cross_entropy(logits, target) * valid
    mean = entropy.sum(axis=(1, 2)) / jnp.maximum(valid.sum(axis=(1, 2)), 1)
    return mean - jnp.log(soft_iou(logits, target, valid) + _LEAST_IOU)


def _focal(logits: jax.Array, target: jax.Array, valid: jax.Array) -> jax.Array:
    """Focal loss (Lin et al. 2017), summed over an image's pixels and divided by its target pixels."""
    found = optax.sigmoid_focal_loss(logits, target, alpha=_FOCAL_ALPHA, gamma=_FOCAL_GAMMA) * valid
    return found.sum(axis=(1, 2)) / jnp.maximum(target.sum(axis=(1, 2)), 1)


def _sls(logits: jax.Array, target: jax.Array, valid: jax.Array) -> jax.Array:
    """Scale and location sensitive loss (Liu et al. 2024), with centroids in place of moments that grow with the mass.

    1 - w IoU + location: w compares the predicted mass with the true one; location compares length and angle of the
    two centroids, seen from the image's first corner; it is left out of images without target.
    """
    p = jax.nn.sigmoid(logits) * valid
    mass, true = p.sum(axis=(1, 2)), target.sum(axis=(1, 2))
    apart = ((mass - true) / 2) ** 2
    scale = (jnp.minimum(mass, true) + apart + 1) / (jnp.maximum(mass, true) + apart + 1)
    height, width = logits.shape[1:]
    places = jnp.meshgrid((jnp.arange(height) + 0.5) / height, (jnp.arange(width) + 0.5) / width, indexing="ij")

    def centroid(weights: jax.Array) -> jax.Array:
        total = jnp.maximum(weights.sum(axis=(1, 2)), 1e-6)
        return jnp.stack([(weights * place[None]).sum(axis=(1, 2)) / total for place in places])

    ours, theirs = centroid(p), centroid(target)
    lengths = [jnp.sqrt((point**2).sum(axis=0) + 1e-12) for point in (ours, theirs)]
    angles = [jnp.arctan2(point[0], point[1] + 1e-12) for point in (ours, theirs)]
    length = jnp.minimum(*lengths) / jnp.maximum(jnp.maximum(*lengths), 1e-6)
    location = 1 - length + (4 / jnp.pi**2) * (angles[0] - angles[1]) ** 2
    return 1 - scale * soft_iou(logits, target, valid) + jnp.where(true > 0, location, 0.0)


_LOSSES = {"soft_iou_bce": _soft_iou_bce, "sls": _sls, "focal": _focal}


class SmallTargetModel(FineTuneModel):
    """What a small-target run computes, apart from its weights."""

    def __init__(self, config: SmallTargetConfig):
        """`config`: with architecture filled in, see `finetune.resolved`."""
        super().__init__(config)
        self.module = TargetDetector(config.encoder, config.head)

    def evaluate(self, params: Any, shards: Sequence[str], split: str, thorough: bool = False) -> dict[str, Any]:
        """Measures of a split, every image at its stored size; the same scores on all hosts.

        `thorough`: also at thresholds from 0.1 to 0.9.

        Returns:
          scores: see `evaluation.small_targets`; worst: a picture of the images with the smallest IoU, of this host.
        """
        labelled = LabelledImages(shards, split, self.config.data.intensity, "mask")
        counts = small_targets.SmallTargetCounts(self.config.threshold, small_targets.SWEEP if thorough else ())
        worst: Worst[tuple[str, np.ndarray, np.ndarray, np.ndarray]] = Worst()
        for image, scores in self.predictions(params, labelled, lambda image: image.pixels):
            above = (scores > self.config.threshold).astype(np.uint8)
            worst.add(counts.add(scores, image.labels), (image.key, image.pixels, image.labels, above))
        counts.values[:], damaged = summed(counts.values), summed(np.array(len(labelled.damaged)))
        scores = {**counts.scores(), "damaged": int(damaged)}
        scores["protocol"] = f"{self._labels(shards)}{self.config.windows}; {scores['protocol']}"
        return {"scores": scores, "worst": pictures.segmentation_panel(worst.items(), self.classes)}

    @staticmethod
    def _labels(shards: Sequence[str]) -> str:
        """What has to be said of the masks themselves."""
        builders = (str(read_manifest(folder).settings.get("builder", "")) for folder in local_folders(shards))
        weak = any(name.startswith("weak_") for name in builders)
        return "weak masks, ellipses in boxes (not to be compared with published numbers); " if weak else ""

    def report(self, scores: dict[str, Any]) -> tuple[str, dict[str, np.ndarray]]:
        """The scores as a table for people; no further pictures."""
        return small_targets.table_text(scores), {}

    def compute(self, params: Any, images: jax.Array) -> jax.Array:
        """(N,H,W) uint8 on a canvas -> (N,H,W) float32 probabilities, on the devices."""
        return _probabilities(self.module, self.config.windows, params, images)

    def write(self, folder: Path, name: str, image: np.ndarray, scores: np.ndarray) -> dict[str, Any]:
        """Writes mask, probabilities (16 bit) and picture of one image, and returns what is to be noted of it."""
        found = scores > self.config.threshold
        targets = sorted(small_targets.components(found, scores), key=lambda target: -target.peak)
        drawn = {
            "masks": Image.fromarray(found.astype(np.uint8) * 255),
            "probabilities": Image.fromarray(np.rint(scores * small_targets.LEVELS).astype(np.uint16)),
            "overlays": pictures.target_overlay(image, found, [(t.row, t.column) for t in targets]),
        }
        files = self.save(folder, name, drawn, compress_level=1)  # the default took a tenth of all time
        listed = [
            {"row": round(t.row, 2), "column": round(t.column, 2), "area": t.area, "peak": round(t.peak, 4)}
            for t in targets
        ]
        return {**files, "targets": listed}

    def finish(self, folder: Path, rows: Sequence[dict[str, Any]]) -> None:
        table = ((row["image"], *(target[name] for name in _COLUMNS)) for row in rows for target in row["targets"])
        write_csv(folder / "targets.csv", ("image", *_COLUMNS), table)


def _scores(module: TargetDetector, params: Any, pixels: jax.Array) -> jax.Array:
    return module.apply({"params": params}, pixels, deep=False)[0][..., None]


@functools.partial(jax.jit, static_argnums=(0, 1))
def _probabilities(module: TargetDetector, how: Windows, params: Any, images: jax.Array) -> jax.Array:
    scores = window_scores(functools.partial(_scores, module), params, images, how)
    return jax.nn.sigmoid(scores[..., 0].astype(jnp.float32))

"""The linear probe: one linear layer on the frozen encoder's features, which are computed once.

The recipe is MAE's (He et al. 2022, appendix A): batch normalisation without affine parameters before the layer, LARS,
90 epochs of which 10 warm up, half a cosine, no weight decay.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence
from typing import Annotated, Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
import optax

from data_pipelines.errors import InputError
from data_pipelines.order import RecordOrder
from infmae_jax import pictures
from infmae_jax.evaluation import classification
from infmae_jax.evaluation.features import LabelledFeatures
from infmae_jax.interop.trained_model import FEATURES
from infmae_jax.tasks.batches import ORDER_STRIDE
from infmae_jax.training.config import Count, Duration, OptimizerConfig, RunConfig
from infmae_jax.training.duration import in_steps
from infmae_jax.training.task import Evaluator, Loss, Position, Task

NORM_EPS = 1e-6
_INITIAL_STD = 0.01


@dataclasses.dataclass(frozen=True)
class ProbeConfig(RunConfig):
    """A linear probe.

    Attributes:
      csv: label file: columns file (relative to its folder), split and labels; made into shards in the run folder.
      shards: shard sets with labels, in place of `csv`.
      label_column: names of one or more labels (columns of the CSV); each is a run of its own on the same features.
      train_split, test_split: names of the splits.
      synthetic: with neither `csv` nor `shards`, make this many synthetic scenes and probe their scene class.
      variant: of an untrained encoder (checkpoint "random"); or the variant that the checkpoint must be.
      like: run whose architecture and image size an untrained encoder takes.
      encoder_seed: of an untrained encoder's weights.
      image_size: rows and columns; (0, 0) takes those of the run.
      feature: "pooled", "fused", "stage1", "stage2", "stage3" or "multi", see
        `TrainedModel.vectors`.
      view: "stretch": the whole image squeezed to the image size; "center_crop": its centre at the original aspect
        ratio. Stretching is the default because what an infrared label is about may be small and near the rim.
      flip, crops: more views of each training image: mirrored; random crops. Each pass draws one view per image.
      batch_size: images per step (all of them, if there are fewer).
      least_steps: a data set too small for this many steps in `duration` is passed over more often, for LARS moves a
        layer by a fraction of its own norm at each step, whatever the batch.
      heads: classifiers trained side by side, with seeds `seed`, `seed` + 1, ...; the encoder is the same for all.
      feature_batch: images per device call when features are computed.
      neighbors: of the k-NN figure.
    """

    optimizer: OptimizerConfig = OptimizerConfig(
        name="lars", base_learning_rate=6.4, warmup="11 percent", weight_decay=0.0
    )
    duration: Duration = "90 epochs"
    log_every: Duration = "10 percent"
    checkpoint_every: Duration = "25 percent"
    csv: str = ""
    shards: tuple[str, ...] = ()
    label_column: tuple[str, ...] = ("label",)
    train_split: str = "train"
    test_split: str = "val"
    synthetic: Count = 0
    variant: str = ""
    like: str = ""
    encoder_seed: Annotated[int, "[0, 4294967295]"] = 0
    image_size: tuple[int, int] = (0, 0)
    feature: Annotated[str, ", ".join(FEATURES)] = "pooled"
    view: Annotated[str, "stretch, center_crop"] = "stretch"
    flip: bool = False
    crops: Count = 0
    batch_size: Annotated[int, "[1, inf)"] = 256
    least_steps: Count = 720
    heads: Annotated[int, "[1, inf)"] = 3
    feature_batch: Annotated[int, "[1, inf)"] = 64
    neighbors: Annotated[int, "[1, inf)"] = 20

    FREE_KEYS: ClassVar[tuple[str, ...]] = (*RunConfig.FREE_KEYS, "csv", "shards", "label_column", "feature_batch")


class ProbeTask(Task):
    """See `training.task.Task`. A batch is feature (B,S,D) float32 and label (B,S) int32, for S classifiers.

    The encoder is frozen by staying outside: what trains are S linear layers {"head_s": kernel (D,C), bias (C,)}.
    """

    name, dtype = "probe", "float32"

    def __init__(
        self,
        config: ProbeConfig,
        train: LabelledFeatures,
        test: LabelledFeatures,
        class_names: Sequence[str],
        fingerprint: dict[str, Any],
    ):
        """`fingerprint` identifies encoder and data; InputError where a split or the classes do not suffice."""
        if len(class_names) < 2 or len(np.unique(train.classes)) < 2:
            raise InputError(f"all images of split {config.train_split} are of one class; a probe needs two")
        self.config, self.train, self.test = config, train, test
        self.class_names, self.fingerprint = list(class_names), fingerprint
        self.num_examples = len(train.classes)
        devices = jax.device_count()
        self.batch_size = min(config.batch_size, self.num_examples) // devices * devices
        if not self.batch_size:
            raise InputError(f"{self.num_examples} training images cannot be shared by {devices} devices; use fewer")
        self.width = train.values.shape[-1]
        self.batch_spec = {
            "feature": ((self.batch_size, config.heads, self.width), np.float32),
            "label": ((self.batch_size, config.heads), np.int32),
        }

    def init(self, key: jax.Array) -> dict[str, Any]:
        del key  # every classifier has its own seed, so that it does not depend on its neighbours
        classes = len(self.class_names)

        def head(seed: int) -> dict[str, jax.Array]:
            kernel = jax.random.truncated_normal(jax.random.key(seed), -2.0, 2.0, (self.width, classes))
            return {"kernel": _INITIAL_STD * kernel, "bias": jnp.zeros(classes)}

        return {f"head_{number}": head(self.config.seed + number) for number in range(self.config.heads)}

    def loss(self, params: Any, batch: dict[str, jax.Array], key: jax.Array) -> Loss:
        """Cross-entropy, summed over the classifiers, each of which thus has its own gradient."""
        del key
        total, right = 0.0, 0.0
        for number in range(self.config.heads):
            feature, label = batch["feature"][:, number], batch["label"][:, number]
            logits = _linear(params[f"head_{number}"], standardise(feature))
            total += optax.softmax_cross_entropy_with_integer_labels(logits, label).sum()
            right += (logits.argmax(axis=-1) == label).sum() / self.config.heads
        return Loss(total, len(batch["label"]), {"train_top1": right})

    def train_batches(self, at: Position) -> _Batches:
        return _Batches(self, at)

    def evaluators(self) -> dict[str, Evaluator]:
        return {"test": Evaluator("100 percent", self._evaluate)}

    def steps(self) -> int:
        """Steps of a run: those of `duration`, but at least `least_steps`."""
        asked = in_steps(self.config.duration, batch_size=self.batch_size, num_examples=self.num_examples)
        return max(asked, self.config.least_steps)

    def _evaluate(self, params: Any) -> dict[str, Any]:
        """Scores on the test split, mean over the classifiers; the table holds all that is known."""
        results = self.results(jax.device_get(params))
        picture = pictures.confusion_matrix(np.array(results["confusion"]), self.class_names)
        means = {f"test_{name}": results[name]["mean"] for name in ("top1", "balanced_accuracy")}
        return {**means, "knn_top1": results["knn"]["top1"], "confusion_matrix": picture, "results": results}

    def results(self, params: Any) -> dict[str, Any]:
        """Scores on the test split.

        Keys: top1, balanced_accuracy (mean of the class accuracies) and train_top1, each with mean, std and seeds;
        per_class (images and mean accuracy); majority_class (always the most frequent training class); knn; confusion:
        test images of each true class (row) by predicted class (column), summed over the classifiers.
        """
        train, test, count = self.train, self.test, len(self.class_names)
        matrices = [
            classification.confusion_counts(test.classes, logits.argmax(axis=-1), count)
            for logits in self.logits(params, test.values[:, 0])
        ]
        fitted = [float(np.mean(x.argmax(-1) == train.classes)) for x in self.logits(params, train.values[:, 0])]
        images = np.bincount(test.classes, minlength=count)
        majority = int(np.bincount(train.classes, minlength=count).argmax())
        accuracy = np.mean([classification.class_accuracy(matrix) for matrix in matrices], axis=0)
        return {
            "classes": self.class_names,
            "train_images": len(train.classes),
            "test_images": len(test.classes),
            "top1": classification.summary([classification.top1(m) for m in matrices]),
            "balanced_accuracy": classification.summary([classification.balanced_accuracy(m) for m in matrices]),
            "train_top1": classification.summary(fitted),
            "per_class": {
                name: {"images": int(n), "accuracy": float(a) if n else None}
                for name, n, a in zip(self.class_names, images, accuracy, strict=True)
            },
            "majority_class": {
                "class": self.class_names[majority],
                "top1": float(images[majority] / images.sum()),
                "balanced_accuracy": float((images[majority] > 0) / np.count_nonzero(images)),
            },
            "knn": self._knn,
            "confusion": np.sum(matrices, axis=0).tolist(),
        }

    def logits(self, params: Any, features: np.ndarray) -> np.ndarray:
        """(m,D) float32 features -> (S,m,classes) float32, normalised with the statistics of all training features."""
        mean, variance = self.statistics
        standardised = (features - mean) / np.sqrt(variance + NORM_EPS)
        return np.stack([_linear(params[f"head_{s}"], standardised) for s in range(self.config.heads)])

    @functools.cached_property
    def statistics(self) -> tuple[np.ndarray, np.ndarray]:
        """Mean and variance (D,) of all training features: what running averages would settle at."""
        flat = self.train.values.reshape(-1, self.width).astype(np.float64)
        return flat.mean(axis=0).astype(np.float32), flat.var(axis=0).astype(np.float32)

    @functools.cached_property
    def _knn(self) -> dict[str, Any]:
        train, test, neighbors = self.train, self.test, min(self.config.neighbors, self.num_examples)
        near = classification.knn_predict(train.values[:, 0], train.classes, test.values[:, 0], neighbors)
        counts = classification.confusion_counts(test.classes, near, len(self.class_names))
        return {
            "neighbors": neighbors,
            "top1": classification.top1(counts),
            "balanced_accuracy": classification.balanced_accuracy(counts),
        }


class _Batches:
    """This host's part of the batches, see `training.task.Batches`: every classifier has its own order and views."""

    substituted = 0

    def __init__(self, task: ProbeTask, at: Position):
        self._task, self._step = task, at.step
        first = task.config.seed + at.order * ORDER_STRIDE
        self._seeds = [(first + head) % 2**32 for head in range(task.config.heads)]
        self._orders = [RecordOrder([task.num_examples], (), seed) for seed in self._seeds]

    def __next__(self) -> dict[str, np.ndarray]:
        train, size = self._task.train, self._task.batch_size // jax.process_count()
        start = self._step * self._task.batch_size + jax.process_index() * size
        self._step += 1
        images = np.stack([order.indices(start, size) for order in self._orders], axis=1)
        views = np.zeros_like(images)
        if (count := train.values.shape[1]) > 1:
            generators = [[np.random.default_rng([s, start + place]) for s in self._seeds] for place in range(size)]
            views = np.array([[generator.integers(count) for generator in row] for row in generators])
        return {"feature": train.values[images, views], "label": train.classes[images]}

    def keys(self, step: int) -> list[str]:
        """Of the first classifier's images."""
        size = self._task.batch_size
        return [self._task.train.key(index) for index in self._orders[0].indices(step * size, size)]

    def close(self) -> None:
        """Nothing is open."""


def standardise(batch: jax.Array) -> jax.Array:
    """Batch normalisation without affine parameters, (b,D) -> (b,D): the batch's own mean and (biased) variance."""
    return (batch - batch.mean(axis=0, keepdims=True)) / jnp.sqrt(batch.var(axis=0, keepdims=True) + NORM_EPS)


def _linear(params: Any, features: Any) -> Any:
    return features @ params["kernel"] + params["bias"][None]

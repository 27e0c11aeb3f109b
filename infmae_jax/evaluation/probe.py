"""Linear probe and k-NN of a frozen encoder on a label CSV: features once, then every label column and seed."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np

from data_pipelines.errors import InputError
from infmae_jax.evaluation import metrics
from infmae_jax.interop.trained_model import TrainedModel
from infmae_jax.evaluation.features import FeatureExtractor, Views, write_npz
from infmae_jax.evaluation.knn import knn_predict
from infmae_jax.evaluation.labels import LabelColumn, LabelTable, read_labels
from infmae_jax.evaluation.linear_probe import Heads, Recipe, train_heads

RESULTS_NAME = "results.json"
HEADS_NAME = "probe.npz"
PICTURE_NAME = "confusion_matrix.png"
CACHE_NAME = "features"
VIEWS = ("stretch", "center_crop")


@dataclasses.dataclass(frozen=True)
class ProbeConfig:
    """A linear probe.

    Attributes:
      csv: label file: columns file (relative to its folder), split and labels.
      label_column: one or more label columns; each is a probe of its own on the same features.
      train_split, test_split: values of the split column.
      synthetic: with an empty `csv`, make this many synthetic scenes in the work folder and probe their scene class.
      model: variant of an untrained encoder, or the variant that the checkpoint must be; empty: whatever it is.
      like: run whose architecture and image size an untrained encoder takes.
      encoder_seed: of an untrained encoder's weights.
      image_size: rows and columns; (0, 0) takes those of the run.
      feature: "pooled", "fused", "stage1", "stage2", "stage3" or "multi", see `FeatureExtractor.extract`.
      view: "stretch": the whole image squeezed to the image size; "center_crop": its centre at the original aspect
        ratio. Stretching is the default because what an infrared label is about may be small and near the rim.
      flip, crops: more views of each training image, see `Views`; features of all of them are computed once.
      batch_size, threads: of feature extraction.
      seeds: classifiers trained, with seeds 0, 1, ...; the encoder is the same for all.
      neighbors: of the k-NN figure.
      recipe: how the classifiers are trained.
    """

    csv: str = ""
    label_column: tuple[str, ...] = ("label",)
    train_split: str = "train"
    test_split: str = "val"
    synthetic: int = 0
    model: str = ""
    like: str = ""
    encoder_seed: int = 0
    image_size: tuple[int, int] = (0, 0)
    feature: str = "pooled"
    view: str = "stretch"
    flip: bool = False
    crops: int = 0
    batch_size: int = 64
    threads: int = 4
    seeds: int = 3
    neighbors: int = 20
    recipe: Recipe = Recipe()

    def __post_init__(self):
        for name, least in (("crops", 0), ("batch_size", 1), ("threads", 1), ("seeds", 1), ("neighbors", 1)):
            if getattr(self, name) < least:
                raise InputError(f"config key {name} is {getattr(self, name)}; the least is {least}")
        if self.view not in VIEWS:
            raise InputError(f"config key view is {self.view!r}; use {' or '.join(VIEWS)}")
        if not self.label_column:
            raise InputError("config key label_column is empty; name a column of the CSV")


def linear_probe(
    encoder: TrainedModel, config: ProbeConfig, workdir: str | Path | None = None
) -> dict[str, dict[str, Any]]:
    """Trains and scores linear classifiers, and k-NN beside them, on frozen features.

    Args:
      encoder: from `load_encoder`, `untrained` or given weights.
      config: what to probe; `config.csv` names the label file.
      workdir: folder for features, results.json, probe.npz and confusion_matrix.png (several label columns: a folder
        each). A column that is finished there is not computed again. None writes nothing.

    Returns:
      The results of each label column; see `_score` for the keys.

    Raises:
      InputError: see `read_labels` and `FeatureExtractor.extract`.
    """
    table = read_labels(config.csv, config.label_column, config.train_split, config.test_split)
    folder = None if workdir is None else Path(workdir)
    cache = None if folder is None else folder / CACHE_NAME
    extractor = FeatureExtractor(encoder, config.batch_size, config.threads, cache)
    view = Views(encoder.image_size, stretch=config.view == "stretch")
    train_view = dataclasses.replace(view, flip=config.flip, crops=config.crops)
    keys = [extractor.key(table.train_files, train_view), extractor.key(table.test_files, view)]

    folders = {name: _column_folder(folder, name, config.label_column) for name in config.label_column}
    requests = {name: _request(keys, column, config) for name, column in table.columns.items()}
    results = {name: _finished(folders[name], requests[name]) for name in config.label_column}
    todo = [name for name in config.label_column if results[name] is None]
    if not todo:
        return results
    train = extractor.extract(table.train_files, train_view, config.feature, config.train_split)
    test = extractor.extract(table.test_files, view, config.feature, config.test_split)[:, 0]
    for name in todo:
        column = table.columns[name]
        heads = train_heads(train, column.train, len(column.classes), config.recipe, range(config.seeds))
        scores = _score(heads, train[:, 0], test, column, config.neighbors)
        results[name] = _describe(encoder, config, table, name) | scores | {"request": requests[name]}
        if folders[name] is not None:
            _write(folders[name], results[name], heads)
    return results


def table_text(results: dict[str, dict[str, Any]]) -> str:
    """The results as a short table for people."""
    lines = []
    for column, result in results.items():
        images = f"{result['train_images']} train and {result['test_images']} test images"
        lines += [
            f"{column}: {len(result['classes'])} classes, {images}; {result['checkpoint']}, "
            f"feature {result['feature']}; mean ± std over {len(result['top1']['seeds'])} seed(s)",
            _row("", "top-1 %", "per-class mean %"),
            _row("linear probe", _percent(result["top1"]), _percent(result["balanced_accuracy"])),
            _row(f"{result['knn']['neighbors']}-nearest neighbours", *_shares(result["knn"])),
            _row("most frequent class", *_shares(result["majority_class"])),
            "  per class: " + ", ".join(_class_text(name, values) for name, values in result["per_class"].items()),
        ]
    return "\n".join(lines)


def _score(heads: Heads, train: np.ndarray, test: np.ndarray, column: LabelColumn, neighbors: int) -> dict[str, Any]:
    """Scores on the test images.

    Keys: top1, balanced_accuracy (mean of the class accuracies) and train_top1, each with mean, std and seeds;
    per_class (images and mean accuracy); majority_class (always the most frequent training class); knn; confusion:
    test images of each true class (row) by predicted class (column), summed over seeds.
    """
    count = len(column.classes)
    matrices = [metrics.confusion_counts(column.test, p, count) for p in heads.logits(test).argmax(axis=-1)]
    fitted = [float(np.mean(p == column.train)) for p in heads.logits(train).argmax(axis=-1)]
    accuracy = np.mean([metrics.class_accuracy(matrix) for matrix in matrices], axis=0)
    images = np.bincount(column.test, minlength=count)
    majority = int(np.bincount(column.train, minlength=count).argmax())
    near = metrics.confusion_counts(column.test, knn_predict(train, column.train, test, neighbors), count)
    return {
        "top1": metrics.summary([metrics.top1(matrix) for matrix in matrices]),
        "balanced_accuracy": metrics.summary([metrics.balanced_accuracy(matrix) for matrix in matrices]),
        "train_top1": metrics.summary(fitted),
        "per_class": {
            name: {"images": int(n), "accuracy": float(a) if n else None}
            for name, n, a in zip(column.classes, images, accuracy)
        },
        "majority_class": {
            "class": column.classes[majority],
            "top1": float(images[majority] / images.sum()),
            "balanced_accuracy": float((images[majority] > 0) / np.count_nonzero(images)),
        },
        "knn": {
            "neighbors": min(neighbors, len(train)),
            "top1": metrics.top1(near),
            "balanced_accuracy": metrics.balanced_accuracy(near),
        },
        "confusion": np.sum(matrices, axis=0).tolist(),
    }


def _describe(encoder: TrainedModel, config: ProbeConfig, table: LabelTable, name: str) -> dict[str, Any]:
    return {
        "checkpoint": encoder.name,
        "step": encoder.step,
        "encoder_digest": encoder.digest,
        "csv": str(table.csv),
        "label_column": name,
        "classes": list(table.columns[name].classes),
        "train_images": len(table.train_files),
        "test_images": len(table.test_files),
        "image_size": list(encoder.image_size),
        "feature": config.feature,
        "view": config.view,
        "train_views": {"flip": config.flip, "crops": config.crops},
        "recipe": dataclasses.asdict(config.recipe) | {"peak_learning_rate": config.recipe.peak_learning_rate},
    }


def _request(keys: list[str], column: LabelColumn, config: ProbeConfig) -> str:
    """SHA-256 of everything that a column's results depend on."""
    recipe = dataclasses.asdict(config.recipe)
    known = [keys, column.classes, column.train.tolist(), column.test.tolist(), config.feature, recipe]
    return hashlib.sha256(json.dumps([*known, config.seeds, config.neighbors]).encode()).hexdigest()


def _column_folder(folder: Path | None, name: str, columns: tuple[str, ...]) -> Path | None:
    """Files of a single label column lie in the work folder itself."""
    if folder is None or len(columns) == 1:
        return folder
    return folder / "".join(c if c.isalnum() or c in "-_." else "_" for c in name)


def _finished(folder: Path | None, request: str) -> dict[str, Any] | None:
    """Results that are already in `folder` for the same request."""
    path = None if folder is None else folder / RESULTS_NAME
    if path is None or not path.is_file() or not all((folder / n).is_file() for n in (HEADS_NAME, PICTURE_NAME)):
        return None
    try:
        result = json.loads(path.read_text())
    except ValueError:
        return None
    return result if result.get("request") == request else None


def _write(folder: Path, result: dict[str, Any], heads: Heads) -> None:
    """Writes the files of one label column; results.json comes last and says that the others are there."""
    from infmae_jax.pictures import confusion_matrix

    folder.mkdir(parents=True, exist_ok=True)
    write_npz(folder / HEADS_NAME, dataclasses.asdict(heads) | {"classes": np.array(result["classes"])})
    confusion_matrix(np.array(result["confusion"]), result["classes"], folder / PICTURE_NAME)
    temporary = folder / f".{RESULTS_NAME}.tmp"
    temporary.write_text(json.dumps(result, indent=1) + "\n")
    temporary.replace(folder / RESULTS_NAME)


def _row(title: str, top1: str, balanced: str) -> str:
    return f"  {title:24}{top1:>14}{balanced:>20}"


def _percent(value: dict[str, Any]) -> str:
    return f"{100 * value['mean']:.1f} ± {100 * value['std']:.1f}"


def _shares(value: dict[str, Any]) -> tuple[str, str]:
    return f"{100 * value['top1']:.1f}", f"{100 * value['balanced_accuracy']:.1f}"


def _class_text(name: str, values: dict[str, Any]) -> str:
    accuracy = "-" if values["accuracy"] is None else f"{100 * values['accuracy']:.1f}"
    return f"{name} {accuracy} ({values['images']})"

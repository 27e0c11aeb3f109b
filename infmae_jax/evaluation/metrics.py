"""Classification measures from a confusion matrix."""

from __future__ import annotations

import numpy as np


def confusion_counts(truth: np.ndarray, predicted: np.ndarray, num_classes: int) -> np.ndarray:
    """(m,), (m,) int -> (classes, classes) int64: images of each true class (row) by predicted class (column)."""
    counts = np.zeros((num_classes, num_classes), np.int64)
    np.add.at(counts, (truth, predicted), 1)
    return counts


def top1(counts: np.ndarray) -> float:
    """Share of all images that are classified right."""
    return float(np.trace(counts) / counts.sum())


def class_accuracy(counts: np.ndarray) -> np.ndarray:
    """(classes,) share of each class's images that are classified right; NaN for a class without images."""
    images = counts.sum(axis=1)
    return np.where(images > 0, np.diag(counts) / np.maximum(images, 1), np.nan)


def balanced_accuracy(counts: np.ndarray) -> float:
    """Mean of the class accuracies, over the classes that have images: not flattered by frequent classes."""
    return float(np.nanmean(class_accuracy(counts)))


def summary(values: list[float]) -> dict[str, object]:
    """Mean, sample standard deviation (0 for one value) and the values."""
    spread = float(np.std(values, ddof=1)) if len(values) > 1 else 0.0
    return {"mean": float(np.mean(values)), "std": spread, "seeds": values}

"""Measures of classification: from a confusion matrix, and k nearest neighbours, which need no training."""

import numpy as np

_KNN_BLOCK = 1024  # test images whose similarities are held at once


def confusion_counts(truth: np.ndarray, predicted: np.ndarray, num_classes: int) -> np.ndarray:
    """(m,), (m,) int -> (classes, classes) int64: how many of each true class (row) by predicted class (column)."""
    cells = truth.astype(np.int64) * num_classes + predicted
    return np.bincount(cells, minlength=num_classes**2).reshape(num_classes, num_classes)


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


def knn_predict(train: np.ndarray, labels: np.ndarray, test: np.ndarray, neighbors: int = 20) -> np.ndarray:
    """Majority vote of the nearest training images by cosine similarity.

    Features are first standardised with the training images' mean and standard deviation: untrained encoders map all
    images close to one direction, so raw cosines would compare rounding.

    Args:
      train: (n, D) float32 features of the training images.
      labels: (n,) int32, their classes.
      test: (m, D) float32.
      neighbors: votes per image; at most n are used.

    Returns:
      (m,) int32 classes; on a tie the smallest.
    """
    mean, std = train.mean(axis=0), train.std(axis=0)
    train, test = (_unit((x - mean) / np.where(std > 0, std, 1.0)) for x in (train, test))
    votes = np.zeros((len(test), labels.max() + 1), np.int32)
    for start in range(0, len(test), _KNN_BLOCK):
        nearest = np.argsort(-test[start : start + _KNN_BLOCK] @ train.T, axis=1, kind="stable")[:, :neighbors]
        np.add.at(votes, (start + np.arange(len(nearest))[:, None], labels[nearest]), 1)
    return votes.argmax(axis=1).astype(np.int32)


def _unit(vectors: np.ndarray) -> np.ndarray:
    lengths = np.linalg.norm(vectors, axis=1, keepdims=True)
    return vectors / np.where(lengths > 0, lengths, 1.0)

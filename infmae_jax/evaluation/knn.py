"""k-nearest-neighbour classification of frozen features: a measure with nothing to train."""

from __future__ import annotations

import numpy as np


def knn_predict(train: np.ndarray, labels: np.ndarray, test: np.ndarray, neighbors: int = 20) -> np.ndarray:
    """Majority vote of the nearest training images by cosine distance.

    Features are first standardised with the training images' mean and standard deviation: untrained encoders map all
    images close to one direction, so raw cosines would compare rounding.

    Args:
      train: (n, D) float32 features of the training images.
      labels: (n,) int32, their classes.
      test: (m, D) float32.
      neighbors: votes an image; at most n are used.

    Returns:
      (m,) int32 classes; on a tie the smallest.
    """
    # Imported here: it takes a second that commands without k-NN should not pay.
    from sklearn.neighbors import KNeighborsClassifier

    mean, std = train.mean(axis=0), train.std(axis=0)
    std = np.where(std > 0, std, 1.0)
    classifier = KNeighborsClassifier(min(neighbors, len(train)), metric="cosine", algorithm="brute")
    classifier.fit((train - mean) / std, labels)
    return classifier.predict((test - mean) / std).astype(np.int32)

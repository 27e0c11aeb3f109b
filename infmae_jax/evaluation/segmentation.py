"""Measures of semantic segmentation: sums over all images of a split, as mmsegmentation defines them.

Only counts are kept, never predictions. A class that is in neither labels nor predictions is skipped in every mean; one
that is predicted but in no label has IoU 0 and no recall.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np

from data_pipelines.examples import IGNORE
from infmae_jax.evaluation.classification import confusion_counts

_MEANS = ("mIoU", "mAcc", "aAcc")


def confusion(labels: np.ndarray, predicted: np.ndarray, num_classes: int) -> np.ndarray:
    """Pixels of each true class (row) by predicted class (column); those of many images are added up.

    Args:
      labels: (...) uint8; 255 is left out. Other values from `num_classes` on must have been refused before: they, too,
        are left out.
      predicted: (...) integer, 0 to num_classes - 1.
      num_classes: K.

    Returns:
      (K,K) int64.
    """
    known = labels < num_classes
    return confusion_counts(labels[known], predicted[known], num_classes)


def scores(matrix: np.ndarray, class_names: Sequence[str], background: int | None = 0) -> dict[str, Any]:
    """Scores of a confusion matrix, as shares from 0 to 1; None where there is nothing to count, so that it is JSON.

    Args:
      matrix: (K,K) integers, true class by predicted class.
      class_names: K names.
      background: the class left out of the second set of means; None: there is no such set.

    Returns:
      mIoU, mAcc (mean recall), aAcc (share of all pixels that are right), pixels; background: its name;
      without_background: the same three over the other classes and the pixels labelled so; classes: name, IoU, recall
      and share of the labelled pixels.

    Raises:
      ValueError: names or background do not fit the matrix.
    """
    matrix = np.asarray(matrix, np.int64)
    count = len(class_names)
    if matrix.shape != (count, count) or background not in (None, *range(count)):
        raise ValueError(f"a confusion matrix {matrix.shape} does not fit {count} classes and background {background}")
    right, labelled, predicted = np.diag(matrix), matrix.sum(axis=1), matrix.sum(axis=0)
    total = int(labelled.sum())
    classes = [
        {
            "name": name,
            "IoU": _share(right[i], labelled[i] + predicted[i] - right[i]),
            "recall": _share(right[i], labelled[i]),
            "share": _share(labelled[i], total),
        }
        for i, name in enumerate(class_names)
    ]

    def means(chosen: list[int]) -> dict[str, float | None]:
        return {
            "mIoU": _mean([classes[i]["IoU"] for i in chosen]),
            "mAcc": _mean([classes[i]["recall"] for i in chosen]),
            "aAcc": _share(right[chosen].sum(), labelled[chosen].sum()),
        }

    out = {**means(list(range(count))), "pixels": total, "classes": classes}
    if background is not None:
        out["background"] = class_names[background]
        out["without_background"] = means([i for i in range(count) if i != background])
    return out


def boundary_counts(
    labels: np.ndarray, predicted: np.ndarray, num_classes: int, tolerance_pixels: int = 3
) -> np.ndarray:
    """Counts of one image for `boundary_f1`; those of many images are added up.

    A boundary pixel of a class has one of its four neighbours in another class; the image's edge and ignored pixels
    make no boundary, and predictions on ignored pixels are ignored.

    Args:
      labels: (H,W) uint8, 255 is ignored.
      predicted: (H,W) integer classes.
      num_classes: K.
      tolerance_pixels: Euclidean distance up to which boundaries count as matched.

    Returns:
      (K,4) int64: boundary pixels of the label, those of them matched by the prediction; boundary pixels of the
      prediction, those of them matched by the label.
    """
    predicted = np.where(labels == IGNORE, IGNORE, predicted)
    edges = [_edges(classes) for classes in (labels, predicted)]
    counts = np.zeros((num_classes, 4), np.int64)
    for i in range(num_classes):
        true, found = (edge & (classes == i) for edge, classes in zip(edges, (labels, predicted), strict=True))
        for column, (edge, other) in enumerate(((true, found), (found, true))):
            matched = edge & _dilated(other, tolerance_pixels) if edge.any() and other.any() else edge & False
            counts[i, 2 * column : 2 * column + 2] = edge.sum(), matched.sum()
    return counts


def boundary_f1(counts: np.ndarray) -> dict[str, Any]:
    """Boundary F1 (Csurka et al., BMVC 2013) of summed `boundary_counts`: mean, and per class.

    F1 is None, and the class skipped in the mean, where neither label nor prediction has a boundary; 0 where one has.
    """
    values = []
    for true, recalled, found, precise in np.asarray(counts, np.int64).tolist():
        recall, precision = _share(recalled, true) or 0.0, _share(precise, found) or 0.0
        one_sided = 0.0 if true or found else None
        values.append(2 * precision * recall / (precision + recall) if precision + recall else one_sided)
    return {"mean": _mean(values), "classes": values}


def table_text(scores: dict[str, Any], protocol: str) -> str:
    """`scores` as a table in per cent, with the protocol that they hold for: how images were scaled, cut, joined."""
    width = max(len("class"), *(len(row["name"]) for row in scores["classes"]))
    lines = [f"{'class':{width}}     IoU  recall  pixels"]
    lines += [
        f"{row['name']:{width}}  {'  '.join(percent(row[key]) for key in ('IoU', 'recall', 'share'))}"
        for row in scores["classes"]
    ]
    without = f"without {scores.get('background')}"
    for title, part in (("all classes", scores), (without, scores.get("without_background"))):
        if part:
            lines.append(f"{title}: " + ", ".join(f"{key} {percent(part[key]).strip()}" for key in _MEANS))
    if "boundary_f1" in scores:
        lines.append(f"boundary F1 within 3 pixels: {percent(scores['boundary_f1']['mean']).strip()}")
    return "\n".join([*lines, f"in per cent of {scores['pixels']:,} labelled pixels; {protocol}"])


def percent(value: float | None) -> str:
    """A share in a table."""
    return f"{'-' if value is None else format(100 * value, '.2f'):>6}"


def _share(part: int, whole: int) -> float | None:
    return int(part) / int(whole) if whole else None


def _mean(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if known else None


def _edges(classes: np.ndarray) -> np.ndarray:
    """(H,W) bool: pixels beside one of another class, ignored ones aside."""
    edge = np.zeros(classes.shape, bool)
    for a, b in ((np.s_[1:], np.s_[:-1]), (np.s_[:, 1:], np.s_[:, :-1])):
        differ = (classes[a] != classes[b]) & (classes[a] != IGNORE) & (classes[b] != IGNORE)
        edge[a] |= differ
        edge[b] |= differ
    return edge


def _dilated(mask: np.ndarray, radius: int) -> np.ndarray:
    """(H,W) bool: pixels at most `radius` (Euclidean) from one of the mask."""
    padded, out = np.pad(mask, radius), np.zeros(mask.shape, bool)
    for y, x in np.ndindex(2 * radius + 1, 2 * radius + 1):
        if (y - radius) ** 2 + (x - radius) ** 2 <= radius**2:
            out |= padded[y : y + mask.shape[0], x : x + mask.shape[1]]
    return out

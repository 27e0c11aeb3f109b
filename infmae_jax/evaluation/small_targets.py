"""Measures of infrared small-target detection, image by image at its own size, each with its definition.

    IoU     pixels that are target in truth and prediction, over those that are in either; summed over the data set,
            targets alone (the field's "mIoU" is this, not a mean with the background)
    nIoU    mean over images of the image's IoU; an image without target scores 1 where nothing is predicted, else 0
    F1      2 P R / (P + R) of the same pixel counts, which is 2 IoU / (1 + IoU)
    Pd      share of the true targets that are found: connected components (8 neighbours) whose centroid is less than 3
            pixels from that of a predicted one; true targets in reading order take the nearest that is left
    Fa      pixels of the predicted components that found nothing, per million pixels
    AUC     probability that a target pixel scores higher than another one, ties half: exact for scores in steps of
            1 / 65535
    AUC 11  trapezoid through true and false positive rates of pixels above 0, 0.1 ... 1: what the field prints

Published code differs in ways that change numbers, mostly by mistake: unmatched components told by their area and not
by identity (a false one of the same area as a matched one is free: Fa too low); thresholds of probabilities applied to
logits (all but one of the ROC points are void); targets counted on from epoch to epoch (Pd shrinks); images and masks
resized before scoring (targets vanish, 3 pixels mean 6); masks compared with 255 though some files hold other values;
4 neighbours in place of 8 (diagonal targets count twice).

On 50 random pairs with 240 targets pyirstdmetrics 1.0.2 gives the same IoU, F1 (its beta at 1, not the default 0.3), Pd
and Fa in all six digits; its nIoU was lower by 1 / 50: an image that is empty in truth and prediction scores 0 there.
It takes the first predicted target within 3 pixels, not the nearest, which can change Pd where targets crowd.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np
from scipy import ndimage

from data_pipelines.examples import IGNORE

DISTANCE = 3.0  # pixels between centroids, from which on a target is not found
THRESHOLD = 0.5
LEVELS = 65535
SWEEP = tuple(round(0.1 * number, 1) for number in range(1, 10))
_EIGHT = np.ones((3, 3), bool)
_EPSILON = 0.001  # of the field's rates


@dataclasses.dataclass(frozen=True)
class Component:
    """A target: centroid (row, column) in pixels, its pixel count, and its highest score."""

    row: float
    column: float
    area: int
    peak: float


def components(mask: np.ndarray, scores: np.ndarray | None = None) -> list[Component]:
    """The connected parts (8 neighbours) of (H,W) bool, in reading order of their first pixels.

    `scores`: (H,W) float, of which each component's peak is taken; 1 without them.
    """
    labels, count = ndimage.label(mask, _EIGHT)
    rows, columns = np.nonzero(labels)  # few pixels are target: what follows looks at no others
    numbers = labels[rows, columns] - 1
    areas = np.bincount(numbers, minlength=count)
    centres = [np.bincount(numbers, places, minlength=count) / areas for places in (rows, columns)]
    peaks = np.full(count, 1.0 if scores is None else -np.inf)
    if scores is not None:
        np.maximum.at(peaks, numbers, scores[rows, columns])
    return [
        Component(float(row), float(column), int(area), float(peak))
        for row, column, area, peak in zip(*centres, areas, peaks, strict=True)
    ]


def matched(truth: list[Component], predicted: list[Component], distance: float = DISTANCE) -> list[int | None]:
    """For every true target the predicted one that finds it, or None; each predicted one finds one target."""
    free = list(range(len(predicted)))
    found: list[int | None] = []
    for target in truth:
        apart = [np.hypot(predicted[p].row - target.row, predicted[p].column - target.column) for p in free]
        nearest = int(np.argmin(apart)) if apart else -1
        found.append(free.pop(nearest) if apart and apart[nearest] < distance else None)
    return found


class SmallTargetCounts:
    """Counts over a data set, from which `scores` follow. Those of several hosts may be added up (`values`).

    Attributes:
      values: (n,) float64: everything that was counted; to be changed in place.
    """

    def __init__(self, threshold: float = THRESHOLD, sweep: Sequence[float] = SWEEP):
        """`threshold`: score above which a pixel is target; `sweep`: others to measure at."""
        self.threshold, self._thresholds = threshold, (threshold, *sweep)
        sizes = 2, 3 * len(self._thresholds), 2 * (LEVELS + 1)
        self.values = np.zeros(sum(sizes))
        self._images, targets, histograms = np.split(self.values, np.cumsum(sizes[:-1]))  # images, sum of their IoU
        self._targets = targets.reshape(-1, 3)  # targets, found, pixels of false components; at each threshold
        self._histograms = histograms.reshape(2, -1)  # scores of background pixels, of target pixels

    def add(self, scores: np.ndarray, truth: np.ndarray) -> float:
        """Counts one image: scores (H,W) float from 0 to 1, truth (H,W) uint8: 0, 1 target, 255 does not count.

        Returns its IoU."""
        counts = truth != IGNORE
        target = (truth == 1) & counts
        levels = np.rint(np.clip(scores, 0, 1) * LEVELS).astype(np.int64)
        for kind, chosen in enumerate((counts & ~target, target)):
            self._histograms[kind] += np.bincount(levels[chosen], minlength=LEVELS + 1)
        truths = components(target)
        for place, threshold in enumerate(self._thresholds):
            found = (levels > threshold * LEVELS) & counts
            predicted = components(found)
            pairs = [match for match in matched(truths, predicted) if match is not None]
            false = sum(c.area for number, c in enumerate(predicted) if number not in pairs)
            self._targets[place] += len(truths), len(pairs), false
        found = (levels > self.threshold * LEVELS) & counts
        either = (found | target).sum()
        iou = float((found & target).sum() / either) if either else 1.0
        self._images += 1, iou
        return iou

    def scores(self) -> dict[str, Any]:
        """The measures by name, and their sweep over thresholds; None where they have no meaning (no targets)."""
        pixels = self._histograms.sum()
        images, sum_of_ious = self._images
        rows = [self._at(threshold, *counts) for threshold, counts in zip(self._thresholds, self._targets, strict=True)]
        return {
            **rows[0],
            "nIoU": _ratio(sum_of_ious, images),
            "AUC": self._exact_auc(),
            "AUC_11": self._field_auc(),
            "images": int(images),
            "pixels": int(pixels),
            "target_share": _ratio(self._histograms[1].sum(), pixels),
            "sweep": rows[1:],
            "protocol": (
                f"stored size; target above {self.threshold:g}; components of 8 neighbours; found below {DISTANCE:g} "
                "px between centroids; Fa of unmatched components; images without target score nIoU 1 if left empty"
            ),
        }

    def _at(self, threshold: float, targets: float, found: float, false_pixels: float) -> dict[str, Any]:
        above = int(np.floor(threshold * LEVELS)) + 1
        false, true = self._histograms[:, above:].sum(axis=1)
        positives, pixels = self._histograms[1].sum(), self._histograms.sum()
        return {
            "threshold": threshold,
            "IoU": _ratio(true, positives + false),
            "F1": _ratio(2 * true, positives + true + false),
            "precision": _ratio(true, true + false),
            "recall": _ratio(true, positives),
            "Pd": _ratio(found, targets),
            "Fa": _ratio(1e6 * false_pixels, pixels),
            "targets": int(targets),
        }

    def _exact_auc(self) -> float | None:
        background, target = self._histograms
        below = np.cumsum(background) - background
        return _ratio((target * (below + background / 2)).sum(), target.sum() * background.sum())

    def _field_auc(self) -> float | None:
        background, target = self._histograms
        above = [int(np.floor(number / 10 * LEVELS)) + 1 for number in range(11)]
        hits = [target[first:].sum() / (target.sum() + _EPSILON) for first in above]
        alarms = [background[first:].sum() / (background.sum() + _EPSILON) for first in above]
        return float(np.trapezoid(hits[::-1], alarms[::-1])) if target.sum() else None


def _ratio(part: float, whole: float) -> float | None:
    return float(part / whole) if whole else None


def table_text(scores: dict[str, Any]) -> str:
    """The scores for people, with the protocol that they follow."""

    def text(name: str, factor: float = 100.0, unit: str = " %") -> str:
        return "-" if scores[name] is None else f"{factor * scores[name]:.2f}{unit}"

    def swept(name: str, factor: float) -> str:
        values = [row[name] for row in scores["sweep"]]
        return f"  {name:10}" + "".join("       -" if value is None else f"{factor * value:8.1f}" for value in values)

    return "\n".join([
        f"  IoU {text('IoU')}   nIoU {text('nIoU')}   F1 {text('F1')}   AUC {text('AUC')} (11 points {text('AUC_11')})",
        f"  Pd {text('Pd')} of {scores['targets']} targets   Fa {text('Fa', 1.0, ' per million pixels')}",
        swept("threshold", 1),
        *(swept(name, factor) for name, factor in (("IoU", 100), ("Pd", 100), ("Fa", 1))),
        f"  protocol: {scores['protocol']}",
    ])  # fmt: skip

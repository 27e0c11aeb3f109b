"""Measures of object detection: average precision as COCO defines it, computed by a library that is kept up.

    AP        mean over the IoU thresholds 0.50, 0.55 ... 0.95 and over the classes that have boxes
    AP50, AP75  at one IoU threshold
    APs, APm, APl  of boxes below 32 x 32 pixels of the stored image, below 96 x 96, and above
    AR100     mean recall, over the same thresholds and classes, of the best hundred detections per image

Precision is taken at 101 recalls, of the hundred detections of an image with the highest scores. Boxes that are marked
as crowds absorb detections and count neither way. Measures without any box are None, not 0.
"""

import contextlib
import importlib.util
import io
from collections.abc import Sequence
from typing import Any, NamedTuple, Self

import numpy as np

from data_pipelines.errors import InputError
from data_pipelines.examples import Objects
from infmae_jax.evaluation.hosts import gathered
from infmae_jax.evaluation.segmentation import percent

LIBRARY = "faster_coco_eval"
MOST = 100  # detections of an image that count
_NUMBERS = ("AP", "AP50", "AP75", "APs", "APm", "APl")
_AR100 = 8  # place in the library's list of twelve
_AT_50 = 0.5


class Boxes(NamedTuple):
    """The n boxes found in an image, best first.

    Attributes:
      boxes: (n, 4) float32 x0, y0, x1, y1 in pixels of the image.
      scores: (n,) float32.
      classes: (n,) int32.
      masks: (n, S, S) float32 probabilities over each box, or None.
    """

    boxes: np.ndarray
    scores: np.ndarray
    classes: np.ndarray
    masks: np.ndarray | None = None

    def only(self, chosen: np.ndarray) -> Self:
        """Those that an index or a mask chooses."""
        return Boxes(*(None if of is None else of[chosen] for of in self))


def require_library() -> None:
    """InputError, in one line, where the library that measures is not installed."""
    if importlib.util.find_spec(LIBRARY) is None:
        raise InputError("average precision needs faster-coco-eval: pip install 'infmae-jax[detection]'")


class DetectionCounts:
    """Boxes and detections of a split, image by image, from which `scores` follow.

    Several hosts, each with its own images, bring their rows together by `gather`: nothing is lost or rounded.
    """

    def __init__(self):
        self._images: list[int] = []
        self._truth = [np.zeros((0, 8))]  # image, class, crowd, area, x0, y0, x1, y1
        self._found = [np.zeros((0, 7))]  # image, class, score, x0, y0, x1, y1

    def add(self, image: int, truth: Objects, found: Boxes) -> None:
        """`image`: a number of its own in the split."""
        self._images.append(image)
        columns = truth.classes, truth.crowd, truth.area, truth.boxes
        self._truth.append(_rows(image, len(truth.boxes), *columns))
        self._found.append(_rows(image, len(found.boxes), found.classes, found.scores, found.boxes))

    def gather(self) -> None:
        """Brings the rows of all hosts together, on each of them, in the order of the images' numbers."""
        self._images = sorted(gathered(np.array(self._images, np.float64)[:, None])[:, 0].astype(int).tolist())
        self._truth, self._found = ([_by_image(gathered(np.concatenate(rows)))] for rows in (self._truth, self._found))

    def scores(self, class_names: Sequence[str]) -> dict[str, Any]:
        """The measures by name, as shares from 0 to 1, None where there is nothing to measure.

        Returns:
          AP, AP50, AP75, APs, APm, APl, AR100, images, boxes; classes: name, boxes, AP, AP50 and `precision`, (101,)
          numbers at the recalls 0, 0.01 ... 1 for IoU 0.5.
        """
        truth, found = np.concatenate(self._truth), np.concatenate(self._found)
        evaluated = _evaluated(self._images, truth, found, len(class_names))
        precision = evaluated.eval["precision"][:, :, :, 0, -1]  # IoU, recall, class
        numbers = dict(zip(_NUMBERS, map(_known, evaluated.stats[:6]), strict=True))
        ordinary = truth[truth[:, 2] == 0]
        classes = [
            {
                "name": name,
                "boxes": int((ordinary[:, 1] == number).sum()),
                "AP": _known(precision[:, :, number].mean()),
                "AP50": _known(precision[0, :, number].mean()),
                "precision": np.round(np.maximum(precision[0, :, number], 0), 4).tolist(),
            }
            for number, name in enumerate(class_names)
        ]
        counts = {"images": len(self._images), "boxes": len(ordinary)}
        return {**numbers, "AR100": _known(evaluated.stats[_AR100]), **counts, "classes": classes}


def _rows(image: int, count: int, *columns: np.ndarray) -> np.ndarray:
    return np.column_stack([np.full(count, image, np.float64), *columns])


def _by_image(rows: np.ndarray) -> np.ndarray:
    return rows[np.argsort(rows[:, 0], kind="stable")]


def _evaluated(images: Sequence[int], truth: np.ndarray, found: np.ndarray, classes: int) -> Any:
    """The library's evaluation, whose results are in `eval` and `stats`."""
    require_library()
    from faster_coco_eval import COCO, COCOeval_faster

    annotations = [
        {"id": number, "image_id": int(row[0]), "category_id": int(row[1]), "iscrowd": int(row[2]), "area": row[3],
         "bbox": _xywh(row[4:])} for number, row in enumerate(truth.tolist(), start=1)
    ]  # fmt: skip
    described = {
        "images": [{"id": image} for image in images],
        "categories": [{"id": number} for number in range(classes)],
        "annotations": annotations,
    }
    results = [
        {"image_id": int(row[0]), "category_id": int(row[1]), "score": row[2], "bbox": _xywh(row[3:])}
        for row in found.tolist()
    ]
    with contextlib.redirect_stdout(io.StringIO()):
        known = COCO(described)
        evaluation = COCOeval_faster(known, known.loadRes(results), "bbox")
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
    return evaluation


def _xywh(corners: Sequence[float]) -> list[float]:
    x0, y0, x1, y1 = corners
    return [x0, y0, x1 - x0, y1 - y0]


def _known(value: float) -> float | None:
    return float(value) if value >= 0 else None


def image_f1(truth: Objects, found: Boxes, threshold: float) -> float:
    """F1 of one image's detections with a score of at least `threshold`, at IoU 0.5: how well it went, for pictures.

    Detections, best first, take the free box of their class with the greatest IoU. 1 where there is nothing to find
    and nothing found; crowds count neither way.
    """
    found = found.only(found.scores >= threshold)
    overlaps = pairwise_iou(found.boxes, truth.boxes) * (found.classes[:, None] == truth.classes[None])
    free = ~truth.crowd.astype(bool)
    total, hits, absorbed = int(free.sum()), 0, 0
    for row in overlaps:
        best = int(np.argmax(row * free)) if free.any() else -1
        if best >= 0 and (row * free)[best] >= _AT_50:
            free[best] = False
            hits += 1
        elif (row * truth.crowd >= _AT_50).any():
            absorbed += 1
    counted = total + len(overlaps) - absorbed
    return 2 * hits / counted if counted else 1.0


def pairwise_iou(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """(n, 4) and (m, 4) corners -> (n, m) intersection over union; 0 where both are empty."""
    a, b = np.asarray(a, np.float64)[:, None], np.asarray(b, np.float64)[None]
    sides = np.minimum(a[..., 2:], b[..., 2:]) - np.maximum(a[..., :2], b[..., :2])
    both = np.prod(np.maximum(sides, 0), axis=-1)
    areas = [np.prod(np.maximum(x[..., 2:] - x[..., :2], 0), axis=-1) for x in (a, b)]
    return both / np.maximum(areas[0] + areas[1] - both, 1e-12)


def table_text(scores: dict[str, Any], protocol: str) -> str:
    """`scores` as a table in per cent, with the protocol that they hold for."""
    width = max(len("class"), *(len(row["name"]) for row in scores["classes"]))
    lines = [f"{'class':{width}}      AP    AP50    boxes"]
    for row in scores["classes"]:
        lines.append(f"{row['name']:{width}}  {percent(row['AP'])}  {percent(row['AP50'])}  {row['boxes']:7,}")
    means = ", ".join(f"{name} {percent(scores[name]).strip()}" for name in (*_NUMBERS, "AR100"))
    return "\n".join([*lines, means, f"in per cent, of {scores['boxes']:,} boxes; {protocol}"])

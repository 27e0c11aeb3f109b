"""What a detection run computes, apart from its weights: boxes of images, measures of a split, files of predictions."""

from __future__ import annotations

import functools
import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np

from data_pipelines.errors import InputError
from data_pipelines.files import atomic_write, write_csv
from data_pipelines.outlines import encode_rle
from infmae_jax import pictures
from infmae_jax.box_pictures import box_overlay, box_panel, paste
from infmae_jax.evaluation import detection
from infmae_jax.evaluation.detection import Boxes
from infmae_jax.evaluation.hosts import concatenated, summed
from infmae_jax.evaluation.labelled import LabelledImage, LabelledImages
from infmae_jax.evaluation.tiles import detections
from infmae_jax.evaluation.windows import batch_size_of, on_every_device, over_devices
from infmae_jax.evaluation.worst import Worst
from infmae_jax.models.heads.detection import Detections, Detector
from infmae_jax.models.patches import normalize
from infmae_jax.tasks.finetune_task import FineTuneModel, Image

if TYPE_CHECKING:
    from infmae_jax.tasks.detect import DetectConfig

RESULTS_NAME, TABLE_NAME = "detections.json", "detections.csv"
_PIXELS, _SCORE = 2, 6  # decimals of coordinates and scores


class DetectionModel(FineTuneModel):
    """See `FineTuneModel`; what is found in an image are its `Boxes`."""

    def __init__(self, config: DetectConfig):
        """`config`: with classes and architecture filled in, see `finetune.resolved`."""
        super().__init__(config)
        self.category_ids = _category_ids(config)
        self.module = Detector(config.encoder, config.head, len(config.classes), config.masks != "none")

    @property
    def protocol(self) -> str:
        """How evaluation looks at images: what makes its numbers comparable."""
        whole = self.config.windows.size == (0, 0)
        how = "whole images" if whole else f"{self.config.windows.tiles}, boxes on seams brought together"
        return (
            f"{how}; stored size, one scale, no mirroring; COCO's definition: IoU 0.50 to 0.95, best "
            f"{detection.MOST} detections of an image, sizes by area in stored pixels"
        )

    def compute(self, params: Any, images: jax.Array, sizes: jax.Array | None = None) -> dict[str, jax.Array]:
        """Detections of (N,H,W) uint8 on a canvas, D of each, on the devices.

        Args:
          sizes: (N,2) int32 rows and columns that are image; by default all are.

        Returns:
          boxes (N,D,4) float32 x0, y0, x1, y1, scores (N,D) float32, classes (N,D) int32, valid (N,D) bool; with a mask
          branch masks (N,D,28,28) float32, probabilities over each box.
        """
        if sizes is None:
            sizes = jnp.tile(jnp.array(images.shape[1:3], jnp.int32), (len(images), 1))
        found = _detected(self.module, params, images, sizes)
        return {name: of for name, of in found._asdict().items() if of is not None}

    def predictions(
        self, params: Any, images: Iterable[Image], pixels: Callable[[Image], np.ndarray]
    ) -> Iterator[tuple[Image, Boxes]]:
        placed, size = on_every_device(params), batch_size_of(self.config.windows)

        def detect(batch: np.ndarray, sizes: np.ndarray) -> list[Boxes]:
            found = jax.device_get(self.compute(placed, *over_devices((batch, sizes))))
            columns = [found["boxes"], found["scores"], found["classes"], found.get("masks")]
            return [
                Boxes(*(None if of is None else of[place] for of in columns)).only(valid)
                for place, valid in enumerate(found["valid"])
            ]

        return detections(images, pixels, detect, self.config.windows, size, detection.MOST)

    def evaluate(self, params: Any, shards: Sequence[str], split: str, thorough: bool = False) -> dict[str, Any]:
        """Measures of a split, every image at its stored size; the same scores on all hosts.

        Args:
          thorough: also list all detections.

        Returns:
          scores: see `evaluation.detection`, and `protocol`, `images`, `damaged` (left out).
          worst, best: pictures of images by the F1 of their boxes of at least `threshold`, of this host.
          files: with `thorough`, all detections in COCO's format, in the source's ids.

        Raises:
          InputError: no such split, or an example without a list of objects.
        """
        labelled = LabelledImages(shards, split, self.config.data.intensity, "objects")
        counts = detection.DetectionCounts()
        worst: Worst[tuple[float, LabelledImage, Boxes]] = Worst()
        best: Worst[tuple[float, LabelledImage, Boxes]] = Worst()
        listed = []
        for image, found in self.predictions(params, labelled, lambda image: image.pixels):
            counts.add(image.number, image.labels, found)
            f1 = detection.image_f1(image.labels, found, self.config.threshold)
            worst.add(f1, (f1, image, found))
            best.add(-f1, (f1, image, found))
            if thorough:
                number = image.attributes.get("image_id", image.number + 1)
                file, rows = image.key.split("/", 1)[-1], self._objects(found, image.pixels.shape)
                listed += [_coco_result(number, file, row) for row in rows]
        counts.gather()
        damaged = summed(np.array(len(labelled.damaged)))
        scores = {**counts.scores(self.classes), "damaged": int(damaged), "protocol": self.protocol}
        drawn = {name: box_panel([self._row(*entry) for entry in kept.items()], self.classes)
                 for name, kept in (("worst", worst), ("best", best))}  # fmt: skip
        if not thorough:
            return {"scores": scores, **drawn}
        rows = concatenated("".join(f"{json.dumps(row)}, " for row in listed)).rstrip(" ,")
        return {"scores": scores, **drawn, "files": {RESULTS_NAME: f"[{rows}]"}}

    def _row(self, f1: float, image: LabelledImage, found: Boxes) -> tuple[str, np.ndarray, Boxes, Boxes]:
        truth, shown = image.labels, found.only(found.scores >= self.config.threshold)
        true = Boxes(truth.boxes, np.ones(len(truth.boxes), np.float32), truth.classes)
        return f"{image.key}: F1 {f1:.2f}", image.pixels, true, shown

    def report(self, scores: dict[str, Any]) -> tuple[str, dict[str, np.ndarray]]:
        """The scores as a table for people, and as pictures by name."""
        curves = [(row["name"], row["precision"]) for row in scores["classes"] if row["AP50"] is not None]
        return detection.table_text(scores, self.protocol), {"precision": pictures.precision_curves(curves)}

    def write(self, folder: Path, name: str, image: np.ndarray, found: Boxes) -> dict[str, Any]:
        """Writes the picture of one image with its boxes, and returns what is to be noted of it."""
        shown = found.only(found.scores >= self.config.threshold)
        files = self.save(folder, name, {"overlays": box_overlay(image, shown, self.classes)})
        return {"overlay": files["overlays"], "objects": self._objects(found, image.shape)}

    def _objects(self, found: Boxes, size: tuple[int, int]) -> list[dict[str, Any]]:
        """What is noted of each box, best first; with masks their run-length code."""
        rows = []
        for place, (box, score, number) in enumerate(
            zip(found.boxes.tolist(), found.scores.tolist(), found.classes.tolist(), strict=True)
        ):
            known = {"class": self.classes[number], "category_id": self.category_ids[number]}
            row = {**known, "score": round(score, _SCORE), "box": [round(edge, _PIXELS) for edge in box]}
            if found.masks is not None:
                row["segmentation"] = encode_rle(paste(found.masks[place], found.boxes[place], size))
            rows.append(row)
        return rows

    def finish(self, folder: Path, rows: Sequence[dict[str, Any]]) -> None:
        """Writes all boxes in COCO's format, in the source's category ids, and as a table."""
        results = [
            _coco_result(number, row["file"], entry) for number, row in enumerate(rows, 1) for entry in row["objects"]
        ]
        with atomic_write(folder / RESULTS_NAME) as path:
            path.write_text(json.dumps(results) + "\n")
        header = "file", "class", "category_id", "score", "x0", "y0", "x1", "y1"
        table = (
            (row["file"], *(entry[name] for name in header[1:4]), *entry["box"])
            for row in rows
            for entry in row["objects"]
        )
        write_csv(folder / TABLE_NAME, header, table)


def _category_ids(config: DetectConfig) -> list[int | str]:
    """The source's id of every class; InputError where the config, which may be a stranger's, has something else."""
    numbers = list(range(1, len(config.classes) + 1))
    try:
        found = json.loads(f"[{','.join(config.category_ids)}]") or numbers
    except (ValueError, RecursionError):
        found = []
    if len(found) != len(numbers) or not {type(each) for each in found} <= {int, str}:
        raise InputError(f"config key category_ids must be a number or text for each of the {len(numbers)} classes")
    return found


def _coco_result(number: int | str, file: str, entry: dict[str, Any]) -> dict[str, Any]:
    x0, y0, x1, y1 = entry["box"]
    place = [x0, y0, round(x1 - x0, _PIXELS), round(y1 - y0, _PIXELS)]
    mask = {"segmentation": entry["segmentation"]} if "segmentation" in entry else {}
    known = {"image_id": number, "file_name": file, "category_id": entry["category_id"]}
    return {**known, "bbox": place, "score": entry["score"], **mask}


@functools.partial(jax.jit, static_argnums=0)
def _detected(module: Detector, params: Any, images: jax.Array, sizes: jax.Array) -> Detections:
    return module.apply({"params": params}, normalize(images)[..., None], sizes, method="detect")

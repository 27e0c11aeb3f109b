"""Object detection: boxes, and masks where the data has outlines, by Mask R-CNN or Cascade R-CNN."""

from __future__ import annotations

import dataclasses
import functools
import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any, ClassVar, NamedTuple, Self

import jax
import jax.numpy as jnp
import numpy as np

from data_pipelines.errors import InputError
from data_pipelines.examples import CorruptExample, Objects, objects_of
from data_pipelines.files import atomic_write, write_csv
from data_pipelines.outlines import encode_rle, outline
from data_pipelines.reader import ExampleReader
from data_pipelines.remote import local_folders
from infmae_jax import pictures
from infmae_jax.box_pictures import box_overlay, box_panel, paste
from infmae_jax.evaluation import detection
from infmae_jax.evaluation.detection import Boxes
from infmae_jax.evaluation.hosts import concatenated, summed
from infmae_jax.evaluation.labelled import LabelledImage, LabelledImages
from infmae_jax.evaluation.tiles import detections
from infmae_jax.evaluation.windows import Windows, batch_size_of, on_every_device, over_devices, readable
from infmae_jax.evaluation.worst import Worst
from infmae_jax.interop.trained_model import TrainedModel
from infmae_jax.models.config import DetectionHeadConfig, EncoderConfig
from infmae_jax.models.heads.anchors import propose_sizes
from infmae_jax.models.heads.detection import Detections, Detector, Targets
from infmae_jax.models.patches import normalize
from infmae_jax.tasks.finetune import FineTuneConfig, LabelledData, manifests_of
from infmae_jax.tasks.finetune_task import FineTuneModel, FineTuneTask, Image
from infmae_jax.training.config import Count, OptimizerConfig
from infmae_jax.training.task import Loss

OUTLINE_SIDE = 56  # cells along a box, from which the mask head's targets are taken
_PUBLISHED_ANCHORS, _OBJECTS_WITHOUT_DATA = (32, 64, 128, 256, 512), 100
_MOSTLY = 0.5  # share of objects with an outline, up to which "auto" trains no mask branch
RESULTS_NAME, TABLE_NAME = "detections.json", "detections.csv"
_PIXELS, _SCORE = 2, 6  # decimals of coordinates and scores


@dataclasses.dataclass(frozen=True)
class DetectConfig(FineTuneConfig):
    """A detection run. The recipe is that of the MCMAE detectors: layer decay 0.8, weight decay 0.1, drop path 0.1.

    Attributes:
      head: the detector; its anchor sizes are proposed from the training boxes where none are given.
      masks: "outlines" trains a mask branch, "none" does not, "auto" does where most training objects have an outline
        other than their box; "boxes" trains it on the boxes as masks, for comparison with work that did.
      max_objects: most objects of a training crop, to which all are padded; 0: as many as an image has. Fewer than
        needed are refused.
      min_visible: objects with a smaller share of their box in a crop are left out.
      threshold: score from which on boxes are drawn.
      category_ids: the source's id of each class, as JSON, in the order of `classes`; filled in.
    """

    task: str = "detect"
    best_metric: str = "val_ap"
    optimizer: OptimizerConfig = OptimizerConfig(
        base_learning_rate=1.6e-3, warmup="2 percent", schedule="half_cosine", weight_decay=0.1, b2=0.999
    )
    encoder: EncoderConfig = EncoderConfig(fuse_stages=False, drop_path=0.1)
    layer_decay: Annotated[float, "(0, 1]"] = 0.8
    head: DetectionHeadConfig = DetectionHeadConfig()
    masks: Annotated[str, "auto, none, boxes, outlines"] = "auto"
    max_objects: Count = 0
    min_visible: Annotated[float, "[0, 1]"] = 0.2
    threshold: Annotated[float, "[0, 1]"] = 0.5
    category_ids: tuple[str, ...] = ()
    windows: Windows = Windows((0, 0), batch_size=2)
    data: LabelledData = LabelledData()

    LABELS: ClassVar[str] = "objects"
    FREE_KEYS: ClassVar[tuple[str, ...]] = (*FineTuneConfig.FREE_KEYS, "windows.", "threshold")

    def completed(self) -> Self:
        """With anchor sizes, mask branch, number of objects and category ids, as the training labels need them.

        Without shards (to measure or to compile, see `finetune.without_data`) the published sizes and no mask branch.

        Raises:
          InputError: no boxes, more of them than `max_objects`, no outlines for a mask branch that is asked for; or the
            library that evaluates is missing.
        """
        if not self.data.shards:
            head = dataclasses.replace(self.head, anchor_sizes=self.head.anchor_sizes or _PUBLISHED_ANCHORS)
            masks, most = "none" if self.masks == "auto" else self.masks, self.max_objects or _OBJECTS_WITHOUT_DATA
            return dataclasses.replace(self, head=head, masks=masks, max_objects=most)
        detection.require_library()
        found = survey(self, self.data.train_split)
        survey(self, self.data.val_split)
        boxes = np.concatenate([objects.boxes[~objects.crowd] for objects in found.objects])
        needed, where = max((len(o.boxes), key) for o, key in zip(found.objects, found.keys, strict=True))
        if 0 < self.max_objects < needed:
            raise InputError(f"{where} has {needed} objects, more than max_objects={self.max_objects}: raise it, or 0")
        head = self.head
        if not head.anchor_sizes:
            head = dataclasses.replace(head, anchor_sizes=propose_sizes(boxes, head.ratios))
        whole = dataclasses.replace(
            self, head=head, masks=self._mask_branch(found), max_objects=self.max_objects or needed,
            category_ids=self._category_ids(),
        )  # fmt: skip
        whole._describe(found, boxes)
        return whole

    def _mask_branch(self, found: Survey) -> str:
        if self.masks == "auto":
            return "outlines" if found.outlined > _MOSTLY * found.count else "none"
        if self.masks == "outlines" and not found.outlined:
            raise InputError("masks=outlines, but no training object has polygons or RLE other than its box: use auto")
        return self.masks

    def _category_ids(self) -> tuple[str, ...]:
        known: dict[str, Any] = {}
        for manifest in manifests_of(self):
            ids = manifest.settings.get("category_ids")
            known = {**(ids if isinstance(ids, dict) else {}), **known}
        return tuple(json.dumps(known.get(name, place)) for place, name in enumerate(self.classes, start=1))

    def _describe(self, found: Survey, boxes: np.ndarray) -> None:
        """Prints what the training labels are, and what was concluded."""
        counts = np.bincount(np.concatenate([o.classes for o in found.objects]), minlength=len(self.classes))
        empty = sum(not len(objects.boxes) for objects in found.objects)
        sides = np.sqrt(np.prod(boxes[:, 2:] - boxes[:, :2], axis=-1))
        low, middle, high = (f"{side:.0f}" for side in np.percentile(sides, (5, 50, 95)))
        outlines = f"{found.outlined:,} of {found.count:,} objects have an outline other than their box"
        branch = {"none": "no mask branch", "boxes": "a mask branch trained on boxes"}
        if self.masks == "outlines" and found.outlined < found.count:
            outlines += ", the others count as filled boxes"
        lines = [
            f"{len(found.objects):,} training images ({empty:,} without boxes), at most {self.max_objects} boxes each",
            f"boxes: {', '.join(f'{n} {c:,}' for n, c in zip(self.classes, counts.tolist(), strict=True))}; root of "
            f"their area: 5 % below {low} pixels, half below {middle}, 5 % above {high}",
            f"anchors of {', '.join(f'{size:g}' for size in self.head.anchor_sizes)} pixels, a size for each level",
            f"masks: {branch.get(self.masks, 'a mask branch')}; {outlines}",
        ]
        if missing := [name for name, count in zip(self.classes, counts, strict=True) if not count]:
            lines.append(f"no training box is of {', '.join(missing)}: the model cannot learn to find it")
        print("\n".join(lines), flush=True)


class Survey(NamedTuple):
    """Labels of a split: keys and objects of all images, how many objects there are, and how many have an outline."""

    keys: list[str]
    objects: list[Objects]
    count: int
    outlined: int


def survey(config: DetectConfig, split: str) -> Survey:
    """Reads the objects of a split; InputError for an image without a list of them, or where there are no boxes."""
    reader = ExampleReader(local_folders(config.data.shards), split)

    def read(index: int) -> tuple[str, Objects, int]:
        example = reader[index]
        objects = objects_of(example)
        pairs = zip(objects.segmentations, objects.boxes, strict=False)
        return example.key, objects, sum(outline(text, box) is not None for text, box in pairs)

    # Damaged ones are named by the pipeline, which puts others in their place.
    rows = list(readable(read, range(len(reader)), CorruptExample, lambda *_: None))
    if all(objects.crowd.all() for _, objects, _ in rows):
        raise InputError(f"no boxes in the split {split} of {', '.join(config.data.shards)}: choose another")
    keys, objects, outlined = zip(*rows, strict=True)
    return Survey(list(keys), list(objects), sum(len(each.boxes) for each in objects), sum(outlined))


class DetectTask(FineTuneTask):
    """See `training.task.Task`. A batch is image (B,H,W,1) uint8 and the boxes of `LabelledView`, with `outlines`
    (B,M,56,56) uint8 where masks are trained on them."""

    name = "detect"
    measures = {"val_ap": "AP", "val_ap50": "AP50", "val_ap75": "AP75"}

    def __init__(self, config: DetectConfig, trained: TrainedModel):
        """Both from `resolved`."""
        outlines = OUTLINE_SIDE if config.masks == "outlines" else 0
        self.view = config.data.view(max_objects=config.max_objects, outlines=outlines, min_visible=config.min_visible)
        super().__init__(config, trained)
        self.model = DetectionModel(config)

    def loss(self, params: Any, batch: dict[str, jax.Array], key: jax.Array) -> Loss:
        noise, draws = jax.random.split(key)
        arguments = normalize(batch["image"]), self._targets(batch), draws
        module, rngs = self.model.module, self.noise(noise)
        losses = module.apply({"params": params}, *arguments, method="losses", rngs=rngs)
        count = len(batch["image"])
        # Every loss is a mean over images of one weight: the sum over images is all that may be added up.
        means = {name: total * (count / weight) for name, (total, weight) in losses.items()}
        return Loss(sum(means.values()), count, means)

    def _targets(self, batch: dict[str, jax.Array]) -> Targets:
        masks = None
        if self.config.masks == "outlines":
            masks = batch["outlines"].astype(jnp.float32)
        elif self.config.masks == "boxes":
            masks = jnp.ones((*batch["classes"].shape, OUTLINE_SIDE, OUTLINE_SIDE), jnp.float32)
        names = ("size", "boxes", "classes", "box_valid", "crowd")
        return Targets(*(jnp.asarray(batch[name]) for name in names), masks)


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

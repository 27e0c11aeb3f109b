"""TFDS builders `coco_boxes` and `weak_small_targets`: infrared images with boxes in files of COCO, VOC or YOLO."""

import dataclasses
import functools
import json
from collections import Counter
from collections.abc import Mapping
from pathlib import Path, PurePosixPath

import numpy as np
import tensorflow_datasets as tfds
from absl import logging

from data_pipelines.builders.box_files import read_boxes
from data_pipelines.builders.coco_file import Annotation, BoxSplit, CocoImage
from data_pipelines.builders.common import InfraredBuilder, Make
from data_pipelines.builders.masks import MASK_FEATURES, TARGET_CLASSES
from data_pipelines.decode import encode_png
from data_pipelines.errors import InputError
from data_pipelines.examples import IGNORE, MASK, CorruptExample, Example
from data_pipelines.files import images_in
from data_pipelines.outlines import outline
from data_pipelines.prepare.labelled import labelled_image

WEAK = "targets drawn from boxes as filled ellipses (weak masks)"
_CROWDS = "crowd boxes that do not count (ignored)"
_LEFT_OUT = "boxes left out (empty or outside the image)"
_CLIPPED, _ROUNDING = "boxes clipped to their image", 0.5  # pixels beyond the edge that are rounding


class CocoBoxes(InfraredBuilder):
    """Infrared images with boxes, and with polygons or RLE where the files have them.

    `manual_dir` holds images and boxes in one of the layouts of `builders.box_files`: COCO (`images/SPLIT/` and
    `annotations/SPLIT.json`, or `images/` and one `annotations.json`: images, annotations with `bbox` = [x, y, width,
    height] in pixels, categories), VOC (M3FD among them, of which the infrared images are taken) or YOLO. Categories
    are one class for each name, in the order of their ids. Images without boxes are kept. Boxes are clipped to the
    image, empty ones left out. Where a file's width and height are those of the picture before its EXIF rotation, or
    of a resized copy, the annotations are rotated and rescaled with the image; any other difference is an error. All
    this is counted.
    """

    def label_features(self) -> dict:
        objects = {
            "bbox": tfds.features.BBoxFeature(),
            "label": tfds.features.ClassLabel(names=None),
            "area": np.float32,
            "is_crowd": np.bool_,
            "segmentation": tfds.features.Text(),
        }
        return {"objects": tfds.features.Sequence(objects)}

    def _split_generators(self, dl_manager: tfds.download.DownloadManager) -> dict:
        splits, note = read_boxes(Path(dl_manager.manual_dir))
        if note:
            logging.warning("%s", note)
            self.settings["split"] = note
        if not any(split.images for split in splits.values()):
            raise InputError(f"{dl_manager.manual_dir} has no images with boxes: put both there")
        listed = {split.folder / image.file_name for split in splits.values() for image in split.images}
        for folder in dict.fromkeys(split.folder for split in splits.values()):
            count = sum(path not in listed for path in images_in([folder]))
            self.notes += Counter({f"images of {folder.name} left out, as the annotations do not list them": count})
        make = self.labelling(splits)
        return {
            name: self._generate_examples(split.images, make, folder=split.folder) for name, split in splits.items()
        }

    def labelling(self, splits: Mapping[str, BoxSplit]) -> Make:
        """How an entry becomes an example with labels; notes names and ids of the classes."""
        _refuse_other_names(splits)
        names = list(dict.fromkeys(name for split in splits.values() for name in split.categories))
        self.class_names["objects"] = names
        ids = {name: n for split in reversed(splits.values()) for name, n in split.categories.items()}
        self.settings["category_ids"] = {name: ids[name] for name in names}
        self.info.features["objects"]["label"].names = names
        return functools.partial(_example, names=names)


class WeakSmallTargets(CocoBoxes):
    """Infrared images with weak masks of small targets: the filled ellipse inside of each box.

    `manual_dir` as for `coco_boxes`. A box of whatever category is a target; a crowd's is ignored (255). An image
    without boxes is a background. Such masks are larger than the targets where boxes are drawn loosely: measures
    against them compare runs with each other, not with published ones.
    """

    def label_features(self) -> dict:
        return MASK_FEATURES

    def labelling(self, splits: Mapping[str, BoxSplit]) -> Make:
        self.class_names[MASK] = TARGET_CLASSES
        return _weak_example


def _refuse_other_names(splits: Mapping[str, BoxSplit]) -> None:
    """InputError where a split has boxes of categories that the first one does not list."""
    first, *others = splits
    known = splits[first].categories
    for other in others:
        used = dict.fromkeys(a.category for image in splits[other].images for a in image.annotations)
        if strange := [name for name in used if name not in known]:
            raise InputError(
                f"split {other} has boxes of {', '.join(strange)}, which {first} does not list (it has "
                f"{', '.join(known)}): give both the same names"
            )


def annotated_image(image: CocoImage, folder: Path, bit_depth: int) -> tuple[Example, "Grid"]:
    """The image of an entry, and where its annotations lie on it; InputError where either is not certain."""
    name = image.file_name
    if PurePosixPath(name).is_absolute() or ".." in PurePosixPath(name).parts:
        raise InputError(f"the annotations of {folder} name {name}, which leaves the folder: correct file_name")
    example = labelled_image(folder / name, f"{folder.name}/{name}", bit_depth=bit_depth)
    return example, Grid(image, example, folder / name)


def _example(image: CocoImage, folder: Path, names: list[str], bit_depth: int):
    """Makes what `common.Make` says."""
    example, grid = annotated_image(image, folder, bit_depth)
    objects = [found for annotation in image.annotations if (found := _object(annotation, grid, names)) is not None]
    if left_out := len(image.annotations) - len(objects):
        grid.notes[_LEFT_OUT] = left_out
    if not image.annotations:
        grid.notes["images without boxes"] = 1
    if image.number is not None:
        example = dataclasses.replace(example, attributes={**example.attributes, "image_id": image.number})
    yield example, {"objects": objects}, grid.notes


def _object(annotation: Annotation, grid: "Grid", names: list[str]) -> dict | None:
    """The features of one object, clipped to the image; None when nothing of it lies inside."""
    box = grid.clipped(annotation)
    if box is None:
        return None
    left, top, right, bottom = box
    if np.abs(np.subtract(grid.corners(annotation), box)).max() > _ROUNDING:
        grid.notes[_CLIPPED] += 1
    return {
        "bbox": tfds.features.BBox(
            ymin=top / grid.height, xmin=left / grid.width, ymax=bottom / grid.height, xmax=right / grid.width
        ),
        "label": names.index(annotation.category),
        "area": annotation.area * grid.scale[0] * grid.scale[1],
        "is_crowd": annotation.crowd,
        "segmentation": json.dumps(grid.place_segmentation(annotation)),
    }


def _weak_example(image: CocoImage, folder: Path, bit_depth: int):
    """Makes what `common.Make` says."""
    example, grid = annotated_image(image, folder, bit_depth)
    mask = np.zeros((example.height, example.width), np.uint8)
    for annotation in sorted(image.annotations, key=lambda annotation: not annotation.crowd):
        if grid.clipped(annotation) is None:
            grid.notes[_LEFT_OUT] += 1
        else:
            mask[ellipse(grid.corners(annotation), mask.shape)] = IGNORE if annotation.crowd else 1
            grid.notes[_CROWDS if annotation.crowd else WEAK] += 1
    yield example, {MASK: encode_png(mask)}, grid.notes


def ellipse(box: tuple[float, float, float, float], shape: tuple[int, int]) -> np.ndarray:
    """(H,W) bool: pixels whose centres lie in the ellipse inside of the box x0, y0, x1, y1; at least the middle one."""
    x0, y0, x1, y1 = box
    rows, columns = np.arange(shape[0])[:, None] + 0.5, np.arange(shape[1]) + 0.5
    across, down = (2 * columns - x0 - x1) / (x1 - x0), (2 * rows - y0 - y1) / (y1 - y0)
    found = across**2 + down**2 <= 1
    if not found.any():
        found[min(max(int((y0 + y1) / 2), 0), shape[0] - 1), min(max(int((x0 + x1) / 2), 0), shape[1] - 1)] = True
    return found


class Grid:
    """How pixels that a file of boxes speaks of become pixels of the stored image, of `width` x `height`.

    Raises:
      InputError: there are annotations, and the relation of the sizes is not certain.
    """

    def __init__(self, image: CocoImage, example: Example, path: Path):
        self.width, self.height = size = example.width, example.height
        self.path = path
        self.notes: Counter[str] = Counter()
        orientation = example.attributes.get("orientation", 1)  # 1 to 8, as in EXIF
        stated = image.size or size
        upright, turned = _is_resized(stated, size), orientation >= 5 and _is_resized(stated[::-1], size)
        # Half turns and mirrors keep the size, so that it does not tell which picture was annotated.
        uncertain = orientation in (2, 3, 4) or (orientation >= 5 and (image.size is None or upright == turned))
        if image.annotations and (uncertain or not (upright or turned)):
            what = f"EXIF orientation {orientation}, " if orientation > 1 else ""
            written = "no size" if image.size is None else f"{stated[0]:g}x{stated[1]:g}"
            decoded = f"{path} decodes to {size[0]}x{size[1]} ({what}{example.attributes['format']})"
            raise InputError(
                f"{decoded}, its annotations are for {written}: it is not certain where the boxes lie; correct one"
            )
        self._source, self._orientation = stated, orientation if turned and not upright else 1
        width, height = stated[::-1] if self._orientation >= 5 else stated
        self.scale = self.width / width, self.height / height
        if self._orientation > 1:
            self.notes["boxes rotated with their image (EXIF)"] = len(image.annotations)
        if self.scale != (1, 1) and (upright or turned):
            self.notes["boxes rescaled to their image"] = len(image.annotations)

    def place(self, points: np.ndarray) -> np.ndarray:
        """Moves (n, 2) points x, y."""
        size, orientation = self._source, self._orientation
        if orientation >= 5:
            points, size = points[:, ::-1], size[::-1]
        flip = np.array([orientation in (2, 3, 6, 7), orientation in (3, 4, 7, 8)])
        return np.where(flip, np.array(size) - points, points) * self.scale

    def corners(self, annotation: Annotation) -> tuple[float, float, float, float]:
        """x0, y0, x1, y1 of the box on the stored image, not clipped."""
        x, y, width, height = annotation.bbox
        corners = self.place(np.array([[x, y], [x + width, y + height]]))
        return (*corners.min(0), *corners.max(0))

    def clipped(self, annotation: Annotation) -> tuple[float, float, float, float] | None:
        """x0, y0, x1, y1 of the box within the stored image; None when it is empty or nothing of it lies inside."""
        left, top, right, bottom = self.corners(annotation)
        left, top, right, bottom = max(left, 0), max(top, 0), min(right, self.width), min(bottom, self.height)
        empty = left >= right or top >= bottom or min(annotation.bbox[2:]) <= 0
        return None if empty else (left, top, right, bottom)

    def place_segmentation(self, annotation: Annotation) -> list | dict:
        """Polygons, moved; RLE as it is.

        Raises:
          InputError: RLE of another pixel grid, or an outline that would be damage in the set.
        """
        found = annotation.segmentation
        if isinstance(found, dict) and (tuple(found["size"]) != (self.height, self.width) or self._orientation > 1):
            raise InputError(f"{annotation.name} has RLE of {found['size']}, {self.path} is {self.height}x{self.width}")
        try:
            outline(json.dumps(found), np.array(self.corners(annotation)))
        except CorruptExample as error:
            raise InputError(f"{annotation.name}: {error}; correct or remove its segmentation") from error
        if isinstance(found, list):
            return [self.place(np.array(polygon, float).reshape(-1, 2)).ravel().tolist() for polygon in found]
        return found


def _is_resized(source: tuple[float, float], size: tuple[int, int]) -> bool:
    """Whether one factor takes width and height of `source` to those of `size`, up to rounding."""
    lowest = max((side - 0.5) / given for given, side in zip(source, size, strict=True))
    highest = min((side + 0.5) / given for given, side in zip(source, size, strict=True))
    return lowest <= highest

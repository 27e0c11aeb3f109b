"""TFDS builder `weak_small_targets`: masks of small targets drawn from boxes, where nobody has drawn their pixels."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import tensorflow_datasets as tfds
from absl import logging

from data_pipelines.builders.coco_boxes import LEFT_OUT, annotated_image
from data_pipelines.builders.coco_file import CocoImage, read_coco
from data_pipelines.builders.common import InfraredBuilder, image_folders
from data_pipelines.builders.layouts import in_blocks
from data_pipelines.builders.masks import MASK_FEATURES, TARGET_CLASSES
from data_pipelines.decode import encode_png
from data_pipelines.errors import InputError
from data_pipelines.examples import IGNORE, MASK

WEAK = "targets drawn from boxes as filled ellipses (weak masks)"
_CROWDS = "crowd boxes that do not count (ignored)"


class WeakSmallTargets(InfraredBuilder):
    """Infrared images with weak masks of small targets: the filled ellipse inside of each box.

    `manual_dir` as for `coco_boxes`: `images/SPLIT/` and `annotations/SPLIT.json`; or `images/` and one
    `annotations.json`, whose last fifth of the images by name is the split val. A box of whatever category is a target;
    a crowd's is ignored (255). An image without boxes is a background. Such masks are larger than the targets where
    boxes are drawn loosely: measures against them compare runs with each other, not with published ones.
    """

    def label_features(self) -> dict:
        return MASK_FEATURES

    def _split_generators(self, dl_manager: tfds.download.DownloadManager) -> dict:
        root = Path(dl_manager.manual_dir)
        self.class_names[MASK] = TARGET_CLASSES
        parts = _parts(root)
        self._count_unlisted(parts.values())
        return {
            split: self._generate_examples(images, _example, folder=folder) for split, (folder, images) in parts.items()
        }


def _parts(root: Path) -> dict[str, tuple[Path, list[CocoImage]]]:
    """Split -> folder of its images, and their entries."""
    single = root / "annotations.json"
    if single.is_file():
        images = sorted(read_coco(single).images, key=lambda image: image.file_name)
        if not images:
            raise InputError(f"{single} lists no images: give the file of your boxes")
        parts, note = in_blocks(images)
        logging.warning("%s", note)
        return {split: (root / "images", part) for split, part in parts.items()}
    folders = image_folders(root)
    return {name: (path, read_coco(root / "annotations" / f"{name}.json").images) for name, path in folders.items()}


def _example(image: CocoImage, folder: Path, bit_depth: int):
    example, grid = annotated_image(image, folder, bit_depth)
    mask = np.zeros((example.height, example.width), np.uint8)
    for annotation in sorted(image.annotations, key=lambda annotation: not annotation.crowd):
        if grid.clipped(annotation) is None:
            grid.notes[LEFT_OUT] += 1
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

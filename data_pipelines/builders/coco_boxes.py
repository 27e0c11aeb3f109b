"""TFDS builder `coco_boxes`: infrared images with boxes in COCO files."""

from __future__ import annotations

import collections
import functools
import json
from pathlib import Path, PurePosixPath
from typing import Any

import tensorflow_datasets as tfds
from absl import logging

from data_pipelines.builders.common import (
    FolderBuilder,
    annotated_record,
    box_object,
    image_example,
    objects_feature,
    split_folders,
)
from data_pipelines.errors import InputError


class CocoBoxes(FolderBuilder):
    """Infrared images with boxes.

    `manual_dir` holds `images/SPLIT/` and `annotations/SPLIT.json` (COCO: images, annotations with `bbox` = [x, y,
    width, height] in pixels, categories). Boxes are clipped to the image; categories are numbered from 0 in the order
    of their ids.
    """

    def _info(self) -> tfds.core.DatasetInfo:
        return self._dataset_info("Infrared images with boxes.", {"objects": objects_feature(None)})

    def _split_generators(self, dl_manager: tfds.download.DownloadManager) -> dict:
        root = Path(dl_manager.manual_dir)
        folders = split_folders(root, "images")
        files = {split: _read_coco(root / "annotations" / f"{split}.json") for split in folders}
        categories = {entry["id"]: entry["name"] for coco in files.values() for entry in coco["categories"]}
        labels = {number: place for place, number in enumerate(sorted(categories))}
        self.info.features["objects"]["label"].names = [categories[number] for number in sorted(categories)]
        return {split: self._generate_examples(folders[split], files[split], labels) for split in folders}

    def _generate_examples(self, folder: Path, coco: dict[str, Any], labels: dict[int, int]):
        boxes = collections.defaultdict(list)
        for annotation in coco["annotations"]:
            boxes[annotation["image_id"]].append(annotation)
        items = [(image["file_name"], boxes[image["id"]]) for image in coco["images"]]
        make = functools.partial(_example, folder=folder, labels=labels, bit_depth=self.builder_config.bit_depth)
        return self._generate(items, make)


def _example(item: tuple[str, list[dict]], folder: Path, labels: dict[int, int], bit_depth: int):
    name, annotations = item
    if PurePosixPath(name).is_absolute() or ".." in PurePosixPath(name).parts:
        raise InputError(f"the annotations of {folder} name {name}, which leaves the folder: correct file_name")
    record = annotated_record(folder / name, f"{folder.name}/{name}", bit_depth)
    objects = []
    for annotation in annotations:
        if annotation["category_id"] not in labels:
            raise InputError(f"{name} has a box of category {annotation['category_id']}, which is not listed: add it")
        found = box_object(
            *map(float, annotation["bbox"]),
            (record.height, record.width),
            labels[annotation["category_id"]],
            float(annotation.get("area", annotation["bbox"][2] * annotation["bbox"][3])),
            bool(annotation.get("iscrowd", 0)),
        )
        if found is None:
            logging.warning("left out box %s of %s: outside the image or empty", annotation["bbox"], record.key)
        else:
            objects.append(found)
    yield record.key, {**image_example(record), "objects": objects}


def _read_coco(path: Path) -> dict[str, Any]:
    try:
        coco = json.loads(path.read_text())
        missing = [name for name in ("images", "annotations", "categories") if not isinstance(coco.get(name), list)]
    except (OSError, ValueError, AttributeError) as error:
        raise InputError(f"{path} is not a COCO file ({error}): every split needs annotations/SPLIT.json") from error
    if missing:
        raise InputError(f"{path} lacks the COCO list {missing[0]!r}: every split needs annotations/SPLIT.json")
    return coco

"""A folder of synthetic scenes with labels in the formats that real data sets come in."""

import itertools
import json
import math
import os
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from PIL import Image

from data_pipelines.decode import encode_png
from data_pipelines.errors import InputError
from data_pipelines.examples import LABEL, MASK, Example
from data_pipelines.files import local_path, new_folder, write_csv
from data_pipelines.prepare.labelled import write_examples
from data_pipelines.shards import Manifest
from data_pipelines.synthetic.canvas import CATEGORIES, SURFACES
from data_pipelines.synthetic.generate import DEFAULT_SIZE, SCENE_CLASSES, Scene, generate_scene

SPLITS = ("train", "val")


def write_dataset(
    output: str | os.PathLike,
    count: int,
    seed: int = 0,
    size: tuple[int, int] = DEFAULT_SIZE,
    val_fraction: float = 0.2,
) -> Path:
    """Writes `count` scenes to a new folder; the folder appears when it is complete, or not at all.

    ```
    images/{train,val}/000000.png        8-bit gray pictures
    class_labels.csv                     file,split,label: the scene class of each picture
    annotations/{train,val}.json         boxes, COCO format
    class_masks/{train,val}/000000.png   a class value a pixel, listed in classes.json
    target_masks/{train,val}/000000.png  255 on small targets, 0 elsewhere
    classes.json                         scene classes, box categories, mask values; seed and count
    ```

    Args:
      output: a folder that is missing or empty.
      count: number of scenes, at least 1.
      seed: series of scenes, see `generate_scene`.
      size: rows and columns of the pictures.
      val_fraction: share of every scene class that goes to the split `val`, in [0, 1]; the second scene of a class is
        the first to go there.

    Returns:
      The folder.

    Raises:
      InputError: `output` holds something already or is a file, `count` or `val_fraction` is out of range.
    """
    categories = [{"id": number, "name": name} for number, name in enumerate(CATEGORIES, start=1)]
    info = {"description": f"synthetic thermal scenes, seed {seed}"}
    coco = {split: {"info": info, "images": [], "annotations": [], "categories": categories} for split in SPLITS}
    described = {
        "classes": [{"value": value, "name": name} for value, name in enumerate(SURFACES)],
        "target_classes": [{"value": 0, "name": "background"}, {"value": 255, "name": "target"}],
        "scene_classes": list(SCENE_CLASSES),
        "box_categories": list(CATEGORIES),
        "seed": seed,
        "count": count,
    }
    rows = []
    with new_folder(output) as folder:
        for kind, split in itertools.product(("images", "class_masks", "target_masks"), SPLITS):
            (folder / kind / split).mkdir(parents=True)
        (folder / "annotations").mkdir()
        for split, name, scene in _scenes(count, seed, size, val_fraction):
            pictures = {"images": scene.image, "class_masks": scene.class_mask}
            pictures["target_masks"] = scene.target_mask.astype(np.uint8) * 255
            for kind, pixels in pictures.items():
                # Sensor noise does not compress: the fastest level costs a few per cent of size and saves most time.
                Image.fromarray(pixels).save(folder / kind / split / name, compress_level=1)
            rows.append((f"images/{split}/{name}", split, scene.scene_class))
            _annotate(coco[split], scene, name)
        write_csv(folder / "class_labels.csv", ("file", "split", "label"), rows)
        files = {f"annotations/{split}.json": coco[split] for split in SPLITS} | {"classes.json": described}
        for name, content in files.items():
            (folder / name).write_text(json.dumps(content, indent=1) + "\n")
    return Path(local_path(output, "output"))


def _scenes(
    count: int, seed: int, size: tuple[int, int], val_fraction: float, splits: tuple[str, ...] = SPLITS
) -> Iterator[tuple[str, str, Scene]]:
    """Split, name and content of the scenes of some splits."""
    if count < 1:
        raise InputError(f"count {count}: at least 1 scene is needed")
    if not 0 <= val_fraction <= 1:
        raise InputError(f"val_fraction {val_fraction}: must lie between 0 and 1")
    for index in range(count):
        split = SPLITS[is_val(index, val_fraction)]
        if split in splits:
            yield split, f"{index:06d}.png", generate_scene(seed, index, size)


def write_shards(
    output: str | os.PathLike,
    count: int,
    seed: int = 0,
    size: tuple[int, int] = DEFAULT_SIZE,
    val_fraction: float = 0.2,
    mask: str = "surfaces",
) -> Manifest:
    """Writes the scenes of `write_dataset` as a shard set with all their labels, splits train and val.

    Args:
      output, count, seed, size, val_fraction: see `write_dataset`.
      mask: "surfaces" (`SURFACES`, a class per pixel) or "targets" (background and small, far targets).

    Raises:
      InputError: see `write_dataset`; or another `mask`.
    """
    if mask not in ("surfaces", "targets"):
        raise InputError(f"mask {mask!r}: choose surfaces or targets")

    def examples(split: str) -> Iterator[Example]:
        for _, name, scene in _scenes(count, seed, size, val_fraction, (split,)):
            yield _example(scene, f"synthetic/{seed}/{name}", mask)

    classes = {LABEL: SCENE_CLASSES, "objects": CATEGORIES}
    classes[MASK] = SURFACES if mask == "surfaces" else ("background", "target")
    used = sorted({is_val(index, val_fraction) for index in range(count)}) or [False]
    splits = {SPLITS[val]: examples(SPLITS[val]) for val in used}
    return write_examples(output, splits, classes, {"synthetic": seed, "count": count})


def _example(scene: Scene, key: str, mask: str) -> Example:
    values = scene.class_mask if mask == "surfaces" else scene.target_mask.astype(np.uint8)
    labels = {LABEL: SCENE_CLASSES.index(scene.scene_class)}
    image = encode_png(scene.image)
    return Example(key, image, "png", *scene.image.shape, 8, {}, encode_png(values), scene.objects, labels)


def is_val(index: int, fraction: float) -> bool:
    """Whether scene `index` goes to the split `val`: a share of every class, spread evenly from its second scene on."""
    place = index // len(SCENE_CLASSES)
    return math.floor(fraction * (place - 1) + 1) > math.floor(fraction * (place - 2) + 1)


def _annotate(coco: dict, scene: Scene, name: str) -> None:
    height, width = scene.image.shape
    image_id = len(coco["images"]) + 1
    coco["images"].append({"id": image_id, "file_name": name, "width": width, "height": height})
    found = np.column_stack([scene.objects.boxes, scene.objects.classes, scene.objects.area]).astype(int).tolist()
    for number, (x0, y0, x1, y1, category, area) in enumerate(found, start=len(coco["annotations"]) + 1):
        known = {"id": number, "image_id": image_id, "category_id": category + 1}
        shape = {"bbox": [x0, y0, x1 - x0, y1 - y0], "area": area, "iscrowd": 0}
        coco["annotations"].append(known | shape)

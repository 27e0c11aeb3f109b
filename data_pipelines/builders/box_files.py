"""Boxes in the formats of COCO, Pascal VOC and YOLO, in the layouts that data sets come in: all become `BoxSplit`s.

    COCO   images/SPLIT/, annotations/SPLIT.json; or images/ and one annotations.json
    VOC    one XML file for each image in Annotations/ (or Annotation/), images in JPEGImages/, images/, Ir/ or ir/;
           splits by folders (Annotations/SPLIT/, images/SPLIT/) or by lists of names (ImageSets/Main/train.txt)
    YOLO   one text file for each image in labels/, images in images/, each with folders of splits or without, or
           SPLIT/images/ and SPLIT/labels/; classes.txt, obj.names, data.yaml or dataset.yaml

Where nothing says how images are split, the first four fifths by name are train and the rest val: frames of a film that
follow each other look alike, so that a random split would train on what it is measured by. VOC's corners are edges as
they are written; its "difficult" objects count neither way, as COCO's crowds. VOC and YOLO number no categories: VOC's
are in alphabetical order from 1, YOLO's in the order of its list from 0.
"""

import dataclasses
import math
import os
import xml.etree.ElementTree as ElementTree
from collections.abc import Callable, Mapping
from pathlib import Path

import yaml
from PIL import ExifTags, Image

from data_pipelines.builders.coco_file import LARGEST, Annotation, BoxSplit, CocoImage, read_coco
from data_pipelines.builders.common import SPLITS, class_names, folders_of
from data_pipelines.builders.layouts import images_of, in_blocks, splits_of
from data_pipelines.errors import InputError, refusing
from data_pipelines.files import read_regular, read_text

_VOC_LABELS, _VOC_IMAGES = ("Annotations", "Annotation", "annotations"), ("Ir", "ir", "JPEGImages", "images")
_NAME_LISTS, _YAML = ("classes.txt", "obj.names"), ("data.yaml", "dataset.yaml", "data.yml", "dataset.yml")
_LARGEST_XML, _LARGEST_LIST, _LARGEST_YAML = 4 << 20, 16 << 20, 1 << 18  # bytes
_SLACK = 1e-3  # of a share of the image: rounding in text files


def read_boxes(root: Path) -> tuple[dict[str, BoxSplit], str]:
    """Split -> boxes, and a note on splits that the source does not have ("" otherwise).

    Raises:
      InputError: no layout that is known, or a file that cannot be used.
    """
    files, whole = root / "annotations", root / "annotations.json"
    if any(files.glob("*.json")):
        if not (folders := folders_of(root / "images")):
            known = f"{', '.join(SPLITS[:-1])} or {SPLITS[-1]}"
            raise InputError(f"{root / 'images'} has no folder {known}: sort the images into one")
        others = sorted({path.name for path in files.glob("*.json")} - {f"{name}.json" for name in folders})
        note = f"left out, as there is no folder images/SPLIT for them: {', '.join(others)}" if others else ""
        return {name: read_coco(files / f"{name}.json", path) for name, path in folders.items()}, note
    if whole.is_file():
        found = read_coco(whole, root / "images")
        parts, note = in_blocks(sorted(found.images, key=lambda image: image.file_name))
        return {name: dataclasses.replace(found, images=part) for name, part in parts.items()}, note
    voc = next((root / name for name in _VOC_LABELS if any((root / name).rglob("*.xml"))), None)
    if voc is not None:
        images = next((root / name for name in _VOC_IMAGES if (root / name).is_dir()), None)
        if images is None:
            raise InputError(f"{root} has no folder of images beside {voc.name}: name it {' or '.join(_VOC_IMAGES)}")
        return _read_all(root, images, voc, _voc_image, None)
    if any((root / "labels").rglob("*.txt")) or any((root / name / "labels").is_dir() for name in SPLITS):
        return _read_all(root, root / "images", root / "labels", _yolo_image, _yolo_names(root))
    raise InputError(
        f"{root} has no boxes in a known layout: annotations/SPLIT.json or annotations.json (COCO), Annotations/*.xml "
        "(VOC) or labels/*.txt (YOLO), with the images beside"
    )


def _read_all(
    root: Path, images: Path, labels: Path, read: Callable[..., CocoImage], categories: dict[str, int] | None
) -> tuple[dict[str, BoxSplit], str]:
    """All splits of a format with a file of labels for each image, named as it; `categories` None: those that occur."""
    folders = {name: (root / name / "images", root / name / "labels") for name in folders_of(root)}
    folders = {name: pair for name, pair in folders.items() if pair[0].is_dir()}
    folders = folders or {name: (folder, labels / name) for name, folder in folders_of(images).items()}
    if not folders:
        if not images.is_dir():
            raise InputError(f"{root} has no folder {images.name} beside {labels.name}: put the images there")
        files, note = splits_of(root, images, labels)
        folders = dict.fromkeys(files, (images, labels))
    else:
        labelled = {name: pair for name, pair in folders.items() if pair[1].is_dir()}
        without = [str(images) for name, (images, _) in folders.items() if name not in labelled]
        if not labelled:
            raise InputError(f"{without[0]} has no folder of labels {folders.popitem()[1][1]}: put them there")
        note = f"left out, as there is no folder of labels for them: {', '.join(without)}" if without else ""
        files, folders = {name: images_of(pair[0]) for name, pair in labelled.items()}, labelled
    for pair in dict.fromkeys(folders.values()):
        _refuse_orphans(*pair, ".xml" if categories is None else ".txt")
    found = {name: [read(file, folders[name][1] / file.stem, categories) for file in files[name]] for name in files}
    if categories is None:
        names = sorted({a.category for part in found.values() for image in part for a in image.annotations})
        names = class_names(names, labels) if names else []
        categories = {name: number for number, name in enumerate(names, start=1)}
    return {name: BoxSplit(folders[name][0], part, categories) for name, part in found.items()}, note


def _refuse_orphans(images: Path, labels: Path, suffix: str) -> None:
    """InputError for a file of labels without image: its boxes would be lost without a word."""
    known = {path.stem for path in images_of(images)} | {Path(name).stem for name in _NAME_LISTS}
    if lost := sorted(path.name for path in labels.glob(f"*{suffix}") if path.stem not in known):
        raise InputError(
            f"{len(lost)} files of {labels} have no image of their name in {images}, the first is {lost[0]}: add the "
            "images (JPEG, PNG, TIFF, …) or remove the files"
        )


def _voc_image(image: Path, label: Path, categories: Mapping[str, int] | None) -> CocoImage:
    """An image with the objects of its XML file."""
    path = label.with_name(label.name + ".xml")
    kinds = OSError, ElementTree.ParseError, ValueError, LookupError  # the last two of encodings
    with refusing(f"{path} is not readable as XML", "correct it", *kinds):
        try:
            root = ElementTree.fromstring(read_regular(path, _LARGEST_XML))
        except FileNotFoundError:
            remedy = "add it, without objects if there are none, or remove the image"
            raise InputError(f"{image} has no {path}: {remedy}") from None
    if root.tag != "annotation":
        raise InputError(f"{path} holds <{root.tag[:40]}>, not VOC's <annotation>: replace it")
    width, height = (_voc_number(root, f"size/{side}", path, needed=False) for side in ("width", "height"))
    objects = [_voc_object(found, f"{path}: object {n}", path) for n, found in enumerate(root.iter("object"), start=1)]
    return CocoImage(image.name, (width, height) if min(width, height) >= 1 else None, objects)


def _voc_object(found: ElementTree.Element, name: str, path: Path) -> Annotation:
    category = (found.findtext("name") or "").strip()
    if not category:
        raise InputError(f"{name} has no name: give it one")
    x0, y0, x1, y1 = (_voc_number(found, f"bndbox/{edge}", path) for edge in ("xmin", "ymin", "xmax", "ymax"))
    if x1 < x0 or y1 < y0:
        raise InputError(
            f"{name} has its second corner {x1:g},{y1:g} before its first {x0:g},{y0:g}: correct it (is it width and "
            "height? bndbox needs xmin, ymin, xmax, ymax)"
        )
    difficult = (found.findtext("difficult") or "0").strip() == "1"
    return Annotation(name, (x0, y0, x1 - x0, y1 - y0), category, (x1 - x0) * (y1 - y0), difficult, [])


def _voc_number(found: ElementTree.Element, tag: str, path: Path, needed: bool = True) -> float:
    text = (found.findtext(tag) or "").strip()
    try:
        value = float(text) if text or needed else 0.0
    except ValueError:
        value = math.nan
    if not abs(value) < LARGEST:
        raise InputError(f"{path}: {tag} is {text!r}, which is no number of pixels: correct it")
    return value


def _yolo_image(image: Path, label: Path, categories: Mapping[str, int] | None) -> CocoImage:
    """An image with the boxes, or polygons, of its text file; without a file it has none."""
    path = label.with_name(label.name + ".txt")
    kinds = OSError, SyntaxError, Image.DecompressionBombError
    with refusing(f"{image} or {path.name} cannot be read", "replace it", *kinds):
        lines = read_text(path, _LARGEST_LIST).splitlines() if os.path.lexists(path) else []
        with Image.open(image) as opened:
            size, turned = opened.size, opened.getexif().get(ExifTags.Base.Orientation, 1) != 1
    names = list(categories or {})
    objects = [
        _yolo_object(line.split(), f"{path}: line {number}", names, size)
        for number, line in enumerate(lines, start=1)
        if line.strip()
    ]
    # Some tools draw boxes on the turned picture, others do not: without a size, turned images are refused.
    return CocoImage(image.name, None if turned else size, objects)


def _yolo_object(parts: list[str], name: str, categories: list[str], size: tuple[int, int]) -> Annotation:
    try:
        number, values = int(parts[0]), [float(part) for part in parts[1:]]
        if len(values) != 4 and (len(values) < 6 or len(values) % 2):
            raise ValueError
    except ValueError:
        what = "a class and x, y, width, height, or a class and the points of a polygon"
        raise InputError(f"{name} is not {what}: correct it") from None
    if not 0 <= number < len(categories):
        raise InputError(f"{name} has class {number}; the list of classes has {len(categories)}: correct one of them")
    if not all(-_SLACK <= value <= 1 + _SLACK for value in values):
        raise InputError(f"{name} holds {' '.join(parts[1:5])}: YOLO boxes are shares of the image, from 0 to 1")
    width, height = size
    if len(values) == 4:
        x, y, w, h = values[0] * width, values[1] * height, values[2] * width, values[3] * height
        box, polygons = (x - w / 2, y - h / 2, w, h), []
    else:
        polygons = [[value * size[place % 2] for place, value in enumerate(values)]]
        xs, ys = polygons[0][::2], polygons[0][1::2]
        box = (min(xs), min(ys), max(xs) - min(xs), max(ys) - min(ys))
    return Annotation(name, box, categories[number], box[2] * box[3], False, polygons)


def _yolo_names(root: Path) -> dict[str, int]:
    """The classes of a YOLO set, by name, in order."""
    lists = [folder / name for name in _NAME_LISTS for folder in (root, root / "labels")]
    path = next((path for path in (*lists, *(root / name for name in _YAML)) if path.is_file()), None)
    if path is None:
        raise InputError(
            f"{root} has no list of classes: add classes.txt, a name on each line, or data.yaml with names"
        )
    if path in lists:
        names = [line.strip() for line in read_text(path, _LARGEST_LIST).splitlines() if line.strip()]
    else:
        kinds = yaml.YAMLError, ValueError, OSError, RecursionError
        with refusing(f'{path} has no "names" of classes', "list them there", *kinds):
            names = _names_in_yaml(read_text(path, _LARGEST_YAML))
    return {name: number for number, name in enumerate(class_names(names, path))}


def _names_in_yaml(text: str) -> list[str]:
    """The entry `names`, a list or a dict by number, as it is written: "no" and "2001-01-01" are names.

    Raises:
      ValueError: there is none, or it is something else.
      yaml.YAMLError: not YAML.
    """
    root = yaml.compose(text, Loader=yaml.SafeLoader)  # nodes: nothing is constructed, no alias unfolded
    if not isinstance(root, yaml.MappingNode):
        raise ValueError("it holds no entries")
    found = [value for key, value in root.value if key.value == "names"]
    if len(found) != 1 or not isinstance(found[0], yaml.CollectionNode):
        raise ValueError(f"{len(found)} entries of this name" if len(found) != 1 else "it is no list")
    entries = found[0].value
    if isinstance(found[0], yaml.MappingNode):
        numbered = sorted((int(key.value), place) for place, (key, _) in enumerate(entries))
        if [number for number, _ in numbered] != list(range(len(entries))):
            raise ValueError("its numbers are not 0, 1, 2 and so on")
        entries = [entries[place][1] for _, place in numbered]
    if not all(isinstance(entry, yaml.ScalarNode) for entry in entries):
        raise ValueError("it holds something else than names")
    return [entry.value for entry in entries]

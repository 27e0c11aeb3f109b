"""COCO annotation files, every entry checked: a mistake is one line that names the file and the entry."""

import dataclasses
import json
import math
import os
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path, PurePosixPath
from typing import Any

from absl import logging

from data_pipelines.commands import printable
from data_pipelines.errors import InputError, refusing
from data_pipelines.files import read_text

LARGEST = 1e9  # of coordinates
_LARGEST_FILE = 4 << 30  # bytes
_OUTSIDE = 0.1  # share of boxes that leave their image, from which on they are something else


@dataclasses.dataclass(frozen=True)
class Annotation:
    """One object: `bbox` is x, y, width, height in pixels of the file's grid; `name` is for messages."""

    name: str
    bbox: tuple[float, float, float, float]
    category: str
    area: float
    crowd: bool
    segmentation: list | dict


@dataclasses.dataclass(frozen=True)
class CocoImage:
    """One image with its objects.

    Attributes:
      file_name: below the split's folder.
      size: width and height, or None where the file does not state them.
      annotations: of its objects.
      number: its id in the file, or None where the format has none.
    """

    file_name: str
    size: tuple[float, float] | None
    annotations: list[Annotation]
    number: int | str | None = None


@dataclasses.dataclass(frozen=True)
class BoxSplit:
    """The images of a split with their boxes.

    Attributes:
      folder: that the images' names are below.
      images: in order.
      categories: ids by name, in the order of the ids.
    """

    folder: Path
    images: list[CocoImage]
    categories: dict[str, int | str]


def read_coco(path: Path, folder: Path) -> BoxSplit:
    """Reads a COCO file whose images lie in `folder`.

    Entries that are there twice, equal in everything, count once; a warning says how many.

    Raises:
      InputError: the file or one of its entries is not usable.
    """
    remedy = "every split needs annotations/SPLIT.json"
    with refusing(f"{path} is not a COCO file", remedy, OSError, ValueError, AttributeError, RecursionError):
        content = json.loads(read_text(path, _LARGEST_FILE))
        lists = {kind: content.get(kind) for kind in _FIELDS}
    for kind, entries in lists.items():
        if not isinstance(entries, list):
            raise InputError(f"{path} lacks the COCO list {kind!r}: {remedy}")
    categories = {entry["id"]: entry["name"] for _, entry in _entries(path, "categories", lists["categories"])}
    _refuse_doubles(path, "category name", categories.values())
    images: dict[int | str, CocoImage] = {}
    for name, entry in _entries(path, "images", lists["images"]):
        if entry["id"] in images:
            raise InputError(f"{name}: another image has the same id; give every image its own")
        size = entry["width"], entry["height"]
        images[entry["id"]] = CocoImage(entry["file_name"], size if all(size) else None, [], entry["id"])
    _refuse_doubles(path, "file_name", (str(PurePosixPath(image.file_name)) for image in images.values()))
    for name, entry in _entries(path, "annotations", lists["annotations"]):
        image = _referenced(images, entry, "image_id", name)
        category = _referenced(categories, entry, "category_id", name)
        box, area = tuple(entry["bbox"]), entry["area"]
        area = box[2] * box[3] if area is None else area
        shapes = entry["segmentation"] or []
        image.annotations.append(Annotation(name, box, category, area, bool(entry["iscrowd"]), shapes))
    _refuse_corners(path, images.values())
    ordered = sorted(categories, key=lambda number: (isinstance(number, str), number))
    return BoxSplit(folder, list(images.values()), {categories[number]: number for number in ordered})


def _entries(path: Path, kind: str, entries: list) -> Iterator[tuple[str, dict[str, Any]]]:
    """The entries of one list, without copies: a name for messages, and the fields (None where one is left out)."""
    what = {"categories": "category", "images": "image", "annotations": "annotation"}[kind]
    fields = _FIELDS[kind]
    known, copies = {}, 0
    for place, entry in enumerate(entries):
        if not isinstance(entry, dict):
            raise InputError(f"{path}: entry {place} of {kind} is {_short(entry)}, not an object: correct or remove it")
        first = known.setdefault(json.dumps(entry.get("id")), entry)
        if first is not entry and first == entry:
            copies += 1
            continue
        name = f"{path}: {what} {_short(entry['id']) if 'id' in entry else f'at place {place}'}"
        for field, (wanted, is_right) in fields.items():
            if not is_right(entry.get(field)):
                given = f"has {field} {_short(entry[field])}" if field in entry else f"has no {field}"
                raise InputError(f"{name} {given}: it needs {wanted}; correct or remove it")
        yield name, {field: entry.get(field) for field in fields}
    if copies:
        logging.warning("%s: %d entries of %s are copies of another one and count once", path, copies, kind)


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 60 else f"{text[:60]}…"


def _referenced(known: dict, entry: dict, field: str, name: str) -> Any:
    """What the id in a field of the entry `name` stands for."""
    if entry[field] not in known:
        some = ", ".join(json.dumps(other) for other in list(known)[:3]) or "(none)"
        given = f"{name} has {field} {_short(entry[field])}"
        raise InputError(f"{given}, which no {field.removesuffix('_id')} has; their ids are like {some}: correct it")
    return known[entry[field]]


def _refuse_doubles(path: Path, what: str, names: Iterable[str]) -> None:
    for name, count in Counter(names).items():
        if count > 1:
            raise InputError(f"{path}: {what} {_short(name)} is used twice: rename or merge them")


def _refuse_corners(path: Path, images: Iterable[CocoImage]) -> None:
    """InputError where the boxes of a file are corners in place of a corner and an extent: all could be, and many leave
    their image otherwise."""
    boxes = [(a.bbox, image.size) for image in images if image.size for a in image.annotations]
    outside = sum(x + w > width + 1 or y + h > height + 1 for (x, y, w, h), (width, height) in boxes)
    corners = all(x < w <= width + 1 and y < h <= height + 1 for (x, y, w, h), (width, height) in boxes)
    if corners and outside > _OUTSIDE * len(boxes):
        raise InputError(
            f"{path}: {outside} of {len(boxes)} boxes leave their image, and all lie inside as two corners: bbox is "
            "[x, y, width, height], not [x0, y0, x1, y1]; subtract x0 and y0 from the last two"
        )


def _is_number(value: Any) -> bool:
    return type(value) in (int, float) and abs(value) < LARGEST and math.isfinite(value)


def _is_identity(value: Any) -> bool:
    return type(value) in (int, str) or (type(value) is float and value.is_integer())


def _is_text(value: Any) -> bool:
    return isinstance(value, str) and bool(value.strip()) and printable(value) == value


def _is_path(value: Any) -> bool:
    try:
        return isinstance(value, str) and bool(value.strip()) and b"\0" not in os.fsencode(value)
    except UnicodeEncodeError:
        return False


def _is_extent(value: Any) -> bool:
    return not value or (_is_number(value) and value >= 1)


def _is_box(value: Any) -> bool:
    return isinstance(value, list) and len(value) == 4 and all(map(_is_number, value))


def _is_segmentation(value: Any) -> bool:
    """Whether it is a list of polygons, or a run-length code: {"size": [height, width], "counts": text or numbers}."""
    if isinstance(value, dict):
        size, counts = value.get("size"), value.get("counts")
        numbers = isinstance(counts, list) and all(type(count) is int for count in counts)
        return isinstance(size, list) and len(size) == 2 and (isinstance(counts, str) or numbers)
    return not value or (
        isinstance(value, list)
        and all(isinstance(each, list) and len(each) >= 6 and len(each) % 2 == 0 for each in value)
        and all(_is_number(number) for each in value for number in each)
    )


# Of each list, the fields of its entries: what they need to be, and whether a value (None where left out) is that.
_ID, _EXTENT = ("a number", _is_identity), ("a number of pixels", _is_extent)
_FIELDS: dict[str, dict[str, tuple[str, Callable[[Any], bool]]]] = {
    "categories": {"id": _ID, "name": ("a name without control characters", _is_text)},
    "images": {"id": _ID, "file_name": ("a name", _is_path), "width": _EXTENT, "height": _EXTENT},
    "annotations": {
        "image_id": _ID,
        "category_id": _ID,
        "bbox": ("[x, y, width, height]", _is_box),
        "area": ("a number", lambda area: area is None or _is_number(area)),
        "iscrowd": ("0 or 1", lambda crowd: crowd in (None, 0, 1)),
        "segmentation": ("polygons of at least 3 points, or RLE", _is_segmentation),
    },
}

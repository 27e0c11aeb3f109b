"""COCO annotation files, every entry checked: a mistake is one line that names the file and the entry."""

from __future__ import annotations

import dataclasses
import json
import math
import os
from collections import Counter
from collections.abc import Callable, Iterable
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
        lists = {kind: content.get(kind) for kind in ("images", "annotations", "categories")}
    for kind, entries in lists.items():
        if not isinstance(entries, list):
            raise InputError(f"{path} lacks the COCO list {kind!r}: {remedy}")
    categories = {
        _checked(entry, "id", what): _checked(entry, "name", what)
        for what, entry in _entries(path, "categories", lists)
    }
    _refuse_doubles(path, "category name", categories.values())
    images: dict[int | str, CocoImage] = {}
    for name, entry in _entries(path, "images", lists):
        number = _checked(entry, "id", name)
        if number in images:
            raise InputError(f"{name}: another image has the same id; give every image its own")
        size = _checked(entry, "width", name), _checked(entry, "height", name)
        images[number] = CocoImage(_checked(entry, "file_name", name), size if all(size) else None, [], number)
    _refuse_doubles(path, "file_name", (str(PurePosixPath(image.file_name)) for image in images.values()))
    for name, entry in _entries(path, "annotations", lists):
        image = images[_reference(entry, "image_id", name, "image", images)]
        category = categories[_reference(entry, "category_id", name, "category", categories)]
        box, area = _checked(entry, "bbox", name), _checked(entry, "area", name)
        crowd, shapes = bool(_checked(entry, "iscrowd", name)), _checked(entry, "segmentation", name) or []
        area = box[2] * box[3] if area is None else area
        image.annotations.append(Annotation(name, tuple(box), category, area, crowd, shapes))
    _refuse_corners(path, images.values())
    ordered = sorted(categories, key=lambda number: (isinstance(number, str), number))
    return BoxSplit(folder, list(images.values()), {categories[number]: number for number in ordered})


def _entries(path: Path, kind: str, lists: dict[str, list]) -> list[tuple[str, dict]]:
    """The entries of one list with a name for messages, without copies of an entry."""
    found, known, copies = [], {}, 0
    for place, entry in enumerate(lists[kind]):
        if not isinstance(entry, dict):
            raise InputError(f"{path}: entry {place} of {kind} is {_short(entry)}, not an object: correct or remove it")
        number = json.dumps(entry.get("id"))
        if number in known and known[number] == entry:
            copies += 1
            continue
        known.setdefault(number, entry)
        what = {"images": "image", "annotations": "annotation", "categories": "category"}[kind]
        found.append((f"{path}: {what} {_short(entry['id']) if 'id' in entry else f'at place {place}'}", entry))
    if copies:
        logging.warning("%s: %d entries of %s are copies of another one and count once", path, copies, kind)
    return found


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 60 else f"{text[:60]}…"


def _checked(entry: dict, field: str, name: str) -> Any:
    """The value of a field of the entry `name`; None where it may be left out."""
    wanted, is_right = _FIELDS[field]
    value = entry.get(field)
    if not is_right(value):
        given = f"has {field} {_short(value)}" if field in entry else f"has no {field}"
        raise InputError(f"{name} {given}: it needs {wanted}; correct or remove it")
    return value


def _reference(entry: dict, field: str, name: str, what: str, known: dict) -> int | str:
    number = _checked(entry, field, name)
    if number not in known:
        some = ", ".join(json.dumps(other) for other in list(known)[:3]) or "(none)"
        raise InputError(
            f"{name} has {field} {_short(number)}, which no {what} has; their ids are like {some}: correct it"
        )
    return number


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


# Of each field: what it needs to be, and whether a value (None where it is left out) is that.
_FIELDS: dict[str, tuple[str, Callable[[Any], bool]]] = {
    **dict.fromkeys(("id", "image_id", "category_id"), ("a number", _is_identity)),
    "name": ("a name without control characters", _is_text),
    "file_name": ("a name", _is_path),
    **dict.fromkeys(("width", "height"), ("a number of pixels", _is_extent)),
    "bbox": ("[x, y, width, height]", _is_box),
    "area": ("a number", lambda area: area is None or _is_number(area)),
    "iscrowd": ("0 or 1", lambda crowd: crowd in (None, 0, 1)),
    "segmentation": ("polygons of at least 3 points, or RLE", _is_segmentation),
}

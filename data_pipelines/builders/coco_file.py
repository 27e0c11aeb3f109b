"""COCO annotation files, every entry checked: a mistake is one line that names the file and the entry."""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path
from typing import Any

from absl import logging

from data_pipelines.errors import InputError


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
    """One image with its objects; `size` is width and height, or None where the file does not state them."""

    file_name: str
    size: tuple[float, float] | None
    annotations: list[Annotation]


@dataclasses.dataclass(frozen=True)
class CocoFile:
    """Images in order, and names of the categories in the order of their ids."""

    images: list[CocoImage]
    categories: list[str]


def read_coco(path: Path) -> CocoFile:
    """Reads a COCO file.

    Entries that are there twice, equal in everything, count once; a warning says how many.

    Raises:
      InputError: the file or one of its entries is not usable.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8-sig"))
        lists = {kind: content.get(kind) for kind in ("images", "annotations", "categories")}
    except (OSError, ValueError, AttributeError, RecursionError) as error:
        reason = " ".join(str(error).split())
        raise InputError(f"{path} is not a COCO file ({reason}): every split needs annotations/SPLIT.json") from error
    for kind, entries in lists.items():
        if not isinstance(entries, list):
            raise InputError(f"{path} lacks the COCO list {kind!r}: every split needs annotations/SPLIT.json")
    categories = {
        _id(entry, "id", name): _text(entry, "name", name) for name, entry in _entries(path, "categories", lists)
    }
    _refuse_doubles(path, "category name", list(categories.values()))
    images: dict[int | str, CocoImage] = {}
    for name, entry in _entries(path, "images", lists):
        number = _id(entry, "id", name)
        if number in images:
            raise InputError(f"{name}: another image has the same id; give every image its own")
        images[number] = CocoImage(_text(entry, "file_name", name), _size(entry, name), [])
    _refuse_doubles(path, "file_name", [image.file_name for image in images.values()])
    for name, entry in _entries(path, "annotations", lists):
        image = images[_reference(entry, "image_id", name, "image", images)]
        category = categories[_reference(entry, "category_id", name, "category", categories)]
        image.annotations.append(_annotation(entry, name, category))
    ordered = sorted(categories, key=lambda number: (isinstance(number, str), number))
    return CocoFile(list(images.values()), [categories[number] for number in ordered])


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
        found.append((f"{path}: {what} {number if 'id' in entry else f'at place {place}'}", entry))
    if copies:
        logging.warning("%s: %d entries of %s are copies of another one and count once", path, copies, kind)
    return found


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 60 else f"{text[:60]}…"


def _required(entry: dict, field: str, name: str, wanted: str, right: bool) -> None:
    if not right:
        given = f"has {field} {_short(entry[field])}" if field in entry else f"has no {field}"
        raise InputError(f"{name} {given}: it needs {wanted}; correct or remove it")


def _id(entry: dict, field: str, name: str) -> int | str:
    value = entry.get(field)
    _required(
        entry, field, name, "a number", type(value) in (int, str) or (type(value) is float and value.is_integer())
    )
    return value


def _text(entry: dict, field: str, name: str) -> str:
    value = entry.get(field)
    _required(entry, field, name, "a name", isinstance(value, str) and bool(value.strip()))
    return value


def _size(entry: dict, name: str) -> tuple[float, float] | None:
    values = [entry.get("width") or 0, entry.get("height") or 0]
    for field, value in zip(("width", "height"), values, strict=True):
        _required(entry, field, name, "a number of pixels", _is_number(value) and value >= 0)
    return (values[0], values[1]) if all(values) else None


def _reference(entry: dict, field: str, name: str, what: str, known: dict) -> int | str:
    number = _id(entry, field, name)
    if number not in known:
        some = ", ".join(json.dumps(other) for other in list(known)[:3]) or "(none)"
        raise InputError(
            f"{name} has {field} {_short(number)}, which no {what} has; their ids are like {some}: correct it"
        )
    return number


def _refuse_doubles(path: Path, what: str, names: list[str]) -> None:
    seen: set[str] = set()
    for name in names:
        if name in seen:
            raise InputError(f"{path}: {what} {_short(name)} is used twice: rename or merge them")
        seen.add(name)


def _annotation(entry: dict, name: str, category: str) -> Annotation:
    box, area, crowd = entry.get("bbox"), entry.get("area"), entry.get("iscrowd")
    right = isinstance(box, list) and len(box) == 4 and all(map(_is_number, box))
    _required(entry, "bbox", name, "[x, y, width, height]", right)
    _required(entry, "area", name, "a number", area is None or _is_number(area))
    _required(entry, "iscrowd", name, "0 or 1", crowd is None or crowd in (0, 1))
    found = entry.get("segmentation") or []
    polygons = isinstance(found, list) and all(
        isinstance(polygon, list) and len(polygon) >= 6 and len(polygon) % 2 == 0 and all(map(_is_number, polygon))
        for polygon in found
    )
    _required(entry, "segmentation", name, "polygons of at least 3 points, or RLE", polygons or _is_rle(found))
    return Annotation(name, tuple(box), category, box[2] * box[3] if area is None else area, bool(crowd), found)


def _is_number(value: Any) -> bool:
    return type(value) in (int, float) and abs(value) < 1e9 and math.isfinite(value)


def _is_rle(found: Any) -> bool:
    """Whether it is a COCO run-length code: {"size": [height, width], "counts": text or numbers}."""
    if not isinstance(found, dict) or not isinstance(found.get("size"), list) or len(found["size"]) != 2:
        return False
    counts = found.get("counts")
    return isinstance(counts, str) or (isinstance(counts, list) and all(type(count) is int for count in counts))

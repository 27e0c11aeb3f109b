"""How public data sets lay out images and masks in folders: pairs of files by split."""

import dataclasses
import re
from collections.abc import Iterator
from pathlib import Path
from typing import TypeVar

from PIL import Image

from data_pipelines.builders.common import SPLITS
from data_pipelines.errors import InputError
from data_pipelines.files import read_text

T = TypeVar("T")
_BLOCK_TRAIN = 0.8  # of the files in order of their names, where nothing says how they are split
_LARGEST_LIST = 64 << 20  # bytes
_SUFFIXES = ("", "_pixels0", "_mask", "_label", "_labelIds")  # of a mask's stem, beside its image's
# Folders of images and of masks; {split} is a split's name. The first pair that exists counts.
_BY_FOLDER = (
    ("images/{split}", "class_masks/{split}"), ("images/{split}", "target_masks/{split}"),
    ("images/{split}", "masks/{split}"), ("images/{split}", "labels/{split}"),
    ("{split}/ir", "{split}/Segmentation_labels"), ("{split}/thermal", "{split}/labels"),
    ("{split}/images", "{split}/masks"), ("{split}/images", "{split}/labels"),
)  # fmt: skip
_BY_LIST = (
    ("JPEGImages", "SegmentationClassPNG"), ("JPEGImages", "SegmentationClass"), ("images", "masks"),
    ("images", "labels"), ("ir", "Segmentation_labels"), ("images/targets", "annotations/masks"),
    ("IRSTD1k_Img", "IRSTD1k_Label"), ("images", "annotations/masks"),
)  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Pair:
    """An image and its mask; `key` names the image in the set.

    `fourth`: of an image of four channels, the last one is the infrared image (MFNet).
    """

    key: str
    image: Path
    mask: Path
    fourth: bool = False


def find_pairs(root: Path, targets: bool = False) -> tuple[dict[str, list[Pair]], str]:
    """Split -> pairs, in order of their names, and a note on splits that the source does not have ("" otherwise).

    `targets`: read `target_masks`, not `class_masks`, where both are there.

    Raises:
      InputError: no layout that is known, or an image without mask.
    """
    other = "class_masks/" if targets else "target_masks/"
    layouts = [pair for pair in _BY_FOLDER if not pair[1].startswith(other)]
    for images, masks in layouts:
        found = {split: [root / kind.format(split=split) for kind in (images, masks)] for split in SPLITS}
        found = {split: pair for split, pair in found.items() if pair[0].is_dir()}
        if any(folder.is_dir() for _, folder in found.values()):
            return {split: list(_paired(*pair, images_of(pair[0]), split)) for split, pair in found.items()}, ""
    for images, masks in _BY_LIST:
        if (root / images).is_dir() and (root / masks).is_dir():
            found, note = splits_of(root, root / images)
            return {split: list(_paired(root / images, root / masks, part, "")) for split, part in found.items()}, note
    known = ", ".join(f"{images} + {masks}" for images, masks in (*layouts, *_BY_LIST))
    raise InputError(f"{root} has no images with masks in a known layout: {known.format(split='SPLIT')}")


def splits_of(root: Path, images: Path, labels: Path | None = None) -> tuple[dict[str, list[Path]], str]:
    """Images by split: by the lists of names in a set's folders, or by blocks where there are none.

    `labels`: folder of text files that are no lists.

    Returns:
      Split -> files, and a note that says how blocks were cut ("" where there are lists).

    Raises:
      InputError: a list names a file that is not there, or one that another list has.
    """
    files: dict[str, Path] = {}
    for path in images_of(images):
        if (other := files.setdefault(path.stem, path)) is not path:
            raise InputError(f"{other} and {path.name} have one stem, and so the same labels: rename or remove one")
    lists = {split: path for split in SPLITS if (path := _list_of(root, split, labels)) is not None}
    if not lists:
        return in_blocks(list(files.values()))
    found: dict[str, list[Path]] = {}
    for split, path in lists.items():
        names = [Path(line.split()[0]).name for line in read_text(path, _LARGEST_LIST).splitlines() if line.strip()]
        stems = [name if name in files else Path(name).stem for name in names]
        if missing := [stem for stem in stems if stem not in files]:
            raise InputError(f"{path} lists {missing[0]}, which is not in {images}: correct one of them")
        found[split] = [files[stem] for stem in dict.fromkeys(stems)]
        if not stems:
            raise InputError(f"{path} lists no image: add them or remove it")
        for other, part in found.items():
            if other != split and (both := {image.stem for image in part} & set(stems)):
                raise InputError(f"{root}: image {min(both)} is in {other} and {split}: correct the lists of names")
    return found, ""


def in_blocks(ordered: list[T]) -> tuple[dict[str, list[T]], str]:
    """Splits of what has none, in the order of its names, and a note on it: frames of one recording stay together."""
    cut = max(1, round(len(ordered) * _BLOCK_TRAIN))
    parts = {"train": ordered[:cut], "val": ordered[cut:]}
    note = f"no lists of splits: the first {cut} images by name are train, the other {len(ordered) - cut} val"
    return {split: part for split, part in parts.items() if part}, note


def _list_of(root: Path, split: str, labels: Path | None) -> Path | None:
    """The file that lists the names of a split, e.g. train.txt, train_infrared.txt, img_idx/train_SET.txt."""
    wanted = "train|trainval" if split == "train" else split
    named = re.compile(rf"(?:{wanted})(?:[_-].*)?\.txt", re.IGNORECASE)
    files = (path for path in root.rglob("*.txt") if labels is None or labels not in path.parents)
    found = sorted(path for path in files if named.fullmatch(path.name))
    infrared = [path for path in found if "infrared" in path.name or "thermal" in path.name]
    return next(iter(infrared or sorted(found, key=lambda path: (len(path.name), str(path)))), None)


def _paired(images: Path, masks: Path, files: list[Path], split: str) -> Iterator[Pair]:
    if not masks.is_dir():
        raise InputError(f"{images} has no folder of masks beside it: every split needs {masks}")
    by_stem = {path.stem: path for path in images_of(masks)}
    for path in files:
        mask = next((by_stem[path.stem + suffix] for suffix in _SUFFIXES if path.stem + suffix in by_stem), None)
        if mask is None:
            raise InputError(f"{path} has no mask of the same stem in {masks}: add it or remove the image")
        yield Pair(f"{split}/{path.name}" if split else path.name, path, mask, masks.name == "labels" and not split)


def images_of(folder: Path) -> list[Path]:
    """The files of a folder with the suffix of an image, in order of their names."""
    suffixes = Image.registered_extensions()
    return sorted(p for p in folder.iterdir() if p.suffix.lower() in suffixes and p.is_file() and p.name[0] != ".")

"""TFDS builders `class_masks` and `small_targets`: infrared images with a mask of the same size."""

import dataclasses
import io
import json
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import tensorflow_datasets as tfds
from absl import logging
from PIL import Image

from data_pipelines.builders.common import NOTES, InfraredBuilder, class_names
from data_pipelines.builders.layouts import Pair, find_pairs
from data_pipelines.decode import encode_png
from data_pipelines.errors import InputError, refusing
from data_pipelines.examples import IGNORE, MASK, Example
from data_pipelines.files import read_text
from data_pipelines.prepare.labelled import labelled_image

MASK_FEATURES = {MASK: tfds.features.Image(shape=(None, None, 1), dtype=np.uint8, encoding_format="png")}
TARGET_CLASSES = ["background", "target"]  # of masks of small targets
_LARGEST_TABLE = 1 << 20  # bytes
_THRESHOLD = 127  # of gray values, above which a pixel is target


class ClassMasks(InfraredBuilder):
    """Infrared images with a class per pixel.

    `manual_dir` holds images and masks of the same size and stem in one of the layouts of `builders.layouts`:
    `images/SPLIT` and `masks/SPLIT`, those of MSRS, PST900 and MFNet (whose thermal image is the fourth channel), or
    VOC's with lists of names; and `classes.json`: {"classes": [{"value": 0, "name": "…", "color": [0, 0, 0]}, …]}.
    Masks are 8-bit gray or palette files of these values, or RGB files of these colours ("color" may be left out where
    there are none). Stored are class numbers: places in that list. The value 255 means "ignore" where the list does not
    name it; with the two classes 0 and 1 this must be said ("ignore": 255 beside "classes"). Without lists or folders
    of splits, the last fifth of the images by name is the split val.
    """

    def label_features(self) -> dict:
        return MASK_FEATURES

    def _split_generators(self, dl_manager: tfds.download.DownloadManager) -> dict:
        root, targets = Path(dl_manager.manual_dir), isinstance(self, SmallTargets)
        table = None if targets else read_classes(root / "classes.json")
        self.class_names[MASK] = TARGET_CLASSES if table is None else list(table.names)
        pairs, note = find_pairs(root, targets)
        if note:
            logging.warning("%s", note)
        return {split: self._generate_examples(part, _example, table=table) for split, part in pairs.items()}


class SmallTargets(ClassMasks):
    """Infrared images with a mask of small targets.

    `manual_dir` as for `class_masks`, without `classes.json`; also the layouts of SIRST, IRSTD-1k and NUDT-SIRST. A
    mask pixel is target above 127, or at 1 in files of 0 and 1; of files with several channels, the first counts. Masks
    are stored with the classes 0 (background) and 1 (target); an image may be without targets.
    """


@dataclasses.dataclass(frozen=True)
class ClassTable:
    """What values and colours in mask files mean.

    Attributes:
      names: of the classes, in the order of their numbers.
      values: value in a file -> class number or `IGNORE`.
      colours: 65536 r + 256 g + b -> class number; empty where the table has none.
      doubtful: a file with 255 and without 1 is to be refused, see `ClassMasks`.
    """

    names: tuple[str, ...]
    values: Mapping[int, int]
    colours: Mapping[int, int]
    doubtful: bool


def read_classes(path: Path) -> ClassTable:
    """Reads classes.json; InputError where it does not list the classes."""
    kinds = OSError, ArithmeticError, ValueError, KeyError, TypeError, RecursionError
    with refusing(f"{path} does not list the classes", "see the builder's description", *kinds):
        content = json.loads(read_text(path, _LARGEST_TABLE))
        classes = content["classes"]
        names = tuple(str(entry["name"]) for entry in classes)
        values = {int(entry["value"]): place for place, entry in enumerate(classes)}
        colours = {bytes(map(int, e["color"])): place for place, e in enumerate(classes) if "color" in e}
        if len(values) != len(classes) or len(set(names)) != len(classes):
            raise ValueError("a value or a name is there twice")
        if not 0 < len(values) < IGNORE or not 0 <= min(values) <= max(values) <= 255:
            raise ValueError("values are 0 to 255, of at most 254 classes")
        if colours and (len(colours) != len(classes) or any(len(colour) != 3 for colour in colours)):
            raise ValueError("colors are [r, g, b], one of its own for every class")
        class_names(names, path)
    # Of two classes 0 and 1, a file of 0 and 255 more likely means the second class than "ignore".
    doubtful = content.get("ignore") != IGNORE and list(values) == [0, 1]
    colours = {int.from_bytes(colour): place for colour, place in colours.items()}
    return ClassTable(names, {IGNORE: IGNORE, **values}, colours, doubtful)


def _example(pair: Pair, table: ClassTable | None, bit_depth: int):
    example = _image(pair, bit_depth)
    values, notes = read_mask(pair.mask), dict(example.attributes.get(NOTES, {}))
    if values.shape[:2] != (example.height, example.width):
        stated = f"{values.shape[1]}x{values.shape[0]}, its image {example.width}x{example.height}"
        raise InputError(f"{pair.mask} is {stated}: make them equal")
    if table is None:
        values = values if values.ndim == 2 else values[..., 0]
        whole = np.isin(values, (0, 1)).all()
        mask = (values == 1 if whole else values > _THRESHOLD).astype(np.uint8)
        if not whole and not np.isin(values, (0, 255)).all():
            notes["masks with values between 0 and 255, cut at 127"] = 1
    else:
        mask = _class_numbers(values, table, pair.mask, notes)
    yield example, {MASK: encode_png(mask)}, notes


def _class_numbers(values: np.ndarray, table: ClassTable, path: Path, notes: dict[str, int]) -> np.ndarray:
    """(H,W) values or (H,W,3) colours -> (H,W) uint8 class numbers; InputError for one that the table does not list."""
    if values.ndim == 3 and not table.colours:
        if (values != values[..., :1]).any():
            raise InputError(f'{path} is a colour picture: give every class its "color" in classes.json')
        values = values[..., 0]
    if values.ndim == 2:
        found, known, what = values, table.values, "value"
    else:
        found, known, what = values @ np.array([1 << 16, 1 << 8, 1]), table.colours, "colour"
        notes["masks translated from colours"] = 1
    listed = np.array(sorted(known))
    places = np.minimum(np.searchsorted(listed, found), len(listed) - 1)
    if (strange := listed[places] != found).any():
        raise InputError(f"{path} holds the {what} {values[strange][0].tolist()}, which classes.json does not list")
    if what == "value" and table.doubtful and (values == 255).any() and not (values == 1).any():
        raise InputError(f'{path} holds 255 and no 1: list 255 in classes.json in the place of 1, or "ignore": 255')
    return np.array([known[value] for value in listed.tolist()], np.uint8)[places]


def _image(pair: Pair, bit_depth: int) -> Example:
    """The example of the image; of a four-channel one in MFNet's layout, of its last channel, the thermal one."""
    if pair.fourth:
        with Image.open(pair.image) as image:
            if image.mode == "RGBA":
                pixels = np.asarray(image.getchannel(3))
                attributes = {"format": "PNG", NOTES: {"thermal images taken from the fourth channel": 1}}
                return Example(pair.key, encode_png(pixels), "png", *pixels.shape, 8, attributes)
    return labelled_image(pair.image, pair.key, bit_depth=bit_depth)


def read_mask(path: Path) -> np.ndarray:
    """Values (H, W) uint8 of a mask file, of a palette file its indices; of a colour file (H, W, 3).

    Raises:
      InputError: it cannot be read, or its values do not fit 8 bit.
    """
    kinds = OSError, SyntaxError, Image.DecompressionBombError
    with (
        refusing(f"mask {path} cannot be read", "replace it", *kinds),
        Image.open(io.BytesIO(path.read_bytes())) as image,
    ):
        if image.mode in ("RGB", "RGBA", "LA"):
            return np.asarray(image.convert("RGB"))
        mask, mode = np.asarray(image), image.mode
    if mode not in ("1", "L", "P", "I;16", "I") or (mask.size and not 0 <= mask.min() <= mask.max() <= 255):
        raise InputError(f"mask {path} has mode {mode}: masks are 8-bit with one channel, or colours of classes.json")
    return mask.astype(np.uint8)

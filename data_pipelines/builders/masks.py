"""TFDS builders `class_masks` and `small_targets`: infrared images with a mask of the same size."""

from __future__ import annotations

import functools
import io
import json
from pathlib import Path

import numpy as np
import tensorflow_datasets as tfds
from PIL import Image, UnidentifiedImageError

from data_pipelines.builders.common import InfraredBuilder, image_features, split_folders
from data_pipelines.decode import encode_png
from data_pipelines.errors import InputError
from data_pipelines.examples import IGNORE, MASK
from data_pipelines.prepare.labelled import labelled_image

_UNKNOWN = 254  # in a table from values to class numbers


class ClassMasks(InfraredBuilder):
    """Infrared images with a class per pixel.

    `manual_dir` holds `images/SPLIT/`, `class_masks/SPLIT/` or `masks/SPLIT/` with 8-bit PNG files of the same stem
    (gray or palette: the values are the classes), and `classes.json`: {"classes": [{"value": 0, "name": "…"}, …]}.
    Stored are class numbers: places in that list. The value 255 means "ignore" where the list does not name it; with
    the two classes 0 and 1 this must be said ("ignore": 255 beside "classes").
    """

    _folders = ("class_masks", "masks")

    def label_features(self) -> dict:
        return {MASK: tfds.features.Image(shape=(None, None, 1), dtype=np.uint8, encoding_format="png")}

    def _split_generators(self, dl_manager: tfds.download.DownloadManager) -> dict:
        root = Path(dl_manager.manual_dir)
        values, ignore = self._class_values(root)
        self.class_names[MASK] = list(values.values())
        images, masks = split_folders(root, "images"), split_folders(root, *self._folders)
        numbers = np.full(256, _UNKNOWN, np.uint8)
        numbers[IGNORE] = IGNORE
        numbers[list(values)] = range(len(values))
        if isinstance(self, SmallTargets):
            numbers[1:] = 1
        # Of two classes 0 and 1, a file of 0 and 255 more likely means the second class than "ignore".
        doubtful = not ignore and list(values) == [0, 1]
        return {split: self._generate_examples(images[split], masks.get(split), numbers, doubtful) for split in images}

    def _class_values(self, root: Path) -> tuple[dict[int, str], bool]:
        """Value in the files -> name; and whether 255 is said to mean "ignore"."""
        path = root / "classes.json"
        try:
            content = json.loads(path.read_text())
            classes = content["classes"]
            values = {int(entry["value"]): str(entry["name"]) for entry in classes}
            if len(values) != len(classes) or len(set(values.values())) != len(classes):
                raise ValueError("a value or a name is there twice")
            if not 0 < len(values) < _UNKNOWN or not 0 <= min(values) <= max(values) <= 255:
                raise ValueError("values are 0 to 255, of at most 253 classes")
            return values, content.get("ignore") == IGNORE
        except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
            raise InputError(f"{path} does not list the classes ({error!r}): see the builder's description") from error

    def _generate_examples(self, images: Path, masks: Path | None, numbers: np.ndarray, doubtful: bool):
        if masks is None:
            raise InputError(f"{images} has no folder of masks beside it: every split needs {self._folders[-1]}/SPLIT")
        by_stem = {path.stem: path for path in sorted(masks.iterdir())}
        pairs = [(path, by_stem.get(path.stem)) for path in sorted(images.iterdir()) if path.is_file()]
        make = functools.partial(_example, numbers=numbers, doubtful=doubtful, bit_depth=self.builder_config.bit_depth)
        return self._generate(pairs, make)


class SmallTargets(ClassMasks):
    """Infrared images with a mask of small targets: not 0 on a target.

    `manual_dir` holds `images/SPLIT/` and `target_masks/SPLIT/` or `masks/SPLIT/` with PNG files of the same stem.
    Masks are stored with the classes 0 (background) and 1 (target).
    """

    _folders = ("target_masks", "masks")

    def _class_values(self, root: Path) -> tuple[dict[int, str], bool]:
        return {0: "background", 1: "target"}, True


def _example(pair: tuple[Path, Path | None], numbers: np.ndarray, doubtful: bool, bit_depth: int):
    path, mask_path = pair
    if mask_path is None:
        raise InputError(f"{path} has no mask of the same stem: add it or remove the image")
    example = labelled_image(path, f"{path.parent.name}/{path.name}", bit_depth=bit_depth)
    values = read_mask(mask_path)
    if values.shape != (example.height, example.width):
        stated = f"{values.shape[1]}x{values.shape[0]}, its image {example.width}x{example.height}"
        raise InputError(f"{mask_path} is {stated}: make them equal")
    found = np.unique(values)
    mask = numbers[values]
    if (mask == _UNKNOWN).any():
        unknown = found[numbers[found] == _UNKNOWN][0]
        raise InputError(f"{mask_path} holds the value {unknown}, which classes.json does not list")
    if doubtful and 255 in found and 1 not in found:
        raise InputError(
            f'{mask_path} holds 255 and no 1: list 255 in classes.json in the place of 1, or "ignore": 255'
        )
    yield example.key, {**image_features(example), MASK: encode_png(mask)}


def read_mask(path: Path) -> np.ndarray:
    """Values (H, W) uint8 of a mask file; of a palette file its indices.

    Raises:
      InputError: it cannot be read or is not 8-bit with one channel.
    """
    try:
        with Image.open(io.BytesIO(path.read_bytes())) as image:
            mask = np.asarray(image)
            mode = image.mode
    except (OSError, UnidentifiedImageError, SyntaxError, Image.DecompressionBombError) as error:
        raise InputError(f"mask {path} cannot be read ({error}): replace it") from error
    if mode not in ("1", "L", "P"):
        raise InputError(f"mask {path} has mode {mode}: masks are 8-bit with one channel")
    return mask.astype(np.uint8)

"""TFDS builders `class_masks` and `small_targets`: infrared images with a mask of the same size."""

from __future__ import annotations

import functools
import io
import json
from pathlib import Path

import numpy as np
import tensorflow_datasets as tfds
from PIL import Image, UnidentifiedImageError

from data_pipelines.builders.common import FolderBuilder, annotated_record, image_example, split_folders
from data_pipelines.decode import encode_png
from data_pipelines.errors import InputError

TARGET = 255
_MASK = tfds.features.Image(shape=(None, None, 1), dtype=np.uint8, encoding_format="png")


class ClassMasks(FolderBuilder):
    """Infrared images with a class value a pixel.

    `manual_dir` holds `images/SPLIT/`, `class_masks/SPLIT/` or `masks/SPLIT/` with 8-bit PNG files of the same stem
    (gray or palette: the values are the classes), and `classes.json`: {"classes": [{"value": 0, "name": "…"}, …]}.
    """

    _folders = ("class_masks", "masks")

    def _info(self) -> tfds.core.DatasetInfo:
        return self._dataset_info(
            "Infrared images with a class value a pixel; the classes are in the metadata.",
            {"mask": _MASK},
            metadata=tfds.core.MetadataDict(),
        )

    def _split_generators(self, dl_manager: tfds.download.DownloadManager) -> dict:
        root = Path(dl_manager.manual_dir)
        classes = self._classes(root)
        self.info.metadata["classes"] = classes
        images, masks = split_folders(root, "images"), split_folders(root, *self._folders)
        values = frozenset(int(entry["value"]) for entry in classes)
        return {split: self._generate_examples(images[split], masks.get(split), values) for split in images}

    def _classes(self, root: Path) -> list[dict]:
        path = root / "classes.json"
        try:
            classes = json.loads(path.read_text())["classes"]
            return [{"value": int(entry["value"]), "name": str(entry["name"])} for entry in classes]
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise InputError(f"{path} does not list the classes ({error!r}): see the builder's description") from error

    def _generate_examples(self, images: Path, masks: Path | None, values: frozenset[int]):
        if masks is None:
            raise InputError(f"{images} has no folder of masks beside it: every split needs {self._folders[-1]}/SPLIT")
        by_stem = {path.stem: path for path in sorted(masks.iterdir())}
        pairs = [(path, by_stem.get(path.stem)) for path in sorted(images.iterdir()) if path.is_file()]
        make = functools.partial(
            _example, values=values, binary=isinstance(self, SmallTargets), bit_depth=self.builder_config.bit_depth
        )
        return self._generate(pairs, make)


class SmallTargets(ClassMasks):
    """Infrared images with a mask of small targets: not 0 on a target.

    `manual_dir` holds `images/SPLIT/` and `target_masks/SPLIT/` or `masks/SPLIT/` with PNG files of the same stem.
    Masks are stored with 0 and 255.
    """

    _folders = ("target_masks", "masks")

    def _classes(self, root: Path) -> list[dict]:
        return [{"value": 0, "name": "background"}, {"value": TARGET, "name": "target"}]


def _example(pair: tuple[Path, Path | None], values: frozenset[int], binary: bool, bit_depth: int):
    path, mask_path = pair
    if mask_path is None:
        raise InputError(f"{path} has no mask of the same stem: add it or remove the image")
    record = annotated_record(path, f"{path.parent.name}/{path.name}", bit_depth)
    mask = read_mask(mask_path)
    if mask.shape != (record.height, record.width):
        raise InputError(f"{mask_path} is {mask.shape[1]}x{mask.shape[0]}, its image {record.width}x{record.height}")
    if binary:
        mask = np.where(mask > 0, np.uint8(TARGET), np.uint8(0))
    unknown = sorted(set(np.unique(mask).tolist()) - values)
    if unknown:
        raise InputError(f"{mask_path} holds the value {unknown[0]}, which classes.json does not list")
    yield record.key, {**image_example(record), "mask": encode_png(mask)}


def read_mask(path: Path) -> np.ndarray:
    """Values (H, W) uint8 of a mask file; of a palette file its indices.

    Raises:
      InputError: it cannot be read or is not 8-bit with one channel.
    """
    try:
        with Image.open(io.BytesIO(path.read_bytes())) as image:
            mask = np.asarray(image)
            mode = image.mode
    except (OSError, UnidentifiedImageError, SyntaxError) as error:
        raise InputError(f"mask {path} cannot be read ({error}): replace it") from error
    if mode not in ("1", "L", "P"):
        raise InputError(f"mask {path} has mode {mode}: masks are 8-bit with one channel")
    return mask.astype(np.uint8)

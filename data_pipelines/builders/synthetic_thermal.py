"""TFDS builder `synthetic_thermal`: the synthetic scenes with all their labels."""

from __future__ import annotations

import functools
from typing import ClassVar

import numpy as np
import tensorflow_datasets as tfds

from data_pipelines.builders.common import InfraredBuilder, box_object, image_example, objects_feature
from data_pipelines.builders.masks import TARGET
from data_pipelines.decode import encode_png
from data_pipelines.examples import Example
from data_pipelines.synthetic import CATEGORIES, SCENE_CLASSES, SURFACES, generate_scene, is_val

_MASK = tfds.features.Image(shape=(None, None, 1), dtype=np.uint8, encoding_format="png")


class SceneConfig(tfds.core.BuilderConfig):
    """Which scenes: `count` of the series `seed`, of `size` rows and columns, a share `val_fraction` in `val`."""

    def __init__(self, count: int, seed: int = 0, size: tuple[int, int] = (256, 320), val_fraction: float = 0.2):
        name = f"scenes{count}_{size[0]}x{size[1]}_seed{seed}"
        super().__init__(name=name, description=f"{count} scenes of {size[0]}x{size[1]} pixels, series {seed}")
        self.count, self.seed, self.size, self.val_fraction = count, seed, size, val_fraction


class SyntheticThermal(InfraredBuilder):
    """Synthetic thermal scenes with scene class, boxes, class mask and small-target mask.

    `tfds.builder("synthetic_thermal", config=SceneConfig(count=5000, seed=3))` makes a set of one's own.
    """

    BUILDER_CONFIGS: ClassVar = [SceneConfig(600), SceneConfig(10_000)]

    def _info(self) -> tfds.core.DatasetInfo:
        features = {
            "label": tfds.features.ClassLabel(names=SCENE_CLASSES),
            "objects": objects_feature(CATEGORIES),
            "class_mask": _MASK,
            "target_mask": _MASK,
        }
        metadata = tfds.core.MetadataDict(classes=[{"value": v, "name": name} for v, name in enumerate(SURFACES)])
        return self._dataset_info("Synthetic thermal scenes.", features, metadata=metadata)

    def _split_generators(self, dl_manager: tfds.download.DownloadManager) -> dict:
        del dl_manager  # nothing to download
        config = self.builder_config
        in_val = [is_val(index, config.val_fraction) for index in range(config.count)]
        splits = {
            "train": [i for i, val in enumerate(in_val) if not val],
            "val": [i for i, val in enumerate(in_val) if val],
        }
        return {name: self._generate_examples(indices) for name, indices in splits.items() if indices}

    def _generate_examples(self, indices: list[int]):
        return self._generate(
            indices, functools.partial(_example, seed=self.builder_config.seed, size=self.builder_config.size)
        )


def _example(index: int, seed: int, size: tuple[int, int]):
    scene = generate_scene(seed, index, size)
    record = Example(f"synthetic/{seed}/{index:08d}.png", encode_png(scene.image), "png", *size, 8, {"seed": seed})
    objects = [
        box_object(box.x, box.y, box.width, box.height, size, CATEGORIES.index(box.category), box.area, False)
        for box in scene.boxes
    ]
    yield (
        record.key,
        {
            **image_example(record),
            "label": scene.scene_class,
            "objects": objects,
            "class_mask": encode_png(scene.class_mask),
            "target_mask": encode_png(scene.target_mask.astype(np.uint8) * TARGET),
        },
    )

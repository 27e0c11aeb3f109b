"""Synthetic thermal scenes: pictures with scene class, boxes, class mask and small-target mask, drawn from a seed.

A scene is painted in apparent temperatures (materials, weather, perspective), photographed by a model thermal camera
(optics, noise, fixed patterns, gain control) and is a pure function of (seed, index, size).
"""

from data_pipelines.synthetic.canvas import CATEGORIES, SURFACES
from data_pipelines.synthetic.dataset import is_val, write_dataset, write_shards
from data_pipelines.synthetic.generate import SCENE_CLASSES, Scene, generate_scene

__all__ = ["CATEGORIES", "SCENE_CLASSES", "SURFACES", "Scene", "generate_scene", "is_val", "write_dataset",
           "write_shards"]  # fmt: skip

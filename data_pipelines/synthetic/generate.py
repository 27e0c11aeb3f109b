"""One synthetic thermal picture with all its labels, from a seed and an index."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from data_pipelines.errors import InputError
from data_pipelines.synthetic.camera import photograph
from data_pipelines.synthetic.canvas import SURFACES, Box, Stage
from data_pipelines.synthetic.scenes import LANDSCAPES, aerial, draw_landscape

SCENE_CLASSES = ("aerial", *LANDSCAPES)
DEFAULT_SIZE = (256, 320)
SMALLEST_SIDE = 64


@dataclass(frozen=True)
class Scene:
    """A picture and its labels.

    Attributes:
      image: (H, W) uint8.
      scene_class: one of `SCENE_CLASSES`.
      boxes: visible objects; coordinates in pixels from the top-left corner.
      class_mask: (H, W) uint8, places in `SURFACES`.
      target_mask: (H, W) bool, True on small targets (fewer than 81 pixels each).
    """

    image: np.ndarray
    scene_class: str
    boxes: tuple[Box, ...]
    class_mask: np.ndarray
    target_mask: np.ndarray


def generate_scene(seed: int, index: int, size: tuple[int, int] = DEFAULT_SIZE) -> Scene:
    """Draws scene `index` of the series `seed`; the classes take turns, so every series is balanced.

    Args:
      seed: number of the series, not negative.
      index: place in the series, not negative.
      size: rows and columns, each at least 64.

    Raises:
      InputError: a negative seed or index, or a size too small for objects to be seen.
    """
    if seed < 0 or index < 0:
        raise InputError(f"seed {seed}, index {index}: neither may be negative")
    height, width = size
    if min(size) < SMALLEST_SIDE:
        raise InputError(f"size {height}x{width}: synthetic scenes need at least {SMALLEST_SIDE} pixels a side")
    rng = np.random.default_rng([seed, index])
    scene_class = SCENE_CLASSES[index % len(SCENE_CLASSES)]
    stage = Stage(height, width, rng)
    if scene_class == "aerial":
        aerial(stage)
    else:
        draw_landscape(stage, LANDSCAPES[scene_class])
    # Nothing is of one temperature all over; sky apart, everything gets a faint unevenness.
    uneven = stage.grain() * np.float32(rng.uniform(0.15, 0.45))
    image = photograph(stage.temperature + uneven * (stage.surface != SURFACES.index("sky")), rng)
    return Scene(image, scene_class, stage.boxes(), stage.surface, stage.targets)

"""One synthetic thermal picture with all its labels, from a seed and an index: scene and camera."""

from dataclasses import dataclass

import numpy as np
from scipy import ndimage

from data_pipelines.errors import InputError
from data_pipelines.examples import Objects
from data_pipelines.synthetic.canvas import SURFACES, Stage
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
      objects: those that are visible; classes are places in `CATEGORIES`.
      class_mask: (H, W) uint8, places in `SURFACES`.
      target_mask: (H, W) bool, True on small targets (fewer than 81 pixels each).
    """

    image: np.ndarray
    scene_class: str
    objects: Objects
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
    return Scene(image, scene_class, stage.objects(), stage.surface, stage.targets)


def photograph(temperature: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Takes a picture of apparent temperatures (H, W) float32 in degrees Celsius; returns (H, W) uint8.

    Draws a camera: blur of the optics, shading towards the corners, noise a pixel (noise-equivalent temperature
    difference 30 to 150 mK), fixed patterns a row and a column, then gain control and, rarely, black-hot polarity.
    """
    height, width = temperature.shape
    image = ndimage.gaussian_filter(temperature, rng.uniform(0.5, 1.2) * max(1.0, height / 320), mode="nearest")
    y = np.linspace(-1, 1, height, dtype=np.float32)[:, None]
    x = np.linspace(-1, 1, width, dtype=np.float32)[None, :]
    image += np.float32(rng.normal(0, 0.4)) * (x * x + y * y)
    image += rng.standard_normal((height, width), dtype=np.float32) * np.float32(np.exp(rng.uniform(-3.5, -1.9)))
    image += rng.standard_normal((1, width), dtype=np.float32) * np.float32(np.exp(rng.uniform(-4.5, -2.4)))
    image += rng.standard_normal((height, 1), dtype=np.float32) * np.float32(np.exp(rng.uniform(-5.0, -2.9)))
    picture = gain_control(image, rng)
    return 255 - picture if rng.random() < 0.15 else picture


def gain_control(image: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Maps (H, W) float32 to uint8 as thermal cameras do: a clipped range, then a gamma.

    The brightness setting (mean level) is drawn apart from the scene, so that it says nothing about what is seen.
    """
    low, high = np.percentile(image, (rng.uniform(0.02, 0.8), rng.uniform(99.2, 99.98)))
    linear = np.clip((image - low) / max(float(high - low), 1e-3), 0, 1)
    level = np.clip(linear, 1e-4, 1)
    brightness = rng.uniform(0.3, 0.6)
    for _ in range(2):
        level = level ** np.float32(np.clip(np.log(brightness) / np.log(float(level.mean())), 0.4, 2.5))
    black, white = rng.uniform(0, 45), rng.uniform(185, 255)
    return np.clip(np.rint(black + (white - black) * level), 0, 255).astype(np.uint8)

"""What a synthetic scene is painted on: temperatures and labels, soft-edged shapes; and weather, textures, a camera."""

from dataclasses import dataclass

import numpy as np
from scipy import ndimage

from data_pipelines.examples import Objects

# Values of a class mask, in order: the value of a class is its place in this tuple.
SURFACES = (
    "sky", "ground", "road", "vegetation", "building", "water", "person", "vehicle", "boat", "aircraft", "machinery",
)  # fmt: skip
# Categories of boxes, numbered from 1 as in COCO files.
CATEGORIES = ("person", "vehicle", "boat", "aircraft", "bird")

# Degrees Celsius over the air at night, and what full sun adds: thermal mass, moisture and emissivity in two numbers.
MATERIALS = {
    "asphalt": (4.0, 15.0), "concrete": (3.0, 10.0), "soil": (0.0, 12.0), "grass": (-3.0, 6.0), "foliage": (0.5, 3.0),
    "wall": (3.0, 8.0), "roof": (-7.0, 18.0), "metal": (-6.0, 9.0), "clothing": (8.0, -1.0), "water": (3.0, -10.0),
}  # fmt: skip


@dataclass(frozen=True)
class Patch:
    """A shape on the canvas: its window of rows and columns and the share of each pixel it covers, in [0, 1]."""

    rows: slice
    columns: slice
    coverage: np.ndarray


class Stage:
    """Apparent temperatures in degrees Celsius with class, instance and small-target labels, all (H, W); the random
    numbers of the scene, its weather, and a level pinhole camera.

    Attributes:
      rows, columns: pixel numbers, (H, 1) and (1, W) float32.
      air: temperature, degrees Celsius.
      sun: 0 (night) to 1.
      sky_drop: how much colder a clear sky is at its zenith, degrees.
      horizon, column: row of the horizon, column that the camera looks along (after `look`).
      focal, camera: length in pixels, height in metres.
      nearest: distance of the nearest ground in the picture, metres.
    """

    def __init__(self, height: int, width: int, rng: np.random.Generator):
        self.height, self.width = height, width
        self.rows, self.columns = np.ogrid[:height, :width]
        self.rows, self.columns = self.rows.astype(np.float32), self.columns.astype(np.float32)
        self.temperature = np.zeros((height, width), np.float32)
        self.surface = np.zeros((height, width), np.uint8)
        self.instance = np.zeros((height, width), np.int32)
        self.targets = np.zeros((height, width), bool)
        self._categories: list[int] = []
        self._painted: list[int] = []
        self.uniform, self.random, self.integers, self.choice = rng.uniform, rng.random, rng.integers, rng.choice
        self._rng = rng
        self.sun = 0.0 if rng.random() < 0.45 else float(rng.uniform(0.1, 1.0))
        self.air = float(rng.uniform(-5, 30))
        self.sky_drop = float(rng.uniform(8, 35))
        self._grain = self.noise(1.0)

    def add_object(self, category: str) -> int:
        """Registers an object of a box category and returns the instance number to paint it with."""
        self._categories.append(CATEGORIES.index(category))
        self._painted.append(0)
        return len(self._painted)

    def paint(
        self, patch: Patch | None, heat: np.ndarray | float, surface: str, instance: int = 0, target: bool = False
    ) -> None:
        """Lays a shape over what is there; `None` (a shape outside the canvas) paints nothing.

        `heat` is the temperature: one value, or an array of the whole canvas or of the patch's window. Pixels covered
        by half or more take the labels.
        """
        if patch is None:
            return
        window = patch.rows, patch.columns
        below = self.temperature[window]
        heat = heat[window] if np.shape(heat) == self.surface.shape else heat
        self.temperature[window] = below + patch.coverage * (heat - below)
        covered = patch.coverage >= 0.5
        self.surface[window][covered] = SURFACES.index(surface)
        self.instance[window][covered] = instance
        self.targets[window][covered] = target
        if instance:
            self._painted[instance - 1] += int(covered.sum())

    def objects(self, min_visible: float = 0.3) -> Objects:
        """All objects of which at least `min_visible` was not painted over later, in painting order: boxes in whole
        pixels, places in `CATEGORIES`, visible pixels as areas."""
        found = []
        for number, window in enumerate(ndimage.find_objects(self.instance), start=1):
            area = int(np.count_nonzero(self.instance[window] == number)) if window else 0
            if area and area >= min_visible * self._painted[number - 1]:
                rows, columns = window
                edges = columns.start, rows.start, columns.stop, rows.stop
                found.append((*edges, self._categories[number - 1], area))
        table = np.array(found, np.float32).reshape(-1, 6)
        return Objects(table[:, :4], table[:, 4].astype(np.int32), np.zeros(len(found), bool), table[:, 5])

    def polygon(self, points: list[tuple[float, float]], fray: np.ndarray | None = None) -> Patch | None:
        """A convex polygon with corners (x, y) in pixel coordinates; `fray` (H, W) moves its edge, in pixels."""
        corners = np.asarray(points, np.float32)
        margin = 2 if fray is None else 2 + fray.max()
        (left, top), (right, bottom) = corners.min(0) - margin, corners.max(0) + margin
        rows = slice(max(0, int(top)), min(self.height, int(bottom) + 1))
        columns = slice(max(0, int(left)), min(self.width, int(right) + 1))
        if rows.start >= rows.stop or columns.start >= columns.stop:
            return None
        y, x = self.rows[rows], self.columns[:, columns]
        following = np.roll(corners, -1, axis=0)
        turn = np.sign(np.sum(corners[:, 0] * following[:, 1] - following[:, 0] * corners[:, 1]))
        inside = np.float32(np.inf)
        for (x0, y0), (dx, dy) in zip(corners, following - corners, strict=True):
            distance = (dx * (y - y0) - dy * (x - x0)) * np.float32(turn / max(np.hypot(dx, dy), 1e-6))
            inside = np.minimum(inside, distance)
        inside = inside if fray is None else inside + fray[rows, columns]
        return Patch(rows, columns, np.clip(inside + np.float32(0.5), 0, 1))

    def ellipse(self, x: float, y: float, half_x: float, half_y: float, fray: np.ndarray | None = None) -> Patch | None:
        """An axis-parallel ellipse, its edge moved by `fray` as that of a polygon."""
        turns = np.linspace(0, 2 * np.pi, 20, endpoint=False)
        return self.polygon(np.stack([x + half_x * np.cos(turns), y + half_y * np.sin(turns)], axis=1), fray)

    def below(self, outline: np.ndarray | float) -> Patch:
        """Everything under an outline, (W,) or one row coordinate."""
        coverage = np.clip(self.rows - outline + np.float32(0.5), 0, 1) * np.ones((1, self.width), np.float32)
        return Patch(slice(0, self.height), slice(0, self.width), coverage)

    def look(self, horizon: tuple[float, float], camera: tuple[float, float]) -> None:
        """Draws a view: the horizon between two shares of the height, the camera between two heights in metres."""
        self.horizon, self.column = self.uniform(*horizon) * self.height, self.uniform(0.15, 0.85) * self.width
        self.focal, self.camera = self.uniform(0.8, 1.5) * self.width, self.uniform(*camera)
        self.nearest = self.focal * self.camera / max(self.height - self.horizon, 1)

    def place(self, across: float, distance: float) -> tuple[float, float, float]:
        """Column, row and pixels per metre of the ground point `across` metres to the right at a distance."""
        scale = self.focal / distance
        return self.column + across * scale, self.horizon + self.camera * scale, scale

    def material(self, name: str) -> float:
        """Temperature of something made of a material, in this weather."""
        night, gain = MATERIALS[name]
        return self.air + night + gain * self.sun + float(self._rng.normal(0, 1.2))

    def noise(self, roughness: float, stretch: float = 1.0) -> np.ndarray:
        """Periodic noise (H, W) float32 whose amplitude falls with frequency, mean 0, spread 1.

        `roughness` 0.5 is coarse-grained sand, 2 soft clouds (the exponent of the amplitude spectrum). `stretch` > 1
        draws the texture out along the columns.
        """
        shape = self.height, self.width
        down, across = np.fft.fftfreq(shape[0], 1 / shape[0]), np.fft.rfftfreq(shape[1], 1 / shape[1]) * stretch
        squared = np.float32(down[:, None] ** 2 + across**2)
        squared[0, 0] = np.inf  # no mean
        white = np.fft.rfft2(self._rng.standard_normal(shape, dtype=np.float32))
        noise = np.fft.irfft2(white * squared ** np.float32(-roughness / 2), shape)
        return noise / noise.std()

    def grain(self) -> np.ndarray:
        """A fine fractal texture (H, W) of unit spread: the same one for all uses, each at a random shift."""
        return np.roll(self._grain, (self.integers(self.height), self.integers(self.width)), axis=(0, 1))

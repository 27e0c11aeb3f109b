"""A canvas with weather and a camera: what the scene classes are drawn on."""

from __future__ import annotations

import numpy as np

from data_pipelines.synthetic.canvas import Canvas, Patch, fractal_noise

# Degrees Celsius over the air at night, and what full sun adds: thermal mass, moisture and emissivity in two numbers.
MATERIALS = {
    "asphalt": (4.0, 15.0),
    "concrete": (3.0, 10.0),
    "soil": (0.0, 12.0),
    "grass": (-3.0, 6.0),
    "foliage": (0.5, 3.0),
    "wall": (3.0, 8.0),
    "roof": (-7.0, 18.0),
    "metal": (-6.0, 9.0),
    "glass": (-1.0, -3.0),
}


class Stage(Canvas):
    """A canvas, the random numbers of its scene, its weather, and a level pinhole camera.

    Attributes:
      air: temperature, degrees Celsius.
      sun: 0 (night) to 1.
      sky_drop: how much colder a clear sky is at its zenith, degrees.
      clouds: cover, 0 to 1.
      horizon, column: row of the horizon, column that the camera looks along (after `look`).
      focal, camera: length in pixels, height in metres.
      nearest: distance of the nearest ground in the picture, metres.
      rows, columns: pixel numbers, (H, 1) and (1, W) float32.
    """

    def __init__(self, height: int, width: int, rng: np.random.Generator):
        super().__init__(height, width)
        self.uniform, self.random, self.integers = rng.uniform, rng.random, rng.integers
        self.normal, self.choice = rng.normal, rng.choice
        self._rng = rng
        self.rows, self.columns = Patch(slice(0, height), slice(0, width), np.ones((1, 1))).grid()
        self._grain: np.ndarray | None = None
        self.sun = 0.0 if rng.random() < 0.45 else float(rng.uniform(0.1, 1.0))
        self.air = float(rng.uniform(-5, 30))
        self.sky_drop = float(rng.uniform(8, 35))
        self.clouds = float(rng.random())
        self.horizon = self.column = self.focal = self.camera = 0.0

    def look(self, horizon: tuple[float, float], camera: float) -> None:
        """Draws a view with the horizon between two shares of the height, `camera` metres over the ground."""
        self.horizon, self.column = self.uniform(*horizon) * self.height, self.uniform(0.15, 0.85) * self.width
        self.focal, self.camera = self.uniform(0.8, 1.5) * self.width, camera
        self.nearest = self.focal * self.camera / max(self.height - self.horizon, 1)

    def place(self, across: float, distance: float) -> tuple[float, float, float]:
        """Column, row and pixels per metre of the ground point `across` metres to the right at a distance."""
        scale = self.focal / distance
        return self.column + across * scale, self.horizon + self.camera * scale, scale

    def somewhere(self, spread: float, distance: float) -> tuple[float, float, float]:
        """`place` of a random point at a distance; `spread` 0.5 reaches the edges of the picture."""
        return self.place(self.uniform(-spread, spread) * self.width * distance / self.focal, distance)

    def distances(self, low: float, high: float, count: int) -> np.ndarray:
        """Distances of things on the ground, far to near, in multiples e^low to e^high of the nearest visible one."""
        return np.sort(self.nearest * np.exp(self.uniform(low, high, count)))[::-1]

    def distance(self, row: np.ndarray | float) -> np.ndarray | float:
        return self.focal * self.camera / np.maximum(row - self.horizon, 1e-3)

    def material(self, name: str) -> float:
        """Temperature of something made of a material, in this weather."""
        night, gain = MATERIALS[name]
        return self.air + night + gain * self.sun + float(self.normal(0, 1.2))

    def noise(self, roughness: float, stretch: float = 1.0) -> np.ndarray:
        """A fractal texture (H, W), see `fractal_noise`."""
        return fractal_noise(self._rng, (self.height, self.width), roughness, stretch)

    def outline(self, roughness: float) -> np.ndarray:
        """A fractal line (W,) of unit spread."""
        return fractal_noise(self._rng, (2 * self.width,), roughness)[: self.width]

    def tile(self, side: int, roughness: float) -> np.ndarray:
        """A fractal texture (side, side), periodic."""
        return fractal_noise(self._rng, (side, side), roughness)

    def grain(self) -> np.ndarray:
        """A fine fractal texture (H, W) of unit spread: the same one for all uses, each at a random shift.

        Drawing it takes longer than everything else that a tree needs; shifting it takes nothing.
        """
        if self._grain is None:
            self._grain = self.noise(1.0)
        return np.roll(self._grain, (self.integers(self.height), self.integers(self.width)), axis=(0, 1))

"""What a synthetic scene is painted on: temperatures and labels, soft-edged shapes, fractal textures."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

# Values of a class mask, in order: the value of a class is its place in this tuple.
SURFACES = (
    "sky", "ground", "road", "vegetation", "building", "water", "person", "vehicle", "boat", "aircraft", "machinery",
)  # fmt: skip
# Categories of boxes, numbered from 1 as in COCO files.
CATEGORIES = ("person", "vehicle", "boat", "aircraft", "bird")


@dataclass(frozen=True)
class Box:
    """One visible object: category name, corner and extent in whole pixels, number of visible pixels."""

    category: str
    x: int
    y: int
    width: int
    height: int
    area: int


@dataclass(frozen=True)
class Patch:
    """A shape on the canvas: its window of rows and columns and the share of each pixel it covers, in [0, 1]."""

    rows: slice
    columns: slice
    coverage: np.ndarray

    def grid(self) -> tuple[np.ndarray, np.ndarray]:
        """Row numbers (h, 1) and column numbers (1, w) of the window, float32."""
        return _grid(self.rows, self.columns)


Temperature = np.ndarray | float | Callable[[Patch], np.ndarray | float]


class Canvas:
    """Apparent temperatures in degrees Celsius with class, instance and small-target labels, all (H, W)."""

    def __init__(self, height: int, width: int, temperature: float = 0.0):
        self.height, self.width = height, width
        self.temperature = np.full((height, width), temperature, np.float32)
        self.surface = np.zeros((height, width), np.uint8)
        self.instance = np.zeros((height, width), np.int32)
        self.targets = np.zeros((height, width), bool)
        self._painted: list[tuple[str, int]] = []

    def add_object(self, category: str) -> int:
        """Registers an object of a box category and returns the instance number to paint it with."""
        assert category in CATEGORIES, category
        self._painted.append((category, 0))
        return len(self._painted)

    def paint(
        self,
        patch: Patch | None,
        temperature: Temperature,
        surface: str,
        instance: int = 0,
        target: bool = False,
    ) -> None:
        """Lays a shape over what is there; `None` (a shape outside the canvas) paints nothing.

        `temperature` is one value, an array of the whole canvas or of the patch's window, or a function that is called
        with the patch, if there is one, and returns either. Pixels covered by half or more take the labels.
        """
        if patch is None:
            return
        window = (patch.rows, patch.columns)
        if callable(temperature):
            temperature = temperature(patch)
        if np.shape(temperature) == self.surface.shape:
            temperature = temperature[window]
        below = self.temperature[window]
        self.temperature[window] = below + patch.coverage * (np.asarray(temperature, np.float32) - below)
        covered = patch.coverage >= 0.5
        self.surface[window][covered] = SURFACES.index(surface)
        self.instance[window][covered] = instance
        self.targets[window][covered] = target
        if instance:
            category, area = self._painted[instance - 1]
            self._painted[instance - 1] = (category, area + int(covered.sum()))

    def boxes(self, min_visible: float = 0.3) -> tuple[Box, ...]:
        """Boxes of all objects of which at least `min_visible` was not painted over later, in painting order."""
        rows, columns = np.nonzero(self.instance)
        numbers = self.instance[rows, columns]
        found = []
        for number, (category, painted) in enumerate(self._painted, start=1):
            here = numbers == number
            area = int(here.sum())
            if not area or area < min_visible * painted:
                continue
            y, x = rows[here], columns[here]
            left, top = int(x.min()), int(y.min())
            found.append(Box(category, left, top, int(x.max()) - left + 1, int(y.max()) - top + 1, area))
        return tuple(found)

    def window(self, left: float, top: float, right: float, bottom: float) -> tuple[slice, slice] | None:
        """Rows and columns of the pixels touched by a rectangle, or None when it lies outside."""
        rows = slice(max(0, int(np.floor(top)) - 1), min(self.height, int(np.ceil(bottom)) + 2))
        columns = slice(max(0, int(np.floor(left)) - 1), min(self.width, int(np.ceil(right)) + 2))
        return (rows, columns) if rows.start < rows.stop and columns.start < columns.stop else None

    def polygon(self, points: list[tuple[float, float]]) -> Patch | None:
        """A convex polygon with corners (x, y) in pixel coordinates, in either direction of rotation."""
        corners = np.asarray(points, np.float32)
        window = self.window(*corners.min(0), *corners.max(0))
        if window is None:
            return None
        y, x = _grid(*window)
        following = np.roll(corners, -1, axis=0)
        turn = np.sum(corners[:, 0] * following[:, 1] - following[:, 0] * corners[:, 1])
        inside = np.float32(np.inf)
        for (x0, y0), (x1, y1) in zip(corners, following):
            length = max(float(np.hypot(x1 - x0, y1 - y0)), 1e-6)
            distance = ((x1 - x0) * (y - y0) - (y1 - y0) * (x - x0)) * np.float32(np.sign(turn) / length)
            inside = np.minimum(inside, distance)
        return Patch(*window, np.clip(inside + np.float32(0.5), 0, 1))

    def rectangle(self, left: float, top: float, right: float, bottom: float) -> Patch | None:
        """An upright rectangle."""
        return self.polygon([(left, top), (right, top), (right, bottom), (left, bottom)])

    def trapezoid(self, x0: float, y0: float, half0: float, x1: float, y1: float, half1: float) -> Patch | None:
        """Two level sides, of half widths `half0` and `half1`, with their centres at (x0, y0) and (x1, y1)."""
        return self.polygon([(x0 - half0, y0), (x0 + half0, y0), (x1 + half1, y1), (x1 - half1, y1)])

    def ellipse(
        self, x: float, y: float, radius_x: float, radius_y: float, rough: np.ndarray | None = None
    ) -> Patch | None:
        """An axis-parallel ellipse; `rough`, a texture (H, W) of unit spread, frays its edge."""
        reach = 1.5 if rough is not None else 1.0
        window = self.window(x - reach * radius_x, y - reach * radius_y, x + reach * radius_x, y + reach * radius_y)
        if window is None:
            return None
        rows, columns = _grid(*window)
        radius = np.sqrt(((columns - x) / radius_x) ** 2 + ((rows - y) / radius_y) ** 2)
        if rough is not None:
            radius = radius + np.float32(0.18) * rough[window]
        return Patch(*window, np.clip((1 - radius) * min(radius_x, radius_y) + np.float32(0.5), 0, 1))

    def below(self, outline: np.ndarray, bottom: int | None = None) -> Patch | None:
        """Everything under an outline (W,) of row coordinates, down to row `bottom` (by default the canvas' end)."""
        bottom = self.height if bottom is None else int(np.clip(bottom, 0, self.height))
        top = int(np.clip(np.floor(outline.min()) - 1, 0, self.height))
        if top >= bottom:
            return None
        rows = np.arange(top, bottom, dtype=np.float32)[:, None]
        coverage = np.clip(rows - outline[None, :].astype(np.float32) + np.float32(0.5), 0, 1)
        return Patch(slice(top, bottom), slice(0, self.width), coverage)


def _grid(rows: slice, columns: slice) -> tuple[np.ndarray, np.ndarray]:
    y = np.arange(rows.start, rows.stop, dtype=np.float32)[:, None]
    x = np.arange(columns.start, columns.stop, dtype=np.float32)[None, :]
    return y, x


def fractal_noise(
    rng: np.random.Generator, shape: tuple[int, ...], roughness: float = 1.0, stretch: float = 1.0
) -> np.ndarray:
    """Periodic noise whose amplitude falls with frequency, float32 of the given 1-D or 2-D shape, mean 0, spread 1.

    `roughness` 0.5 is coarse-grained sand, 2 soft clouds (the exponent of the amplitude spectrum). `stretch` > 1 draws
    the texture out along the columns.
    """
    white = rng.standard_normal(shape, dtype=np.float32)
    frequencies = [np.fft.rfftfreq(shape[-1]).astype(np.float32) * np.float32(stretch) * shape[-1]]
    if len(shape) == 2:
        frequencies.insert(0, (np.fft.fftfreq(shape[0]).astype(np.float32) * shape[0])[:, None])
        frequencies[1] = frequencies[1][None, :]
    squared = sum(f * f for f in frequencies)
    squared.flat[0] = 1.0
    spectrum = np.fft.rfftn(white) * squared ** np.float32(-roughness / 2)
    spectrum.flat[0] = 0.0
    noise = np.fft.irfftn(spectrum, s=shape, axes=tuple(range(len(shape))))
    return (noise / noise.std()).astype(np.float32)

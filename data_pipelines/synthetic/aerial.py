"""The scene class seen from above: roads, roofs, parked cars, trees and people below a drone."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from data_pipelines.synthetic.canvas import Canvas, Patch, fractal_noise
from data_pipelines.synthetic.objects import Weather


@dataclass(frozen=True)
class Map:
    """A camera looking straight down: pixels a metre, turn of the street grid (radians), centre pixel."""

    scale: float
    cosine: float
    sine: float
    x: float
    y: float

    def place(self, east: float, north: float) -> tuple[float, float]:
        across, along = east * self.cosine - north * self.sine, east * self.sine + north * self.cosine
        return self.x + across * self.scale, self.y + along * self.scale

    def box(self, canvas: Canvas, east: float, north: float, length: float, width: float) -> Patch | None:
        """A rectangle on the ground, its sides along the street grid; metres."""
        corners = [(-length, -width), (length, -width), (length, width), (-length, width)]
        return canvas.polygon([self.place(east + dx / 2, north + dy / 2) for dx, dy in corners])


def aerial(canvas: Canvas, rng: np.random.Generator, weather: Weather) -> None:
    angle = rng.uniform(0, np.pi)
    scale = float(np.exp(rng.uniform(np.log(3.5), np.log(14)))) * canvas.height / 256
    ground = Map(scale, float(np.cos(angle)), float(np.sin(angle)), canvas.width / 2, canvas.height / 2)
    reach = 0.5 * float(np.hypot(canvas.height, canvas.width)) / scale
    texture = fractal_noise(rng, (canvas.height, canvas.width), rng.uniform(1.0, 1.5))
    everything = Patch(slice(0, canvas.height), slice(0, canvas.width), np.ones_like(canvas.temperature))
    material = "grass" if rng.random() < 0.6 else "concrete"
    canvas.paint(everything, weather.material(material, rng) + rng.uniform(0.2, 0.8) * texture, "ground")
    for _ in range(rng.integers(0, 4)):
        plot = ground.box(canvas, *rng.uniform(-reach, reach, 2), *rng.uniform(0.3, 1.2, 2) * reach)
        if plot is not None:
            other = weather.material("soil" if rng.random() < 0.5 else "grass", rng)
            canvas.paint(plot, other + 0.4 * texture[plot.rows, plot.columns], "ground")
    north = rng.uniform(-0.5, 0.5) * reach
    width = rng.uniform(5, 12)
    asphalt = weather.material("asphalt", rng)
    roads = [ground.box(canvas, 0, north, 4 * reach, width)]
    if rng.random() < 0.5:
        roads.append(ground.box(canvas, rng.uniform(-0.5, 0.5) * reach, 0, rng.uniform(4, 9), 4 * reach))
    for road in roads:
        if road is not None:
            canvas.paint(road, asphalt + 0.4 * texture[road.rows, road.columns], "road")
    for _ in range(rng.integers(0, 4)):
        side = 1 if rng.random() < 0.5 else -1
        depth = rng.uniform(8, 18)
        centre = north + side * (width / 2 + rng.uniform(3, 8) + depth / 2)
        _paint_roof(canvas, rng, weather, ground, rng.uniform(-reach, reach), centre, rng.uniform(10, 35), depth)
    _paint_cars(canvas, rng, weather, ground, reach, north, width)
    _paint_trees_and_people(canvas, rng, weather, reach, ground, texture)


def _paint_roof(canvas: Canvas, rng: np.random.Generator, weather: Weather, ground: Map, east: float, north: float,
                length: float, depth: float) -> None:  # fmt: skip
    roof = ground.box(canvas, east, north, length, depth)
    if roof is None:
        return
    top = weather.material("roof", rng)
    # Roof parts, ducts and skylights differ in emissivity, hence in apparent temperature, though not in height here.
    canvas.paint(roof, top, "building")
    if rng.random() < 0.6:
        half = ground.box(canvas, east, north - depth / 4, length, depth / 2)
        canvas.paint(half, top + rng.uniform(1, 4) * (1 + weather.sun), "building")
    for _ in range(rng.integers(1, 6)):
        unit = ground.box(canvas, east + rng.uniform(-0.4, 0.4) * length, north + rng.uniform(-0.35, 0.35) * depth,
                          *rng.uniform(1, 3, 2))  # fmt: skip
        canvas.paint(unit, top + rng.uniform(3, 16), "building")


def _paint_cars(canvas: Canvas, rng: np.random.Generator, weather: Weather, ground: Map, reach: float, north: float,
                width: float) -> None:  # fmt: skip
    places = [(east, north + sign * width / 4) for east, sign in
              zip(rng.uniform(-reach, reach, 4), rng.choice([-1, 1], 4))]  # fmt: skip
    crosswise = [False] * len(places)
    if rng.random() < 0.6:
        start, count = rng.uniform(-reach, 0), int(rng.integers(4, 14))
        row = north + (1 if rng.random() < 0.5 else -1) * (width / 2 + 3)
        places += [(start + 2.7 * i, row) for i in range(count) if rng.random() < 0.75]
        crosswise += [True] * (len(places) - 4)
    for (east, place), across in zip(places, crosswise):
        length, breadth = rng.uniform(4, 5.2), rng.uniform(1.75, 2.0)
        size = (breadth, length) if across else (length, breadth)
        body = ground.box(canvas, east, place, *size)
        if body is None or min(body.coverage.shape) < 3:
            continue
        number = canvas.add_object("vehicle")
        cold = weather.material("metal", rng) + rng.uniform(-2, 6)
        engine = rng.uniform(5, 22) if rng.random() < 0.4 else rng.uniform(-2, 2)
        sign = 1 if rng.random() < 0.5 else -1
        canvas.paint(body, cold, "vehicle", number)
        shift = (0.0, sign * 0.32 * length) if across else (sign * 0.32 * length, 0.0)
        hood = tuple(0.85 * s if s == breadth else 0.28 * s for s in size)
        canvas.paint(ground.box(canvas, east + shift[0], place + shift[1], *hood), cold + engine, "vehicle", number)
        glass = tuple(0.8 * s if s == breadth else 0.14 * s for s in size)
        place_glass = (east + 0.35 * shift[0], place + 0.35 * shift[1])
        canvas.paint(ground.box(canvas, *place_glass, *glass), weather.material("glass", rng), "vehicle", number)


def _paint_trees_and_people(canvas: Canvas, rng: np.random.Generator, weather: Weather, reach: float, ground: Map,
                            texture: np.ndarray) -> None:  # fmt: skip
    leaf = weather.material("foliage", rng)
    rough = canvas.grain(rng)
    for _ in range(rng.integers(0, 22)):
        x, y = ground.place(*rng.uniform(-reach, reach, 2))
        radius = rng.uniform(1.2, 4.5) * ground.scale
        crown = canvas.ellipse(x, y, radius, radius * rng.uniform(0.8, 1.2), rough)
        if crown is not None:
            window = (crown.rows, crown.columns)
            canvas.paint(crown, leaf + 1.2 * rough[window] + 0.4 * texture[window], "vegetation")
    for _ in range(rng.integers(1, 9)):
        x, y = ground.place(*rng.uniform(-0.8 * reach, 0.8 * reach, 2))
        if not (3 <= x < canvas.width - 3 and 3 <= y < canvas.height - 3):
            continue
        number = canvas.add_object("person")
        heat = 0.4 * weather.air + 0.6 * 34 + rng.normal(0, 1)
        long, short = max(0.5 * ground.scale, 1.1), max(0.28 * ground.scale, 0.9)
        if rng.random() < 0.5:
            long, short = short, long
        small = np.pi * long * short < 40
        canvas.paint(canvas.ellipse(x, y, long, short), heat, "person", number, target=bool(small))

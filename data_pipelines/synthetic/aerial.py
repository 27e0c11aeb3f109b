"""The scene class seen from above: roads, roofs, parked cars, trees and people below a drone."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from data_pipelines.synthetic.canvas import Patch
from data_pipelines.synthetic.stage import Stage


@dataclass(frozen=True)
class Map:
    """A camera looking straight down: pixels per metre, turn of the street grid (radians), centre pixel."""

    stage: Stage
    scale: float
    cosine: float
    sine: float
    x: float
    y: float

    def place(self, east: float, north: float) -> tuple[float, float]:
        across, along = east * self.cosine - north * self.sine, east * self.sine + north * self.cosine
        return self.x + across * self.scale, self.y + along * self.scale

    def box(self, east: float, north: float, length: float, width: float) -> Patch | None:
        """A rectangle on the ground, its sides along the street grid; metres."""
        corners = [(-length, -width), (length, -width), (length, width), (-length, width)]
        return self.stage.polygon([self.place(east + dx / 2, north + dy / 2) for dx, dy in corners])


def aerial(stage: Stage) -> None:
    angle = stage.uniform(0, np.pi)
    scale = float(np.exp(stage.uniform(np.log(3.5), np.log(14)))) * stage.height / 256
    ground = Map(stage, scale, float(np.cos(angle)), float(np.sin(angle)), stage.width / 2, stage.height / 2)
    reach = 0.5 * float(np.hypot(stage.height, stage.width)) / scale
    texture = stage.noise(stage.uniform(1.0, 1.5))
    everything = Patch(slice(0, stage.height), slice(0, stage.width), np.ones_like(stage.temperature))
    material = "grass" if stage.random() < 0.6 else "concrete"
    stage.paint(everything, stage.material(material) + stage.uniform(0.2, 0.8) * texture, "ground")
    for _ in range(stage.integers(0, 4)):
        plot = ground.box(*stage.uniform(-reach, reach, 2), *stage.uniform(0.3, 1.2, 2) * reach)
        stage.paint(
            plot, lambda _: stage.material("soil" if stage.random() < 0.5 else "grass") + 0.4 * texture, "ground"
        )
    north = stage.uniform(-0.5, 0.5) * reach
    width = stage.uniform(5, 12)
    asphalt = stage.material("asphalt")
    stage.paint(ground.box(0, north, 4 * reach, width), asphalt + 0.4 * texture, "road")
    if stage.random() < 0.5:
        crossing = ground.box(stage.uniform(-0.5, 0.5) * reach, 0, stage.uniform(4, 9), 4 * reach)
        stage.paint(crossing, asphalt + 0.4 * texture, "road")
    for _ in range(stage.integers(0, 4)):
        side = 1 if stage.random() < 0.5 else -1
        depth = stage.uniform(8, 18)
        centre = north + side * (width / 2 + stage.uniform(3, 8) + depth / 2)
        _paint_roof(stage, ground, stage.uniform(-reach, reach), centre, stage.uniform(10, 35), depth)
    _paint_cars(stage, ground, reach, north, width)
    _paint_trees_and_people(stage, reach, ground, texture)


def _paint_roof(stage: Stage, ground: Map, east: float, north: float, length: float, depth: float) -> None:
    roof = ground.box(east, north, length, depth)
    if roof is None:
        return
    top = stage.material("roof")
    # Roof parts, ducts and skylights differ in emissivity, hence in apparent temperature, though not in height here.
    stage.paint(roof, top, "building")
    if stage.random() < 0.6:
        half = ground.box(east, north - depth / 4, length, depth / 2)
        stage.paint(half, top + stage.uniform(1, 4) * (1 + stage.sun), "building")
    for _ in range(stage.integers(1, 6)):
        along, across = stage.uniform(-0.4, 0.4) * length, stage.uniform(-0.35, 0.35) * depth
        unit = ground.box(east + along, north + across, *stage.uniform(1, 3, 2))
        stage.paint(unit, top + stage.uniform(3, 16), "building")


def _paint_cars(stage: Stage, ground: Map, reach: float, north: float, width: float) -> None:
    driving = zip(stage.uniform(-reach, reach, 4), stage.choice([-1, 1], 4))
    places = [(east, north + sign * width / 4, False) for east, sign in driving]
    if stage.random() < 0.6:
        start, count = stage.uniform(-reach, 0), int(stage.integers(4, 14))
        row = north + (1 if stage.random() < 0.5 else -1) * (width / 2 + 3)
        places += [(start + 2.7 * i, row, True) for i in range(count) if stage.random() < 0.75]
    for east, place, across in places:
        length, breadth = stage.uniform(4, 5.2), stage.uniform(1.75, 2.0)
        size = (breadth, length) if across else (length, breadth)
        body = ground.box(east, place, *size)
        if body is None or min(body.coverage.shape) < 3:
            continue
        number = stage.add_object("vehicle")
        cold = stage.material("metal") + stage.uniform(-2, 6)
        engine = stage.uniform(5, 22) if stage.random() < 0.4 else stage.uniform(-2, 2)
        sign = 1 if stage.random() < 0.5 else -1
        stage.paint(body, cold, "vehicle", number)
        shift = (0.0, sign * 0.32 * length) if across else (sign * 0.32 * length, 0.0)
        hood = tuple(0.85 * s if s == breadth else 0.28 * s for s in size)
        stage.paint(ground.box(east + shift[0], place + shift[1], *hood), cold + engine, "vehicle", number)
        glass = tuple(0.8 * s if s == breadth else 0.14 * s for s in size)
        place_glass = (east + 0.35 * shift[0], place + 0.35 * shift[1])
        stage.paint(ground.box(*place_glass, *glass), stage.material("glass"), "vehicle", number)


def _paint_trees_and_people(stage: Stage, reach: float, ground: Map, texture: np.ndarray) -> None:
    leaf = stage.material("foliage")
    rough = stage.grain()
    for _ in range(stage.integers(0, 22)):
        x, y = ground.place(*stage.uniform(-reach, reach, 2))
        radius = stage.uniform(1.2, 4.5) * ground.scale
        crown = stage.ellipse(x, y, radius, radius * stage.uniform(0.8, 1.2), rough)
        stage.paint(crown, leaf + 1.2 * rough + 0.4 * texture, "vegetation")
    for _ in range(stage.integers(1, 9)):
        x, y = ground.place(*stage.uniform(-0.8 * reach, 0.8 * reach, 2))
        if not (3 <= x < stage.width - 3 and 3 <= y < stage.height - 3):
            continue
        number = stage.add_object("person")
        heat = 0.4 * stage.air + 0.6 * 34 + stage.normal(0, 1)
        long, short = max(0.5 * ground.scale, 1.1), max(0.28 * ground.scale, 0.9)
        if stage.random() < 0.5:
            long, short = short, long
        small = bool(np.pi * long * short < 40)
        stage.paint(stage.ellipse(x, y, long, short), heat, "person", number, target=small)

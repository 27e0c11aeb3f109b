"""The scene classes: how sky, ground and things are put together. Every class occurs by day and night."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np
from scipy import ndimage

from data_pipelines.synthetic.canvas import Stage
from data_pipelines.synthetic.objects import Span, draw_target, draw_thing


@dataclass(frozen=True)
class Landscape:
    """A scene class seen from the ground.

    Attributes:
      horizon, camera: from and to, see `Stage.look`.
      treeline: height of a forest edge on the horizon, shares of the picture, from and to; not drawn below 0.
      grounds: materials, of which one is drawn.
      road, facades: shares of scenes with a road (its half width is 2 to 6 metres), with houses along it.
      things: name -> how often, see `objects.THINGS`.
      count: how many, from and below.
      distances: of things, e^from to e^to times that of the nearest visible ground.
      flying: how many targets in the sky, from and below.
    """

    horizon: Span
    camera: Span
    treeline: Span
    grounds: tuple[str, ...]
    road: float = 0.0
    facades: float = 0.0
    things: Mapping[str, float] = field(default_factory=dict)
    count: tuple[int, int] = (0, 1)
    distances: Span = (0.0, 1.0)
    flying: tuple[int, int] = (0, 1)


LANDSCAPES = {
    "coast": Landscape((0.15, 0.6), (4, 25), (-0.06, 0.06), ("water",), things={"boat": 1.0}, count=(0, 6),
                       distances=(0.5, 4)),
    "field": Landscape((0.15, 0.55), (2, 12), (0.01, 0.1), ("grass", "soil"), road=0.5,
                       things={"tree": 0.6, "person": 0.25, "car": 0.15}, count=(1, 9), distances=(0.3, 3.2)),
    "industrial": Landscape((0.4, 0.75), (1.5, 5), (-1, -1), ("concrete",), things={
                                "tank": 0.35, "pipes": 0.25, "chimney": 0.2, "person": 0.1, "car": 0.1},
                            count=(5, 11), distances=(0.4, 1.7)),
    "sky": Landscape((0.72, 1.25), (3, 20), (-0.04, 0.15), ("grass", "concrete"), flying=(1, 5)),
    "street": Landscape((0.3, 0.6), (1.5, 5), (-1, -1), ("concrete",), road=1.0, facades=1.0, things={
                            "person": 0.5, "car": 0.15, "oncoming car": 0.35},
                        count=(2, 9), distances=(0.1, 2.2)),
}  # fmt: skip


def draw_landscape(stage: Stage, plan: Landscape) -> None:
    """Paints a scene class of `LANDSCAPES`, from far to near."""
    stage.look(plan.horizon, plan.camera)
    paint_sky(stage)
    if (trees := stage.uniform(*plan.treeline) * stage.height) > 0:
        outline = stage.horizon + 1 - trees * np.clip(1 + 0.35 * stage.noise(1.3)[0], 0, 3)
        stage.paint(stage.below(outline), 0.9 * stage.grain() + stage.material("foliage"), "vegetation")
    if (ground := stage.choice(plan.grounds)) == "water":
        paint_water(stage)
    else:
        texture = stage.uniform(0.4, 1.2) * ground_texture(stage, 1.2, stage.uniform(0.1, 0.6))
        stage.paint(stage.below(stage.horizon), stage.material(ground) + texture, "ground")
    if stage.random() < plan.road:
        paint_road(stage, stage.uniform(2, 6), 0 if plan.facades else stage.uniform(-8, 8))
    for side in (-1, 1) if stage.random() < plan.facades else ():
        across, far = side * stage.uniform(7, 14), stage.uniform(90, 160)
        while far > 0.6 * stage.nearest:
            near = far - stage.uniform(9, 26)
            paint_facade(stage, across, max(near, 0.3 * stage.nearest), far)
            far = near
    count = stage.integers(*plan.count)
    for distance in sorted(stage.nearest * np.exp(stage.uniform(*plan.distances, count)), reverse=True):
        name = stage.choice(list(plan.things), p=list(plan.things.values()))
        reach = 6 if plan.facades else 0.5 * stage.width * distance / stage.focal
        draw_thing(stage, name, *stage.place(stage.uniform(-reach, reach), distance))
    for _ in range(stage.integers(*plan.flying)):
        x, y = stage.uniform(4, stage.width - 4), stage.uniform(4, min(stage.horizon * 0.9, stage.height - 4))
        contrast = stage.uniform(2.5, 15) * (1 if stage.random() < 0.85 else -0.4)
        draw_target(stage, "aircraft" if stage.random() < 0.65 else "bird", x, y, contrast)


def paint_sky(stage: Stage) -> None:
    """Clear sky grows colder towards the zenith; clouds are near the air's temperature."""
    elevation = np.maximum(stage.horizon - stage.rows, 0) / stage.focal
    sky = stage.air - 2 - stage.sky_drop * (1 - np.exp(-elevation / 0.22))
    veil = stage.noise(stage.uniform(1.4, 1.9), stage.uniform(1.5, 5))
    cover = np.clip((veil - (1.6 - 2.6 * stage.random())) * 0.8, 0, 1)
    clouds = stage.air - 4 - 0.35 * stage.sky_drop + 1.5 * veil
    stage.temperature[:] = sky + cover * np.maximum(clouds - sky, 0)


def ground_texture(stage: Stage, roughness: float, grain: float) -> np.ndarray:
    """A fractal texture lying on the ground plane, (H, W); `grain`: metres per texel. It fades out where unresolved."""
    below = np.maximum(stage.rows - stage.horizon, 1e-3)
    distance = stage.focal * stage.camera / below
    right = (stage.columns - stage.column) * distance / stage.focal
    # Turned against the viewing direction: along the axes the texels would show as a chequerboard.
    turn = complex(math.cos(0.7), math.sin(0.7)) / grain
    texels = [right * turn.real - distance * turn.imag, right * turn.imag + distance * turn.real]
    value = ndimage.map_coordinates(stage.noise(roughness), texels, order=1, mode="grid-wrap")
    # One texel spans so many rows: below half a row it would only alias.
    rows_per_texel = grain * below**2 / (stage.focal * stage.camera)
    return value * np.clip(rows_per_texel - 0.2, 0, 1) + 0.5 * stage.noise(1.5, 4)


def paint_water(stage: Stage) -> None:
    """Water keeps its own temperature near the viewer and mirrors the cold sky at grazing view; waves modulate both."""
    grazing = np.exp(-np.maximum(stage.rows - stage.horizon, 0) / (0.2 * stage.focal))
    waves = ground_texture(stage, 0.5, stage.uniform(0.3, 1.8)) + 0.5 * stage.noise(0.5, stage.uniform(5, 12))
    mirrored = 0.12 * stage.sky_drop * (0.5 + grazing) * (1 + 0.5 * waves)
    stage.paint(stage.below(stage.horizon), stage.material("water") - mirrored, "water")


def paint_road(stage: Stage, half_width: float, centre: float) -> None:
    """A straight road towards the vanishing point, with worn tracks; widths in metres."""
    asphalt, wear, near = stage.material("asphalt"), 0.5 * stage.grain(), 0.9 * stage.nearest
    for middle, half, heat in ((0, 1, 0), (-0.5, 0.07, 1), (0.5, 0.07, 1)):
        left, right = (centre + half_width * (middle + side * half) for side in (-1, 1))
        corners = [(left, 400), (right, 400), (right, near), (left, near)]
        stage.paint(stage.polygon([stage.place(*corner)[:2] for corner in corners]), asphalt + heat + wear, "road")


def paint_facade(stage: Stage, across: float, near: float, far: float) -> None:
    """A house front along the road at `across` metres from its axis, from distance `near` to `far` metres."""
    height = stage.uniform(5, 18)
    (x0, foot0, scale0), (x1, foot1, scale1) = stage.place(across, near), stage.place(across, far)
    front = stage.polygon([(x0, foot0), (x1, foot1), (x1, foot1 - height * scale1), (x0, foot0 - height * scale0)])
    if front is None:
        return
    offset = stage.columns[:, front.columns] - stage.column
    distance = stage.focal * across / np.where(np.abs(offset) < 1, np.sign(across), offset)
    distance = np.clip(distance, near * 0.5, far * 2)
    level = stage.camera - (stage.rows[front.rows] - stage.horizon) * distance / stage.focal
    storey, bay = level / stage.uniform(2.8, 3.6), distance / stage.uniform(2.2, 3.6)
    window = (np.abs(storey % 1 - 0.55) < 0.23) & (np.abs(bay % 1 - 0.5) < 0.2) & (level < height - 0.4)
    # Each room is heated differently: a value per window, read off its storey and bay.
    rooms = stage.uniform(1, 6) * (1 if stage.sun < 0.3 else -1) * stage.uniform(0.3, 1.7, (8, 64))
    leak = np.where(window, rooms[np.floor(storey).astype(int) % 8, np.floor(bay).astype(int) % 64], 0)
    stage.paint(front, stage.material("wall") + leak + np.where(level > height - 0.35, -2.5, 0), "building")


def aerial(stage: Stage) -> None:
    """The scene class seen from above: roads, roofs, cars, trees and people below a drone."""
    scale = math.exp(stage.uniform(math.log(3.5), math.log(14))) * stage.height / 256  # pixels per metre
    reach = 0.5 * math.hypot(stage.height, stage.width) / scale
    turn = scale * np.exp(1j * stage.uniform(0, np.pi))
    texture = 0.4 * stage.noise(stage.uniform(1.0, 1.5))

    def slab(surface: str, heat: float, east: float, north: float, length: float, width: float, number=0) -> None:
        """A rectangle on the ground, its sides along the street grid; metres."""
        corners = [(-length, -width), (length, -width), (length, width), (-length, width)]
        points = [complex(east + dx / 2, north + dy / 2) * turn for dx, dy in corners]
        patch = stage.polygon([(stage.width / 2 + point.real, stage.height / 2 + point.imag) for point in points])
        stage.paint(patch, heat + texture, surface, number)

    slab("ground", stage.material(stage.choice(("grass", "concrete"))), 0, 0, 4 * reach, 4 * reach)
    for _ in range(stage.integers(0, 4)):
        plot = *stage.uniform(-reach, reach, 2), *stage.uniform(0.3, 1.2, 2) * reach
        slab("ground", stage.material(stage.choice(("soil", "grass"))), *plot)
    north, width, asphalt = stage.uniform(-0.5, 0.5) * reach, stage.uniform(5, 12), stage.material("asphalt")
    slab("road", asphalt, 0, north, 4 * reach, width)
    if stage.random() < 0.5:
        slab("road", asphalt, stage.uniform(-0.5, 0.5) * reach, 0, stage.uniform(4, 9), 4 * reach)
    for _ in range(stage.integers(0, 4)):
        length, depth, top = stage.uniform(10, 35), stage.uniform(8, 18), stage.material("roof")
        east, side = stage.uniform(-reach, reach), stage.choice((-1, 1))
        centre = north + side * (width / 2 + stage.uniform(3, 8) + depth / 2)
        slab("building", top, east, centre, length, depth)
        # Roof halves, ducts and skylights differ in emissivity, hence in apparent temperature.
        slab("building", top + stage.uniform(1, 4) * (1 + stage.sun), east, centre - depth / 4, length, depth / 2)
        for _ in range(stage.integers(1, 6)):
            unit = east + stage.uniform(-0.4, 0.4) * length, centre + stage.uniform(-0.35, 0.35) * depth
            slab("building", top + stage.uniform(3, 16), *unit, *stage.uniform(1, 3, 2))
    for _ in range(stage.integers(2, 12)):
        number, metal, sign = stage.add_object("vehicle"), stage.material("metal"), stage.choice((-1, 1))
        engine, place = stage.uniform(-2, 22), (stage.uniform(-reach, reach), north + sign * width / 4)
        for shift, length, breadth, heat in ((0, 4.6, 1.9, 0), (1.5, 1.3, 1.6, engine), (0.5, 0.6, 1.5, 5)):
            slab("vehicle", metal + heat, place[0] + sign * shift, place[1], length, breadth, number)
    leaf, rough = stage.material("foliage"), stage.grain()
    for _ in range(stage.integers(0, 22)):
        radius, x, y = stage.uniform(1.2, 4.5) * scale, stage.uniform(0, stage.width), stage.uniform(0, stage.height)
        crown = stage.ellipse(x, y, radius, radius, 0.18 * radius * rough)
        stage.paint(crown, leaf + 1.2 * rough + texture, "vegetation")
    for _ in range(stage.integers(1, 9)):
        x, y = stage.uniform(3, stage.width - 3), stage.uniform(3, stage.height - 3)
        long, short = max(0.5 * scale, 1.1), max(0.28 * scale, 0.9)
        person = stage.ellipse(x, y, long, short)
        small = math.pi * long * short < 40
        stage.paint(person, stage.material("clothing") + 4, "person", stage.add_object("person"), target=small)

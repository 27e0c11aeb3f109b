"""Things in a synthetic scene: people, vehicles, boats, trees, far targets. Sizes in metres times pixels a metre."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from data_pipelines.synthetic.canvas import Canvas

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


@dataclass(frozen=True)
class Weather:
    """Air temperature (degrees Celsius), sun 0 (night) to 1, drop of a clear sky at its zenith, cloud cover 0 to 1."""

    air: float
    sun: float
    sky_drop: float
    clouds: float

    @classmethod
    def draw(cls, rng: np.random.Generator) -> Weather:
        sun = 0.0 if rng.random() < 0.45 else float(rng.uniform(0.1, 1.0))
        return cls(float(rng.uniform(-5, 30)), sun, float(rng.uniform(8, 35)), float(rng.random()))

    def material(self, name: str, rng: np.random.Generator) -> float:
        night, gain = MATERIALS[name]
        return self.air + night + gain * self.sun + float(rng.normal(0, 1.2))


def draw_person(
    canvas: Canvas, rng: np.random.Generator, weather: Weather, x: float, foot: float, scale: float
) -> None:
    """A standing or walking person whose feet are at (x, foot); `scale` in pixels a metre."""
    number = canvas.add_object("person")
    clothing = 0.55 * weather.air + 0.45 * 33 + rng.normal(0, 1.0)
    skin = 0.2 * weather.air + 0.8 * 34 + rng.normal(0, 0.5)
    height = rng.uniform(1.55, 1.9) * scale
    stride = rng.uniform(0.02, 0.16) * height
    lean = rng.normal(0, 0.02) * height

    def limb(x0: float, y0: float, x1: float, y1: float, half: float, temperature: float) -> None:
        corners = [(x0 - half, y0), (x0 + half, y0), (x1 + half, y1), (x1 - half, y1)]
        canvas.paint(canvas.polygon(corners), temperature, "person", number)

    hip, shoulder = foot - 0.48 * height, foot - 0.82 * height
    limb(x, hip, x - stride, foot, 0.055 * height, clothing - 0.8)
    limb(x, hip, x + stride, foot, 0.055 * height, clothing - 1.2)
    limb(x - 0.11 * height, shoulder, x - 0.14 * height - stride / 2, hip, 0.03 * height, clothing)
    limb(x + 0.11 * height, shoulder, x + 0.14 * height + stride / 2, hip, 0.03 * height, clothing)
    torso = [(x - 0.09 * height, hip), (x + 0.09 * height, hip), (x + 0.12 * height, shoulder),
             (x - 0.12 * height, shoulder)]  # fmt: skip
    canvas.paint(canvas.polygon(torso), clothing + 0.8, "person", number)
    head = canvas.ellipse(x + lean, foot - 0.915 * height, max(0.062 * height, 0.6), max(0.085 * height, 0.6))
    canvas.paint(head, skin, "person", number)


def draw_vehicle(
    canvas: Canvas, rng: np.random.Generator, weather: Weather, x: float, ground: float, scale: float, side: bool
) -> None:
    """A car or van standing on row `ground`, seen from the side or from an end; `scale` in pixels a metre."""
    number = canvas.add_object("vehicle")
    body = weather.material("metal", rng) + rng.uniform(0, 5)
    driven = float(rng.random() < 0.6) * rng.uniform(6, 25)
    length = (rng.uniform(3.9, 5.2) if side else rng.uniform(1.7, 1.95)) * scale
    height = (rng.uniform(1.4, 1.6) if rng.random() < 0.75 else rng.uniform(1.9, 2.4)) * scale
    front = 1.0 if rng.random() < 0.5 else -1.0
    half, sill, belt = length / 2, ground - 0.16 * height, ground - 0.6 * height
    # The ground under a car stays warm at night and shaded by day; both show as a band between the wheels.
    shade = canvas.ellipse(x, ground, half * 1.02, max(0.07 * height, 0.5))
    canvas.paint(shade, weather.air + driven * 0.35 - 4 * weather.sun, "vehicle", number)
    canvas.paint(canvas.rectangle(x - half, belt, x + half, sill), body, "vehicle", number)
    inset = (0.22 if side else 0.1) * length
    cabin = [(x - half + 0.6 * inset, belt), (x + half - 1.2 * inset, belt), (x + half - 2 * inset, ground - height),
             (x - half + inset, ground - height)]  # fmt: skip
    cabin = [(2 * x - px if front < 0 else px, py) for px, py in cabin]
    canvas.paint(canvas.polygon(cabin), body - 1.5, "vehicle", number)
    glass = [(x + 0.82 * (px - x), py + 0.06 * height if py < belt else py - 0.02 * height) for px, py in cabin]
    canvas.paint(canvas.polygon(glass), weather.material("glass", rng) + 0.1 * driven, "vehicle", number)
    if side:
        left, right = sorted((x + front * half, x + front * 0.55 * half))
        canvas.paint(canvas.rectangle(left, belt, right, sill), body + 0.6 * driven, "vehicle", number)
        for place in (-0.62, 0.62):
            wheel = canvas.ellipse(x + place * half, ground - 0.19 * height, 0.2 * height, 0.2 * height)
            canvas.paint(wheel, weather.air + 2 + 0.45 * driven, "vehicle", number)
    else:
        for place in (-0.78, 0.78):
            wheel = canvas.rectangle(x + place * half - 0.09 * length, ground - 0.26 * height,
                                     x + place * half + 0.09 * length, ground)  # fmt: skip
            canvas.paint(wheel, weather.air + 2 + 0.45 * driven, "vehicle", number)
        grille = canvas.rectangle(x - 0.5 * half, belt + 0.1 * height, x + 0.5 * half, sill)
        canvas.paint(grille, body + 0.7 * driven, "vehicle", number)


def draw_boat(canvas: Canvas, rng: np.random.Generator, weather: Weather, x: float, water: float, scale: float) -> None:
    """A motor boat or small ship on row `water`; `scale` in pixels a metre."""
    number = canvas.add_object("boat")
    length, height = rng.uniform(8, 24) * scale, rng.uniform(1.2, 2.4) * scale
    hull = weather.air + rng.uniform(-4, 5) + 6 * weather.sun
    bow = 1.0 if rng.random() < 0.5 else -1.0
    corners = [(x - bow * 0.5 * length, water - height), (x + bow * 0.56 * length, water - 1.15 * height),
               (x + bow * 0.42 * length, water), (x - bow * 0.46 * length, water)]  # fmt: skip
    canvas.paint(canvas.polygon(corners), hull, "boat", number)
    left = x - bow * rng.uniform(0.05, 0.3) * length - 0.14 * length
    house = canvas.rectangle(left, water - rng.uniform(1.9, 2.8) * height, left + 0.28 * length, water - height)
    canvas.paint(house, hull + rng.uniform(1, 5), "boat", number)
    funnel = left + rng.uniform(0.08, 0.2) * length
    hot = canvas.rectangle(funnel - max(0.02 * length, 0.5), water - 3.2 * height, funnel + max(0.02 * length, 0.5),
                           water - 1.8 * height)  # fmt: skip
    canvas.paint(hot, hull + rng.uniform(8, 30), "boat", number)


def draw_tree(canvas: Canvas, rng: np.random.Generator, weather: Weather, x: float, foot: float, scale: float) -> None:
    """A broad-leaved tree or bush with its foot at (x, foot); `scale` in pixels a metre."""
    height = rng.uniform(2.5, 9) * scale
    rough = canvas.grain(rng)
    leaf = weather.material("foliage", rng)
    trunk = canvas.rectangle(x - 0.025 * height, foot - 0.5 * height, x + 0.025 * height, foot)
    canvas.paint(trunk, leaf + 1.5, "vegetation")
    crown = canvas.ellipse(x, foot - 0.62 * height, rng.uniform(0.25, 0.42) * height, 0.4 * height, rough)
    if crown is not None:
        canvas.paint(crown, leaf + 1.1 * rough[crown.rows, crown.columns], "vegetation")


def draw_target(canvas: Canvas, rng: np.random.Generator, category: str, x: float, y: float, contrast: float) -> None:
    """A far object of fewer than 81 pixels, marked in the target mask; `contrast` in degrees to what is behind it."""
    if not (2 <= x < canvas.width - 2 and 2 <= y < canvas.height - 2):
        return
    number = canvas.add_object(category)
    surface = {"bird": "aircraft"}.get(category, category)
    temperature = float(canvas.temperature[int(y), int(x)]) + contrast
    long, short = rng.uniform(1.1, 3.8), rng.uniform(0.9, 1.6)
    if category in ("person",):
        long, short = short * 0.9, long
    body = canvas.ellipse(x, y, long, short)
    canvas.paint(body, temperature, surface, number, target=True)
    if category in ("aircraft", "bird") and rng.random() < 0.6:
        span, drop = rng.uniform(1.2, 2.0) * long, rng.uniform(-1.5, 1.5)
        for sign in (-1, 1):
            wing = [(x, y - 0.7), (x, y + 0.7), (x + sign * span, y + drop + 0.4), (x + sign * span, y + drop - 0.4)]
            canvas.paint(canvas.polygon(wing), temperature - 0.3 * contrast, surface, number, target=True)

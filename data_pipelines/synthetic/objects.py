"""Things in a synthetic scene, as a table of their parts; and far targets."""

from dataclasses import dataclass

from data_pipelines.synthetic.canvas import CATEGORIES, Stage

Span = tuple[float, float]
FAR = 9.0  # pixels: a person, vehicle or boat whose larger side is below this is a far target


@dataclass(frozen=True)
class Thing:
    """What a kind of thing looks like from the side.

    Attributes:
      surface: its class; if that is a category of boxes, it gets one.
      material: gives the temperature.
      width, height: metres, from and to.
      heat: degrees that its warmest part is above the others, from and to.
      parts: painted in order: shape, place across, bottom and top, half width, share of `heat`. Places and widths are
        in shares of the thing's width, bottom and top of its height. A shape is "oval", "crown" (an oval with a frayed
        edge) or, of a trapezoid, the ratio of its widths at the top and the bottom.
    """

    surface: str
    material: str
    width: Span
    height: Span
    heat: Span
    parts: tuple[tuple[str | float, float, float, float, float, float], ...]


# The ground under a car stays warm at night and shaded by day; both show as a band between the wheels.
THINGS = {
    "person": Thing("person", "clothing", (0.5, 0.8), (1.55, 1.9), (3, 10), (
        (0.9, -0.2, 0, 0.5, 0.11, -0.1), (0.9, 0.2, 0, 0.5, 0.11, 0), (1.2, -0.35, 0.48, 0.82, 0.07, 0.1),
        (1.2, 0.35, 0.48, 0.82, 0.07, 0.1), (1.3, 0, 0.46, 0.83, 0.24, 0.3), ("oval", 0, 0.83, 1, 0.18, 1),
    )),
    "car": Thing("vehicle", "metal", (3.9, 5.2), (1.4, 2.2), (0, 25), (
        ("oval", 0, -0.07, 0.07, 0.51, 0.3), (1, 0, 0.16, 0.6, 0.5, 0), (0.7, -0.04, 0.6, 1, 0.38, -0.1),
        (0.65, -0.04, 0.65, 0.97, 0.31, 0.2), (1, 0.39, 0.16, 0.58, 0.11, 0.7), ("oval", -0.31, 0, 0.39, 0.08, 0.5),
        ("oval", 0.31, 0, 0.39, 0.08, 0.5),
    )),
    "oncoming car": Thing("vehicle", "metal", (1.7, 1.95), (1.4, 2.3), (0, 25), (
        ("oval", 0, -0.07, 0.07, 0.51, 0.3), (1, 0, 0.16, 0.6, 0.5, 0), (0.75, 0, 0.6, 1, 0.45, -0.1),
        (0.75, 0, 0.65, 0.97, 0.37, 0.2), (1, 0, 0.2, 0.5, 0.26, 0.8), (1, -0.39, 0, 0.26, 0.09, 0.5),
        (1, 0.39, 0, 0.26, 0.09, 0.5),
    )),
    "boat": Thing("boat", "metal", (8, 24), (4, 7), (8, 30), (
        (1.2, 0, 0, 0.35, 0.43, 0), (0.9, -0.15, 0.35, 0.7, 0.14, 0.2), (1, -0.12, 0.6, 1, 0.03, 1),
    )),
    "tree": Thing("vegetation", "foliage", (2, 6), (3, 9), (1, 3), (
        (0.8, 0, 0, 0.5, 0.04, 0.5), ("crown", 0, 0.22, 1, 0.5, 0),
    )),
    "tank": Thing("machinery", "metal", (2.5, 8), (3, 9), (-5, 30), (
        (1, 0, 0, 1, 0.5, 0), (1, 0, 0, 0.55, 0.5, 1), ("oval", 0, 0.92, 1.08, 0.5, -0.3), (1, 0.4, 0, 1, 0.03, 0.5),
    )),
    "pipes": Thing("machinery", "metal", (8, 30), (2.5, 4), (5, 35), (
        (1, -0.45, 0, 1, 0.01, 0), (1, 0, 0, 1, 0.01, 0), (1, 0.45, 0, 1, 0.01, 0), (1, 0, 0.3, 0.42, 0.5, 0.2),
        (1, 0, 0.55, 0.7, 0.5, 1), (1, 0.2, 0.52, 0.73, 0.02, 1.2), (1, 0, 0.85, 0.93, 0.5, 0.5),
    )),
    "chimney": Thing("machinery", "wall", (1, 2.5), (8, 22), (5, 40), (
        (0.7, 0, 0, 1, 0.5, 0.1), (0.85, 0, 0.5, 1, 0.42, 0.4), (1, 0, 0.88, 1, 0.36, 1),
    )),
}  # fmt: skip


def draw_thing(stage: Stage, name: str, x: float, foot: float, scale: float) -> None:
    """Draws a thing of the table with its foot at (x, foot); `scale` in pixels per metre. Far ones become targets."""
    thing = THINGS[name]
    width, height = stage.uniform(*thing.width) * scale, stage.uniform(*thing.height) * scale
    if thing.surface in CATEGORIES and max(width, height) < FAR:
        return draw_target(stage, thing.surface, x, foot - height / 2, stage.uniform(3, 12))
    number = stage.add_object(thing.surface) if thing.surface in CATEGORIES else 0
    heat, base = stage.uniform(*thing.heat), stage.material(thing.material)
    front, texture = stage.choice((-1, 1)), stage.grain()
    for shape, place, low, high, half, share in thing.parts:
        middle, top, bottom, reach = x + front * place * width, foot - high * height, foot - low * height, half * width
        temperature = base + share * heat
        if shape == "oval":
            patch = stage.ellipse(middle, (top + bottom) / 2, max(reach, 0.6), max((bottom - top) / 2, 0.6))
        elif shape == "crown":
            patch = stage.ellipse(middle, (top + bottom) / 2, reach, (bottom - top) / 2, 0.18 * reach * texture)
            temperature = temperature + texture
        else:
            corners = [(-reach, bottom), (reach, bottom), (shape * reach, top), (-shape * reach, top)]
            patch = stage.polygon([(middle + across, row) for across, row in corners])
        stage.paint(patch, temperature, thing.surface, number)


def draw_target(stage: Stage, category: str, x: float, y: float, contrast: float) -> None:
    """A far object of fewer than 81 pixels, marked in the target mask; `contrast` in degrees to what is behind it."""
    if not (2 <= x < stage.width - 2 and 2 <= y < stage.height - 2):
        return
    number, surface = stage.add_object(category), {"bird": "aircraft"}.get(category, category)
    temperature = float(stage.temperature[int(y), int(x)]) + contrast
    long, short = stage.uniform(1.1, 3.8), stage.uniform(0.9, 1.6)
    body = stage.ellipse(x, y, short, long) if category == "person" else stage.ellipse(x, y, long, short)
    stage.paint(body, temperature, surface, number, target=True)
    if surface == "aircraft" and stage.random() < 0.6:
        span, rise = stage.uniform(1.2, 2.0) * long, stage.uniform(-1.5, 1.5)
        wings = stage.polygon([(x - span, y + rise), (x, y - 0.8), (x + span, y + rise), (x, y + 0.8)])
        stage.paint(wings, temperature - 0.3 * contrast, surface, number, target=True)

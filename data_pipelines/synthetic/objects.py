"""Things in a synthetic scene: people, vehicles, boats, trees, far targets. Sizes in metres times pixels per metre."""

from __future__ import annotations

from data_pipelines.synthetic.stage import Stage


def draw_person(stage: Stage, x: float, foot: float, scale: float) -> None:
    """A standing or walking person whose feet are at (x, foot); `scale` in pixels per metre."""
    number = stage.add_object("person")
    clothing = 0.55 * stage.air + 0.45 * 33 + stage.normal(0, 1.0)
    skin = 0.2 * stage.air + 0.8 * 34 + stage.normal(0, 0.5)
    height = stage.uniform(1.55, 1.9) * scale
    stride = stage.uniform(0.02, 0.16) * height
    lean = stage.normal(0, 0.02) * height

    def limb(x0: float, y0: float, x1: float, y1: float, half: float, temperature: float) -> None:
        stage.paint(stage.trapezoid(x0, y0, half, x1, y1, half), temperature, "person", number)

    hip, shoulder = foot - 0.48 * height, foot - 0.82 * height
    limb(x, hip, x - stride, foot, 0.055 * height, clothing - 0.8)
    limb(x, hip, x + stride, foot, 0.055 * height, clothing - 1.2)
    limb(x - 0.11 * height, shoulder, x - 0.14 * height - stride / 2, hip, 0.03 * height, clothing)
    limb(x + 0.11 * height, shoulder, x + 0.14 * height + stride / 2, hip, 0.03 * height, clothing)
    torso = stage.trapezoid(x, hip, 0.09 * height, x, shoulder, 0.12 * height)
    stage.paint(torso, clothing + 0.8, "person", number)
    head = stage.ellipse(x + lean, foot - 0.915 * height, max(0.062 * height, 0.6), max(0.085 * height, 0.6))
    stage.paint(head, skin, "person", number)


def draw_vehicle(stage: Stage, x: float, ground: float, scale: float, side: bool) -> None:
    """A car or van standing on row `ground`, seen from the side or from an end; `scale` in pixels per metre."""
    number = stage.add_object("vehicle")
    body = stage.material("metal") + stage.uniform(0, 5)
    driven = float(stage.random() < 0.6) * stage.uniform(6, 25)
    length = (stage.uniform(3.9, 5.2) if side else stage.uniform(1.7, 1.95)) * scale
    height = (stage.uniform(1.4, 1.6) if stage.random() < 0.75 else stage.uniform(1.9, 2.4)) * scale
    front = 1.0 if stage.random() < 0.5 else -1.0
    half, sill, belt = length / 2, ground - 0.16 * height, ground - 0.6 * height
    # The ground under a car stays warm at night and shaded by day; both show as a band between the wheels.
    shade = stage.ellipse(x, ground, half * 1.02, max(0.07 * height, 0.5))
    stage.paint(shade, stage.air + driven * 0.35 - 4 * stage.sun, "vehicle", number)
    stage.paint(stage.rectangle(x - half, belt, x + half, sill), body, "vehicle", number)
    inset = (0.22 if side else 0.1) * length
    cabin = [(x - half + 0.6 * inset, belt), (x + half - 1.2 * inset, belt)]
    cabin += [(x + half - 2 * inset, ground - height), (x - half + inset, ground - height)]
    cabin = [(2 * x - px if front < 0 else px, py) for px, py in cabin]
    stage.paint(stage.polygon(cabin), body - 1.5, "vehicle", number)
    glass = [(x + 0.82 * (px - x), py + 0.06 * height if py < belt else py - 0.02 * height) for px, py in cabin]
    stage.paint(stage.polygon(glass), stage.material("glass") + 0.1 * driven, "vehicle", number)
    if side:
        left, right = sorted((x + front * half, x + front * 0.55 * half))
        stage.paint(stage.rectangle(left, belt, right, sill), body + 0.6 * driven, "vehicle", number)
        for place in (-0.62, 0.62):
            wheel = stage.ellipse(x + place * half, ground - 0.19 * height, 0.2 * height, 0.2 * height)
            stage.paint(wheel, stage.air + 2 + 0.45 * driven, "vehicle", number)
    else:
        for place in (-0.78, 0.78):
            centre = x + place * half
            wheel = stage.rectangle(centre - 0.09 * length, ground - 0.26 * height, centre + 0.09 * length, ground)
            stage.paint(wheel, stage.air + 2 + 0.45 * driven, "vehicle", number)
        grille = stage.rectangle(x - 0.5 * half, belt + 0.1 * height, x + 0.5 * half, sill)
        stage.paint(grille, body + 0.7 * driven, "vehicle", number)


def draw_boat(stage: Stage, x: float, water: float, scale: float) -> None:
    """A motor boat or small ship on row `water`; `scale` in pixels per metre."""
    number = stage.add_object("boat")
    length, height = stage.uniform(8, 24) * scale, stage.uniform(1.2, 2.4) * scale
    hull = stage.air + stage.uniform(-4, 5) + 6 * stage.sun
    bow = 1.0 if stage.random() < 0.5 else -1.0
    deck = [(x - bow * 0.5 * length, water - height), (x + bow * 0.56 * length, water - 1.15 * height)]
    keel = [(x + bow * 0.42 * length, water), (x - bow * 0.46 * length, water)]
    stage.paint(stage.polygon(deck + keel), hull, "boat", number)
    left = x - bow * stage.uniform(0.05, 0.3) * length - 0.14 * length
    house = stage.rectangle(left, water - stage.uniform(1.9, 2.8) * height, left + 0.28 * length, water - height)
    stage.paint(house, hull + stage.uniform(1, 5), "boat", number)
    funnel = left + stage.uniform(0.08, 0.2) * length
    reach = max(0.02 * length, 0.5)
    hot = stage.rectangle(funnel - reach, water - 3.2 * height, funnel + reach, water - 1.8 * height)
    stage.paint(hot, hull + stage.uniform(8, 30), "boat", number)


def draw_tree(stage: Stage, x: float, foot: float, scale: float) -> None:
    """A broad-leaved tree or bush with its foot at (x, foot); `scale` in pixels per metre."""
    height = stage.uniform(2.5, 9) * scale
    rough = stage.grain()
    leaf = stage.material("foliage")
    trunk = stage.rectangle(x - 0.025 * height, foot - 0.5 * height, x + 0.025 * height, foot)
    stage.paint(trunk, leaf + 1.5, "vegetation")
    crown = stage.ellipse(x, foot - 0.62 * height, stage.uniform(0.25, 0.42) * height, 0.4 * height, rough)
    stage.paint(crown, leaf + 1.1 * rough, "vegetation")


def draw_target(stage: Stage, category: str, x: float, y: float, contrast: float) -> None:
    """A far object of fewer than 81 pixels, marked in the target mask; `contrast` in degrees to what is behind it."""
    if not (2 <= x < stage.width - 2 and 2 <= y < stage.height - 2):
        return
    number = stage.add_object(category)
    surface = {"bird": "aircraft"}.get(category, category)
    temperature = float(stage.temperature[int(y), int(x)]) + contrast
    long, short = stage.uniform(1.1, 3.8), stage.uniform(0.9, 1.6)
    if category == "person":
        long, short = short * 0.9, long
    body = stage.ellipse(x, y, long, short)
    stage.paint(body, temperature, surface, number, target=True)
    if category in ("aircraft", "bird") and stage.random() < 0.6:
        span, drop = stage.uniform(1.2, 2.0) * long, stage.uniform(-1.5, 1.5)
        for sign in (-1, 1):
            wing = [(x, y - 0.7), (x, y + 0.7), (x + sign * span, y + drop + 0.4), (x + sign * span, y + drop - 0.4)]
            stage.paint(stage.polygon(wing), temperature - 0.3 * contrast, surface, number, target=True)

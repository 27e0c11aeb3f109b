"""The scene classes: how sky, ground and things are put together. Every class occurs by day and night."""

from __future__ import annotations

import math

import numpy as np

from data_pipelines.synthetic.canvas import Patch
from data_pipelines.synthetic.objects import draw_boat, draw_person, draw_target, draw_tree, draw_vehicle
from data_pipelines.synthetic.stage import Stage


def paint_sky(stage: Stage) -> None:
    """Clear sky grows colder towards the zenith; clouds are near the air's temperature."""
    rows = stage.rows
    elevation = np.maximum(stage.horizon - rows, 0) / np.float32(stage.focal)
    sky = stage.air - 2 - stage.sky_drop * (1 - np.exp(-elevation / np.float32(0.22)))
    stretch = stage.uniform(1.5, 5)
    veil = stage.noise(stage.uniform(1.4, 1.9), stretch)
    cover = np.clip((veil - (1.6 - 2.6 * stage.clouds)) * np.float32(0.8), 0, 1)
    clouds = stage.air - 4 - 0.35 * stage.sky_drop + 1.5 * veil
    stage.temperature[:] = sky + cover * np.maximum(clouds - sky, 0)


def paint_ground(stage: Stage, material: str, spread: float) -> None:
    """A textured plane from the horizon to the viewer; `spread` is the texture's strength in degrees."""
    texture = ground_texture(stage, stage.uniform(0.9, 1.4), float(np.exp(stage.uniform(-2.5, -0.5))))
    patch = stage.below(np.full(stage.width, stage.horizon))
    stage.paint(patch, lambda _: stage.material(material) + spread * texture, "ground")


def ground_texture(stage: Stage, roughness: float, grain: float) -> np.ndarray:
    """A fractal texture lying on the ground plane, (H, W); `grain`: metres per texel. It fades out where unresolved."""
    side = 256
    tile = stage.tile(side, roughness)
    rows = stage.rows
    distance = stage.distance(rows)
    right = (stage.columns - stage.column) * distance / stage.focal / grain
    # Turned against the viewing direction: along the axes the texels would show as a chequerboard.
    angle = stage.uniform(0.4, 1.1)
    across = math.cos(angle) * right - math.sin(angle) * distance / grain
    along = math.sin(angle) * right + math.cos(angle) * distance / grain
    u, v = np.floor(across), np.floor(along)
    fu, fv = across - u, along - v
    u, v = (u.astype(np.int64) % side).astype(np.int32), (v.astype(np.int64) % side).astype(np.int32)
    right, below = (u + 1) % side, (v + 1) % side
    value = (1 - fv) * ((1 - fu) * tile[v, u] + fu * tile[v, right])
    value += fv * ((1 - fu) * tile[below, u] + fu * tile[below, right])
    # One texel spans `grain * (row - horizon)**2 / (focal * camera)` rows: below half a row it would only alias.
    rows_per_texel = grain * np.maximum(rows - stage.horizon, 0) ** 2 / (stage.focal * stage.camera)
    coarse = stage.noise(1.5, 4)
    return (value * np.clip(rows_per_texel - 0.2, 0, 1) + 0.5 * coarse).astype(np.float32)


def paint_treeline(stage: Stage, height: float) -> None:
    """A far forest edge standing on the horizon; `height` in pixels."""
    shape = stage.outline(stage.uniform(0.7, 1.1))
    outline = stage.horizon + 1 - height * np.clip(1 + 0.35 * shape, 0, 3)
    patch = stage.below(outline, int(stage.horizon) + 2)
    stage.paint(patch, lambda _: 0.9 * stage.grain() + stage.material("foliage"), "vegetation")


def paint_road(stage: Stage, half_width: float, centre: float = 0.0) -> None:
    """A straight road towards the vanishing point; widths in metres."""
    near, far = max(stage.focal * stage.camera / max(stage.height + 20 - stage.horizon, 1), 0.5), 400.0

    def strip(left: float, right: float) -> Patch | None:
        return stage.polygon(
            [stage.place(*corner)[:2] for corner in ((left, far), (right, far), (right, near), (left, near))]
        )

    surface = strip(centre - half_width, centre + half_width)
    if surface is None:
        return
    wear = 0.5 * ground_texture(stage, 1.0, 0.3)
    stage.paint(surface, stage.material("asphalt") + wear, "road")
    for track in (-0.5, 0.5):
        tyres = strip(centre + half_width * (track - 0.07), centre + half_width * (track + 0.07))
        if tyres is not None:
            faint = Patch(tyres.rows, tyres.columns, tyres.coverage * np.float32(0.5))
            stage.paint(faint, stage.material("asphalt") + 1.5, "road")


def paint_facade(stage: Stage, across: float, near: float, far: float) -> None:
    """A house front along the road at `across` metres from its axis, from distance `near` to `far` metres."""
    height = stage.uniform(5, 18)
    corners = []
    for distance, top in ((near, False), (far, False), (far, True), (near, True)):
        x, foot, scale = stage.place(across, distance)
        corners.append((x, foot - height * scale if top else foot))
    front = stage.polygon(corners)
    if front is None:
        return
    rows, columns = front.grid()
    offset = columns - stage.column
    slope = np.where(np.abs(offset) < 1, np.sign(across), offset)
    distance = np.clip(stage.focal * across / slope, near * 0.5, far * 2)
    level = stage.camera - (rows - stage.horizon) * distance / stage.focal
    pitch, storey = stage.uniform(2.2, 3.6), stage.uniform(2.8, 3.6)
    sill = ((level / storey) % 1 > 0.35) & ((level / storey) % 1 < 0.8) & (level < height - 0.4) & (level > 0.3)
    window = sill & ((distance / pitch) % 1 > 0.3) & ((distance / pitch) % 1 < 0.7)
    wall = stage.material("wall") + stage.uniform(-0.5, 2.0) * level / height
    leak = stage.uniform(1, 6) if stage.sun < 0.3 else stage.uniform(-6, -1)
    # Each room is heated differently: a value per window, read off its storey and bay.
    rooms = stage.normal(1.0, 0.35, (8, 64)).astype(np.float32)
    bay = rooms[np.floor(level / storey).astype(int) % 8, np.floor(distance / pitch).astype(int) % 64]
    roof_edge = level > height - 0.35
    temperature = wall + np.where(window, leak * bay, 0) + np.where(roof_edge, -2.5, 0)
    stage.paint(front, temperature, "building")


def street(stage: Stage) -> None:
    stage.look((0.3, 0.6), stage.uniform(1.5, 5))
    paint_sky(stage)
    paint_ground(stage, "concrete", 0.5)
    paint_road(stage, stage.uniform(2.5, 6))
    sides = {-1: stage.uniform(6, 14), 1: stage.uniform(6, 14)}
    for side, across in sides.items():
        far = stage.uniform(90, 160)
        while far > 0.6 * stage.nearest:
            near = far - stage.uniform(9, 26)
            if stage.random() < 0.85:
                paint_facade(stage, side * across, max(near, 0.3 * stage.nearest), far)
            elif far > 25:
                x, foot, scale = stage.place(side * across, (near + far) / 2)
                draw_tree(stage, x, foot, scale)
            far = near
    for distance in stage.distances(0.1, 2.2, stage.integers(2, 9)):
        side = 1 if stage.random() < 0.5 else -1
        kerb = stage.uniform(2.5, sides[side])
        kind = stage.random()
        x, foot, scale = stage.place(side * (kerb if kind < 0.45 else stage.uniform(0.8, 3)), distance)
        if kind < 0.45:
            draw_person(stage, x, foot, scale)
        elif kind < 0.92:
            draw_vehicle(stage, x, foot, scale, side=stage.random() < 0.3)
        else:
            mast = stage.rectangle(x - 0.07 * scale, foot - 7 * scale, x + 0.07 * scale, foot)
            stage.paint(mast, stage.material("metal"), "building")


def field(stage: Stage) -> None:
    stage.look((0.15, 0.55), stage.uniform(2, 12))
    paint_sky(stage)
    paint_treeline(stage, stage.uniform(0.01, 0.1) * stage.height)
    material = "grass" if stage.random() < 0.6 else "soil"
    paint_ground(stage, material, stage.uniform(0.4, 1.3))
    if stage.random() < 0.45:
        paint_furrows(stage)
    if stage.random() < 0.5:
        paint_road(stage, stage.uniform(1.2, 2.5), stage.uniform(-8, 8))
    for distance in stage.distances(0.3, 3.2, stage.integers(1, 9)):
        x, foot, scale = stage.somewhere(0.6, distance)
        kind = stage.random()
        if kind < 0.6:
            draw_tree(stage, x, foot, scale * (0.5 if distance < 3 * stage.nearest else 1))
        elif scale < 6:
            draw_target(stage, "person", x, foot - 2, stage.uniform(3, 12))
        elif kind < 0.85:
            draw_person(stage, x, foot, scale)
        else:
            draw_vehicle(stage, x, foot, scale, side=stage.random() < 0.7)


def paint_furrows(stage: Stage) -> None:
    """Plough lines on the ground already painted, meeting at a vanishing point of their own."""
    rows = stage.rows
    vanish = stage.column + stage.uniform(-0.8, 0.8) * stage.width
    scale = stage.focal / np.maximum(stage.distance(rows), 1e-3)
    across = (stage.columns - vanish) / np.maximum(scale, 1e-3)
    spacing = stage.uniform(0.7, 1.8)
    # Lines closer than four pixels, across or (far to the side) along the rows, would alias: they fade out.
    steepness = np.abs(across) / np.maximum(rows - stage.horizon, 1e-3) / spacing
    visible = np.clip(scale * spacing / 4 - 0.5, 0, 1) * np.clip(1.5 - 6 * steepness, 0, 1)
    lines = np.sin(2 * np.pi * across / spacing) * visible
    stage.temperature += np.where(rows > stage.horizon, stage.uniform(0.4, 1.4) * lines, 0).astype(np.float32)


def sky(stage: Stage) -> None:
    stage.look((0.72, 1.25), stage.uniform(3, 20))
    paint_sky(stage)
    if stage.random() < 0.75:
        paint_treeline(stage, stage.uniform(0.02, 0.15) * stage.height)
    paint_ground(stage, "grass" if stage.random() < 0.7 else "concrete", 1.2)
    lowest = min(stage.horizon * 0.9, stage.height - 4)
    for _ in range(stage.integers(1, 5)):
        x, y = stage.uniform(4, stage.width - 4), stage.uniform(4, lowest)
        category = "aircraft" if stage.random() < 0.65 else "bird"
        contrast = stage.uniform(2.5, 20) if category == "aircraft" else stage.uniform(1.5, 8)
        draw_target(stage, category, x, y, contrast if stage.random() < 0.85 else -0.4 * contrast)


def coast(stage: Stage) -> None:
    stage.look((0.15, 0.6), stage.uniform(4, 25))
    paint_sky(stage)
    if stage.random() < 0.5:
        paint_treeline(stage, stage.uniform(0.01, 0.06) * stage.height)
    paint_water(stage)
    for distance in stage.distances(0.5, 4, stage.integers(0, 6)):
        x, row, scale = stage.somewhere(0.5, distance)
        if 12 * scale < 9:
            draw_target(stage, "boat", x, row - 1, stage.uniform(2, 10))
        else:
            draw_boat(stage, x, row, scale)
    if stage.random() < 0.5:
        shore = stage.outline(1.4)
        slope = np.linspace(-1, 1, stage.width) * stage.uniform(-0.35, 0.35) * stage.height
        patch = stage.below(stage.uniform(0.78, 1.0) * stage.height + slope + 0.03 * stage.height * shore)
        stage.paint(patch, lambda _: 1.6 * stage.grain() + stage.material("soil"), "ground")


def paint_water(stage: Stage) -> None:
    """Water keeps its own temperature near the viewer and mirrors the cold sky at grazing view; waves modulate both."""
    patch = stage.below(np.full(stage.width, stage.horizon))
    if patch is None:
        return
    water = 0.5 * stage.air + 0.5 * 12 + stage.normal(0, 2)
    rows = stage.rows
    grazing = np.exp(-np.maximum(rows - stage.horizon, 0) / np.float32(0.2 * stage.focal))
    waves = ground_texture(stage, stage.uniform(0.3, 0.7), float(np.exp(stage.uniform(-1.2, 0.6))))
    ripples = stage.noise(0.5, stage.uniform(5, 12))
    mirrored = 0.12 * stage.sky_drop * (0.5 + grazing)
    temperature = water - mirrored * (1 + 0.5 * waves + 0.7 * ripples * (0.3 + grazing)) + 0.3 * waves
    stage.paint(patch, temperature, "water")


def industrial(stage: Stage) -> None:
    stage.look((0.4, 0.75), stage.uniform(1.5, 5))
    paint_sky(stage)
    paint_ground(stage, "concrete", 0.7)
    if stage.random() < 0.7:
        x, foot, scale = stage.place(stage.uniform(-10, 10), 5 * stage.nearest)
        half, height = stage.uniform(10, 30) * scale, stage.uniform(6, 14) * scale
        ribs = 0.5 * np.sign(np.sin(np.arange(stage.width, dtype=np.float32) / stage.uniform(1.5, 5)))[None, :]
        hall = stage.rectangle(x - half, foot - height, x + half, foot)
        stage.paint(hall, lambda part: stage.material("wall") + ribs[:, part.columns], "building")
    for distance in stage.distances(0.2, 1.4, stage.integers(3, 8)):
        x, foot, scale = stage.somewhere(0.5, distance)
        (paint_tank, paint_pipes, paint_chimney)[stage.integers(3)](stage, x, foot, scale)
    for _ in range(stage.integers(0, 4)):
        distance = stage.nearest * np.exp(stage.uniform(0.1, 1.2))
        x, foot, scale = stage.somewhere(0.5, distance)
        if stage.random() < 0.6:
            draw_person(stage, x, foot, scale)
        else:
            draw_vehicle(stage, x, foot, scale, side=stage.random() < 0.5)


def paint_tank(stage: Stage, x: float, foot: float, scale: float) -> None:
    """A standing cylinder whose filled part shows through its wall."""
    radius, height = stage.uniform(1.2, 4) * scale, stage.uniform(3, 9) * scale
    patch = stage.rectangle(x - radius, foot - height, x + radius, foot)
    if patch is None:
        return
    rows, columns = patch.grid()
    rounding = -3.0 * np.clip(np.abs((columns - x) / radius), 0, 1) ** 3
    full = np.clip((rows - (foot - stage.uniform(0.2, 0.9) * height)) / 2, 0, 1)
    shell = stage.material("metal")
    stage.paint(patch, shell + rounding + full * stage.uniform(-5, 30), "machinery")
    stage.paint(stage.ellipse(x, foot - height, radius, 0.25 * radius), shell - 4 + 6 * stage.sun, "machinery")


def paint_pipes(stage: Stage, x: float, foot: float, scale: float) -> None:
    """A rack of level pipes on posts, each with a temperature of its own and some leaking flanges."""
    length, level = stage.uniform(8, 30) * scale, foot - stage.uniform(0.4, 1.5) * scale
    for post in np.linspace(-0.5, 0.5, 5):
        left = x + post * length
        pole = stage.rectangle(left - 0.08 * scale, level - 3 * scale, left + 0.08 * scale, foot)
        stage.paint(pole, stage.material("metal"), "machinery")
    for _ in range(stage.integers(2, 6)):
        half = stage.uniform(0.1, 0.35) * scale
        heat = stage.air + stage.choice([-6.0, 2.0, 12.0, 35.0]) + stage.normal(0, 2)
        run = stage.rectangle(x - length / 2, level - half, x + length / 2, level + half)
        stage.paint(run, heat, "machinery")
        left = x + stage.uniform(-0.45, 0.45) * length
        flange = stage.rectangle(left - half / 2, level - 1.5 * half, left + half / 2, level + 1.5 * half)
        stage.paint(flange, heat + stage.uniform(-3, 10), "machinery")
        level -= stage.uniform(0.5, 1.0) * scale


def paint_chimney(stage: Stage, x: float, foot: float, scale: float) -> None:
    """A tapering stack, hotter towards its mouth, with a plume that drifts and thins out."""
    height, half = stage.uniform(8, 22) * scale, stage.uniform(0.3, 0.9) * scale
    stack = stage.trapezoid(x, foot, half, x, foot - height, 0.7 * half)
    heat = stage.uniform(5, 40)
    rise = np.clip((foot - stage.rows) / height, 0, 1)
    stage.paint(stack, lambda part: stage.material("wall") + heat * 0.5 * rise[part.rows], "machinery")
    if stage.random() < 0.6:
        drift = stage.uniform(-0.8, 0.8)
        rough = stage.grain()
        for step in range(9):
            radius = half * (0.9 + 0.45 * step)
            across = x + drift * step * 1.2 * half * (1 + 0.2 * step)
            puff = stage.ellipse(across, foot - height - step * 1.3 * half, radius, radius, rough)
            if puff is not None:
                window = (puff.rows, puff.columns)
                opacity = puff.coverage * np.float32(0.55 * np.exp(-step / 3.5))
                stage.temperature[window] += opacity * (stage.air + heat - stage.temperature[window])

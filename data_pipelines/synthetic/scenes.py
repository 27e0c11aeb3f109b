"""The scene classes: how sky, ground and things are put together. Every class occurs by day and night."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from data_pipelines.synthetic.canvas import Canvas, Patch, fractal_noise
from data_pipelines.synthetic.objects import Weather, draw_boat, draw_person, draw_target, draw_tree, draw_vehicle


@dataclass(frozen=True)
class View:
    """A level pinhole camera: row of the horizon, column it looks along, focal length (pixels), height (metres)."""

    horizon: float
    column: float
    focal: float
    camera: float

    @classmethod
    def draw(cls, canvas: Canvas, rng: np.random.Generator, horizon: tuple[float, float], camera: float) -> View:
        row, column = rng.uniform(*horizon) * canvas.height, rng.uniform(0.15, 0.85) * canvas.width
        return cls(row, column, rng.uniform(0.8, 1.5) * canvas.width, camera)

    def place(self, across: float, distance: float) -> tuple[float, float, float]:
        """Column, row and pixels a metre of the ground point `across` metres to the right at a distance."""
        scale = self.focal / distance
        return self.column + across * scale, self.horizon + self.camera * scale, scale

    def distance(self, row: np.ndarray | float) -> np.ndarray | float:
        return self.focal * self.camera / np.maximum(row - self.horizon, 1e-3)


def paint_sky(canvas: Canvas, rng: np.random.Generator, weather: Weather, view: View) -> None:
    """Clear sky grows colder towards the zenith; clouds are near the air's temperature."""
    rows = np.arange(canvas.height, dtype=np.float32)[:, None]
    elevation = np.maximum(view.horizon - rows, 0) / np.float32(view.focal)
    sky = weather.air - 2 - weather.sky_drop * (1 - np.exp(-elevation / np.float32(0.22)))
    stretch = rng.uniform(1.5, 5)
    veil = fractal_noise(rng, (canvas.height, canvas.width), rng.uniform(1.4, 1.9), stretch)
    cover = np.clip((veil - (1.6 - 2.6 * weather.clouds)) * np.float32(0.8), 0, 1)
    clouds = weather.air - 4 - 0.35 * weather.sky_drop + 1.5 * veil
    canvas.temperature[:] = sky + cover * np.maximum(clouds - sky, 0)


def paint_ground(
    canvas: Canvas, rng: np.random.Generator, weather: Weather, view: View, material: str, spread: float
) -> None:
    """A textured plane from the horizon to the viewer; `spread` is the texture's strength in degrees."""
    texture = ground_texture(canvas, rng, view, rng.uniform(0.9, 1.4), float(np.exp(rng.uniform(-2.5, -0.5))))
    patch = canvas.below(np.full(canvas.width, view.horizon))
    if patch is not None:
        canvas.paint(patch, weather.material(material, rng) + spread * texture[patch.rows], "ground")


def ground_texture(canvas: Canvas, rng: np.random.Generator, view: View, roughness: float, grain: float) -> np.ndarray:
    """A fractal texture lying on the ground plane, (H, W); `grain` in metres a texel. It fades out where unresolved."""
    side = 256
    tile = fractal_noise(rng, (side, side), roughness)
    rows = np.arange(canvas.height, dtype=np.float32)[:, None]
    distance = view.distance(rows)
    right = (np.arange(canvas.width, dtype=np.float32)[None, :] - view.column) * distance / view.focal / grain
    # Turned against the viewing direction: along the axes the texels would show as a chequerboard.
    angle = rng.uniform(0.4, 1.1)
    across = math.cos(angle) * right - math.sin(angle) * distance / grain
    along = math.sin(angle) * right + math.cos(angle) * distance / grain
    u, v = np.floor(across), np.floor(along)
    fu, fv = across - u, along - v
    u, v = (u.astype(np.int64) % side).astype(np.int32), (v.astype(np.int64) % side).astype(np.int32)
    right, below = (u + 1) % side, (v + 1) % side
    value = (1 - fv) * ((1 - fu) * tile[v, u] + fu * tile[v, right])
    value += fv * ((1 - fu) * tile[below, u] + fu * tile[below, right])
    # One texel spans `grain * (row - horizon)**2 / (focal * camera)` rows: below half a row it would only alias.
    rows_per_texel = grain * np.maximum(rows - view.horizon, 0) ** 2 / (view.focal * view.camera)
    coarse = fractal_noise(rng, (canvas.height, canvas.width), 1.5, 4)
    return (value * np.clip(rows_per_texel - 0.2, 0, 1) + 0.5 * coarse).astype(np.float32)


def paint_treeline(canvas: Canvas, rng: np.random.Generator, weather: Weather, view: View, height: float) -> None:
    """A far forest edge standing on the horizon; `height` in pixels."""
    shape = fractal_noise(rng, (2 * canvas.width,), rng.uniform(0.7, 1.1))[: canvas.width]
    outline = view.horizon + 1 - height * np.clip(1 + 0.35 * shape, 0, 3)
    patch = canvas.below(outline, int(view.horizon) + 2)
    if patch is not None:
        leaves = canvas.grain(rng)
        canvas.paint(patch, weather.material("foliage", rng) + 0.9 * leaves[patch.rows], "vegetation")


def paint_road(canvas: Canvas, rng: np.random.Generator, weather: Weather, view: View, half_width: float,
               centre: float = 0.0) -> None:  # fmt: skip
    """A straight road towards the vanishing point; widths in metres."""
    near, far = max(view.focal * view.camera / max(canvas.height + 20 - view.horizon, 1), 0.5), 400.0
    corners = [view.place(centre + sign * half_width, z)[:2]
               for sign, z in ((-1, far), (1, far), (1, near), (-1, near))]  # fmt: skip
    surface = canvas.polygon(corners)
    if surface is None:
        return
    wear = ground_texture(canvas, rng, view, 1.0, 0.3)[surface.rows, surface.columns]
    canvas.paint(surface, weather.material("asphalt", rng) + 0.5 * wear, "road")
    for track in (-0.5, 0.5):
        corners = [view.place(centre + half_width * (track + d), z)[:2]
                   for d, z in ((-0.07, far), (0.07, far), (0.07, near), (-0.07, near))]  # fmt: skip
        tyres = canvas.polygon(corners)
        if tyres is not None:
            faint = Patch(tyres.rows, tyres.columns, tyres.coverage * np.float32(0.5))
            canvas.paint(faint, weather.material("asphalt", rng) + 1.5, "road")


def paint_facade(
    canvas: Canvas, rng: np.random.Generator, weather: Weather, view: View, across: float, near: float, far: float
) -> None:
    """A house front along the road at `across` metres from its axis, from distance `near` to `far` metres."""
    height = rng.uniform(5, 18)
    corners = []
    for distance, top in ((near, False), (far, False), (far, True), (near, True)):
        x, foot, scale = view.place(across, distance)
        corners.append((x, foot - height * scale if top else foot))
    front = canvas.polygon(corners)
    if front is None:
        return
    columns = np.arange(front.columns.start, front.columns.stop, dtype=np.float32)[None, :]
    rows = np.arange(front.rows.start, front.rows.stop, dtype=np.float32)[:, None]
    offset = columns - view.column
    distance = np.clip(view.focal * across / np.where(np.abs(offset) < 1, np.sign(across), offset), near * 0.5, far * 2)
    level = view.camera - (rows - view.horizon) * distance / view.focal
    pitch, storey = rng.uniform(2.2, 3.6), rng.uniform(2.8, 3.6)
    sill = ((level / storey) % 1 > 0.35) & ((level / storey) % 1 < 0.8) & (level < height - 0.4) & (level > 0.3)
    window = sill & ((distance / pitch) % 1 > 0.3) & ((distance / pitch) % 1 < 0.7)
    wall = weather.material("wall", rng) + rng.uniform(-0.5, 2.0) * level / height
    leak = rng.uniform(1, 6) if weather.sun < 0.3 else rng.uniform(-6, -1)
    # Each room is heated differently: a value per window, read off its storey and bay.
    rooms = rng.normal(1.0, 0.35, (8, 64)).astype(np.float32)
    bay = rooms[np.floor(level / storey).astype(int) % 8, np.floor(distance / pitch).astype(int) % 64]
    roof_edge = level > height - 0.35
    temperature = wall + np.where(window, leak * bay, 0) + np.where(roof_edge, -2.5, 0)
    canvas.paint(front, temperature, "building")


def street(canvas: Canvas, rng: np.random.Generator, weather: Weather) -> None:
    view = View.draw(canvas, rng, (0.3, 0.6), rng.uniform(1.5, 5))
    paint_sky(canvas, rng, weather, view)
    paint_ground(canvas, rng, weather, view, "concrete", 0.5)
    paint_road(canvas, rng, weather, view, rng.uniform(2.5, 6))
    sides = {-1: rng.uniform(6, 14), 1: rng.uniform(6, 14)}
    nearest = view.focal * view.camera / max(canvas.height - view.horizon, 1)
    for side, across in sides.items():
        far = rng.uniform(90, 160)
        while far > 0.6 * nearest:
            near = far - rng.uniform(9, 26)
            if rng.random() < 0.85:
                paint_facade(canvas, rng, weather, view, side * across, max(near, 0.3 * nearest), far)
            elif far > 25:
                x, foot, scale = view.place(side * across, (near + far) / 2)
                draw_tree(canvas, rng, weather, x, foot, scale)
            far = near
    for distance in np.sort(nearest * np.exp(rng.uniform(0.1, 2.2, rng.integers(2, 9))))[::-1]:
        side = 1 if rng.random() < 0.5 else -1
        kerb = rng.uniform(2.5, sides[side])
        kind = rng.random()
        x, foot, scale = view.place(side * (kerb if kind < 0.45 else rng.uniform(0.8, 3)), distance)
        if kind < 0.45:
            draw_person(canvas, rng, weather, x, foot, scale)
        elif kind < 0.92:
            draw_vehicle(canvas, rng, weather, x, foot, scale, side=rng.random() < 0.3)
        else:
            mast = canvas.rectangle(x - 0.07 * scale, foot - 7 * scale, x + 0.07 * scale, foot)
            canvas.paint(mast, weather.material("metal", rng), "building")


def field(canvas: Canvas, rng: np.random.Generator, weather: Weather) -> None:
    view = View.draw(canvas, rng, (0.15, 0.55), rng.uniform(2, 12))
    paint_sky(canvas, rng, weather, view)
    paint_treeline(canvas, rng, weather, view, rng.uniform(0.01, 0.1) * canvas.height)
    material = "grass" if rng.random() < 0.6 else "soil"
    paint_ground(canvas, rng, weather, view, material, rng.uniform(0.4, 1.3))
    if rng.random() < 0.45:
        paint_furrows(canvas, rng, view)
    if rng.random() < 0.5:
        paint_road(canvas, rng, weather, view, rng.uniform(1.2, 2.5), rng.uniform(-8, 8))
    nearest = view.focal * view.camera / max(canvas.height - view.horizon, 1)
    for distance in np.sort(nearest * np.exp(rng.uniform(0.3, 3.2, rng.integers(1, 9))))[::-1]:
        x, foot, scale = view.place(rng.uniform(-0.6, 0.6) * canvas.width * distance / view.focal, distance)
        kind = rng.random()
        if kind < 0.6:
            draw_tree(canvas, rng, weather, x, foot, scale * (0.5 if distance < 3 * nearest else 1))
        elif scale < 6:
            draw_target(canvas, rng, "person", x, foot - 2, rng.uniform(3, 12))
        elif kind < 0.85:
            draw_person(canvas, rng, weather, x, foot, scale)
        else:
            draw_vehicle(canvas, rng, weather, x, foot, scale, side=rng.random() < 0.7)


def paint_furrows(canvas: Canvas, rng: np.random.Generator, view: View) -> None:
    """Plough lines on the ground already painted, meeting at a vanishing point of their own."""
    rows = np.arange(canvas.height, dtype=np.float32)[:, None]
    vanish = view.column + rng.uniform(-0.8, 0.8) * canvas.width
    scale = view.focal / np.maximum(view.distance(rows), 1e-3)
    across = (np.arange(canvas.width, dtype=np.float32)[None, :] - vanish) / np.maximum(scale, 1e-3)
    spacing = rng.uniform(0.7, 1.8)
    # Lines closer than four pixels, across or (far to the side) along the rows, would alias: they fade out.
    steepness = np.abs(across) / np.maximum(rows - view.horizon, 1e-3) / spacing
    visible = np.clip(scale * spacing / 4 - 0.5, 0, 1) * np.clip(1.5 - 6 * steepness, 0, 1)
    lines = np.sin(2 * np.pi * across / spacing) * visible
    canvas.temperature += np.where(rows > view.horizon, rng.uniform(0.4, 1.4) * lines, 0).astype(np.float32)


def sky(canvas: Canvas, rng: np.random.Generator, weather: Weather) -> None:
    view = View.draw(canvas, rng, (0.72, 1.25), rng.uniform(3, 20))
    paint_sky(canvas, rng, weather, view)
    if rng.random() < 0.75:
        paint_treeline(canvas, rng, weather, view, rng.uniform(0.02, 0.15) * canvas.height)
    paint_ground(canvas, rng, weather, view, "grass" if rng.random() < 0.7 else "concrete", 1.2)
    lowest = min(view.horizon * 0.9, canvas.height - 4)
    for _ in range(rng.integers(1, 5)):
        x, y = rng.uniform(4, canvas.width - 4), rng.uniform(4, lowest)
        category = "aircraft" if rng.random() < 0.65 else "bird"
        contrast = rng.uniform(2.5, 20) if category == "aircraft" else rng.uniform(1.5, 8)
        draw_target(canvas, rng, category, x, y, contrast if rng.random() < 0.85 else -0.4 * contrast)


def coast(canvas: Canvas, rng: np.random.Generator, weather: Weather) -> None:
    view = View.draw(canvas, rng, (0.15, 0.6), rng.uniform(4, 25))
    paint_sky(canvas, rng, weather, view)
    if rng.random() < 0.5:
        paint_treeline(canvas, rng, weather, view, rng.uniform(0.01, 0.06) * canvas.height)
    paint_water(canvas, rng, weather, view)
    nearest = view.focal * view.camera / max(canvas.height - view.horizon, 1)
    for distance in np.sort(nearest * np.exp(rng.uniform(0.5, 4, rng.integers(0, 6))))[::-1]:
        x, row, scale = view.place(rng.uniform(-0.5, 0.5) * canvas.width * distance / view.focal, distance)
        if 12 * scale < 9:
            draw_target(canvas, rng, "boat", x, row - 1, rng.uniform(2, 10))
        else:
            draw_boat(canvas, rng, weather, x, row, scale)
    if rng.random() < 0.5:
        shore = fractal_noise(rng, (2 * canvas.width,), 1.4)[: canvas.width]
        slope = np.linspace(-1, 1, canvas.width) * rng.uniform(-0.35, 0.35) * canvas.height
        patch = canvas.below(rng.uniform(0.78, 1.0) * canvas.height + slope + 0.03 * canvas.height * shore)
        if patch is not None:
            rocks = canvas.grain(rng)[patch.rows]
            canvas.paint(patch, weather.material("soil", rng) + 1.6 * rocks, "ground")


def paint_water(canvas: Canvas, rng: np.random.Generator, weather: Weather, view: View) -> None:
    """Water keeps its own temperature near the viewer and mirrors the cold sky at grazing view; waves modulate both."""
    patch = canvas.below(np.full(canvas.width, view.horizon))
    if patch is None:
        return
    water = 0.5 * weather.air + 0.5 * 12 + rng.normal(0, 2)
    rows = np.arange(canvas.height, dtype=np.float32)[:, None]
    grazing = np.exp(-np.maximum(rows - view.horizon, 0) / np.float32(0.2 * view.focal))
    waves = ground_texture(canvas, rng, view, rng.uniform(0.3, 0.7), float(np.exp(rng.uniform(-1.2, 0.6))))
    ripples = fractal_noise(rng, (canvas.height, canvas.width), 0.5, rng.uniform(5, 12))
    mirrored = 0.12 * weather.sky_drop * (0.5 + grazing)
    temperature = water - mirrored * (1 + 0.5 * waves + 0.7 * ripples * (0.3 + grazing)) + 0.3 * waves
    canvas.paint(patch, temperature[patch.rows], "water")


def industrial(canvas: Canvas, rng: np.random.Generator, weather: Weather) -> None:
    view = View.draw(canvas, rng, (0.4, 0.75), rng.uniform(1.5, 5))
    paint_sky(canvas, rng, weather, view)
    paint_ground(canvas, rng, weather, view, "concrete", 0.7)
    nearest = view.focal * view.camera / max(canvas.height - view.horizon, 1)
    if rng.random() < 0.7:
        x, foot, scale = view.place(rng.uniform(-10, 10), 5 * nearest)
        half, height = rng.uniform(10, 30) * scale, rng.uniform(6, 14) * scale
        ribs = 0.5 * np.sign(np.sin(np.arange(canvas.width, dtype=np.float32) / rng.uniform(1.5, 5)))[None, :]
        hall = canvas.rectangle(x - half, foot - height, x + half, foot)
        if hall is not None:
            canvas.paint(hall, weather.material("wall", rng) + ribs[:, hall.columns], "building")
    for distance in np.sort(nearest * np.exp(rng.uniform(0.2, 1.4, rng.integers(3, 8))))[::-1]:
        x, foot, scale = view.place(rng.uniform(-0.5, 0.5) * canvas.width * distance / view.focal, distance)
        draw = (paint_tank, paint_pipes, paint_chimney)[rng.integers(3)]
        draw(canvas, rng, weather, x, foot, scale)
    for _ in range(rng.integers(0, 4)):
        distance = nearest * np.exp(rng.uniform(0.1, 1.2))
        x, foot, scale = view.place(rng.uniform(-0.5, 0.5) * canvas.width * distance / view.focal, distance)
        if rng.random() < 0.6:
            draw_person(canvas, rng, weather, x, foot, scale)
        else:
            draw_vehicle(canvas, rng, weather, x, foot, scale, side=rng.random() < 0.5)


def paint_tank(canvas: Canvas, rng: np.random.Generator, weather: Weather, x: float, foot: float, scale: float) -> None:
    """A standing cylinder whose filled part shows through its wall."""
    radius, height = rng.uniform(1.2, 4) * scale, rng.uniform(3, 9) * scale
    patch = canvas.rectangle(x - radius, foot - height, x + radius, foot)
    if patch is None:
        return
    columns = (np.arange(patch.columns.start, patch.columns.stop, dtype=np.float32) - x)[None, :] / radius
    rows = np.arange(patch.rows.start, patch.rows.stop, dtype=np.float32)[:, None]
    rounding = -3.0 * np.clip(np.abs(columns), 0, 1) ** 3
    full = np.clip((rows - (foot - rng.uniform(0.2, 0.9) * height)) / 2, 0, 1)
    shell = weather.material("metal", rng)
    canvas.paint(patch, shell + rounding + full * rng.uniform(-5, 30), "machinery")
    canvas.paint(canvas.ellipse(x, foot - height, radius, 0.25 * radius), shell - 4 + 6 * weather.sun, "machinery")


def paint_pipes(
    canvas: Canvas, rng: np.random.Generator, weather: Weather, x: float, foot: float, scale: float
) -> None:
    """A rack of level pipes on posts, each with a temperature of its own and some leaking flanges."""
    length, level = rng.uniform(8, 30) * scale, foot - rng.uniform(0.4, 1.5) * scale
    for post in np.linspace(-0.5, 0.5, 5):
        left = x + post * length
        canvas.paint(canvas.rectangle(left - 0.08 * scale, level - 3 * scale, left + 0.08 * scale, foot),
                     weather.material("metal", rng), "machinery")  # fmt: skip
    for _ in range(rng.integers(2, 6)):
        half = rng.uniform(0.1, 0.35) * scale
        heat = weather.air + rng.choice([-6.0, 2.0, 12.0, 35.0]) + rng.normal(0, 2)
        run = canvas.rectangle(x - length / 2, level - half, x + length / 2, level + half)
        canvas.paint(run, heat, "machinery")
        flange = x + rng.uniform(-0.45, 0.45) * length
        canvas.paint(canvas.rectangle(flange - half / 2, level - 1.5 * half, flange + half / 2, level + 1.5 * half),
                     heat + rng.uniform(-3, 10), "machinery")  # fmt: skip
        level -= rng.uniform(0.5, 1.0) * scale


def paint_chimney(
    canvas: Canvas, rng: np.random.Generator, weather: Weather, x: float, foot: float, scale: float
) -> None:
    """A tapering stack, hotter towards its mouth, with a plume that drifts and thins out."""
    height, half = rng.uniform(8, 22) * scale, rng.uniform(0.3, 0.9) * scale
    stack = canvas.polygon([(x - half, foot), (x + half, foot), (x + 0.7 * half, foot - height),
                            (x - 0.7 * half, foot - height)])  # fmt: skip
    heat = rng.uniform(5, 40)
    if stack is not None:
        rows = np.arange(stack.rows.start, stack.rows.stop, dtype=np.float32)[:, None]
        rise = np.clip((foot - rows) / height, 0, 1)
        canvas.paint(stack, weather.material("wall", rng) + heat * 0.5 * rise, "machinery")
    if rng.random() < 0.6:
        drift = rng.uniform(-0.8, 0.8)
        rough = canvas.grain(rng)
        for step in range(9):
            radius = half * (0.9 + 0.45 * step)
            puff = canvas.ellipse(x + drift * step * 1.2 * half * (1 + 0.2 * step), foot - height - step * 1.3 * half,
                                  radius, radius, rough)  # fmt: skip
            if puff is not None:
                window = (puff.rows, puff.columns)
                opacity = puff.coverage * np.float32(0.55 * np.exp(-step / 3.5))
                canvas.temperature[window] += opacity * (weather.air + heat - canvas.temperature[window])

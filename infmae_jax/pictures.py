"""Everything that is drawn: reconstruction panels, curves of metrics, confusion matrices. NumPy arrays in, pixels out.

Curves and matrices are drawn on matplotlib's Agg canvas, imported when first used, without pyplot's global state: safe
in the training loop, in threads and without a display. Text is drawn as it is, without mathematical markup.
"""

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from data_pipelines.errors import InputError
from data_pipelines.examples import IGNORE
from data_pipelines.files import atomic_write, writing
from data_pipelines.sheets import GAP, Tile, class_colours, draw_sheet, veiled
from infmae_jax.models.patches import PATCH, PIXEL_MEAN, PIXEL_STD, grid_to_tokens, token_grid, tokens_to_grid

if TYPE_CHECKING:
    from matplotlib.figure import Figure

COLORMAPS = ("inferno", "gray")
PANEL_TITLES = ("input", "masked input", "reconstruction", "visible pasted", "scores, kept framed")
_EPSILON = 1e-6  # of the per-patch normalisation, as in the loss
_HIDDEN = np.array([94, 104, 122], np.uint8)  # slate, in neither colour map: masked never looks like a temperature
_FRAME = "#35d4e8"
_DPI = 100
_SMALLEST_CELL = 160  # pixels: below it, titles collide and patches cannot be told apart
MARKS = {  # events that are marked on a curve: what they are, colour and matplotlib marker
    "resume": ("restart", "#1f77b4", ">"),
    "skip": ("skipped update", "#e08a00", "o"),
    "rollback": ("roll-back", "#7b3fa0", "<"),
    "checkpoint_damaged": ("checkpoint damaged", "#c62828", "D"),
    "save_failed": ("checkpoint not saved", "#c62828", "D"),
}
_LOG_RANGE = 30.0  # largest / smallest value from which on a logarithmic axis reads better
_INSET, _MAGNIFIED = 96, 6  # pixels of a magnified target, and how much
_SWATCH = 12  # pixels of a colour in a legend
_LONGEST_NAME = 30  # characters of a class name
_ROW = 192  # pixels: the height of an image among others
NO_TILES = [[(Image.new("RGB", (_SMALLEST_CELL, 1), "white"), "")]]  # of a sheet without rows


def printable(text: object) -> str:
    """The text with everything that is not printed (control characters, changes of direction) written as \\u001b."""
    return "".join(c if c.isprintable() else f"\\u{ord(c):04x}" for c in str(text))


def reconstruction_panel(
    images: np.ndarray,
    ids_keep: np.ndarray,
    pred: np.ndarray,
    scores: np.ndarray,
    norm_pix: bool,
    path: str | Path | None = None,
    colormap: str = "inferno",
) -> np.ndarray:
    """Draws one row per image: input, masked input, reconstruction, visible patches pasted over it, token scores.

    Args:
      images: (B,H,W) uint8, sides divisible by 16.
      ids_keep: (B,K) integers, the visible tokens of each image.
      pred: (B,N,P) float, the model's output for all tokens, P = 256 * C in the order row, column, channel;
        channels are averaged.
      scores: (B,N), the token scores that the selection was made from; any number type.
      norm_pix: the model was trained on pixels normalised per patch: the output is scaled back with each patch's own
        mean and standard deviation, visible or masked, as in the pictures of MAE.
      path: PNG to write, if any; its folder is made.
      colormap: "inferno" or "gray", for images and scores.

    Returns:
      The panel, (rows, columns, 3) uint8.

    Raises:
      InputError: an unknown colour map.
      ValueError: shapes that do not belong together.
    """
    batch, height, width = images.shape
    h, w = height // PATCH, width // PATCH
    if (h * PATCH, w * PATCH) != (height, width) or pred.shape[:2] != (batch, h * w) or scores.shape != (batch, h * w):
        raise ValueError(f"images {images.shape}, pred {pred.shape}, scores {scores.shape} do not fit patch {PATCH}")
    masked = np.ones((batch, h * w), bool)
    np.put_along_axis(masked, np.asarray(ids_keep), False, axis=1)
    hidden = masked.reshape(batch, h, w).repeat(PATCH, axis=1).repeat(PATCH, axis=2)
    rebuilt = reconstructed_pixels(images, pred, norm_pix)
    colours = _colour_table(colormap)
    zoom = max(1, -(-_SMALLEST_CELL // width))
    rows: list[list[Tile]] = []
    for row in range(batch):
        veiled = colours[images[row]]
        veiled[hidden[row]] = _HIDDEN
        pasted = np.where(hidden[row], rebuilt[row], images[row])
        levels = _to_levels(scores[row].reshape(h, w)).repeat(PATCH, axis=0).repeat(PATCH, axis=1)
        cells = (colours[images[row]], veiled, colours[rebuilt[row]], colours[pasted], colours[levels])
        drawn = [Image.fromarray(cell.repeat(zoom, axis=0).repeat(zoom, axis=1)) for cell in cells]
        for corner in np.argwhere(~masked[row].reshape(h, w)) * PATCH * zoom:
            top, left = corner.tolist()
            frame = left + 1, top + 1, left + PATCH * zoom - 2, top + PATCH * zoom - 2
            ImageDraw.Draw(drawn[-1]).rectangle(frame, outline=_FRAME, width=zoom)
        rows.append([(picture, "") for picture in drawn])
    panel = np.asarray(draw_sheet(PANEL_TITLES, rows))
    if path is not None:
        with writing(path), atomic_write(path) as partial:
            Image.fromarray(panel).save(partial, format="PNG")
    return panel


def reconstructed_pixels(images: np.ndarray, pred: np.ndarray, norm_pix: bool) -> np.ndarray:
    """Gray levels of a model's output: (B,H,W) uint8 from (B,H,W) uint8 inputs and (B,N,P) float patch vectors.

    `norm_pix` scales each patch back with the mean and the unbiased standard deviation of its own input pixels.
    """
    grid, channels = token_grid(*images.shape[1:]), pred.shape[-1] // PATCH**2
    pred = np.asarray(pred, np.float64)
    if norm_pix:
        levels = (images[..., None] / 255.0 - PIXEL_MEAN) / PIXEL_STD
        target = grid_to_tokens(levels, grid).reshape(*pred.shape[:2], -1).repeat(channels, axis=-1)
        deviation = np.sqrt(target.var(axis=-1, ddof=1, keepdims=True) + _EPSILON)
        pred = pred * deviation + target.mean(axis=-1, keepdims=True)
    gray = tokens_to_grid(pred.reshape(*pred.shape[:2], PATCH, PATCH, channels), grid).mean(axis=-1)
    # A diverged model predicts NaN; black says so without stopping the run that draws it.
    return np.nan_to_num(np.clip(np.rint((gray * PIXEL_STD + PIXEL_MEAN) * 255), 0, 255)).astype(np.uint8)


def metric_curve(series: np.ndarray, marks: Mapping[str, Sequence[float]], shown: tuple[float, float]) -> np.ndarray:
    """Draws a metric over the steps of a run, large enough for a phone.

    Args:
      series: (n,2) step and value; NaN is a gap. At least one is finite.
      marks: steps by event, a key of `MARKS`.
      shown: first and last step of the axis.

    Returns:
      The picture, (480,840,3) uint8.
    """
    from matplotlib.ticker import EngFormatter

    figure = _figure(420, 240, zoom=2)
    axis = figure.add_axes((0.14, 0.1, 0.82, 0.83))
    steps, values = series.T
    values = np.clip(values, -1e99, 1e99)  # Agg cannot scale an axis of larger ones
    alone = ~np.isnan(values) & np.isnan(np.r_[np.nan, values[:-1]]) & np.isnan(np.r_[values[1:], np.nan])
    noisy = len(values) >= 40
    axis.plot(steps, values, color="#d9a07a" if noisy else "#8c2d04", linewidth=0.8 if noisy else 1.6)
    axis.plot(steps[alone], values[alone], ".", color="#8c2d04")
    if noisy:
        reach = len(values) // 40
        known = np.convolve(~np.isnan(values), np.ones(2 * reach + 1), "same")
        sums = np.convolve(np.nan_to_num(values), np.ones(2 * reach + 1), "same")
        axis.plot(steps, sums / np.where(known, known, np.nan), color="#8c2d04", linewidth=1.6)
    if np.nanmin(values) > 0 and np.nanmax(values) > _LOG_RANGE * np.nanmin(values):
        axis.set_yscale("log")
    edge = axis.get_xaxis_transform()  # x in steps, y from 0 to 1
    for event, places in marks.items():
        _, colour, marker = MARKS[event]
        axis.vlines(places, 0, 1, color=colour, linewidth=0.6, alpha=0.5, transform=edge)
        axis.plot(places, np.ones(len(places)), marker, color=colour, transform=edge, clip_on=False)
    axis.xaxis.set_major_formatter(EngFormatter(sep=""))
    axis.set_xlim(shown[0], max(shown[1], shown[0] + 1))
    axis.tick_params(labelsize=8)
    axis.grid(alpha=0.25)
    return _render(figure)


def confusion_matrix(matrix: np.ndarray, names: Sequence[str]) -> np.ndarray:
    """Draws a confusion matrix, shaded by the share of each true class; returns (rows, columns, 3) uint8.

    Args:
      matrix: (classes, classes) counts, row = true class, column = predicted class.
      names: the classes' names, in the order of rows and columns.
    """
    matrix = np.asarray(matrix)
    names = [printable(name)[:_LONGEST_NAME] for name in names]
    count = len(names)
    if matrix.shape != (count, count):
        raise ValueError(f"matrix {matrix.shape} does not fit {count} class names")
    share = matrix / np.maximum(matrix.sum(axis=1, keepdims=True), 1)
    # Margins grow with the longest name, cells shrink with their number.
    cell = max(18, min(70, 1400 // count))
    size = max(5, min(10, cell // 5))
    side = max(220, cell * count) + 70 + size * max(map(len, names))
    figure = _figure(side, side)
    figure.set_layout_engine("constrained")  # whatever the names: nothing is cut off
    axis = figure.add_subplot()
    axis.imshow(share, cmap="Blues", vmin=0, vmax=1)
    axis.set_xticks(range(count), names, rotation=90, fontsize=size, parse_math=False)
    axis.set_yticks(range(count), names, fontsize=size, parse_math=False)
    axis.set(xlabel="predicted", ylabel="true")
    if count <= 30:
        for row, column in np.ndindex(count, count):
            colour = "white" if share[row, column] > 0.5 else "black"
            text = str(int(matrix[row, column]))
            axis.text(column, row, text, ha="center", va="center", fontsize=size, color=colour)
    return _render(figure)


def precision_curves(curves: Sequence[tuple[str, Sequence[float]]]) -> np.ndarray:
    """Draws precision over recall: a name and the precisions at evenly spaced recalls from 0 to 1 for each curve.

    Returns:
      The picture, (640,960,3) uint8.
    """
    figure = _figure(480, 320, zoom=2)
    figure.set_layout_engine("constrained")
    axis = figure.add_subplot()
    for (name, values), colour in zip(curves, class_colours(len(curves) + 1)[1:] / 255, strict=True):
        axis.plot(np.linspace(0, 1, len(values)), values, color=colour, label=printable(name)[:_LONGEST_NAME])
    axis.set(xlabel="recall", ylabel="precision", xlim=(0, 1), ylim=(0, 1.02))
    axis.grid(alpha=0.25)
    if curves:
        legend = axis.legend(fontsize=7, loc="lower left")
        for text in legend.get_texts():
            text.set_parse_math(False)
    return _render(figure)


def _colour_table(colormap: str) -> np.ndarray:
    """(256, 3) uint8."""
    if colormap not in COLORMAPS:
        raise InputError(f"colormap {colormap!r} is unknown; choose one of {', '.join(COLORMAPS)}")
    import matplotlib

    return np.rint(matplotlib.colormaps[colormap](np.arange(256))[:, :3] * 255).astype(np.uint8)


def _to_levels(scores: np.ndarray) -> np.ndarray:
    scores = np.nan_to_num(scores.astype(np.float64))
    spread = float(np.ptp(scores))
    return np.rint((scores - scores.min()) / (spread or 1.0) * 255).astype(np.uint8)


def _figure(width: int, height: int, zoom: float = 1) -> "Figure":
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width / _DPI, height / _DPI), dpi=_DPI * zoom, facecolor="white")
    FigureCanvasAgg(figure)
    return figure


def _render(figure: "Figure") -> np.ndarray:
    """The pixels of a figure, (rows, columns, 3) uint8."""
    figure.canvas.draw()
    return np.asarray(figure.canvas.buffer_rgba())[..., :3].copy()


def class_map(classes: np.ndarray) -> Image.Image:
    """(H,W) uint8 class numbers as a palette picture: its values are the numbers, viewers show colours."""
    picture = Image.fromarray(np.ascontiguousarray(classes))
    picture.putpalette(class_colours(256).tobytes())
    return picture


def class_overlay(image: np.ndarray, classes: np.ndarray, names: Sequence[str], legend: bool = True) -> Image.Image:
    """A gray image (H,W) uint8 with its classes as a veil of colours, class 0 and ignored pixels clear.

    With `legend`, the classes that occur are named below it.
    """
    picture = veiled(image, classes)
    return _with_legend(picture, np.unique(classes), names) if legend else picture


def _with_legend(picture: Image.Image, classes: Iterable[int], names: Sequence[str]) -> Image.Image:
    """The picture with names and colours of these classes below it; class 0, which has no colour, in brackets."""
    present = [number for number in map(int, classes) if number < len(names)]
    if not present:
        return picture
    colours, font = class_colours(256), ImageFont.load_default()
    texts = [printable(names[number])[:_LONGEST_NAME] for number in present]
    texts = [text if number else f"({text})" for number, text in zip(present, texts, strict=True)]
    widths = [_SWATCH + int(font.getlength(text)) + 2 * GAP for text in texts]
    places, right, line = [], 0, 0
    for width in widths:
        if right and right + width > max(picture.width, _SMALLEST_CELL):
            right, line = 0, line + 1
        places.append((right, picture.height + line * (_SWATCH + GAP) + GAP // 2))
        right += width
    size = max(picture.width, _SMALLEST_CELL, *widths), picture.height + (line + 1) * (_SWATCH + GAP)
    whole = Image.new("RGB", size, "white")
    whole.paste(picture, (0, 0))
    draw = ImageDraw.Draw(whole)
    for number, text, (left, top) in zip(present, texts, places, strict=True):
        colour = tuple(colours[number].tolist()) if number else None
        draw.rectangle((left, top, left + _SWATCH, top + _SWATCH), fill=colour, outline="gray")
        draw.text((left + _SWATCH + GAP, top), text, fill="black", font=font)
    return whole


def target_overlay(image: np.ndarray, found: np.ndarray, centres: Sequence[tuple[float, float]]) -> Image.Image:
    """A gray image (H,W) uint8 with target pixels (H,W) bool framed, and the first targets magnified beside it.

    Frames and magnified targets have the same numbers, from 1, in the order of `centres` (row, column).
    """
    picture = Image.new("RGB", (image.shape[1] + 2 * (_INSET + GAP), max(image.shape[0], _INSET + GAP)), "white")
    picture.paste(Image.fromarray(image), (0, 0))
    draw = ImageDraw.Draw(picture)
    half = _INSET // _MAGNIFIED // 2
    padded = np.pad(image, half)
    marked = np.repeat(padded[..., None], 3, axis=2)
    marked[np.pad(found, half)] = (0.6 * marked[np.pad(found, half)] + 0.4 * np.array([255, 40, 40])).astype(np.uint8)
    for place, (row, column) in enumerate(centres):
        draw.rectangle((column - half, row - half, column + half, row + half), outline=_FRAME)
        draw.text((column + half + 2, row - half - 2), str(place + 1), fill=_FRAME)
        column_of_insets, line = place % 2, place // 2
        top = line * (_INSET + GAP)
        if top + _INSET > picture.height:
            continue
        part = marked[round(row) : round(row) + 2 * half, round(column) : round(column) + 2 * half]
        inset = Image.fromarray(np.ascontiguousarray(part)).resize((_INSET, _INSET), Image.Resampling.NEAREST)
        left = image.shape[1] + GAP + column_of_insets * (_INSET + GAP)
        picture.paste(inset, (left, top))
        draw.text((left + 3, top + 1), str(place + 1), fill=_FRAME)
    return picture


def segmentation_panel(
    rows: Sequence[tuple[str, np.ndarray, np.ndarray, np.ndarray]], names: Sequence[str]
) -> np.ndarray:
    """One row per image: input, true classes, predicted classes, and where they differ (red); a legend below.

    Args:
      rows: key, image (H,W) uint8, true classes (H,W) uint8 with 255 = ignore, predicted classes (H,W) uint8.
      names: of the classes.

    Returns:
      (rows, columns, 3) uint8; a small white picture for no rows.
    """
    tiles: list[list[Tile]] = []
    for key, image, truth, predicted in rows:
        wrong = np.repeat(image[..., None] // 2, 3, axis=2)
        wrong[(truth != predicted) & (truth != IGNORE)] = (230, 40, 40)
        parts = [
            Image.fromarray(image).convert("RGB"), class_overlay(image, truth, names, legend=False),
            class_overlay(image, predicted, names, legend=False), Image.fromarray(wrong),
        ]  # fmt: skip
        size = max(1, round(image.shape[1] * _ROW / image.shape[0])), _ROW
        captions = (printable(key), "", "", "")
        tiles.append([(part.resize(size), caption) for part, caption in zip(parts, captions, strict=True)])
    whole = draw_sheet(("input", "truth", "prediction", "wrong"), tiles or NO_TILES)
    shown = {number for _, _, *maps in rows for classes in maps for number in np.unique(classes).tolist()}
    return np.asarray(_with_legend(whole, sorted(shown), names))

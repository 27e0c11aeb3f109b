"""Pictures of what a model does: reconstruction panels, loss curves, confusion matrices. NumPy arrays in, PNG out.

Every function draws with matplotlib's Agg canvas, imported when first used, without pyplot's global state: safe in the
training loop, in threads and without a display. Files are written beside and renamed.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image

from data_pipelines.errors import InputError
from infmae_jax.models.patches import PATCH, PIXEL_MEAN, PIXEL_STD

if TYPE_CHECKING:
    from matplotlib.figure import Figure

COLORMAPS = ("inferno", "gray")
PANEL_TITLES = ("input", "masked input", "reconstruction", "visible pasted", "scores, kept framed")
_EPSILON = 1e-6  # of the per-patch normalisation, as in the loss
_HIDDEN = np.array([94, 104, 122], np.uint8)  # slate, in neither colour map: masked never looks like a temperature
_FRAME = "#35d4e8"
_DPI = 100
_GAP = 6  # pixels between the cells of a panel
_HEAD = 26  # pixels for the titles
_SMALLEST_CELL = 160  # pixels: below it, titles collide and patches cannot be told apart


def reconstruction_panel(
    images: np.ndarray,
    ids_keep: np.ndarray,
    pred: np.ndarray,
    scores: np.ndarray,
    norm_pix: bool,
    path: str | Path | None = None,
    colormap: str = "inferno",
    patch: int = PATCH,
) -> np.ndarray:
    """Draws one row an image: input, masked input, reconstruction, visible patches pasted over it, token scores.

    Args:
      images: (B,H,W) uint8, sides divisible by `patch`.
      ids_keep: (B,K) integers, the visible tokens of each image.
      pred: (B,N,P) float, the model's output for all tokens, P = patch * patch * C in the order row, column, channel;
        channels are averaged.
      scores: (B,N), the token scores that the selection was made from; any number type.
      norm_pix: the model was trained on pixels normalised per patch: the output is scaled back with each patch's own
        mean and standard deviation, visible or masked, as in the pictures of MAE.
      path: PNG to write, if any; its folder is made.
      colormap: "inferno" or "gray", for images and scores.
      patch: side of a patch in pixels.

    Returns:
      The panel, (rows, columns, 3) uint8.

    Raises:
      InputError: an unknown colour map.
      ValueError: shapes that do not belong together.
    """
    batch, height, width = images.shape
    h, w = height // patch, width // patch
    if (h * patch, w * patch) != (height, width) or pred.shape[:2] != (batch, h * w) or scores.shape != (batch, h * w):
        raise ValueError(f"images {images.shape}, pred {pred.shape}, scores {scores.shape} do not fit patch {patch}")
    masked = np.ones((batch, h * w), bool)
    np.put_along_axis(masked, np.asarray(ids_keep), False, axis=1)
    hidden = masked.reshape(batch, h, w).repeat(patch, axis=1).repeat(patch, axis=2)
    rebuilt = reconstructed_pixels(images, pred, norm_pix, patch)
    colours = _colour_table(colormap)
    cells = []
    for row in range(batch):
        veiled = colours[images[row]]
        veiled[hidden[row]] = _HIDDEN
        pasted = np.where(hidden[row], rebuilt[row], images[row])
        levels = _to_levels(scores[row].reshape(h, w))
        cells.append([colours[images[row]], veiled, colours[rebuilt[row]], colours[pasted], colours[levels]])
    figure, axes = _cell_grid(batch, PANEL_TITLES, height, width)
    for row in range(batch):
        for axis, cell in zip(axes[row], cells[row]):
            axis.imshow(cell, interpolation="nearest", aspect="auto")
        _frame_cells(axes[row][-1], ~masked[row].reshape(h, w))
    return _save(figure, path)


def reconstructed_pixels(images: np.ndarray, pred: np.ndarray, norm_pix: bool, patch: int = PATCH) -> np.ndarray:
    """Gray levels of a model's output: (B,H,W) uint8 from (B,H,W) uint8 inputs and (B,N,P) float patch vectors.

    `norm_pix` scales each patch back with the mean and the unbiased standard deviation of its own input pixels.
    """
    batch, height, width = images.shape
    h, w, channels = height // patch, width // patch, pred.shape[-1] // patch**2
    pred = np.asarray(pred, np.float64)
    if norm_pix:
        levels = (images / 255.0 - PIXEL_MEAN) / PIXEL_STD
        target = levels.reshape(batch, h, patch, w, patch).transpose(0, 1, 3, 2, 4).reshape(batch, h * w, patch**2)
        target = target.repeat(channels, axis=-1)
        deviation = np.sqrt(target.var(axis=-1, ddof=1, keepdims=True) + _EPSILON)
        pred = pred * deviation + target.mean(axis=-1, keepdims=True)
    gray = pred.reshape(batch, h, w, patch, patch, channels).mean(axis=-1)
    gray = gray.transpose(0, 1, 3, 2, 4).reshape(batch, height, width)
    # A diverged model predicts NaN; black says so without stopping the run that draws it.
    return np.nan_to_num(np.clip(np.rint((gray * PIXEL_STD + PIXEL_MEAN) * 255), 0, 255)).astype(np.uint8)


def loss_curve(metrics: str | Path, path: str | Path) -> None:
    """Draws loss and learning rate over the steps of a run.

    Args:
      metrics: a `metrics.jsonl`: one object a line with `step`, `loss` and, optionally, `learning_rate`. Of a step
        logged twice the later counts; a last line cut short is left out.
      path: PNG to write.

    Raises:
      InputError: no such file, or no logged loss in it.
    """
    rows = _read_rows(Path(metrics))
    steps = np.array(sorted(rows))
    losses = np.array([rows[step]["loss"] for step in steps], float)
    rates = np.array([rows[step].get("learning_rate", np.nan) for step in steps], float)
    figure = _figure(900, 480)
    axis = figure.add_axes((0.09, 0.12, 0.81, 0.82))
    smooth = _running_mean(losses, max(1, len(losses) // 40))
    axis.plot(steps, losses, color="#d9a07a", linewidth=0.8, label="loss", marker="." if len(steps) < 3 else None)
    if len(steps) >= 40:
        axis.plot(steps, smooth, color="#8c2d04", linewidth=1.8, label="running mean")
    axis.set(xlabel="step", ylabel="masked reconstruction loss")
    axis.grid(alpha=0.25)
    if np.isfinite(rates).any():
        right = axis.twinx()
        right.plot(steps, rates, color="#4a6fa5", linewidth=1.0, linestyle="--")
        right.set_ylabel("learning rate (dashed)", color="#4a6fa5")
        right.ticklabel_format(style="sci", axis="y", scilimits=(0, 0))
    axis.legend(loc="upper right", frameon=False)
    _save(figure, path)


def confusion_matrix(matrix: np.ndarray, names: Sequence[str], path: str | Path | None = None) -> np.ndarray:
    """Draws a confusion matrix, shaded by the share of each true class.

    Args:
      matrix: (classes, classes) counts, row = true class, column = predicted class.
      names: the classes' names, in the order of rows and columns.
      path: PNG to write.
    """
    matrix = np.asarray(matrix)
    count = len(names)
    if matrix.shape != (count, count):
        raise ValueError(f"matrix {matrix.shape} does not fit {count} class names")
    share = matrix / np.maximum(matrix.sum(axis=1, keepdims=True), 1)
    longest = max(len(str(name)) for name in names)
    # Margins grow with the longest name, cells shrink with their number.
    cell, margin = max(18, min(70, 1400 // count)), 50 + 7 * min(longest, 30)
    side = max(220, cell * count)
    figure = _figure(side + margin + 30, side + margin + 20)
    total = figure.get_size_inches() * _DPI
    axis = figure.add_axes((margin / total[0], margin / total[1], side / total[0], side / total[1]))
    axis.imshow(share, cmap="Blues", vmin=0, vmax=1)
    size = max(5, min(10, cell // 5))
    axis.set_xticks(range(count), [str(name)[:30] for name in names], rotation=90, fontsize=size)
    axis.set_yticks(range(count), [str(name)[:30] for name in names], fontsize=size)
    axis.set(xlabel="predicted", ylabel="true")
    if count <= 30:
        for row, column in np.ndindex(count, count):
            colour = "white" if share[row, column] > 0.5 else "black"
            text = str(int(matrix[row, column]))
            axis.text(column, row, text, ha="center", va="center", fontsize=size, color=colour)
    return _save(figure, path)


def _read_rows(path: Path) -> dict[int, dict]:
    """Logged objects that have a loss, by step; the later of two with the same step."""
    if not path.is_file():
        raise InputError(f"{path} does not exist: give the metrics.jsonl of a run folder")
    rows = {}
    for line in path.read_text().splitlines():
        try:
            row = json.loads(line)
        except ValueError:
            break
        if isinstance(row, dict) and "step" in row and "loss" in row:
            rows[int(row["step"])] = row
    if not rows:
        raise InputError(f"{path} holds no logged loss: let the run reach its first logged step")
    return rows


def _running_mean(values: np.ndarray, reach: int) -> np.ndarray:
    """Mean over `reach` values to each side, fewer at the ends."""
    kernel = np.ones(2 * reach + 1)
    return np.convolve(values, kernel, "same") / np.convolve(np.ones_like(values), kernel, "same")


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


def _figure(width: int, height: int) -> Figure:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width / _DPI, height / _DPI), dpi=_DPI, facecolor="white")
    FigureCanvasAgg(figure)
    return figure


def _cell_grid(rows: int, titles: Sequence[str], height: int, width: int) -> tuple[Figure, list[list]]:
    """Axes that map image pixels to a whole number of figure pixels, so that nothing is resampled."""
    zoom = max(1, -(-_SMALLEST_CELL // width))
    height, width = zoom * height, zoom * width
    total_width = len(titles) * (width + _GAP) + _GAP
    total_height = rows * (height + _GAP) + _GAP + _HEAD
    figure = _figure(total_width, total_height)
    axes = []
    for row in range(rows):
        bottom = total_height - _HEAD - (row + 1) * (height + _GAP)
        axes.append([])
        for column, title in enumerate(titles):
            left = _GAP + column * (width + _GAP)
            place = (left / total_width, bottom / total_height, width / total_width, height / total_height)
            axis = figure.add_axes(place)
            axis.set_axis_off()
            if row == 0:
                axis.set_title(title, fontsize=9, pad=4)
            axes[-1].append(axis)
    return figure, axes


def _frame_cells(axis, kept: np.ndarray) -> None:
    from matplotlib.collections import PatchCollection
    from matplotlib.patches import Rectangle

    frames = [Rectangle((column - 0.42, row - 0.42), 0.84, 0.84) for row, column in zip(*np.nonzero(kept))]
    axis.add_collection(PatchCollection(frames, facecolor="none", edgecolor=_FRAME, linewidth=1.4))


def _save(figure: Figure, path: str | Path | None) -> np.ndarray:
    """Renders a figure, writes it as PNG (where a path is given) and returns its pixels (rows, columns, 3) uint8."""
    figure.canvas.draw()
    pixels = np.asarray(figure.canvas.buffer_rgba())[..., :3].copy()
    if path is None:
        return pixels
    path = Path(path)
    temporary = path.with_name(f".{path.name}.partial")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels).save(temporary, format="PNG")
        temporary.replace(path)
    except OSError as error:
        if temporary.exists():
            temporary.unlink()
        raise InputError(f"{path} cannot be written ({error.strerror or error}): name another output") from error
    return pixels

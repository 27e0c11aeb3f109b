"""Boxes drawn into images: predictions and truth. NumPy arrays in, pixels out."""

from collections.abc import Sequence

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from data_pipelines.sheets import draw_sheet
from infmae_jax.evaluation.detection import Boxes
from infmae_jax.pictures import NO_TILES, class_colours, printable

_LONGEST_NAME = 16  # characters of a class name in a picture
_LINE = 16  # pixels that a text needs above its box
_MASK = 0.5  # probability from which on a pixel is drawn as part of an object
_SMALLEST = 320  # pixels: narrower images are enlarged, so that the texts can be told apart


def box_overlay(image: np.ndarray, found: Boxes, names: Sequence[str]) -> Image.Image:
    """A gray image (H,W) uint8 with boxes framed in the colours of their classes, named, with scores below 1.

    Small images are enlarged by a whole factor. Masks lie as a veil over their boxes.
    """
    zoom = max(1, -(-_SMALLEST // image.shape[1]))
    pixels = np.repeat(image[..., None], 3, axis=2)
    colours = class_colours(len(names) + 1)[1:]
    if found.masks is not None:
        for box, mask, number in zip(found.boxes, found.masks, found.classes.tolist(), strict=True):
            shown = paste(mask, box, image.shape)
            pixels[shown] = (0.6 * pixels[shown] + 0.4 * colours[number]).astype(np.uint8)
    picture = Image.fromarray(pixels.repeat(zoom, axis=0).repeat(zoom, axis=1))
    draw, font = ImageDraw.Draw(picture), ImageFont.load_default(11)
    columns = zip(found.boxes.tolist(), found.scores.tolist(), found.classes.tolist(), strict=True)
    for box, score, number in reversed(list(columns)):  # the best ones on top
        colour = tuple(colours[number].tolist())
        x0, y0, x1, y1 = (round(edge * zoom) for edge in box)
        draw.rectangle((x0, y0, max(x1 - 1, x0), max(y1 - 1, y0)), outline=colour, width=1 + (zoom > 1))
        text = printable(names[number])[:_LONGEST_NAME] + (f" {score:.2f}" if score < 1 else "")
        place, anchor = ((x0, y0 - 3), "lb") if y0 >= _LINE else ((x0, y1 + 2), "lt")
        left, top, right, bottom = draw.textbbox(place, text, font=font, anchor=anchor)
        draw.rectangle((left - 1, top - 1, right, bottom), fill="black")
        draw.text(place, text, fill=colour, font=font, anchor=anchor)
    return picture


def paste(mask: np.ndarray, box: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """(H,W) bool: where the mask (S,S) of a box, stretched over it bilinearly, has a probability of at least a half."""
    out = np.zeros(size, bool)
    x0, y0, x1, y1 = np.asarray(box, np.float64).tolist()
    top, left = max(0, int(np.floor(y0))), max(0, int(np.floor(x0)))
    bottom, right = min(size[0], int(np.ceil(y1))), min(size[1], int(np.ceil(x1)))
    if bottom <= top or right <= left or x1 <= x0 or y1 <= y0:
        return out
    rows = (np.arange(top, bottom) + 0.5 - y0) / (y1 - y0) * mask.shape[0] - 0.5
    columns = (np.arange(left, right) + 0.5 - x0) / (x1 - x0) * mask.shape[1] - 0.5
    down, across = _weights(rows, mask.shape[0]), _weights(columns, mask.shape[1])
    out[top:bottom, left:right] = down @ np.asarray(mask, np.float64) @ across.T >= _MASK
    return out


def _weights(places: np.ndarray, count: int) -> np.ndarray:
    """(n, count): what each of `count` samples contributes to each place, linearly; 0 beyond their cells."""
    weights = np.maximum(0, 1 - np.abs(np.clip(places, 0, count - 1)[:, None] - np.arange(count)))
    return weights * ((places >= -0.5) & (places <= count - 0.5))[:, None]


def box_panel(rows: Sequence[tuple[str, np.ndarray, Boxes, Boxes]], names: Sequence[str]) -> np.ndarray:
    """One row per image: its true boxes, and those found.

    Args:
      rows: what is to be written below, image (H,W) uint8, true boxes with score 1, boxes found.
      names: of the classes.

    Returns:
      (rows, columns, 3) uint8; a small white picture for no rows.
    """
    tiles = [
        [(box_overlay(image, true, names), printable(text)), (box_overlay(image, found, names), "")]
        for text, image, true, found in rows
    ]
    return np.asarray(draw_sheet(("truth", "prediction"), tiles or NO_TILES))

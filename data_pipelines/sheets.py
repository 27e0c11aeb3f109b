"""Contact sheets: pictures in rows and columns with a line or two of text below each; colours of classes in them."""

from collections.abc import Sequence
from typing import TypeVar

import numpy as np
from PIL import Image, ImageDraw

from data_pipelines.examples import IGNORE

GAP, HEADING, LINE = 6, 16, 12  # pixels
T = TypeVar("T")
Tile = tuple[Image.Image, str]


def draw_sheet(headings: Sequence[str], rows: Sequence[Sequence[Tile]]) -> Image.Image:
    """Returns a page of pictures with captions, headings at the top of the columns; rows may end early."""
    columns = range(max(map(len, rows)))
    widths = [max(row[column][0].width for row in rows if column < len(row)) for column in columns]
    lefts = [GAP + sum(widths[:column]) + column * GAP for column in columns]
    heights = [max(picture.height for picture, _ in row) for row in rows]
    below = GAP + LINE * max(caption.count("\n") + 1 for row in rows for _, caption in row)
    ends = [left + 7 * len(heading) for left, heading in zip(lefts, headings, strict=False)]
    width = max(lefts[-1] + widths[-1] + GAP, *ends)
    page = Image.new("RGB", (width, HEADING + sum(heights) + len(rows) * below), "white")
    draw, top = ImageDraw.Draw(page), HEADING
    for left, heading in zip(lefts, headings, strict=False):
        draw.text((left, 2), heading, "black")
    for row, height in zip(rows, heights, strict=True):
        for left, (picture, caption) in zip(lefts, row, strict=False):
            page.paste(picture, (left, top))
            draw.multiline_text((left, top + height), caption, "black", spacing=0)
        top += height + below
    return page


def spread(items: Sequence[T], most: int) -> list[T]:
    """At most so many of the items, evenly spaced from first to last."""
    return [items[place] for place in np.linspace(0, len(items) - 1, min(most, len(items))).round().astype(int)]


def class_colours(count: int) -> np.ndarray:
    """(count, 3) uint8: colours of class numbers, the first black. Neighbours differ by the golden angle of hue; the
    eighth after one has nearly its hue again, but another brightness, as that goes round by threes."""
    from matplotlib.colors import hsv_to_rgb

    numbers = np.arange(count)
    hue, bright = (0.28 + numbers * 0.61803398875) % 1.0, np.take([0.85, 1.0, 0.65], numbers % 3)
    colours = hsv_to_rgb(np.stack([hue, np.where(numbers % 2, 1.0, 0.5), bright], axis=-1))
    colours[:1] = 0
    return (255 * colours).astype(np.uint8)


def veiled(image: np.ndarray, classes: np.ndarray) -> Image.Image:
    """A gray image (H, W) uint8 under the colours of its classes (H, W) uint8; class 0 and ignored pixels are clear."""
    shown = (classes > 0) & (classes != IGNORE)
    pixels = np.repeat(image[..., None], 3, axis=2)
    pixels[shown] = (0.55 * pixels[shown] + 0.45 * class_colours(256)[classes[shown]]).astype(np.uint8)
    return Image.fromarray(pixels)

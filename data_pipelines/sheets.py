"""Contact sheets: pictures in rows and columns with a line or two of text below each."""

from collections.abc import Sequence
from typing import TypeVar

import numpy as np
from PIL import Image, ImageDraw

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

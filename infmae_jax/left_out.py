"""What commands over images and folders say where there are none, and how they end where some could not be read."""

import sys
from collections.abc import Collection, Sequence
from pathlib import Path

from data_pipelines.commands import printable
from data_pipelines.errors import InputError

EXIT_LEFT_OUT = 4


def require_any(images: Collection, sources: Sequence[str | Path]) -> None:
    """InputError where no images were found in the sources."""
    if not images:
        where = f" in {', '.join(map(str, sources))}" if sources else ""
        raise InputError(f"no images{where}: name image files, or a folder of them")


def require_some(left_out: Sequence[str], images: int) -> None:
    """InputError where all images were left out; `left_out` has a line for each."""
    if len(left_out) == images:
        raise InputError(f"none of the {images} images can be read; the first: {left_out[0]}")


def ended(written: str, left_out: Sequence[str]) -> int:
    """Names the images that were left out, says what was written, and returns the exit code."""
    for line in left_out:
        print(f"left out: {printable(line)}", file=sys.stderr)
    print(f"{written}{f', {len(left_out)} images left out' if left_out else ''}")
    return EXIT_LEFT_OUT if left_out else 0

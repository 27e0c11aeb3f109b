"""How commands over images and folders end where some images could not be read."""

import sys
from collections.abc import Sequence

from data_pipelines.commands import printable
from data_pipelines.errors import InputError

EXIT_LEFT_OUT = 4


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

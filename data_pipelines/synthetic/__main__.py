"""Writes a folder of synthetic thermal scenes: python -m data_pipelines.synthetic --output=DIR --count=N --seed=S"""

from __future__ import annotations

import time
from collections.abc import Sequence

from absl import flags

from data_pipelines.commands import run_command
from data_pipelines.errors import InputError
from data_pipelines.synthetic.dataset import write_dataset

_OUTPUT = flags.DEFINE_string("output", None, "Folder to write; must be missing or empty.", required=True)
_COUNT = flags.DEFINE_integer("count", 600, "Number of scenes.")
_SEED = flags.DEFINE_integer("seed", 0, "Series of scenes; the same seed gives the same files.")
_HEIGHT = flags.DEFINE_integer("height", 256, "Pixel rows.")
_WIDTH = flags.DEFINE_integer("width", 320, "Pixel columns.")
_VAL_FRACTION = flags.DEFINE_float("val_fraction", 0.2, "Share of every scene class that goes to the split val.")


def main(argv: Sequence[str]) -> None:
    if len(argv) > 1:
        raise InputError(f"unexpected argument {argv[1]!r}: this command takes flags only, see --help")
    start = time.monotonic()
    size = (_HEIGHT.value, _WIDTH.value)
    folder = write_dataset(_OUTPUT.value, _COUNT.value, _SEED.value, size, _VAL_FRACTION.value)
    print(f"{_COUNT.value} scenes of {size[0]}x{size[1]} in {folder} ({time.monotonic() - start:.1f} s)")


if __name__ == "__main__":
    run_command(main)

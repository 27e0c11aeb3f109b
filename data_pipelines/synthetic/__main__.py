"""Writes synthetic thermal scenes, as a folder of files or as shards with their labels.

python -m data_pipelines.synthetic --output=DIR --count=N --seed=S [--shards=surfaces]
"""

from __future__ import annotations

from collections.abc import Sequence

from absl import flags

from data_pipelines.commands import printable, run_command
from data_pipelines.errors import InputError
from data_pipelines.synthetic.dataset import write_dataset, write_shards

_OUTPUT = flags.DEFINE_string("output", None, "Folder to write; must be missing or empty.", required=True)
_COUNT = flags.DEFINE_integer("count", 600, "Number of scenes.")
_SEED = flags.DEFINE_integer("seed", 0, "Series of scenes; the same seed gives the same files.")
_HEIGHT = flags.DEFINE_integer("height", 256, "Pixel rows.")
_WIDTH = flags.DEFINE_integer("width", 320, "Pixel columns.")
_VAL_FRACTION = flags.DEFINE_float("val_fraction", 0.2, "Share of every scene class that goes to the split val.")
_SHARDS = flags.DEFINE_enum(
    "shards", None, ("surfaces", "targets"), "Write a shard set with boxes, scene classes and these masks."
)


def main(argv: Sequence[str]) -> None:
    if len(argv) > 1:
        raise InputError(f"unexpected argument {argv[1]!r}: this command takes flags only, see --help")
    size = (_HEIGHT.value, _WIDTH.value)
    request = (_OUTPUT.value, _COUNT.value, _SEED.value, size, _VAL_FRACTION.value)
    if _SHARDS.value is None:
        write_dataset(*request)
    else:
        write_shards(*request, _SHARDS.value)
    print(f"{_COUNT.value} scenes of {size[0]}x{size[1]} in {printable(_OUTPUT.value)}")


if __name__ == "__main__":
    run_command(main)

"""Writes synthetic thermal scenes, as a folder of files or as shards with their labels.

python -m data_pipelines.synthetic --output=DIR --count=N --seed=S [--shards=surfaces]
"""

from collections.abc import Sequence

from absl import flags

from data_pipelines.commands import flags_only, printable, run_command
from data_pipelines.synthetic.dataset import write_dataset, write_shards

_FLAGS = flags.FLAGS


def _define_flags() -> None:
    flags.DEFINE_string("output", None, "Folder to write; must be missing or empty.", required=True)
    flags.DEFINE_integer("count", 600, "Number of scenes.")
    flags.DEFINE_integer("seed", 0, "Series of scenes; the same seed gives the same files.")
    flags.DEFINE_integer("height", 256, "Pixel rows.")
    flags.DEFINE_integer("width", 320, "Pixel columns.")
    flags.DEFINE_float("val_fraction", 0.2, "Share of every scene class that goes to the split val.")
    flags.DEFINE_enum(
        "shards", None, ("surfaces", "targets"), "Write a shard set with boxes, scene classes and these masks."
    )


def main(argv: Sequence[str]) -> None:
    flags_only(argv)
    size = (_FLAGS.height, _FLAGS.width)
    request = (_FLAGS.output, _FLAGS.count, _FLAGS.seed, size, _FLAGS.val_fraction)
    if _FLAGS.shards is None:
        write_dataset(*request)
    else:
        write_shards(*request, _FLAGS.shards)
    print(f"{_FLAGS.count} scenes of {size[0]}x{size[1]} in {printable(_FLAGS.output)}")


if __name__ == "__main__":
    run_command(main, define_flags=_define_flags)

"""Builds a TFDS data set: python -m data_pipelines.builders --dataset=image_folder --input=DIR --data_dir=DATA"""

from collections.abc import Sequence

from absl import flags

import data_pipelines.builders  # noqa: F401  registers the builders
from data_pipelines.builders.build import build
from data_pipelines.commands import printable, run_command
from data_pipelines.errors import InputError
from data_pipelines.prepare.results import REJECTED_NAME


def _define_flags() -> None:
    known = "inf30, image_folder, coco_boxes, class_masks, small_targets, weak_small_targets"
    flags.DEFINE_string("dataset", None, f"{known}; or NAME/CONFIG.", required=True)
    flags.DEFINE_string("data_dir", None, "TFDS data folder.", required=True)
    flags.DEFINE_string("input", None, "Folder of the files or archives.", required=True)
    flags.DEFINE_list("beam", None, "Build with Apache Beam and these options: runner=DirectRunner,…")
    flags.DEFINE_integer("shards", None, "Shards per split (default: by size).", lower_bound=1)


def main(argv: Sequence[str]) -> None:
    if len(argv) > 1:
        raise InputError(f"unexpected argument {argv[1]!r}: this command takes flags only, see --help")
    values = flags.FLAGS
    built = build(values.dataset, values.data_dir, values.input, beam_options=values.beam, shards=values.shards)
    counts = ", ".join(f"{split} {count}" for split, count in built.counts.items())
    rejected = ", ".join(f"{reason} {count}" for reason, count in built.rejected.items())
    for what, count in built.notes.items():
        print(f"{what}: {count}")
    print(
        f"{printable(str(built.folder))}: {counts}" + (f"; left out: {rejected} ({REJECTED_NAME})" if rejected else "")
    )


if __name__ == "__main__":
    run_command(main, define_flags=_define_flags)

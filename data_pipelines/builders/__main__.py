"""Builds a TFDS data set: python -m data_pipelines.builders --dataset=image_folder --input=DIR --data_dir=DATA"""

from __future__ import annotations

from collections.abc import Sequence

from absl import flags

import data_pipelines.builders  # noqa: F401  registers the builders
from data_pipelines.builders.build import build
from data_pipelines.commands import printable, run_command
from data_pipelines.errors import InputError
from data_pipelines.prepare.results import REJECTED_NAME

_DATASET = flags.DEFINE_string(
    "dataset", None, "inf30, image_folder, coco_boxes, class_masks, small_targets, weak_small_targets; or NAME/CONFIG.",
    required=True,
)  # fmt: skip
_DATA_DIR = flags.DEFINE_string("data_dir", None, "TFDS data folder.", required=True)
_INPUT = flags.DEFINE_string("input", None, "Folder of the files or archives.", required=True)
_BEAM = flags.DEFINE_list("beam", None, "Build with Apache Beam and these options: runner=DirectRunner,…")
_SHARDS = flags.DEFINE_integer("shards", None, "Shards per split (default: by size).", lower_bound=1)


def main(argv: Sequence[str]) -> None:
    if len(argv) > 1:
        raise InputError(f"unexpected argument {argv[1]!r}: this command takes flags only, see --help")
    built = build(_DATASET.value, _DATA_DIR.value, _INPUT.value, beam_options=_BEAM.value, shards=_SHARDS.value)
    counts = ", ".join(f"{split} {count}" for split, count in built.counts.items())
    rejected = ", ".join(f"{reason} {count}" for reason, count in built.rejected.items())
    for what, count in built.notes.items():
        print(f"{what}: {count}")
    print(
        f"{printable(str(built.folder))}: {counts}" + (f"; left out: {rejected} ({REJECTED_NAME})" if rejected else "")
    )


if __name__ == "__main__":
    run_command(main)

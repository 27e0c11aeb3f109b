"""Builds a TFDS data set: python -m data_pipelines.builders --dataset=image_folder --input=DIR --data_dir=DATA"""

from collections.abc import Sequence

from absl import flags

import data_pipelines.builders  # noqa: F401  registers the builders
from data_pipelines.builders.build import build
from data_pipelines.commands import flags_only, printable, run_command
from data_pipelines.prepare.results import REJECTED_NAME
from data_pipelines.shards import read_manifest


def _define_flags() -> None:
    known = "inf30, image_folder, coco_boxes, class_masks, small_targets, weak_small_targets"
    flags.DEFINE_string("dataset", None, f"{known}; or NAME/CONFIG.", required=True)
    flags.DEFINE_string("data_dir", None, "TFDS data folder.", required=True)
    flags.DEFINE_string("input", None, "Folder of the files or archives.", required=True)
    flags.DEFINE_list("beam", None, "Build with Apache Beam and these options: runner=DirectRunner,…")
    flags.DEFINE_integer("shards", None, "Shards per split (default: by size).", lower_bound=1)


def main(argv: Sequence[str]) -> None:
    flags_only(argv)
    values = flags.FLAGS
    folder = build(values.dataset, values.data_dir, values.input, beam_options=values.beam, shards=values.shards)
    manifest = read_manifest(folder)
    counts = ", ".join(f"{name} {split.count}" for name, split in manifest.splits.items())
    rejected = ", ".join(f"{reason} {count}" for reason, count in manifest.settings["rejected"].items())
    for what, count in manifest.settings["notes"].items():
        print(f"{what}: {count}")
    print(f"{printable(str(folder))}: {counts}" + (f"; left out: {rejected} ({REJECTED_NAME})" if rejected else ""))


if __name__ == "__main__":
    run_command(main, define_flags=_define_flags)

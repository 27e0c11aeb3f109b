"""The command of this package: see its docstring."""

import dataclasses
from collections.abc import Sequence
from typing import Any

from absl import flags

from data_pipelines.commands import printable, run_command
from data_pipelines.errors import InputError
from data_pipelines.files import local_path
from data_pipelines.prepare.curate import Filters
from data_pipelines.prepare.duplicates import DuplicateRule
from data_pipelines.prepare.labelled import prepare_table
from data_pipelines.prepare.results import PICTURES_NAME, REJECTED_NAME, REPORT_NAME
from data_pipelines.prepare.run import ENCODINGS, PrepareConfig, prepare
from data_pipelines.shards import MANIFEST_NAME


def _define_flags() -> None:
    defaults = PrepareConfig()
    filters, rule = defaults.filters, defaults.duplicates
    flags.DEFINE_multi_string("input", [], "Folder, glob pattern, image, zip or tar file; repeat for several.")
    flags.DEFINE_string("output", None, "New folder for the shards.")
    flags.DEFINE_string("table", None, "CSV of labelled images (columns file, split, labels), instead of --input.")
    flags.DEFINE_multi_string("label", [], "With --table: a column of class names; repeat for several.")
    flags.DEFINE_integer("workers", None, "Processes; default one per core, 0 works in this process.", 0)
    flags.DEFINE_integer("min_side", filters.min_side, "Drop images with both sides under this; 0 keeps all.", 0)
    flags.DEFINE_integer("min_levels", filters.min_levels, "Drop images of fewer gray levels; 0 keeps all.", 0)
    flags.DEFINE_bool("crop_borders", filters.crop_borders, "Cut off black borders.")
    flags.DEFINE_integer("max_pixels", filters.max_pixels, "Refuse pictures with more pixels.", 1)
    flags.DEFINE_integer("max_file_bytes", filters.max_file_bytes, "Refuse larger files.", 1)
    flags.DEFINE_bool("exact_duplicates", rule.exact, "Remove images whose pixels equal an earlier one's.")
    flags.DEFINE_bool("near_duplicates", rule.near, "Remove images of the same scene as an earlier one.")
    flags.DEFINE_integer("duplicate_radius", rule.radius, "Bits in which perceptual hashes may differ.", 0, 64)
    flags.DEFINE_float("duplicate_threshold", rule.threshold, "Cosine similarity that makes a near-duplicate.", -1, 1)
    flags.DEFINE_enum("encoding", defaults.encoding, ENCODINGS, "raw: uncompressed pixels, read without decoding.")
    flags.DEFINE_integer("shard_bytes", defaults.shard_bytes, "Close a shard at this size.", 1)
    flags.DEFINE_bool("pictures", defaults.pictures, "Draw contact sheets and histograms.")


def _config_from_flags(values: dict[str, Any]) -> PrepareConfig:
    def given(kind: type) -> dict[str, Any]:
        """The flags that are named as fields are."""
        return {field.name: values[field.name] for field in dataclasses.fields(kind) if field.name in values}

    names = ("exact_duplicates", "near_duplicates", "duplicate_radius", "duplicate_threshold")
    rule = DuplicateRule(*(values[name] for name in names))
    return PrepareConfig(**given(PrepareConfig), filters=Filters(**given(Filters)), duplicates=rule)


def main(arguments: Sequence[str]) -> None:
    """Runs `prepare` with the command line's flags and prints what became of the files."""
    if len(arguments) > 1:
        raise InputError(f"unexpected argument {arguments[1]!r}: inputs are given as --input=DIR, patterns quoted")
    values = flags.FLAGS.flag_values_dict()
    if not values["output"]:
        raise InputError("no output given: pass --output=SHARDS")
    if values["table"]:
        manifest = prepare_table(values["table"], values["label"], values["output"], encoding=values["encoding"])
        for name, names in manifest.classes.items():
            print(f"{name}: {len(names)} classes, {printable(', '.join(names[:8]))}")
        print(", ".join(f"{printable(name)} {split.count}" for name, split in manifest.splits.items()))
        return
    manifest = prepare(values["input"], values["output"], _config_from_flags(values), values["workers"])
    counts, output = manifest.settings["rejected"], printable(local_path(values["output"], "output"))
    rejected = ", ".join(f"{reason} {count}" for reason, count in counts.items())
    found = manifest.count + sum(counts.values())
    print(f"found {found} files, kept {manifest.count}" + (f", rejected {rejected}" if rejected else ""))
    print(f"shards: {output} ({MANIFEST_NAME}, {REJECTED_NAME}, {REPORT_NAME}, {PICTURES_NAME}/)")
    print(f"next: python -m data_pipelines.inspect {output}")


if __name__ == "__main__":
    run_command(main, define_flags=_define_flags)

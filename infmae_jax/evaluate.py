"""Measures of a fine-tuned model on a labelled split.

    python -m infmae_jax.evaluate --checkpoint=RUN --output=DIR [--shards=SHARDS] [--split=test] [--tile=512]

Prints a table with the protocol that its numbers follow. DIR gets scores.json, the table and pictures.
"""

import json
import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from absl import flags
from PIL import Image

from data_pipelines.commands import flags_only, run_command
from data_pipelines.errors import InputError
from data_pipelines.files import atomic_write, local_path, output_file, read_text, writing
from data_pipelines.remote import local_folders
from data_pipelines.shards import read_manifest
from infmae_jax.tasks import finetuned_flags
from infmae_jax.tasks.finetuned import load_finetuned

SCORES_NAME = "scores.json"
_WRITTEN = r"scores\.(json|txt)|detections\.json|\w+\.png"
_LARGEST_SCORES = 1 << 24  # bytes


def evaluate(run: str | Path, output: str | Path, shards: Sequence[str] = (), split: str = "", **options: Any) -> str:
    """Writes the measures of a run on a split, and returns them as a table.

    The processes of a job share the images, and the first one writes.

    Args:
      run: folder of a fine-tuning run.
      output: folder for scores.json, scores.txt and pictures.
      shards: labelled shard sets with the classes of the run, in their order; by default the run's own.
      split: of them; the validation split by default.
      options: of `load_finetuned`: which checkpoint, and how images are looked at.

    Raises:
      InputError: not such a run, no such split, other classes, or an output that cannot be written.
    """
    output = output_file(Path(output) / SCORES_NAME, "output").parent
    with writing(output):
        _written_before(output)
    model, params, step = load_finetuned(run, **options)
    config = model.config
    shards, split = tuple(shards) or _own_shards(run, config.data.shards), split or config.data.val_split
    if not shards:
        raise InputError(f"{run} names no labelled shard set: give --shards")
    for name, folder in zip(shards, local_folders(shards), strict=True):
        classes = tuple(read_manifest(folder).classes.get(config.LABELS, ()))
        if classes != model.classes:
            theirs, ours = ", ".join(classes) or "none", ", ".join(model.classes)
            raise InputError(f"{name} has the classes {theirs}; {run} knows {ours}: build the set with the same table")
    found = model.evaluate(params, shards, split, thorough=True)
    table, drawn = model.report(found["scores"])
    drawn = {**drawn, **{name: picture for name, picture in found.items() if isinstance(picture, np.ndarray)}}
    origin: dict[str, Any] = {"run": Path(run).name, "step": step, "split": split}
    sets = ", ".join(Path(name).name for name in shards)
    text = f"{origin['run']}, step {step}; split {split} of {sets}, {found['scores']['images']} images\n{table}"
    if jax.process_index() == 0:
        _write(output, {SCORES_NAME: json.dumps({**origin, **found["scores"]}, indent=1), "scores.txt": text,
                        **found.get("files", {})}, drawn)  # fmt: skip
    return text


def _written_before(folder: Path) -> set[str]:
    """Names of what `evaluate` wrote into a folder; InputError where it holds anything else."""
    names = {path.name for path in folder.iterdir() if ".partial-" not in path.name} if folder.is_dir() else set()
    if not names:
        return names
    try:
        origin = json.loads(read_text(folder / SCORES_NAME, _LARGEST_SCORES))
        ours = {"run", "step", "split"} <= origin.keys() and all(re.fullmatch(_WRITTEN, name) for name in names)
    except (OSError, InputError, ValueError, AttributeError, RecursionError):
        ours = False
    if not ours:
        raise InputError(f"{folder} holds other files than scores: name another --output")
    return names


def _own_shards(run: str | Path, shards: tuple[str, ...]) -> tuple[str, ...]:
    """A run's own shard sets; InputError where one has gone since."""
    for name in shards:
        if "://" not in name and not os.path.isdir(os.path.expanduser(name)):
            place = local_path(Path(run, os.path.expanduser(name)), "shard set")
            raise InputError(f"the run's own shard set {place} is not there: give --shards=SHARDS, or bring it back")
    return shards


def _write(folder: Path, texts: dict[str, str], drawn: dict[str, np.ndarray]) -> None:
    with writing(folder):
        for name in _written_before(folder) - texts.keys() - {f"{name}.png" for name in drawn}:
            (folder / name).unlink()
        for name, content in texts.items():
            with atomic_write(folder / name) as partial:
                partial.write_text(content + "\n")
        for name, pixels in drawn.items():
            with atomic_write(folder / f"{name}.png") as partial:
                Image.fromarray(pixels).save(partial, "PNG")


def _define_flags() -> None:
    finetuned_flags.define()
    flags.DEFINE_string("output", None, "Folder for scores and pictures.", required=True)
    flags.DEFINE_list("shards", [], "Labelled shard sets (default: those of the run).")
    flags.DEFINE_string("split", "", "Of the shard sets (default: the run's validation split).")


def main(argv: Sequence[str]) -> None:
    flags_only(argv)
    values, output = flags.FLAGS, local_path(flags.FLAGS.output, "--output")
    print(evaluate(values.checkpoint, output, values.shards, values.split, **finetuned_flags.options()))
    print(f"scores.json, scores.txt and pictures are in {output}")


if __name__ == "__main__":
    run_command(main, define_flags=_define_flags)

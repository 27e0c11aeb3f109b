"""A fine-tuned model on images and folders of images; no labels are needed.

    python -m infmae_jax.predict --checkpoint=RUN --output=DIR [--tile=512 --overlap=64] IMAGES_OR_FOLDER...

Every image is looked at by itself, in its own pixels, and gets a line of JSON in DIR/predictions.jsonl: size, files
and what was found. Segmentation writes class numbers (DIR/classes, PNG) and overlays; small targets masks,
probabilities, overlays and a table of all targets (DIR/targets.csv); detection overlays and all boxes as
DIR/detections.json (COCO) and DIR/detections.csv. The same command again goes on where it was. Images that cannot be
read are named and left out.

Exit codes: 0; 2 nothing to do or a mistake, in one line; 4 written, but some images were left out.
"""

import contextlib
import hashlib
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from absl import flags

from data_pipelines.commands import progress_bar, run_command
from data_pipelines.decode import read_image_file
from data_pipelines.errors import InputError, refusing
from data_pipelines.files import atomic_write, images_in, output_file, read_text, writing
from infmae_jax.evaluation import windows
from infmae_jax.left_out import ended, require_any, require_some
from infmae_jax.tasks import finetuned_flags
from infmae_jax.tasks.finetuned import FineTuned, load_finetuned
from infmae_jax.training.config import RunConfig, use_compilation_cache
from infmae_jax.training.run_folder import write_object

RESULTS_NAME, SETTINGS_NAME = "predictions.jsonl", "settings.json"
_LARGEST_RESULTS, _LARGEST_SETTINGS = 4 << 30, 1 << 24  # bytes


def predict(tuned: FineTuned, sources: Sequence[str | Path], output: str | Path) -> list[str]:
    """Writes predictions for image files.

    Args:
      tuned: the model.
      sources: image files, and folders that are searched for images.
      output: folder; what it holds of an earlier call with the same model is kept, unless an image has changed.

    Returns:
      One line per image that was left out.

    Raises:
      InputError: no images, none that can be read, two of the same name, or an output that is in the way.
    """
    output, files = output_file(Path(output) / RESULTS_NAME, "output").parent, named(sources)
    with writing(output):
        done = _begun(output, tuned, files)
    left_out: list[str] = []
    todo = [(name, path) for name, path in files.items() if name not in done]
    intensity = tuned.model.config.data.intensity

    def read(item: tuple[str, Path]) -> tuple[dict[str, Any], np.ndarray]:
        name, path = item
        known = {"image": name, "file": name + path.suffix, "sha256": _digest(path)}
        pixels = read_image_file(path, intensity)
        return known | {"height": pixels.shape[0], "width": pixels.shape[1]}, pixels

    def leave_out(_: Any, error: Exception) -> None:
        left_out.append(str(error))
        bar.update(1)

    def write(prediction: tuple[tuple[dict[str, Any], np.ndarray], Any]) -> dict[str, Any]:
        (known, pixels), found = prediction
        return known | tuned.model.write(output, known["image"], pixels, found)

    with (
        writing(output),
        (output / RESULTS_NAME).open("a") as results,
        progress_bar("predict", len(files), "image", done=len(files) - len(todo)) as bar,
    ):
        images = windows.readable(read, todo, InputError, leave_out)
        predictions = tuned.model.predictions(tuned.params, images, lambda image: image[1])
        for row in windows.ahead(write, predictions, threads=2, most=2):  # while the devices compute the next ones
            results.write(json.dumps(row) + "\n")
            results.flush()
            bar.update(1)
    require_some(left_out, len(files))
    with writing(output), _of_before(output), (output / RESULTS_NAME).open() as results:
        tuned.model.finish(output, sorted(map(json.loads, results), key=lambda row: row["image"]))
    return left_out


def named(sources: Sequence[str | Path]) -> dict[str, Path]:
    """Image files by name: of a folder's images the path inside it, without suffix, of single files their stem.

    Raises:
      InputError: no images, or two of the same name.
    """
    files: dict[str, Path] = {}
    for source in map(Path, sources):
        source = source.expanduser()
        if not source.exists():
            raise InputError(f"{source} does not exist: name image files, or a folder of them")
        for path in images_in([source]):
            name = str(path.relative_to(source).with_suffix("")) if source.is_dir() else path.stem
            if name in files:
                raise InputError(f"{files[name]} and {path} would both be called {name}: predict them into two folders")
            files[name] = path
    require_any(files, sources)
    return files


def _digest(path: Path) -> str:
    """Of a file's content; InputError where it cannot be read."""
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise InputError(f"{path}: {error.strerror}") from error


def _begun(output: Path, tuned: FineTuned, files: dict[str, Path]) -> set[str]:
    """Makes the folder, or returns the names of the images that it has; InputError where they are of another."""
    digest = hashlib.sha256(repr(tuned.model.config).encode())
    for leaf in jax.tree.leaves(tuned.params):
        digest.update(np.ascontiguousarray(leaf).tobytes())
    settings = {"model": digest.hexdigest(), "classes": list(tuned.model.classes), "step": tuned.step}
    path = output / SETTINGS_NAME
    with _of_before(output):
        if path.is_file():
            if json.loads(read_text(path, _LARGEST_SETTINGS)).get("model") != settings["model"]:
                raise InputError(f"{output} holds predictions of another model or settings: name another --output")
        elif output.is_dir() and any(output.iterdir()):
            raise InputError(f"{output} is not empty and holds no predictions: name another --output")
        else:
            write_object(path, settings)
        return _finished(output / RESULTS_NAME, files)


def _of_before(output: Path) -> contextlib.AbstractContextManager:
    """InputError where reading what a folder holds fails because nobody predicted it."""
    kinds = ValueError, LookupError, TypeError, AttributeError, RecursionError
    return refusing(f"{output} holds files that are not of predictions", "name another --output", *kinds)


def _finished(path: Path, files: dict[str, Path]) -> set[str]:
    """Names in the results; lines that a kill cut off, whose files are gone or whose image has changed are removed."""
    if not os.path.lexists(path):
        return set()
    kept = {}
    for line in read_text(path, _LARGEST_RESULTS).splitlines(keepends=True):
        if line.endswith("\n"):
            row = json.loads(line)
            names = [str(value) for key, value in row.items() if key not in ("image", "file")]
            whole = all((path.parent / name).is_file() for name in names if name.endswith(".png"))
            image = files.get(row["image"])
            with contextlib.suppress(InputError):  # an image that cannot be read any more is left out later
                if whole and (image is None or row.get("sha256") == _digest(image)):
                    kept[row["image"]] = line
    with atomic_write(path) as partial:
        partial.write_text("".join(kept.values()))
    return set(kept)


def _define_flags() -> None:
    finetuned_flags.define()
    flags.DEFINE_string("output", None, "Folder for predictions; those of the same images are kept.", required=True)


def main(argv: Sequence[str]) -> int:
    values = flags.FLAGS
    output = output_file(Path(values.output) / RESULTS_NAME, "--output").parent  # before the model is loaded
    tuned = load_finetuned(values.checkpoint, **finetuned_flags.options())
    use_compilation_cache(RunConfig())  # the run may be a stranger's, and programs from its folder would be run
    left_out = predict(tuned, argv[1:], output)
    return ended(f"{output}: {RESULTS_NAME} and pictures", left_out)


if __name__ == "__main__":
    run_command(main, define_flags=_define_flags)

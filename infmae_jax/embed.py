"""Features of images and folders of images, one row per image.

    python -m infmae_jax.embed --checkpoint=RUN --output=features.npz IMAGES_OR_FOLDER...

Writes the arrays `names` and `features` (n,D) float32 (or, with `--output=FILE.parquet`, those columns) in the order of
the arguments, folders sorted by path. A run that was killed goes on where it was: finished parts lie beside the output
until it is written. Images that cannot be read are named and left out.

Exit codes: 0; 2 nothing to do or a mistake, in one line; 4 written, but some images were left out.
"""

import dataclasses
import hashlib
import importlib.util
import json
import shutil
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from absl import flags

from data_pipelines.commands import progress_bar, run_command
from data_pipelines.decode import read_image_file
from data_pipelines.errors import InputError
from data_pipelines.files import atomic_write, images_in, output_file, writing
from data_pipelines.intensity import Intensity
from data_pipelines.transforms import center_crop_resize
from infmae_jax.evaluation import windows
from infmae_jax.interop import checkpoint_flags
from infmae_jax.interop.load import load_encoder
from infmae_jax.interop.trained_model import FEATURES, TrainedModel
from infmae_jax.left_out import ended, require_any, require_some

VIEWS = ("stretch", "crop", "original")
FORMATS = (".npz", ".parquet")
_PART = 512  # images: a killed run loses at most so many


def embed(
    trained: TrainedModel,
    sources: Sequence[str | Path],
    output: str | Path,
    *,
    feature: str = "pooled",
    view: str = "stretch",
    batch_size: int = 32,
) -> list[str]:
    """Writes features of image files.

    Args:
      trained: the model; its `image_size` is the size that images are brought to, its `intensity` their mapping.
      sources: image files, and folders that are searched for images.
      output: `.npz` or `.parquet` file; replaced if it exists.
      feature: see `TrainedModel.vectors`.
      view: "stretch" (the whole image, squeezed), "crop" (its centre), or "original" (pixel by pixel as it is).
      batch_size: images per device call.

    Returns:
      One line per image that was left out.

    Raises:
      InputError: no images, none that can be read, an unknown format or feature, an output that cannot be written.
    """
    output = output_file(output, "output")
    _check(output)
    files = list(images_in(sources))
    require_any(files, sources)
    stats = [(str(file), file.stat().st_size, file.stat().st_mtime_ns) for file in files if file.exists()]
    settings = [trained.digest, repr(trained.intensity), trained.image_size, feature, view, stats]
    key = hashlib.sha256(json.dumps(settings).encode()).hexdigest()[:16]
    parts = output.with_name(f".{output.name}.parts-{key}")
    names, features, left_out = [], [], []
    with writing(output), progress_bar("embed", len(files), "image") as bar:
        for start in range(0, len(files), _PART):
            chosen = files[start : start + _PART]
            part = parts / f"{start:09d}.npz"
            if not part.is_file():
                vectors, errors = _part(trained, chosen, feature, view, batch_size)
                with atomic_write(part) as partial, partial.open("wb") as stream:
                    np.savez(stream, features=vectors, errors=np.array(errors, dtype=np.str_))
            with np.load(part) as stored:
                features.append(stored["features"])
                errors = stored["errors"].tolist()
            names += [str(file) for file, error in zip(chosen, errors, strict=True) if not error]
            left_out += [error for error in errors if error]
            bar.update(len(chosen))
        require_some(left_out, len(files))
        _write(output, names, np.concatenate([rows for rows in features if len(rows)]))
    shutil.rmtree(parts, ignore_errors=True)
    return left_out


def _check(output: Path) -> None:
    if output.suffix not in FORMATS:
        raise InputError(f"output {output} is neither {' nor '.join(FORMATS)}: name a file that ends in one of them")
    if output.suffix == ".parquet" and importlib.util.find_spec("pyarrow") is None:
        raise InputError("writing .parquet needs pyarrow: pip install pyarrow, or name an .npz file")


def _part(
    trained: TrainedModel, files: Sequence[Path], feature: str, view: str, batch_size: int
) -> tuple[np.ndarray, list[str]]:
    """Features (m,D) of the m files that can be read, and for every file "" or why it cannot."""

    errors = [""] * len(files)

    def read(place: int) -> tuple[int, np.ndarray]:
        image = read_image_file(files[place], trained.intensity)
        if view != "original":
            image = center_crop_resize(image, trained.image_size, stretch=view == "stretch")
        return place, image

    def leave_out(place: int, error: Exception) -> None:
        errors[place] = str(error)

    images = windows.readable(read, range(len(files)), InputError, leave_out)
    model = dataclasses.replace(trained, intensity=Intensity("full_range"))  # they are mapped already
    vectors: dict[int, np.ndarray] = {}
    for group in windows.in_groups(images, lambda item: item[1].shape, lambda shape: batch_size):
        padded = min(batch_size, 1 << (len(group) - 1).bit_length())  # few batch sizes, as each is compiled
        batch = np.stack([image for _, image in group + group[-1:] * (padded - len(group))])
        vectors.update(zip([place for place, _ in group], model.vectors(batch, feature), strict=False))
    return np.stack([vectors[place] for place in sorted(vectors)]) if vectors else np.zeros((0, 0)), errors


def _write(output: Path, names: list[str], features: np.ndarray) -> None:
    with atomic_write(output) as partial:
        if output.suffix == ".npz":
            with partial.open("wb") as stream:
                np.savez(stream, names=np.array(names), features=features)
            return
        import pyarrow
        import pyarrow.parquet

        rows = pyarrow.FixedSizeListArray.from_arrays(pyarrow.array(features.reshape(-1)), features.shape[1])
        pyarrow.parquet.write_table(pyarrow.table({"names": pyarrow.array(names), "features": rows}), partial)


def _define_flags() -> None:
    flags.DEFINE_string("checkpoint", None, "Run folder, published checkpoint file, or 'random'.", required=True)
    flags.DEFINE_string("output", None, "File to write, .npz or .parquet; replaced if it exists.", required=True)
    flags.DEFINE_enum("feature", "pooled", FEATURES, "Which features; multi is the three stages together.")
    flags.DEFINE_enum("view", "stretch", VIEWS, "The input: the whole image squeezed, its centre, or as it is.")
    flags.DEFINE_list("image_size", None, "Rows,columns that images are brought to (default: the checkpoint's).")
    flags.DEFINE_integer("batch_size", 32, "Images per device call.", lower_bound=1)
    checkpoint_flags.define_architecture()
    checkpoint_flags.define_intensity()


def main(argv: Sequence[str]) -> int:
    values = flags.FLAGS
    if values.image_size and values.view == "original":
        raise InputError("--image_size has no meaning with --view=original: leave one of them out")
    size, output = checkpoint_flags.rows_columns("image_size") or (0, 0), output_file(values.output, "output")
    trained = load_encoder(values.checkpoint, image_size=size, **checkpoint_flags.load_options())
    trained = checkpoint_flags.with_intensity(trained)
    left_out = embed(trained, argv[1:], output, feature=values.feature, view=values.view, batch_size=values.batch_size)
    return ended(f"{values.output}: {values.feature} features", left_out)


if __name__ == "__main__":
    run_command(main, define_flags=_define_flags)

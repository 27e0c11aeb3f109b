"""Features of a labelled split under a frozen encoder, computed once and kept."""

import dataclasses
import hashlib
import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from data_pipelines.commands import progress_bar
from data_pipelines.errors import InputError
from data_pipelines.files import atomic_write
from data_pipelines.intensity import Intensity
from data_pipelines.pipeline import PipelineConfig, eval_batches
from data_pipelines.reader import ExampleReader
from data_pipelines.remote import local_folders
from data_pipelines.shards import read_manifest
from data_pipelines.views import LabelledView
from infmae_jax.interop.trained_model import TrainedModel


@dataclasses.dataclass(frozen=True)
class LabelledFeatures:
    """Features of a split's images.

    Attributes:
      values: (n,V,D) float32, V views of each image; a test split has one.
      classes: (n,) int32.
      keys: names of the images.
    """

    values: np.ndarray
    classes: np.ndarray
    keys: Sequence[str]


def labelled_features(
    trained: TrainedModel,
    shards: Sequence[str],
    split: str,
    label: str,
    views: Sequence[tuple[LabelledView, bool]],
    feature: str,
    batch_size: int,
    cache: Path,
) -> LabelledFeatures:
    """Features of all images of a split that have the label.

    Args:
      trained: the frozen encoder.
      shards: shard sets with labels.
      views: how images become the encoder's input and whether they are mirrored, one row of `values` each; labels and
        intensity are set here.
      feature: see `TrainedModel.vectors`.
      batch_size: images per device call.
      cache: folder in which finished views are kept; what they depend on is in their names.

    Raises:
      InputError: an unknown feature for this encoder, no such split or label, features that are not finite.
    """
    folders = local_folders(shards)
    manifests = [read_manifest(folder) for folder in folders]
    reader = ExampleReader(folders, split)
    found = []
    for number, (view, mirrored) in enumerate(views):
        view = dataclasses.replace(view, labels=(label,), intensity=trained.intensity)
        known = [trained.digest, [m.fingerprint for m in manifests], split, repr(view), mirrored, feature, number]
        path = cache / f"{hashlib.sha256(json.dumps(known).encode()).hexdigest()[:24]}.npz"
        if not path.is_file():
            config = PipelineConfig(tuple(shards), batch_size=batch_size, image_size=view.size, seed=number)
            values, classes = _one_view(trained, config, split, view, mirrored, label, feature)
            with atomic_write(path) as partial, partial.open("wb") as stream:
                np.savez(stream, values=values, classes=classes)
        with np.load(path) as stored:
            found.append((stored["values"], stored["classes"]))
    classes = found[0][1]
    if (classes < 0).any():
        key = reader[int((classes < 0).argmax())].key
        raise InputError(f"image {key} of split {split} has no label {label!r}; name a label that all images have")
    values = np.stack([values for values, _ in found], axis=1)
    bad = ~np.isfinite(values).all(axis=(1, 2))
    if bad.any():
        key = reader[int(bad.argmax())].key
        raise InputError(f"features of {key} are not finite under {trained.name}; use an earlier checkpoint")
    return LabelledFeatures(values, classes, _Keys(reader))


class _Keys(Sequence):
    """Names of the examples, read when asked for."""

    def __init__(self, reader: ExampleReader):
        self._reader = reader

    def __len__(self) -> int:
        return len(self._reader)

    def __getitem__(self, index: int) -> str:
        return self._reader[index].key


def _one_view(
    trained: TrainedModel,
    config: PipelineConfig,
    split: str,
    view: LabelledView,
    mirrored: bool,
    label: str,
    feature: str,
) -> tuple[np.ndarray, np.ndarray]:
    """(n,D) float32 features and (n,) int32 classes of one view."""
    model = dataclasses.replace(trained, intensity=Intensity("full_range"))  # the view has mapped its images
    values, classes = [], []
    with (
        eval_batches(dataclasses.replace(config, max_corrupt=0), split, view) as batches,
        progress_bar(f"features {split}", len(ExampleReader(local_folders(config.shards), split)), "image") as bar,
    ):
        for batch in batches:
            vectors = model.vectors(batch["image"][:, :, ::-1] if mirrored else batch["image"], feature)
            values.append(vectors[batch["valid"]])
            classes.append(batch[label][batch["valid"]])
            bar.update(int(batch["valid"].sum()))
    return np.concatenate(values), np.concatenate(classes)

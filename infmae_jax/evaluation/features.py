"""Features of a labelled split under a frozen encoder, computed once and kept."""

import dataclasses
import hashlib
import json
from collections.abc import Callable, Sequence
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
      key: gives the name of an image, by its number.
    """

    values: np.ndarray
    classes: np.ndarray
    key: Callable[[int], str]


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
    mapped = dataclasses.replace(trained, intensity=Intensity("full_range"))  # the views have mapped their images

    def computed(number: int, view: LabelledView, mirrored: bool) -> dict[str, np.ndarray]:
        config = PipelineConfig(tuple(shards), batch_size=batch_size, image_size=view.size, seed=number, max_corrupt=0)
        values, classes = [], []
        with (
            eval_batches(config, split, view) as batches,
            progress_bar(f"features {split}", len(reader), "image") as bar,
        ):
            for batch in batches:
                vectors = mapped.vectors(batch["image"][:, :, ::-1] if mirrored else batch["image"], feature)
                values.append(vectors[batch["valid"]])
                classes.append(batch[label][batch["valid"]])
                bar.update(int(batch["valid"].sum()))
        return {"values": np.concatenate(values), "classes": np.concatenate(classes)}

    found = []
    for number, (view, mirrored) in enumerate(views):
        view = dataclasses.replace(view, labels=(label,), intensity=trained.intensity)
        known = [trained.digest, [m.fingerprint for m in manifests], split, repr(view), mirrored, feature, number]
        path = cache / f"{hashlib.sha256(json.dumps(known).encode()).hexdigest()[:24]}.npz"
        if not path.is_file():
            with atomic_write(path) as partial, partial.open("wb") as stream:
                np.savez(stream, **computed(number, view, mirrored))
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
    return LabelledFeatures(values, classes, lambda index: reader[index].key)

"""What all builders share: features of an image, curated images as examples, one machine or Apache Beam."""

import dataclasses
import functools
import hashlib
import inspect
import itertools
import os
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import tensorflow_datasets as tfds
from array_record.python import array_record_data_source

from data_pipelines.commands import printable
from data_pipelines.errors import InputError
from data_pipelines.examples import IMAGE, KEY, SOURCE, Example, decode_example, decode_pixels, source_text
from data_pipelines.prepare.collect import describe_image
from data_pipelines.prepare.results import write_set_manifest
from data_pipelines.shards import describe_shard, make_split

Features = dict[str, Any]
# Of an item (an annotated image, a pair of files, ...): an example, its labels' features, what was done to them.
Make = Callable[..., Iterator[tuple[Example, Features, dict[str, int]]]]
SPLITS = ("train", "val", "validation", "test")
# In `Example.attributes`: what was done to the annotations of an image, and to how many.
NOTES = "annotations"


class DepthConfig(tfds.core.BuilderConfig):
    """Stored bit depth of the images; files of another depth are left out, so that none is rescaled unasked."""

    def __init__(self, bit_depth: int):
        super().__init__(name=f"gray{bit_depth}", description=f"one channel, {bit_depth} bit per pixel")
        self.bit_depth = bit_depth


class _Info(tfds.core.DatasetInfo):
    def initialize_from_bucket(self) -> None:
        """Nothing: TFDS would ask its public bucket for the user's set, and leave a folder in /tmp each time."""


class InfraredBuilder(tfds.core.GeneratorBasedBuilder, skip_registration=True):
    """A builder of one-channel infrared images from the user's files: `manual_dir` of `tfds.download.DownloadConfig`.

    Every example has the features of `data_pipelines.examples`, and the version folder a manifest of all splits beside
    what TFDS writes: it is a shard set of this project, which the pipeline reads without TensorFlow.

    Args (beside those of `tfds.core.DatasetBuilder`):
      beam: generate with Apache Beam; the runner is chosen by `tfds.download.DownloadConfig`.
    """

    VERSION = tfds.core.Version("1.0.0")
    RELEASE_NOTES: ClassVar = {"1.0.0": "first"}
    BUILDER_CONFIGS: ClassVar = [DepthConfig(8), DepthConfig(16)]
    MANUAL_DOWNLOAD_INSTRUCTIONS = (
        "Give the folder of your files as manual_dir; its layout is in the class description."
    )

    def __init__(self, *, beam: bool = False, **options: Any):
        self._beam = beam
        # Names in the order of their numbers, of "mask" and "objects": known when the annotations were read.
        self.class_names: dict[str, list[str]] = {}
        self.settings: dict[str, Any] = {}  # what a builder notes in the manifest, likewise
        self.notes: Counter[str] = Counter()  # what the command counts of the whole source
        super().__init__(file_format="array_record", **options)

    def _download_and_prepare(
        self, dl_manager: tfds.download.DownloadManager, download_config: tfds.download.DownloadConfig
    ) -> None:
        """Generates the splits, then the manifest: TFDS shows the folder only when this method has ended."""
        super()._download_and_prepare(dl_manager, download_config)
        if self.info.splits:
            self._write_manifest(Path(dl_manager.manual_dir))

    def _write_manifest(self, root: Path) -> None:
        """Describes the splits in a pass over their images."""
        splits, images = {}, []
        notes = self.notes.copy()
        first: dict[str, str] = {}  # digest of pixels -> split
        for name, info in self.info.splits.items():
            files = [os.fspath(self.data_path / file) for file in info.filenames]
            splits[name] = make_split(map(describe_shard, files, info.shard_lengths))
            source = array_record_data_source.ArrayRecordDataSource(files)
            for index in range(len(source)):
                example = decode_example(source[index])
                images.append(describe_image(example, decode_pixels(example)))
                if (other := first.setdefault(images[-1].content, name)) != name:
                    notes[f"images of {name} whose pixels are in {other} too"] += 1
                notes.update(example.attributes.get(NOTES, {}))
        settings = {"builder": self.info.full_name, "source": source_name(root), "notes": dict(notes), **self.settings}
        settings["rejected"] = self._account_for_files(root, {image.key for image in images})
        write_set_manifest(self.data_path, images, splits, self.class_names, settings)

    def _account_for_files(self, root: Path, kept: set[str]) -> dict[str, int]:
        """Lists the files of the source that are not among the examples of these keys; reason -> count."""
        return {}

    def label_features(self) -> Features:
        """What is stored beside the image."""
        return {}

    def _info(self) -> tfds.core.DatasetInfo:
        eight_bit = self.builder_config.bit_depth == 8
        dtype, encoding = (np.uint8, None) if eight_bit else (np.uint16, "png")
        image = tfds.features.Image(shape=(None, None, 1), dtype=dtype, encoding_format=encoding)
        text = tfds.features.Text()
        features = {IMAGE: image, KEY: text, SOURCE: text, **self.label_features()}
        description = inspect.cleandoc(type(self).__doc__)
        return _Info(builder=self, description=description, features=tfds.features.FeaturesDict(features))

    def _generate_examples(self, items: Iterable[Any], make: Make, **options: Any) -> Any:
        """What `make(item, bit_depth=…, **options)` gives for all items; picklable, as Beam runs it elsewhere."""
        stored = functools.partial(_stored, make=make, bit_depth=self.builder_config.bit_depth, **options)
        if not self._beam:
            return itertools.chain.from_iterable(map(stored, items))
        import apache_beam as beam

        return beam.Create(list(items)) | beam.Reshuffle() | beam.FlatMap(stored)


def _stored(item: Any, make: Make, **options: Any) -> Iterator[tuple[str, Features]]:
    """Key and features of an item's examples."""
    for example, labels, notes in make(item, **options):
        if notes:
            example = dataclasses.replace(example, attributes={**example.attributes, NOTES: notes})
        yield example.key, {IMAGE: example.image, KEY: example.key, SOURCE: source_text(example), **labels}


def source_name(source: str | os.PathLike) -> str:
    """How a manifest names the folder that a set was made from, without telling where it lies."""
    path = Path(source).resolve()
    return f"{path.name} ({hashlib.sha256(os.fsencode(path)).hexdigest()[:8]})"


def class_names(names: Iterable[str], path: Path) -> list[str]:
    """Names of classes as a list; InputError where one is empty, there twice, or would not stay on one line."""
    found = list(names)
    if not found or len({name.strip() for name in found} - {""}) != len(found):
        raise InputError(f"{path} lists no class, or one of them twice: give every class a name of its own")
    if strange := [name for name in found if printable(name) != name]:
        raise InputError(f"{path} names a class {printable(strange[0])!r}: names have no control characters")
    return found


def folders_of(parent: Path) -> dict[str, Path]:
    """Split -> the folder of its name; splits without one are left out."""
    return {name: parent / name for name in SPLITS if (parent / name).is_dir()}

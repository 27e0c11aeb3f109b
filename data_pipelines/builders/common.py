"""What all builders share: features of an image, curated records as examples, one machine or Apache Beam."""

from __future__ import annotations

import itertools
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import tensorflow_datasets as tfds
from absl import logging

from data_pipelines.builders.manifest import describe_split
from data_pipelines.prepare.curate import Filters, apply_filters
from data_pipelines.decode import ImageRefused, decode_image, make_record
from data_pipelines.errors import InputError
from data_pipelines.records import Record, write_manifest
from data_pipelines.prepare.inputs import Source, SourceReader, SourceUnreadable
from data_pipelines.tfds_examples import IMAGE, KEY, SOURCE, source_text

Example = dict[str, Any]
# Annotations are in the pixels of the source: nothing may be cropped, and a small or flat image keeps its labels.
KEEP_ALL = Filters(min_side=0, min_levels=0, crop_borders=False)
SPLITS = ("train", "val", "validation", "test")


class DepthConfig(tfds.core.BuilderConfig):
    """Stored bit depth of the images; files of another depth are left out, so that none is rescaled unasked."""

    def __init__(self, bit_depth: int):
        super().__init__(name=f"gray{bit_depth}", description=f"one channel, {bit_depth} bit a pixel")
        self.bit_depth = bit_depth


class InfraredBuilder(tfds.core.GeneratorBasedBuilder, skip_registration=True):
    """A builder of one-channel infrared images.

    Every example has `image` (the encoded file that `data_pipelines.prepare` would store: the source's own bytes where
    they are one-channel JPEG, else lossless PNG), `key` (its path, unique in the split) and `source` (JSON: size, bit
    depth, unit, scale and offset). They make the shards readable by this project's pipeline without TensorFlow.

    Args (beside those of `tfds.core.DatasetBuilder`):
      beam: generate with Apache Beam; the runner is chosen by `tfds.download.DownloadConfig`.
      pipeline_split: the split that the manifest lists, which is what this project's pipeline reads when the version
        folder is named in `data.shards`; by default train, or the first where there is no train.
      file_format: ArrayRecord unless told otherwise; TFRecord needs TensorFlow.
    """

    VERSION = tfds.core.Version("1.0.0")
    RELEASE_NOTES: ClassVar = {"1.0.0": "first"}

    def __init__(
        self,
        *,
        beam: bool = False,
        pipeline_split: str | None = None,
        file_format: str = "array_record",
        **options: Any,
    ):
        self._beam = beam
        self._pipeline_split = pipeline_split
        super().__init__(file_format=file_format, **options)

    def _download_and_prepare(
        self, dl_manager: tfds.download.DownloadManager, download_config: tfds.download.DownloadConfig
    ) -> None:
        """Generates the splits, then the manifest: TFDS shows the folder only when this method has ended."""
        super()._download_and_prepare(dl_manager, download_config)
        splits = self.info.splits
        if not splits or self.info.file_format is not tfds.core.FileFormat.ARRAY_RECORD:
            return
        chosen = self._pipeline_split or ("train" if "train" in splits else next(iter(splits)))
        if chosen not in splits:
            raise InputError(f"there is no split {chosen}: choose one of {', '.join(splits)}")
        root = dl_manager.manual_dir if self.MANUAL_DOWNLOAD_INSTRUCTIONS else None
        settings = {
            "builder": self.info.full_name,
            "split": chosen,
            "source": source_name(root),
            "rejected": self._account_for_files(root),
        }
        write_manifest(self.data_path, describe_split(self.data_path, splits[chosen], settings))

    def _account_for_files(self, root: Path | None) -> dict[str, int]:
        """Lists the files of the source that were left out; reason -> count."""
        del root
        return {}

    def _dataset_info(self, description: str, features: dict[str, Any], **options: Any) -> tfds.core.DatasetInfo:
        bit_depth = getattr(self.builder_config, "bit_depth", 8)
        return tfds.core.DatasetInfo(
            builder=self,
            description=description,
            features=tfds.features.FeaturesDict({**image_features(bit_depth), **features}),
            **options,
        )

    def _generate(self, items: Iterable[Any], make: Callable[[Any], Iterator[tuple[str, Example]]]) -> Any:
        """Examples of all items; `make` must be picklable, Beam runs it elsewhere."""
        if not self._beam:
            return itertools.chain.from_iterable(map(make, items))
        import apache_beam as beam

        return beam.Create(list(items)) | beam.Reshuffle() | beam.FlatMap(make)


class FolderBuilder(InfraredBuilder, skip_registration=True):
    """A builder that reads the user's files: `manual_dir` of `tfds.download.DownloadConfig`."""

    BUILDER_CONFIGS: ClassVar = [DepthConfig(8), DepthConfig(16)]
    MANUAL_DOWNLOAD_INSTRUCTIONS = (
        "Give the folder of your files as manual_dir; its layout is in the class description."
    )


def source_name(source: str | os.PathLike | None) -> str | None:
    """How a manifest names the folder that a set was made from."""
    return None if source is None else str(Path(source).resolve())


def image_features(bit_depth: int) -> dict[str, Any]:
    dtype = np.uint8 if bit_depth == 8 else np.uint16
    return {
        IMAGE: tfds.features.Image(
            shape=(None, None, 1), dtype=dtype, encoding_format=None if bit_depth == 8 else "png"
        ),
        KEY: tfds.features.Text(),
        SOURCE: tfds.features.Text(),
    }


def objects_feature(names: Sequence[str] | None) -> tfds.features.Sequence:
    """Boxes of an image; `names` None where the classes are read with the annotations."""
    return tfds.features.Sequence(
        {
            "bbox": tfds.features.BBoxFeature(),
            "label": tfds.features.ClassLabel(names=names),
            "area": np.float32,
            "is_crowd": np.bool_,
        }
    )


def box_object(
    x: float, y: float, width: float, height: float, size: tuple[int, int], label: int, area: float, crowd: bool
) -> Example | None:
    """One object from a pixel box (corner and extent) in an image of `size` rows and columns; clipped to the image.

    None when nothing of it lies inside.
    """
    rows, columns = size
    left, top = max(x, 0.0), max(y, 0.0)
    right, bottom = min(x + width, columns), min(y + height, rows)
    if left >= right or top >= bottom:
        return None
    box = tfds.features.BBox(ymin=top / rows, xmin=left / columns, ymax=bottom / rows, xmax=right / columns)
    return {"bbox": box, "label": label, "area": area, "is_crowd": crowd}


def image_example(record: Record) -> Example:
    return {IMAGE: record.payload, KEY: record.key, SOURCE: source_text(record)}


def examine(reader: SourceReader, source: Source, filters: Filters, bit_depth: int) -> Record:
    """The record of a listed file.

    Raises:
      SourceUnreadable, ImageRefused: it is left out; `reason` and `detail` say why.
    """
    data = reader.read(source, filters.max_file_bytes)
    record = make_record(source.key, data, apply_filters(decode_image(data, max_pixels=filters.max_pixels), filters))
    if record.bit_depth != bit_depth:
        raise ImageRefused("bit_depth", f"{record.bit_depth} bit a pixel, the set is of {bit_depth}")
    return record


def part_examples(part: Sequence[Source], filters: Filters, bit_depth: int) -> Iterator[tuple[str, Example]]:
    """Key and example of each usable file of a part of a listing; the others are logged and left out."""
    with SourceReader() as reader:
        for source in part:
            try:
                record = examine(reader, source, filters, bit_depth)
            except (SourceUnreadable, ImageRefused) as refusal:
                logging.warning("left out %s: %s (%s)", source.key, refusal.reason, refusal.detail)
                continue
            yield record.key, image_example(record)


def annotated_record(path: Path, key: str, bit_depth: int) -> Record:
    """The record of an annotated image file, uncropped.

    Raises:
      InputError: it cannot be used; leaving it out would silently drop its annotations.
    """
    source = Source(key=key, path=str(path), size=0, modified=0)
    try:
        with SourceReader() as reader:
            return examine(reader, source, KEEP_ALL, bit_depth)
    except (SourceUnreadable, ImageRefused) as refusal:
        raise InputError(
            f"annotated image {path} is not usable ({refusal.reason}: {refusal.detail}); mend it or remove its entry"
        ) from refusal


def split_folders(root: Path, *kinds: str) -> dict[str, Path]:
    """Split -> folder below the first of the folders `kinds` of `root` that exists.

    Raises:
      InputError: none exists, or it has no folder named after a split.
    """
    for kind in kinds:
        folder = root / kind
        if folder.is_dir():
            splits = {name: folder / name for name in SPLITS if (folder / name).is_dir()}
            if not splits:
                raise InputError(
                    f"{folder} has no folder {', '.join(SPLITS[:-1])} or {SPLITS[-1]}: sort its files into one"
                )
            return splits
    raise InputError(f"{root} has no folder {' or '.join(kinds)}: see the layout in the builder's description")

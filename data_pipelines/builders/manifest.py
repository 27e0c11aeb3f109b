"""The manifest that makes a set built by TensorFlow Datasets a shard set of this project."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import tensorflow_datasets as tfds
from array_record.python import array_record_data_source
from etils import epath

from data_pipelines.intensity import to_uint8
from data_pipelines.examples import Example, decode_example, decode_pixels
from data_pipelines.shards import Manifest, describe_shard, fingerprint_splits, make_split


def split_records(folder: epath.Path, info: tfds.core.SplitInfo) -> Iterator[Example]:
    """The records of a split whose shards lie in `folder`, in shard order."""
    source = array_record_data_source.ArrayRecordDataSource([os.fspath(folder / name) for name in info.filenames])
    for index in range(len(source)):
        yield decode_example(source[index])


def describe_split(folder: epath.Path, info: tfds.core.SplitInfo, settings: Mapping[str, Any]) -> Manifest:
    """The manifest of a split whose shards lie in `folder`, from a pass over its images."""
    sizes, depths = Counter(), Counter()
    total, entropies = np.zeros(256, np.int64), []
    for record in split_records(folder, info):
        histogram = np.bincount(to_uint8(decode_pixels(record)).ravel(), minlength=256)
        share = histogram[histogram > 0] / histogram.sum()
        entropies.append(float(-(share * np.log2(share)).sum()))
        total += histogram
        sizes[f"{record.width}x{record.height}"] += 1
        depths[str(record.bit_depth)] += 1
    levels = np.arange(256) / 255
    mean = float(total @ levels / total.sum())
    variance = float(total @ levels**2 / total.sum() - mean**2)
    shards = tuple(
        describe_shard(folder / name, count) for name, count in zip(info.filenames, info.shard_lengths, strict=True)
    )
    splits = {info.name: make_split(shards)}
    return Manifest(
        splits=splits,
        classes={},
        sizes=dict(sizes),
        bit_depths=dict(depths),
        mean=mean,
        std=max(variance, 0.0) ** 0.5,
        entropy=float(np.mean(entropies)),
        fingerprint=fingerprint_splits(splits),
        settings=settings,
    )

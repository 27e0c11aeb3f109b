"""Small shard sets for tests: smooth noise as gray JPEG and PNG records, damaged where asked."""

import dataclasses
import io
import os
from collections import Counter

import numpy as np
from PIL import Image

from data_pipelines.records import (
    Manifest,
    Record,
    encode_record,
    fingerprint_shards,
    write_manifest,
    write_shard,
)


def make_image(seed, height=60, width=80):
    """(H, W) uint8 with detail at several scales."""
    rng = np.random.default_rng(seed)
    coarse = Image.fromarray(rng.integers(0, 256, (6, 8), dtype=np.uint8)).resize((width, height))
    return np.clip(np.asarray(coarse) + rng.normal(0, 9, (height, width)), 0, 255).astype(np.uint8)


def make_record(key, image, encoding="jpeg"):
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, encoding)
    depth = 8 * image.dtype.itemsize
    return Record(key, buffer.getvalue(), encoding, *image.shape, depth, {})


def truncated(record):
    """The record with the second half of its image gone: its header is whole, its image does not decode."""
    return dataclasses.replace(record, payload=record.payload[: len(record.payload) // 2])


def write_set(folder, records, shards=2):
    """Writes a shard set and returns its folder as text."""
    os.makedirs(folder, exist_ok=True)
    written = [
        write_shard(folder / f"data-{k}.array_record", [encode_record(r) for r in records[k::shards]])
        for k in range(shards)
    ]
    sizes = dict(Counter(f"{record.width}x{record.height}" for record in records))
    depths = dict(Counter(str(record.bit_depth) for record in records))
    write_manifest(
        folder, Manifest(len(records), tuple(written), sizes, depths, 0.4, 0.2, 6.5, fingerprint_shards(written))
    )
    return str(folder)


def make_set(folder, count, damaged=(), name="image", **size):
    """A set of `count` records `image00`, ..., those at `damaged` truncated."""
    records = [
        make_record(f"{name}{i:02d}", make_image(i, **size), "png" if i % 5 == 0 else "jpeg") for i in range(count)
    ]
    return write_set(folder, [truncated(r) if i in damaged else r for i, r in enumerate(records)])

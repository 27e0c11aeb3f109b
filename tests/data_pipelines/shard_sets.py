"""Small shard sets for tests: smooth noise as gray JPEG and PNG examples, damaged where asked."""

import dataclasses
import io
import os
from collections import Counter

import numpy as np
from PIL import Image

from data_pipelines.examples import Example, encode_example
from data_pipelines.shards import Manifest, fingerprint_splits, make_split, read_manifest, write_manifest, write_shard


def make_image(seed, height=60, width=80):
    """(H, W) uint8 with detail at several scales."""
    rng = np.random.default_rng(seed)
    coarse = Image.fromarray(rng.integers(0, 256, (6, 8), dtype=np.uint8)).resize((width, height))
    return np.clip(np.asarray(coarse) + rng.normal(0, 9, (height, width)), 0, 255).astype(np.uint8)


def make_example(key, image, encoding="jpeg"):
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, encoding)
    depth = 8 * image.dtype.itemsize
    return Example(key, buffer.getvalue(), encoding, *image.shape, depth, {})


def truncated(example):
    """The example with the second half of its image gone: its header is whole, its image does not decode."""
    return dataclasses.replace(example, image=example.image[: len(example.image) // 2])


def write_splits(folder, splits, shards=2, classes=None):
    """Writes examples by split and returns the folder as text."""
    os.makedirs(folder, exist_ok=True)
    written = {
        name: make_split(
            write_shard(folder / f"{name}-{k}.array_record", map(encode_example, examples[k::shards]))
            for k in range(shards)
        )
        for name, examples in splits.items()
    }
    everything = [example for examples in splits.values() for example in examples]
    sizes = dict(Counter(f"{example.width}x{example.height}" for example in everything))
    depths = dict(Counter(str(example.bit_depth) for example in everything))
    fingerprint = fingerprint_splits(written)
    write_manifest(folder, Manifest(written, classes or {}, sizes, depths, 0.4, 0.2, 6.5, fingerprint))
    return str(folder)


def write_set(folder, examples, shards=2):
    """Writes a set of one split and returns its folder as text."""
    return write_splits(folder, {"train": examples}, shards)


def make_set(folder, count, damaged=(), name="image", **size):
    """A set of `count` examples `image00`, ..., those at `damaged` truncated."""
    examples = [
        make_example(f"{name}{i:02d}", make_image(i, **size), "png" if i % 5 == 0 else "jpeg") for i in range(count)
    ]
    return write_set(folder, [truncated(r) if i in damaged else r for i, r in enumerate(examples)])


def counts(folder):
    """Split -> images of a built set."""
    return {name: split.count for name, split in read_manifest(folder).splits.items()}


def notes(folder):
    """What was done to the annotations of a built set -> how many."""
    return read_manifest(folder).settings["notes"]

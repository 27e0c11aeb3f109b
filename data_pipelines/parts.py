"""One part of a collection, examined: the unit of parallel work and of resuming.

A part is a fixed run of listed files. Examining it decodes and filters each file and leaves two files: the encoded
records that passed, and, written last, a JSON file with a row for every file. A part whose JSON file exists is done.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
from collections.abc import Sequence
from typing import Any

import numpy as np

from data_pipelines.curation import Filters, apply_filters
from data_pipelines.decode import ImageRefused, decode_image, make_record
from data_pipelines.intensity import to_uint8
from data_pipelines.records import encode_record, write_shard
from data_pipelines.sources import Rejection, Source, SourceUnreadable, read_source


@dataclasses.dataclass(frozen=True)
class Candidate:
    """One image that passed the filters of its own.

    Attributes:
      key: see `Source.key`.
      height, width, bit_depth: of the stored image.
      bytes: size of the encoded record.
      content: BLAKE2b digest (hexadecimal) of shape, type and pixels; equal pixels, equal digest.
      pixel_sum, pixel_square_sum: sums over the pixels in [0, 1] under the default intensity mapping.
      entropy: Shannon entropy of the 256-level histogram, bit.
      attributes: the record's.
    """

    key: str
    height: int
    width: int
    bit_depth: int
    bytes: int
    content: str
    pixel_sum: float
    pixel_square_sum: float
    entropy: float
    attributes: dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Part:
    """The rows of an examined part; record i of its records file belongs to candidate i."""

    candidates: tuple[Candidate, ...]
    rejections: tuple[Rejection, ...]


def records_path(folder: str, number: int) -> str:
    """Path of the encoded records of part `number`."""
    return os.path.join(folder, f"part-{number:06d}.array_record")


def rows_path(folder: str, number: int) -> str:
    """Path of the rows of part `number`; the part is done when it exists."""
    return os.path.join(folder, f"part-{number:06d}.json")


def examine_part(folder: str, number: int, sources: Sequence[Source], filters: Filters) -> int:
    """Examines `sources` and writes part `number` into `folder`. Returns the number of candidates."""
    candidates: list[Candidate] = []
    rejections: list[Rejection] = []

    def accepted_records():
        for source in sources:
            try:
                stored, candidate = _examine(source, filters)
            except (SourceUnreadable, ImageRefused) as refusal:
                rejections.append(Rejection(source.key, refusal.reason, refusal.detail))
                continue
            candidates.append(candidate)
            yield stored

    write_shard(records_path(folder, number), accepted_records())
    rows = {
        "candidates": [dataclasses.asdict(candidate) for candidate in candidates],
        "rejections": [dataclasses.asdict(rejection) for rejection in rejections],
    }
    beside = f"{rows_path(folder, number)}.{os.getpid()}"
    with open(beside, "w", encoding="utf-8") as file:
        json.dump(rows, file)
    os.replace(beside, rows_path(folder, number))
    return len(candidates)


def _examine(source: Source, filters: Filters) -> tuple[bytes, Candidate]:
    """Returns the encoded record of one file and its row."""
    data = read_source(source, filters.max_file_bytes)
    image = apply_filters(decode_image(data, max_pixels=filters.max_pixels), filters)
    record = make_record(source.key, data, image)
    stored = encode_record(record)
    gray = to_uint8(image.pixels)
    histogram = np.bincount(gray.ravel(), minlength=256)
    levels = np.arange(256) / 255
    share = histogram[histogram > 0] / gray.size
    return stored, Candidate(
        key=source.key,
        height=record.height,
        width=record.width,
        bit_depth=record.bit_depth,
        bytes=len(stored),
        content=_content_digest(image.pixels),
        pixel_sum=float(histogram @ levels),
        pixel_square_sum=float(histogram @ levels**2),
        entropy=float(-(share * np.log2(share)).sum()),
        attributes=dict(record.attributes),
    )


def _content_digest(pixels: np.ndarray) -> str:
    digest = hashlib.blake2b(f"{pixels.shape}{pixels.dtype.str}".encode(), digest_size=16)
    digest.update(pixels.tobytes())
    return digest.hexdigest()


def read_part(folder: str, number: int) -> Part:
    """Returns the rows of a finished part."""
    with open(rows_path(folder, number), encoding="utf-8") as file:
        rows = json.load(file)
    return Part(
        candidates=tuple(Candidate(**row) for row in rows["candidates"]),
        rejections=tuple(Rejection(**row) for row in rows["rejections"]),
    )

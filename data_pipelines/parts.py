"""One part of a collection, examined: the unit of parallel work and of resuming.

A part is a fixed run of listed files. Examining it decodes and filters each file and leaves three files: the encoded
records that passed, their fingerprints for the duplicate search, and, written last, a JSON file with a row for every
file. A part whose JSON file exists is done.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
from collections import Counter
from collections.abc import Iterator, Sequence

import numpy as np

from data_pipelines.curation import Filters, apply_filters
from data_pipelines.decode import DecodedImage, ImageRefused, decode_image, make_example
from data_pipelines.duplicates import FEATURE_SIZE, fingerprint_image
from data_pipelines.intensity import count_values, to_uint8
from data_pipelines.examples import Example, encode_example
from data_pipelines.shards import write_shard
from data_pipelines.sources import Rejection, Source, SourceReader, SourceUnreadable


@dataclasses.dataclass(frozen=True, slots=True)
class Candidate:
    """One image that passed the filters of its own.

    Attributes:
      key: see `Source.key`.
      height, width, bit_depth: of the stored image.
      bytes: size of the encoded record.
      content: BLAKE2b digest (hexadecimal) of shape, type and pixels; equal pixels, equal digest.
      pixel_sum, pixel_square_sum: sums over the pixels in [0, 1] under the default intensity mapping.
      entropy: Shannon entropy of the 256-level histogram, bit.
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


@dataclasses.dataclass(frozen=True)
class Part:
    """The rows of an examined part; record i of its records file belongs to candidate i.

    Attributes:
      candidates: the images that passed their own filters.
      rejections: the files that did not.
      kinds: "FORMAT mode" -> number of candidates, and "notes" that apply to some: frames dropped, turned, cropped.
      codes: (n,) uint64 perceptual hashes of the candidates.
      features: (n, 256) float16 small-image features.
    """

    candidates: tuple[Candidate, ...]
    rejections: tuple[Rejection, ...]
    kinds: Counter[str]
    codes: np.ndarray
    features: np.ndarray


def records_path(folder: str, number: int) -> str:
    """Path of the encoded records of part `number`."""
    return os.path.join(folder, f"part-{number:06d}.array_record")


def rows_path(folder: str, number: int) -> str:
    """Path of the rows of part `number`; the part is done when it exists."""
    return os.path.join(folder, f"part-{number:06d}.json")


def _fingerprints_path(folder: str, number: int) -> str:
    return os.path.join(folder, f"part-{number:06d}.npz")


def examine_part(folder: str, number: int, sources: Sequence[Source], filters: Filters) -> int:
    """Examines `sources` and writes part `number` into `folder`. Returns the number of files examined."""
    candidates: list[Candidate] = []
    rejections: list[Rejection] = []
    kinds: Counter[str] = Counter()
    codes: list[np.uint64] = []
    features: list[np.ndarray] = []

    def accepted_records() -> Iterator[bytes]:
        with SourceReader() as reader:
            for source in sources:
                try:
                    data = reader.read(source, filters.max_file_bytes)
                    image = apply_filters(decode_image(data, max_pixels=filters.max_pixels), filters)
                except (SourceUnreadable, ImageRefused) as refusal:
                    rejections.append(Rejection(source.key, refusal.reason, refusal.detail))
                    continue
                record = make_example(source.key, data, image)
                stored = encode_example(record)
                candidates.append(_describe(record, image.pixels, len(stored)))
                kinds.update(_kinds(image))
                code, feature = fingerprint_image(image.pixels)
                codes.append(code)
                features.append(feature)
                yield stored

    write_shard(records_path(folder, number), accepted_records())
    np.savez(
        _fingerprints_path(folder, number),
        codes=np.asarray(codes, np.uint64),
        features=np.asarray(features, np.float16).reshape(-1, FEATURE_SIZE),
    )
    rows = {
        "candidates": [dataclasses.asdict(candidate) for candidate in candidates],
        "rejections": [dataclasses.asdict(rejection) for rejection in rejections],
        "kinds": kinds,
    }
    beside = f"{rows_path(folder, number)}.{os.getpid()}"
    with open(beside, "w", encoding="utf-8") as file:
        json.dump(rows, file)
    os.replace(beside, rows_path(folder, number))
    return len(sources)


def _kinds(image: DecodedImage) -> Iterator[str]:
    """What the report counts about an image's source."""
    attributes = image.attributes
    yield f"{attributes['format']} {attributes['mode']}"
    for name in ("frames", "orientation", "border_crop", "scale"):
        if name in attributes:
            yield f"with {name}"


def _describe(record: Example, pixels: np.ndarray, size: int) -> Candidate:
    """Returns the row of an accepted image whose encoded record has `size` bytes."""
    gray = to_uint8(pixels)
    histogram = count_values(gray)
    levels = np.arange(256) / 255
    share = histogram[histogram > 0] / gray.size
    return Candidate(
        key=record.key,
        height=record.height,
        width=record.width,
        bit_depth=record.bit_depth,
        bytes=size,
        content=_content_digest(pixels),
        pixel_sum=float(histogram @ levels),
        pixel_square_sum=float(histogram @ levels**2),
        entropy=float(-(share * np.log2(share)).sum()),
    )


def _content_digest(pixels: np.ndarray) -> str:
    digest = hashlib.blake2b(f"{pixels.shape}{pixels.dtype.str}".encode(), digest_size=16)
    digest.update(pixels.tobytes())
    return digest.hexdigest()


def read_part(folder: str, number: int) -> Part:
    """Returns the rows of a finished part."""
    with open(rows_path(folder, number), encoding="utf-8") as file:
        rows = json.load(file)
    with np.load(_fingerprints_path(folder, number)) as arrays:
        codes, features = arrays["codes"], arrays["features"]
    return Part(
        candidates=tuple(Candidate(**row) for row in rows["candidates"]),
        rejections=tuple(Rejection(**row) for row in rows["rejections"]),
        kinds=Counter(rows["kinds"]),
        codes=codes,
        features=features,
    )

"""The files of a collection, examined in parts, and all parts together.

A part is a fixed run of listed files: the unit of parallel work and of resuming. Examining it decodes and filters each
file and leaves two files: the encoded examples that passed and, written last, a JSON file with a row for every file and
the fingerprints for the duplicate search. A part whose JSON file exists is done.
"""

import dataclasses
import hashlib
import itertools
import json
import operator
import os
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence

import numpy as np
from array_record.python import array_record_data_source

from data_pipelines.decode import DecodedImage, ImageRefused, decode_image, make_example
from data_pipelines.examples import Example, decode_example, decode_pixels, encode_example
from data_pipelines.files import atomic_write
from data_pipelines.intensity import Intensity, count_values
from data_pipelines.prepare.archives import Rejection, Source, SourceReader
from data_pipelines.prepare.curate import Filters, apply_filters
from data_pipelines.prepare.duplicates import FEATURE_SIZE, fingerprint_image
from data_pipelines.shards import write_shard

EXAMPLES, ROWS = ".array_record", ".json"
_COUNTED = ("frames", "orientation", "border_crop", "scale")  # attributes of images that the report counts


@dataclasses.dataclass(frozen=True, slots=True)
class Candidate:
    """One image that passed the filters of its own.

    Attributes:
      key: see `Source.key`.
      height, width, bit_depth: of the stored image.
      content: BLAKE2b digest (hexadecimal) of shape, type and pixels; equal pixels, equal digest.
      pixel_sum, pixel_square_sum: sums over the pixels in [0, 1] under the default intensity mapping.
      entropy: Shannon entropy of the 256-level histogram, bit.
    """

    key: str
    height: int
    width: int
    bit_depth: int
    content: str
    pixel_sum: float
    pixel_square_sum: float
    entropy: float

    @property
    def pixels(self) -> int:
        """Number of pixels."""
        return self.height * self.width


def part_path(folder: str, number: int, suffix: str) -> str:
    """Path of one of the two files of part `number`: EXAMPLES, or ROWS, with which the part is done."""
    return os.path.join(folder, f"part-{number:06d}{suffix}")


def read_images(
    sources: Iterable[Source], filters: Filters, refused: list[Rejection], encoding: str = "source"
) -> Iterator[tuple[Example, DecodedImage]]:
    """Reads, decodes and filters listed files one after the other.

    Args:
      sources: which files.
      filters: what they must satisfy.
      refused: gets a row for each file that is left out.
      encoding: see `decode.make_example`.
    """
    with SourceReader() as reader:
        for source in sources:
            try:
                data = reader.read(source, filters.max_file_bytes)
                image = apply_filters(decode_image(data, max_pixels=filters.max_pixels), filters)
            except ImageRefused as refusal:
                refused.append(Rejection(source.key, refusal.reason, refusal.detail))
            else:
                yield make_example(source.key, data, image, encoding), image


def examine_part(
    folder: str, number: int, sources: Sequence[Source], filters: Filters, encoding: str = "source"
) -> int:
    """Examines `sources` and writes part `number` into `folder`. Returns the number of files examined."""
    candidates: list[Candidate] = []
    rejections: list[Rejection] = []
    kinds: Counter[str] = Counter()
    fingerprints: list[tuple[int, str]] = []

    def accepted() -> Iterator[bytes]:
        for example, image in read_images(sources, filters, rejections, encoding):
            candidates.append(describe_image(example, image.pixels))
            kinds.update([f"{image.attributes['format']} {image.attributes['mode']}"])
            kinds.update(f"with {name}" for name in _COUNTED if name in image.attributes)
            code, feature = fingerprint_image(image.pixels)
            fingerprints.append((int(code), feature.tobytes().hex()))
            yield encode_example(example)

    write_shard(part_path(folder, number, EXAMPLES), accepted())
    rows = {"candidates": candidates, "rejections": rejections, "kinds": kinds, "fingerprints": fingerprints}
    with atomic_write(part_path(folder, number, ROWS)) as path:
        path.write_text(json.dumps(rows, default=dataclasses.asdict), encoding="utf-8")
    return len(sources)


def describe_image(example: Example, pixels: np.ndarray) -> Candidate:
    """Returns the row of an example whose stored pixels are (H, W) uint8 or uint16."""
    histogram = count_values(Intensity().apply(pixels))
    levels = np.arange(256) / 255
    share = histogram[histogram > 0] / pixels.size
    content = hashlib.blake2b(f"{pixels.shape}{pixels.dtype.str}".encode(), digest_size=16)
    content.update(pixels.tobytes())
    return Candidate(
        key=example.key,
        height=example.height,
        width=example.width,
        bit_depth=example.bit_depth,
        content=content.hexdigest(),
        pixel_sum=float(histogram @ levels),
        pixel_square_sum=float(histogram @ levels**2),
        entropy=float(-(share * np.log2(share)).sum()),
    )


class Collection:
    """Every examined file of a collection: the rows of all its parts, in order.

    Attributes:
      folder: where the parts are.
      candidates: the N images that passed their own filters, in listing order.
      rejections: the files that did not.
      kinds: "FORMAT mode" -> number of candidates, and "notes" that apply to some: frames dropped, turned, cropped.
      codes: (N,) uint64 perceptual hashes.
      features: (N, 256) float16 small-image features.
      places: (part number, position in the part) of each candidate's example.
    """

    def __init__(self, folder: str, part_count: int):
        self.folder = folder
        self.candidates: list[Candidate] = []
        self.rejections: list[Rejection] = []
        self.kinds: Counter[str] = Counter()
        self.places: list[tuple[int, int]] = []
        codes, features = [], bytearray()
        for number in range(part_count):
            with open(part_path(folder, number, ROWS), encoding="utf-8") as file:
                rows = json.load(file)
            self.candidates += [Candidate(**row) for row in rows["candidates"]]
            self.rejections += [Rejection(**row) for row in rows["rejections"]]
            self.kinds.update(rows["kinds"])
            self.places += [(number, position) for position in range(len(rows["candidates"]))]
            for code, feature in rows["fingerprints"]:
                codes.append(code)
                features += bytes.fromhex(feature)
        self.codes = np.array(codes, np.uint64)
        self.features = np.frombuffer(features, np.float16).reshape(-1, FEATURE_SIZE)

    def stored(self, indices: Iterable[int]) -> Iterator[bytes]:
        """The encoded examples of some candidates, given in increasing order."""
        places = (self.places[index] for index in indices)
        for part, of_part in itertools.groupby(places, key=operator.itemgetter(0)):
            source = array_record_data_source.ArrayRecordDataSource(part_path(self.folder, part, EXAMPLES))
            yield from (source[position] for _, position in of_part)

    def pixels(self, index: int) -> np.ndarray:
        """The stored pixels of one candidate, (H, W) uint8 or uint16."""
        (stored,) = self.stored([index])
        return decode_pixels(decode_example(stored))

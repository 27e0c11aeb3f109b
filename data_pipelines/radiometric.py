"""Radiometric JPEG: the raw sensor array inside the file, not the false-colour picture that it shows.

FLIR's application segments hold a file of its own ("FFF"): a header, a directory of records, the raw array and the
constants of the camera among them. Sources: the field tables of ExifTool's documentation (FLIR tags), and the files.
"""

import io
import struct
from typing import Any

import numpy as np
from PIL import Image
from PIL.JpegImagePlugin import JpegImageFile

from data_pipelines.refusals import ImageRefused

_FLIR_SEGMENT = b"FLIR\0\1"
_RAW_RECORD, _CAMERA_RECORD = 1, 32
_RAW_HEADER_SIZE = 32
_PNG_SIGNATURE = b"\x89PNG"
_MAX_RECORDS = 4096
_CLEARLY = 4  # real frames differ 50-fold or more
# Offset in the camera's record and format.
_CAMERA_FACTS = {
    "planck_r1": (88, "f"),
    "planck_r2": (780, "f"),
    "planck_b": (92, "f"),
    "planck_f": (96, "f"),
    "planck_o": (776, "i"),
    "emissivity": (32, "f"),
    "object_distance": (36, "f"),
    "reflected_apparent_temperature": (40, "f"),
}
# Application segments without a common use. An array of half the picture's height and width is seen, debug data of a
# telephone beside its large picture are not.
_OTHER_ARRAY_MARKERS = [f"APP{number}" for number in range(3, 11)]
_SMALLEST_ARRAY = 1 << 13


def read_raw_array(image: JpegImageFile, max_pixels: int) -> tuple[np.ndarray, dict[str, Any]] | None:
    """Returns the raw sensor counts, (H, W) uint16, and the camera's constants, of a radiometric JPEG; else None.

    The Planck constants and emissivity in the attributes turn counts into temperatures; the counts themselves are
    stored, as they are exact and the temperature depends on assumptions about the scene.

    Args:
      image: a JPEG file.
      max_pixels: refuse larger arrays before anything is unpacked.

    Raises:
      ImageRefused: there is a raw array, but of a kind that is not read (DJI and others), damaged or too large.
    """
    flir, others = [], dict.fromkeys(_OTHER_ARRAY_MARKERS, 0)
    for marker, content in image.applist:
        if marker == "APP1" and content.startswith(_FLIR_SEGMENT):
            flir.append(content)
        elif marker in others:
            others[marker] += len(content)
    if flir:
        try:
            return _read_flir(b"".join(content[8:] for content in _in_order(flir)), max_pixels)
        except (struct.error, ValueError, OSError, SyntaxError, KeyError) as error:
            detail = " ".join(str(error).split()) or type(error).__name__
            raise ImageRefused("radiometric_unreadable", detail) from error
    largest = max(others, key=others.__getitem__)
    if others[largest] >= max(_SMALLEST_ARRAY, image.width * image.height // 2):
        place = f"{others[largest]} bytes in {largest}, as DJI writes"
        detail = f"the picture renders a raw array ({place}) that is not read; export it as TIFF"
        raise ImageRefused("radiometric_unreadable", detail)
    return None


def _in_order(segments: list[bytes]) -> list[bytes]:
    """FLIR's segments by their numbers, all of them there."""
    ordered = sorted(segments, key=lambda content: content[6])
    if [content[6] for content in ordered] != list(range(ordered[0][7] + 1)):
        raise ValueError(f"{len(segments)} of {ordered[0][7] + 1} parts of the metadata")
    return ordered


def _read_flir(data: bytes, max_pixels: int) -> tuple[np.ndarray, dict[str, Any]]:
    # The version, near 100, tells the byte order of the directory; every record has its own.
    order = ">" if int.from_bytes(data[20:24], "big") < int.from_bytes(data[20:24], "little") else "<"
    start, count = struct.unpack_from(f"{order}II", data, 24)
    records = {}
    for number in range(min(count, _MAX_RECORDS)):
        kind, _, _, _, place, length = struct.unpack_from(f"{order}HHIIII", data, start + 32 * number)
        records.setdefault(kind, data[place : place + length])
    facts = {}
    if camera := records.get(_CAMERA_RECORD):
        order = _byte_order(camera)
        for name, (place, kind) in _CAMERA_FACTS.items():
            value = struct.unpack_from(order + kind, camera, place)[0]
            if np.isfinite(value):
                facts[name] = float(value)
    return _read_counts(records[_RAW_RECORD], max_pixels), {"unit": "raw_count", "camera": facts}


def _byte_order(record: bytes) -> str:
    """A record begins with the number 2 in its byte order."""
    if record[:2] not in (b"\2\0", b"\0\2"):
        raise ValueError(f"a record with the byte order mark {record[:2].hex()}, which is none")
    return "<" if record[0] else ">"


def _read_counts(record: bytes, max_pixels: int) -> np.ndarray:
    order = _byte_order(record)
    width, height = struct.unpack_from(f"{order}HH", record, 2)
    if width * height > max_pixels:
        raise ValueError(f"the raw array of {width}x{height} is over {max_pixels} pixels")
    payload = record[_RAW_HEADER_SIZE:]
    if not payload.startswith(_PNG_SIGNATURE):
        return np.frombuffer(payload, f"{order}u2", width * height).reshape(height, width).astype(np.uint16)
    with Image.open(io.BytesIO(payload), formats=("PNG",)) as image:
        if image.size != (width, height):
            raise ValueError(f"the metadata says {width}x{height}, the raw array is {'x'.join(map(str, image.size))}")
        if not image.mode.startswith("I;16"):
            raise ValueError(f"the raw array is a PNG of mode {image.mode}, not of 16 bit")
        counts = np.asarray(image).astype(np.uint16)
    # Cameras write PNG in both byte orders, whatever the record's: neighbours are alike in the right one.
    swapped = counts.byteswap()
    steps, swapped_steps = (float(np.abs(np.diff(array.astype(np.int32))).sum()) for array in (counts, swapped))
    if max(steps, swapped_steps) < _CLEARLY * min(steps, swapped_steps) or steps == swapped_steps:
        raise ValueError("the byte order of the raw array cannot be told")
    return counts if steps < swapped_steps else swapped

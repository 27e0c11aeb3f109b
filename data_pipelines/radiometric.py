"""FLIR radiometric JPEG: the raw sensor array inside the file, not the false-colour picture that it shows.

Needs the `flir` extra (package flyr, EUPL-1.2); without it such files are refused rather than kept as false colour.
"""

from __future__ import annotations

import io
import struct
from typing import Any

import numpy as np

_FLIR_SEGMENT = b"FLIR\x00\x01"
# The segment stands among the JPEG's application segments, before the picture data.
_SEARCHED_BYTES = 1 << 20
_PNG_SIGNATURE = b"\x89PNG"
_RAW_HEADER_SIZE = 32
_PLANCK_CONSTANTS = ("planck_r1", "planck_r2", "planck_b", "planck_f", "planck_o")
_CAMERA_FACTS = (*_PLANCK_CONSTANTS, "emissivity", "object_distance", "reflected_apparent_temperature")


class RadiometricExtraMissing(Exception):
    """The package that reads FLIR's raw array is not installed."""


class RadiometricUnreadable(Exception):
    """The file says that it is radiometric, but its raw array cannot be read."""


def is_flir_jpeg(data: bytes) -> bool:
    """Whether the JPEG file `data` carries FLIR's application segments."""
    return data.find(_FLIR_SEGMENT, 0, _SEARCHED_BYTES) >= 0


def read_flir_array(data: bytes, max_pixels: int) -> tuple[np.ndarray, dict[str, Any]]:
    """Returns the raw sensor counts, (H, W) uint16, and the camera's constants, of a FLIR radiometric JPEG.

    The Planck constants and emissivity in the attributes turn counts into temperatures; the counts themselves are
    stored, as they are exact and the temperature depends on assumptions about the scene.

    Raises:
      RadiometricExtraMissing: the `flir` extra is not installed.
      RadiometricUnreadable: the embedded array is damaged, contradicts its own size, or has over `max_pixels` pixels.
    """
    try:
        from flyr.records import RecordIndex, extract_flir_app1, parse_flir_records
        from flyr.thermal import parse_camera_info, parse_raw_data
    except ImportError as error:
        raise RadiometricExtraMissing(str(error)) from error
    try:
        segments = extract_flir_app1(io.BytesIO(data))
        index = parse_flir_records(segments)
        entry = index[RecordIndex.RAW_DATA.value]
        _check_size(segments, entry[2], max_pixels)
        _, _, counts = parse_raw_data(segments, entry)
        camera = parse_camera_info(segments, index[RecordIndex.CAMERA_INFO.value])
    except RadiometricUnreadable:
        raise
    except Exception as error:  # The parser meets damaged bytes with whatever its next operation raises.
        raise RadiometricUnreadable(" ".join(str(error).split()) or type(error).__name__) from error
    if counts.size == 0 or counts.min() < 0 or counts.max() > 65535:
        raise RadiometricUnreadable("the raw values do not fit 16 bit")
    facts = {name: float(camera[name]) for name in _CAMERA_FACTS if np.isfinite(camera[name])}
    return counts.astype(np.uint16), {"unit": "raw_count", "camera": facts}


def _check_size(segments: io.BytesIO, offset: int, max_pixels: int) -> None:
    """Looks at the sizes that the raw data declares before anything is unpacked."""
    segments.seek(offset)
    header = segments.read(_RAW_HEADER_SIZE + 24)
    width, height = struct.unpack_from("<HH", header, 2)
    if header[_RAW_HEADER_SIZE : _RAW_HEADER_SIZE + 4] == _PNG_SIGNATURE:
        png_width, png_height = struct.unpack_from(">II", header, _RAW_HEADER_SIZE + 16)
        if png_width * png_height > max_pixels:
            raise RadiometricUnreadable(f"the raw array of {png_width}x{png_height} is over {max_pixels} pixels")
        if (png_width, png_height) != (width, height):
            raise RadiometricUnreadable(
                f"the metadata says {width}x{height}, the raw array inside is {png_width}x{png_height}"
            )
    if width * height > max_pixels:
        raise RadiometricUnreadable(f"the raw array of {width}x{height} is over {max_pixels} pixels")

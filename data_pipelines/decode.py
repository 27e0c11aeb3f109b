"""Bytes -> pixels: 8-bit, 16-bit, float and radiometric; gray or colour. Every refusal has a named reason.

One image of one channel comes out of a file by these rules:

    format        JPEG, PNG, BMP, TIFF, WebP, GIF, told by the content; the file's name plays no part
    colour        ITU-R 601 luma; exact for gray pictures stored in three channels
    palette       looked up, then as colour
    CMYK          converted to RGB, then as colour
    alpha         dropped, not composited: the channels under it are what the camera saw
    1 bit         0 and 255
    several       the first frame or page; their number is kept in the attributes
    EXIF          the orientation tag is applied
    16 bit        one channel, kept exactly; signed values are shifted by 32768 (see `offset`)
    32 bit, float  integers that span less than 65536 are kept exactly, anything else is quantised to 65536 levels with
                  a power-of-two step (see `scale`); pictures with NaN or infinity are refused
    FLIR JPEG     the raw sensor array (16 bit), not the false-colour picture
"""

from __future__ import annotations

import dataclasses
import io
import math
import os
import struct
import warnings
from collections.abc import Mapping
from typing import Any

import numpy as np
import simplejpeg
from PIL import Image, UnidentifiedImageError

from data_pipelines.errors import InputError
from data_pipelines.intensity import MAPPINGS, Intensity, to_uint8
from data_pipelines.radiometric import (
    RadiometricExtraMissing,
    RadiometricUnreadable,
    is_flir_jpeg,
    read_flir_array,
)
from data_pipelines.examples import CorruptExample, Example

__all__ = [
    "MAPPINGS",
    "MAX_PIXELS",
    "REFUSALS",
    "DecodedImage",
    "ImageRefused",
    "decode_image",
    "make_example",
    "read_image_file",
    "to_uint8",
]

MAX_PIXELS = 1 << 26  # 67 million: nine times the largest image of Inf30 (6912 x 1024)

REFUSALS = {
    "empty_file": "the file has no bytes",
    "not_an_image": "the content is of none of the supported formats",
    "truncated": "the file ends before the image does",
    "corrupt_data": "the image data are damaged",
    "decompression_bomb": "the image unpacks to more pixels than allowed",
    "unsupported_depth": "several channels of 16 bit",
    "not_finite": "NaN or infinity among the pixels",
    "radiometric_unreadable": "a radiometric file whose raw array cannot be read",
    "radiometric_extra_missing": "a radiometric file, and the package that reads it is not installed",
}

_FORMATS = ("JPEG", "PNG", "BMP", "TIFF", "WEBP", "GIF")
# Pillow registers formats on demand, but not when it is told which ones to try.
Image.init()
_SIGNATURES = (b"\xff\xd8\xff", b"\x89PNG\r\n", b"BM", b"II*\0", b"MM\0*", b"RIFF", b"GIF8")
_ORIENTATION_TAG = 0x0112
_BITS_PER_SAMPLE_TAG = 258
# A progressive JPEG of a few kilobytes can ask for thousands of passes over a large picture.
_MAX_JPEG_SCANS = 200
_PNG_COMPRESSION = 4


class ImageRefused(ValueError):
    """A file that is not usable as an image.

    Attributes:
      reason: slug from `REFUSALS`.
      detail: what exactly, for a person; one line.
    """

    def __init__(self, reason: str, detail: str):
        super().__init__(f"{reason}: {detail}")
        self.reason = reason
        self.detail = detail

    def __reduce__(self):
        return ImageRefused, (self.reason, self.detail)


@dataclasses.dataclass(frozen=True)
class DecodedImage:
    """One upright one-channel image.

    Attributes:
      pixels: (H, W) uint8 or uint16.
      attributes: JSON-able facts: `format`, `mode`; where they apply `frames`, `orientation`, `unit`, `scale`,
        `offset`, `camera`.
      verbatim: the source's bytes are an upright 8-bit gray JPEG, so they can be stored as they are.
    """

    pixels: np.ndarray
    attributes: Mapping[str, Any]
    verbatim: bool = False


def decode_image(data: bytes, name: str = "", max_pixels: int = MAX_PIXELS) -> DecodedImage:
    """Decodes the bytes of an image file by the rules at the top of this module.

    Args:
      data: the whole file.
      name: put before the detail of a refusal, when given.
      max_pixels: refuse pictures with more pixels (H * W); checked before anything is unpacked.

    Raises:
      ImageRefused: the one exception for any content; `reason` says which kind.
    """
    try:
        return _decode(data, max_pixels)
    except ImageRefused as refusal:
        raise ImageRefused(refusal.reason, f"{name}: {refusal.detail}" if name else refusal.detail) from refusal


def _decode(data: bytes, max_pixels: int) -> DecodedImage:
    if not data:
        raise ImageRefused("empty_file", "0 bytes")
    if not data.startswith(_SIGNATURES):
        kind = "text" if _looks_like_text(data[:256]) else "unknown content"
        raise ImageRefused("not_an_image", f"{kind}, not one of {', '.join(_FORMATS)}")
    try:
        with warnings.catch_warnings():
            # Pillow warns about metadata that it cannot read; the pixels are judged by themselves.
            warnings.simplefilter("ignore")
            return _decode_supported(data, max_pixels)
    except ImageRefused:
        raise
    except Exception as error:  # Pillow meets damaged bytes with many kinds of exceptions, all of them a refusal here.
        raise _refusal_of(data, error) from error


def _looks_like_text(start: bytes) -> bool:
    return all(byte >= 32 or byte in b"\t\n\r\f" for byte in start)


def _decode_supported(data: bytes, max_pixels: int) -> DecodedImage:
    with Image.open(io.BytesIO(data), formats=_FORMATS) as image:
        width, height = image.size
        if width * height > max_pixels:
            raise ImageRefused("decompression_bomb", f"{width}x{height} is over the limit of {max_pixels} pixels")
        attributes: dict[str, Any] = {"format": image.format, "mode": image.mode}
        if getattr(image, "n_frames", 1) > 1:
            attributes["frames"] = image.n_frames
        if image.format in ("JPEG", "MPO"):
            return _decode_jpeg(data, image, attributes, max_pixels)
        if _has_wide_channels(image, data):
            raise ImageRefused("unsupported_depth", f"{image.format} with several 16-bit channels; store one channel")
        image.load()
        # After load: TIFF applies its own orientation there, PNG may hold its EXIF block behind the pixels.
        orientation = image.getexif().get(_ORIENTATION_TAG, 1)
        pixels, numbers = _one_channel(image)
    return _upright(pixels, {**attributes, **numbers}, orientation)


def _decode_jpeg(data: bytes, image: Image.Image, attributes: dict[str, Any], max_pixels: int) -> DecodedImage:
    scans = data.count(b"\xff\xda")
    if scans > _MAX_JPEG_SCANS:
        raise ImageRefused("decompression_bomb", f"a JPEG of {scans} scans (over {_MAX_JPEG_SCANS})")
    if is_flir_jpeg(data):
        try:
            counts, facts = read_flir_array(data, max_pixels)
        except RadiometricExtraMissing as error:
            raise ImageRefused("radiometric_extra_missing", "install the `flir` extra: infmae-jax[flir]") from error
        except RadiometricUnreadable as error:
            raise ImageRefused("radiometric_unreadable", str(error)) from error
        return DecodedImage(counts, {**attributes, "format": "FLIR", "mode": "raw", **facts})
    orientation = image.getexif().get(_ORIENTATION_TAG, 1)
    if image.mode == "CMYK":
        image.load()
        pixels = np.asarray(image.convert("L"))
    else:
        # Strict: the decoder's warnings are errors, as a picture with a gray lower half is not one to learn from.
        pixels = simplejpeg.decode_jpeg(data, colorspace="GRAY", strict=True)[..., 0]
    decoded = _upright(pixels, attributes, orientation)
    verbatim = image.mode == "L" and decoded.attributes.get("orientation", 1) == 1
    return dataclasses.replace(decoded, verbatim=verbatim)


def _has_wide_channels(image: Image.Image, data: bytes) -> bool:
    """Several channels of more than 8 bit: Pillow would drop the low bytes without a word."""
    if image.format == "PNG":
        bit_depth, color_type = data[24], data[25]
        return bit_depth == 16 and color_type != 0
    if image.format == "TIFF":
        bits = image.tag_v2.get(_BITS_PER_SAMPLE_TAG, (1,))
        return len(bits) > 1 and max(bits) > 8
    return False


def _one_channel(image: Image.Image) -> tuple[np.ndarray, dict[str, Any]]:
    """Returns (H, W) uint8 or uint16 pixels of a loaded Pillow image, and how they stand for source values."""
    if image.mode.startswith("I;16"):
        return np.asarray(image).astype(np.uint16), {"unit": "count"}
    if image.mode in ("I", "F"):
        return _to_16_bit(np.asarray(image))
    if image.mode == "LA":
        return np.asarray(image)[..., 0], {}
    if image.mode in ("RGBA", "PA", "RGBX", "RGBa", "La"):
        image = image.convert("RGBA").convert("RGB")
    elif image.mode == "P" and "transparency" in image.info:
        image = image.convert("RGBA").convert("RGB")
    elif image.mode not in ("1", "L", "RGB", "P", "CMYK"):
        image = image.convert("RGB")
    return np.asarray(image.convert("L")), {}


def _to_16_bit(values: np.ndarray) -> tuple[np.ndarray, dict[str, Any]]:
    """Stores int32 or float values (H, W) as uint16: exactly where possible, else with a power-of-two step.

    A step that is a power of two, and an offset that is a multiple of it, make `v * scale + offset` exact in floats.
    """
    if not np.isfinite(values).all():
        share = 1 - np.isfinite(values).mean()
        raise ImageRefused("not_finite", f"{share:.2%} of the pixels are NaN or infinite")
    values = values.astype(np.float64)
    low, high = float(values.min()), float(values.max())
    if high - low <= 65535 and np.array_equal(values, np.rint(values)):
        # The common cases get an offset that does not depend on the frame.
        offset = 0.0 if 0 <= low and high <= 65535 else -32768.0 if -32768 <= low and high <= 32767 else low
        return (values - offset).astype(np.uint16), {"unit": "source", "scale": 1.0, "offset": offset}
    # 65534: one level is left for the rounding of the offset.
    scale = 2.0 ** math.ceil(math.log2((high - low) / 65534)) if high > low else 1.0
    offset = math.floor(low / scale) * scale
    return np.rint((values - offset) / scale).astype(np.uint16), {"unit": "source", "scale": scale, "offset": offset}


def _upright(pixels: np.ndarray, attributes: dict[str, Any], orientation: Any) -> DecodedImage:
    """Applies an EXIF orientation (1 to 8; anything else counts as 1)."""
    if orientation not in range(2, 9):
        return DecodedImage(np.ascontiguousarray(pixels), attributes)
    if orientation in (5, 6, 7, 8):
        pixels = pixels.T
    if orientation in (2, 3, 6, 7):
        pixels = pixels[:, ::-1]
    if orientation in (3, 4, 7, 8):
        pixels = pixels[::-1]
    return DecodedImage(np.ascontiguousarray(pixels), {**attributes, "orientation": int(orientation)})


def _refusal_of(data: bytes, error: Exception) -> ImageRefused:
    """Says in a person's words why a file with an image's signature could not be decoded."""
    message = " ".join(str(error).split()) or type(error).__name__
    if isinstance(error, Image.DecompressionBombError):
        return ImageRefused("decompression_bomb", message)
    lowered = message.lower()
    cut = "truncated" in lowered or "premature end" in lowered or "unexpected end" in lowered
    if data.startswith(b"\x89PNG"):
        cut = cut or b"IEND" not in data[-16:]
    if data.startswith(b"\xff\xd8"):
        cut = cut or b"\xff\xda" not in data
    if cut:
        return ImageRefused("truncated", f"the file ends after {len(data)} bytes, inside the image")
    if isinstance(error, UnidentifiedImageError):
        return ImageRefused("corrupt_data", "the header cannot be read")
    return ImageRefused("corrupt_data", message)


def encode_png(pixels: np.ndarray) -> bytes:
    """Returns a lossless one-channel PNG file of (H, W) uint8 or uint16 pixels."""
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG", compress_level=_PNG_COMPRESSION)
    return buffer.getvalue()


def make_example(key: str, data: bytes, image: DecodedImage) -> Example:
    """Returns the record that stores `image`, decoded from `data`: the source's own bytes if they can be kept."""
    height, width = image.pixels.shape
    return Example(
        key=key,
        image=data if image.verbatim else encode_png(image.pixels),
        encoding="jpeg" if image.verbatim else "png",
        height=height,
        width=width,
        bit_depth=image.pixels.dtype.itemsize * 8,
        attributes=image.attributes,
    )


def read_image_file(path: str | os.PathLike, intensity: Intensity | None = None) -> np.ndarray:
    """Returns the image file `path` as (H, W) uint8 under an `Intensity`, by default "auto".

    Raises:
      InputError: the file is missing or not usable; the message names it.
    """
    try:
        with open(path, "rb") as file:
            data = file.read()
    except OSError as error:
        raise InputError(f"cannot read {os.fspath(path)}: {error.strerror}; check the path") from error
    try:
        image = decode_image(data)
    except ImageRefused as refusal:
        raise InputError(
            f"{os.fspath(path)} is not usable ({refusal.reason}: {refusal.detail}); remove it or replace it"
        ) from refusal
    scale, offset = float(image.attributes.get("scale", 1.0)), float(image.attributes.get("offset", 0.0))
    how = ("auto", None, None) if intensity is None else (intensity.mapping, intensity.low, intensity.high)
    return to_uint8(image.pixels, *how, scale=scale, offset=offset)

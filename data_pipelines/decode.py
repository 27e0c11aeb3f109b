"""Bytes -> pixels: 8-bit, 16-bit, float and radiometric; gray or colour. Every refusal has a named reason.

One image of one channel comes out of a file by these rules:

    format        JPEG, PNG, BMP, TIFF (see `tiff`), WebP, GIF, told by the content; the file's name plays no part
    colour        ITU-R 601 luma; exact for gray pictures stored in three channels
    palette       looked up, then as colour
    CMYK          converted to RGB, then as colour
    alpha         dropped, not composited: the channels under it are what the camera saw
    1 bit         0 and 255
    several       the first frame, or the first page of full resolution; their number is kept in the attributes
    EXIF          the orientation tag is applied
    16 bit        one channel, kept exactly; signed values are shifted by 32768, of 8 bit by 128 (see `offset`)
    32 bit, float  integers that span less than 65536 are kept exactly, anything else is quantised to 65536 levels with
                  a power-of-two step (see `scale`); pictures with NaN or infinity are refused
    no data       pixels that a TIFF declares to be absent hold the lowest of the others; see `nodata_share`
    FLIR JPEG     the raw sensor array (16 bit), not the false-colour picture; others that hold a raw array (DJI) are
                  refused
    damage        judged by the pixels: unreadable metadata and stray bytes between the parts of a file do not matter
"""

import contextlib
import dataclasses
import io
import itertools
import os
import re
import warnings
from collections.abc import Iterator, Mapping
from types import MappingProxyType
from typing import Any

import numpy as np
import simplejpeg
from PIL import Image, UnidentifiedImageError

from data_pipelines import tiff
from data_pipelines.errors import OF_THE_MACHINE, InputError, refusing
from data_pipelines.examples import Example
from data_pipelines.intensity import Intensity
from data_pipelines.radiometric import read_raw_array
from data_pipelines.refusals import ImageRefused

MAX_FILE_BYTES = 1 << 29
MAX_PIXELS = 1 << 26  # 67 million: nine times the largest image of Inf30 (6912 x 1024)

_FORMATS = ("JPEG", "PNG", "BMP", "TIFF", "WEBP", "GIF")
# Pillow registers formats on demand, but not when it is told which ones to try.
Image.init()
_SIGNATURES = (b"\xff\xd8\xff", b"\x89PNG\r\n", b"BM", b"RIFF", b"GIF8", *tiff.SIGNATURES)
_ORIENTATION_TAG = 0x0112
# A progressive JPEG of a few kilobytes can ask for thousands of passes over a large picture.
_MAX_JPEG_SCANS = 200
_PNG_COMPRESSION = 4
# Chunks that say what the pixels are and which way up.
_PNG_CHUNKS = (b"IHDR", b"PLTE", b"tRNS", b"IDAT", b"eXIf", b"IEND")
# Header fields on which no pixel depends: the warning about them, and how a value without a warning is written over it.
_UNUSED_JPEG_FIELDS = (
    ("unknown JFIF revision", re.compile(rb"(JFIF\0)..", re.DOTALL), b"\1\1"),
    ("Unknown Adobe color transform", re.compile(rb"(Adobe.{6}).", re.DOTALL), b"\1"),
    ("bad ICC marker", re.compile(rb"(ICC_PROFILE)\0"), b"-"),
    (
        "Invalid SOS parameters for sequential",
        re.compile(rb"(\xff\xda\0(?:\x08\x01.{2}|\x0c\x03.{6})).{3}", re.DOTALL),
        b"\0\x3f\0",
    ),
)
_STRAY_BYTES = re.compile("([0-9]+) extraneous bytes before marker 0x([0-9a-f]{2})")
# Damaged picture data leave bytes over as well, about 14 at the median, below 5 in a twentieth of the cases.
_MAX_STRAY_BYTES = 4
_MAX_REPAIRS = 1000
_MAX_REPAIRED_PIXELS = 1 << 28


@dataclasses.dataclass(frozen=True)
class DecodedImage:
    """One upright one-channel image.

    Attributes:
      pixels: (H, W) uint8 or uint16.
      attributes: JSON-able facts: `format`, `mode`; where they apply `frames`, `orientation`, `unit`, `scale`,
        `offset`, `camera`, `nodata_share`.
      verbatim: the source's bytes are an upright 8-bit gray JPEG without faults, so they can be stored as they are.
    """

    pixels: np.ndarray
    attributes: Mapping[str, Any]
    verbatim: bool = False


def decode_image(data: bytes, max_pixels: int = MAX_PIXELS) -> DecodedImage:
    """Decodes the bytes of an image file by the rules at the top of this module.

    Args:
      data: the whole file.
      max_pixels: refuse pictures with more pixels (H * W); checked before anything is unpacked.

    Raises:
      ImageRefused: the one exception for any content; `reason` says which kind.
    """
    if not data:
        raise ImageRefused("empty_file", "0 bytes")
    is_text = all(byte >= 32 or byte in b"\t\n\r\f" for byte in data[:256])
    kind = "text" if is_text else "unknown content"
    if data.startswith(b"RIFF") and data[8:12] != b"WEBP":
        kind = "a RIFF file of sound or video"
    elif not is_text and data.startswith(_SIGNATURES):
        kind = ""
    if kind:
        raise ImageRefused("not_an_image", f"{kind}, not one of {', '.join(_FORMATS)}")
    with warnings.catch_warnings():
        # Pillow warns about metadata that it cannot read; the pixels are judged by themselves.
        warnings.simplefilter("ignore")
        try:
            return _decode_supported(data, max_pixels)
        except ImageRefused:
            raise
        except Exception as error:  # Pillow meets damaged bytes with many kinds of exceptions, all of them a refusal.
            if (bare := _without_metadata(data)) != data:
                with contextlib.suppress(Exception):  # The first error is the one to report.
                    return _decode_supported(bare, max_pixels)
            raise _refusal_of(data, error) from error


def _decode_supported(data: bytes, max_pixels: int) -> DecodedImage:
    if not data.startswith(tiff.SIGNATURES):
        return _decode_with_pillow(data, max_pixels)
    page, pixels, attributes = tiff.read_tiff(data, max_pixels)
    if pixels is not None:
        return _upright(pixels, {"format": "TIFF", **attributes}, page.tags.valueof(_ORIENTATION_TAG))
    try:
        return _decode_with_pillow(data, max_pixels, page.index, attributes)
    except UnidentifiedImageError as error:
        raise ImageRefused("unsupported_layout", f"{tiff.described(page)}; store it gray") from error


def _decode_with_pillow(
    data: bytes, max_pixels: int, page: int = 0, known: Mapping[str, Any] = MappingProxyType({})
) -> DecodedImage:
    """`page` of a TIFF file, of which these attributes are known; the first frame of others."""
    with Image.open(io.BytesIO(data), formats=_FORMATS) as image:
        image.seek(page)
        attributes: dict[str, Any] = {"format": image.format, "mode": image.mode, **known}
        if image.format != "TIFF" and getattr(image, "n_frames", 1) > 1:
            attributes["frames"] = image.n_frames
        width, height = image.size
        if width * height > max_pixels:
            raise ImageRefused("decompression_bomb", f"{width}x{height} is over the limit of {max_pixels} pixels")
        if image.format in ("JPEG", "MPO"):
            return _decode_jpeg(data, image, attributes, max_pixels)
        # Several channels of more than 8 bit: Pillow would drop the low bytes without a word.
        if image.format == "PNG" and data[24] == 16 and data[25] != 0:
            raise ImageRefused("unsupported_depth", "PNG with several 16-bit channels; store one channel")
        image.load()
        # After load: TIFF applies its own orientation there, PNG may hold its EXIF block behind the pixels.
        orientation = image.getexif().get(_ORIENTATION_TAG, 1)
        pixels, numbers = _one_channel(image)
    return _upright(pixels, {**attributes, **numbers}, orientation)


def _without_metadata(data: bytes) -> bytes:
    """A PNG file without the chunks that do not change pixels, up to where its chunks end; other files unchanged."""
    if not data.startswith(b"\x89PNG"):
        return data
    parts, place = [data[:8]], 8
    while place + 12 <= len(data):
        end = place + 12 + int.from_bytes(data[place : place + 4], "big")
        if data[place + 4 : place + 8] in _PNG_CHUNKS:
            parts.append(data[place:end])
        place = end
    return b"".join(parts)


def _decode_jpeg(data: bytes, image: Image.Image, attributes: dict[str, Any], max_pixels: int) -> DecodedImage:
    if (scans := data.count(b"\xff\xda")) > _MAX_JPEG_SCANS:
        raise ImageRefused("decompression_bomb", f"a JPEG of {scans} scans (over {_MAX_JPEG_SCANS})")
    if (raw := read_raw_array(image, max_pixels)) is not None:
        counts, facts = raw
        return DecodedImage(counts, {**attributes, "format": "FLIR", "mode": "raw", **facts})
    orientation = image.getexif().get(_ORIENTATION_TAG, 1)
    if image.mode == "CMYK":
        return _upright(np.asarray(image.convert("L")), attributes, orientation)
    pixels, faultless = _decode_gray_jpeg(data, max(1, image.width * image.height))
    return _upright(pixels, attributes, orientation, faultless and image.mode == "L")


def _decode_gray_jpeg(data: bytes, pixel_count: int) -> tuple[np.ndarray, bool]:
    """Returns the luma, (H, W) uint8, and whether the file is without faults.

    The decoder's warnings are errors, as a picture with a gray lower half is not one to learn from, except where a file
    with a corrected header field, or without a few stray bytes, decodes faultlessly.

    Raises:
      ValueError: the picture data are damaged.
    """
    pixels, message = _try_jpeg(data)
    left = first_left = min(_MAX_REPAIRS, _MAX_REPAIRED_PIXELS // pixel_count)
    while pixels is None:
        for repaired in itertools.islice(_repairs(data, message), left):
            left -= 1
            pixels, new_message = _try_jpeg(repaired)
            # Bytes removed in a wrong place cause other warnings, which are no progress.
            known = any(text in message + new_message for text, _, _ in _UNUSED_JPEG_FIELDS)
            if pixels is not None or (known and new_message != message):
                data, message = repaired, new_message
                break
        else:
            raise ValueError(message)
    return pixels, left == first_left


def _try_jpeg(data: bytes) -> tuple[np.ndarray | None, str]:
    """The luma and "", or None and the last of the decoder's warnings."""
    try:
        return simplejpeg.decode_jpeg(data, colorspace="GRAY", strict=True)[..., 0], ""
    except ValueError as error:
        return None, str(error)


def _repairs(data: bytes, warning: str) -> Iterator[bytes]:
    """Versions of a JPEG file of which one may be without the fault that does not touch the picture data."""
    for text, field, value in _UNUSED_JPEG_FIELDS:
        if text in warning:
            yield field.sub(lambda found, value=value: found[1] + value, data)
    stray = _STRAY_BYTES.search(warning)
    if stray and int(stray[1]) <= _MAX_STRAY_BYTES:
        marker = int(stray[2], 16)
        # The warning names the next marker that was searched for. Restart markers may have passed without a search.
        markers = b"\xff[\xd0-\xd7\xd9]" if 0xD0 <= marker <= 0xD9 else re.escape(bytes([0xFF, marker]))
        for found in re.finditer(markers, data):
            yield data[: found.start() - int(stray[1])] + data[found.start() :]


def _one_channel(image: Image.Image) -> tuple[np.ndarray, dict[str, Any]]:
    """Returns (H, W) uint8 or uint16 pixels of a loaded Pillow image, and how they stand for source values."""
    if image.mode.startswith("I"):
        return np.asarray(image).astype(np.uint16), {"unit": "count"}
    transparent = image.mode == "P" and "transparency" in image.info
    if transparent or image.mode in ("RGBA", "PA", "RGBX", "RGBa", "La"):
        image = image.convert("RGBA").convert("RGB")
    elif image.mode not in ("1", "L", "LA", "RGB", "P", "CMYK"):
        image = image.convert("RGB")
    return np.asarray(image.convert("L")), {}


def _upright(pixels: np.ndarray, attributes: dict[str, Any], orientation: Any, verbatim: bool = False) -> DecodedImage:
    """Applies an EXIF orientation (1 to 8; anything else counts as 1); turned images are stored anew."""
    if orientation not in range(2, 9):
        return DecodedImage(np.ascontiguousarray(pixels), attributes, verbatim)
    pixels = pixels.T if orientation >= 5 else pixels
    pixels = pixels[:, ::-1] if orientation in (2, 3, 6, 7) else pixels
    pixels = pixels[::-1] if orientation in (3, 4, 7, 8) else pixels
    return DecodedImage(np.ascontiguousarray(pixels), {**attributes, "orientation": int(orientation)})


def _refusal_of(data: bytes, error: Exception) -> ImageRefused:
    """Says in a person's words why a file with an image's signature could not be decoded."""
    message = " ".join(str(error).split()) or type(error).__name__
    if isinstance(error, Image.DecompressionBombError):
        return ImageRefused("decompression_bomb", message)
    cut = any(said in message.lower() for said in ("truncated", "premature end", "unexpected end"))
    cut |= data.startswith(b"\x89PNG") and b"IEND" not in data[-16:]
    cut |= data.startswith(b"\xff\xd8") and b"\xff\xda" not in data
    if cut:
        return ImageRefused("truncated", f"the file ends after {len(data)} bytes, inside the image")
    unknown = isinstance(error, UnidentifiedImageError)
    return ImageRefused("corrupt_data", "the header cannot be read" if unknown else message)


def encode_png(pixels: np.ndarray) -> bytes:
    """Returns a lossless one-channel PNG file of (H, W) uint8 or uint16 pixels."""
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG", compress_level=_PNG_COMPRESSION)
    return buffer.getvalue()


def make_example(key: str, data: bytes, image: DecodedImage, encoding: str = "source") -> Example:
    """Returns the example that stores `image`, decoded from `data`.

    `encoding` "source" keeps the source's own bytes where they can be kept and makes PNG of others, "raw" stores the
    pixels uncompressed.
    """
    if encoding == "raw":
        stored = image.pixels.astype(image.pixels.dtype.newbyteorder("<"), copy=False).tobytes()
    elif image.verbatim:
        stored, encoding = data, "jpeg"
    else:
        stored, encoding = encode_png(image.pixels), "png"
    return Example(key, stored, encoding, *image.pixels.shape, 8 * image.pixels.dtype.itemsize, image.attributes)


def read_image_file(path: str | os.PathLike, intensity: Intensity | None = None) -> np.ndarray:
    """Returns the image file `path` as (H, W) uint8.

    Args:
      path: of a file of any supported format.
      intensity: how its values become 8 bit: that of the run which the image is for; None is `auto`.

    Raises:
      InputError: the file is missing or not usable; the message names it.
      OSError: the machine cannot read now (`OF_THE_MACHINE`), whatever the file holds.
    """
    try:
        with open(path, "rb") as file:
            data = file.read(MAX_FILE_BYTES + 1)
    except OSError as error:
        if error.errno in OF_THE_MACHINE:
            raise
        raise InputError(f"cannot read {os.fspath(path)}: {error.strerror}; check the path") from error
    if len(data) > MAX_FILE_BYTES:
        raise InputError(f"{os.fspath(path)} is larger than {MAX_FILE_BYTES >> 20} MiB; remove it or make it smaller")
    with refusing(f"{os.fspath(path)} is not usable", "remove it or replace it", ImageRefused):
        image = decode_image(data)
    return (intensity or Intensity()).apply(image.pixels, image.attributes)

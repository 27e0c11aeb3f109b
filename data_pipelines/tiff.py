"""TIFF files: which page counts, and the array of a gray page of any sample format, byte order and compression.

    page          the first of full resolution: pages marked as reduced or as a mask are passed over, and so is one that
                  a larger page of the same shape follows (a thumbnail), among the first 16 pages and the SubIFDs of
                  the first page
    samples       8 to 32 bit integers, packed ones among them, 64-bit ones, and 16 to 64 bit floats
    WhiteIsZero   unsigned integers are inverted; signed ones and floats are measurements and stay
    GDAL_NODATA   those pixels are left out of the scaling and hold the lowest of the other values; their share is kept

Everything else of at most 8 bit (colour, palettes, JPEG inside) is left to the imaging library, the rest is refused by
name. A hostile file costs at most about three times 4 bytes for each allowed pixel: sizes, pages, strips and the bytes
of compressed strips are bounded before anything is unpacked, and every codec gets the size that it may fill.
"""

import contextlib
import io
import logging
import math
from typing import Any

import numpy as np
import tifffile
from tifffile import TiffPage

from data_pipelines.refusals import ImageRefused

SIGNATURES = (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")
MAX_PAGES = 10_000
MAX_NODATA_SHARE = 0.5

_SEARCHED_PAGES = 16
_MAX_PARTS = 1 << 16
_MAX_OVERLAP = 2  # how often the bytes of a file may be used
# Codecs that fill a buffer of a given size. Those of whole pictures (JPEG 2000, LERC, ...) size their own.
_COMPRESSIONS = {1, 5, 8, 32773, 32946, 34925, 34926, 50000}
_PHOTOMETRIC_TAG, _NODATA_TAG = 262, 42113
_REDUCED_OR_MASK = 0b101
_BLOCK = 1 << 20
_IMAGING_LIBRARY_MODES = {"uint8": "L", "uint16": "I;16", "int32": "I", "float32": "F"}
_SMALLEST_STEP = 2.0**-1000
# The library looks for the dialects of many microscopes, which read further parts of a file.
# What newer versions cannot be told is a property without setter there, which looks at the first page's tags alone.
_NO_DIALECTS = {
    name: False
    for name in (f"is_{flag}" for flag in tifffile.TIFF.FILE_FLAGS)
    if getattr(getattr(tifffile.TiffFile, name, None), "fset", True) is not None
}
# It also logs what it finds odd; here a file is read or refused, and the refusal says why.
logging.getLogger("tifffile").setLevel(logging.CRITICAL + 1)


def read_tiff(data: bytes, max_pixels: int) -> tuple[TiffPage, np.ndarray | None, dict[str, Any]]:
    """Reads the page of the TIFF or BigTIFF file `data` that counts.

    Returns:
      The page, for what its tags say; its pixels, (H, W) uint8 or uint16, or None where it is left to the imaging
      library; and attributes: `frames`, `mode`, what the integers stand for (`unit`, `scale`, `offset`) and
      `nodata_share`, where they apply.

    Raises:
      ImageRefused: over a limit, damaged, or of an unsupported kind.
      Exception: whatever the library raises on damaged bytes.
    """
    with tifffile.TiffFile(io.BytesIO(data), **_NO_DIALECTS) as file:
        frames = _count_pages(file)
        page = _full_resolution_page(file)
        if page.imagewidth * page.imagelength > max_pixels:
            size = f"{page.imagewidth}x{page.imagelength}"
            raise ImageRefused("decompression_bomb", f"{size} is over the limit of {max_pixels} pixels")
        pixels, attributes = None, {"frames": frames} if frames > 1 else {}
        if not _is_left_to_imaging_library(page):
            _check_parts(page, len(data), 4 * max_pixels)
            # One thread: images are decoded in several processes already.
            pixels, numbers = _stored(page.asarray(maxworkers=1), page)
            attributes |= numbers
        return page, pixels, attributes


def _count_pages(file: tifffile.TiffFile) -> int:
    with contextlib.suppress(IndexError):
        file.pages[MAX_PAGES]
        raise ImageRefused("decompression_bomb", f"over {MAX_PAGES} pages, or a chain of pages without an end")
    if not len(file.pages):
        raise ImageRefused("truncated", "the file ends before its first page directory")
    return len(file.pages)


def _full_resolution_page(file: tifffile.TiffFile) -> TiffPage:
    pages = list(file.pages[:_SEARCHED_PAGES])
    pages += list((pages[0].pages or ())[:_SEARCHED_PAGES])
    whole = [page for page in pages if not page.subfiletype & _REDUCED_OR_MASK] or pages
    chosen = whole[0]
    for page in whole[1:]:
        # Of the same shape to a pixel, with no more channels and no fewer bits: not the photo beside a thermal image.
        if (
            page.imagewidth > chosen.imagewidth
            and abs(page.imagewidth * chosen.imagelength - page.imagelength * chosen.imagewidth) <= page.imagewidth
            and page.samplesperpixel <= chosen.samplesperpixel
            and _bits(page) >= _bits(chosen)
        ):
            chosen = page
    return chosen


def _bits(page: TiffPage) -> int:
    return max(page.bitspersample) if isinstance(page.bitspersample, tuple) else page.bitspersample


def described(page: TiffPage) -> str:
    """The samples of a page and their compression, for a refusal."""
    kinds = (getattr(kind, "name", kind) for kind in (page.sampleformat, page.photometric, page.compression))
    return f"TIFF of {_bits(page)}-bit {'{}, {}, compression {}'.format(*kinds)}"


def _is_left_to_imaging_library(page: TiffPage) -> bool:
    """False for gray pages of a supported kind; true for the others of 8 bit; the rest is refused by name."""
    bits, compression = _bits(page), page.compression
    # The library counts a page without the tag as WhiteIsZero.
    gray = page.samplesperpixel == 1 and page.photometric in (0, 1)
    if gray and bits >= 8 and page.dtype is not None and page.dtype.kind in "iuf" and compression in _COMPRESSIONS:
        if page.imagedepth != 1 or page.tiledepth != 1:
            raise ImageRefused("unsupported_layout", "a TIFF volume; store one plane a page")
        predictors = (1, 2, 3) if page.dtype.kind == "f" else (1, 2)
        if page.predictor not in predictors[: 3 if bits in (8, 16, 32, 64) else 1]:
            raise ImageRefused("unsupported_layout", f"TIFF predictor {page.predictor:d} with {bits}-bit samples")
        return False
    if bits <= 8 and page.sampleformat in (1, 4) and (bits == 8 or page.predictor == 1):
        if len(page.treeindex) > 1:
            raise ImageRefused("unsupported_layout", "a TIFF whose full-resolution colour picture is in a SubIFD")
        return True
    if page.samplesperpixel > 1:
        raise ImageRefused(
            "unsupported_depth", f"TIFF with {page.samplesperpixel} channels of {bits} bit; store one channel"
        )
    raise ImageRefused("unsupported_layout", f"{described(page)}; store it gray and uncompressed or with LZW")


def _check_parts(page: TiffPage, file_size: int, max_bytes: int) -> None:
    """Looks at the declared strips or tiles before anything is unpacked."""
    offsets, counts = page.dataoffsets, page.databytecounts
    part = page.tilewidth * page.tilelength if page.is_tiled else 0
    needed = max(page.imagewidth * page.imagelength, part) * page.dtype.itemsize
    if needed > max_bytes:
        raise ImageRefused("decompression_bomb", f"the page or a tile unpacks to {needed} bytes, over {max_bytes}")
    parts = math.prod(page.chunked)
    if parts > _MAX_PARTS:
        raise ImageRefused("decompression_bomb", f"{parts} strips or tiles, over {_MAX_PARTS}")
    if not parts == len(offsets) == len(counts):
        raise ImageRefused("corrupt_data", f"{parts} strips or tiles, but {len(offsets)} places in the file")
    if not all(offsets) or not all(counts):
        raise ImageRefused("unsupported_layout", "a sparse TIFF: strips or tiles without data")
    end = offsets[0] + page.nbytes if page.is_contiguous else max(map(sum, zip(offsets, counts, strict=True)))
    if end > file_size:
        raise ImageRefused("truncated", f"the file ends after {file_size} bytes, the image after {end}")
    if sum(counts) > _MAX_OVERLAP * file_size:
        raise ImageRefused("decompression_bomb", f"strips or tiles of {sum(counts)} bytes in a file of {file_size}")


def _stored(values: np.ndarray, page: TiffPage) -> tuple[np.ndarray, dict[str, Any]]:
    """Source values (H, W) -> uint8 or uint16, and what they stand for."""
    kind, bits = values.dtype.kind, _bits(page)
    name = f"{ {'u': 'uint', 'i': 'int', 'f': 'float'}[kind] }{bits}"
    numbers: dict[str, Any] = {"mode": _IMAGING_LIBRARY_MODES.get(name, name)}
    absent = _nodata_mask(values, page.tags.valueof(_NODATA_TAG))
    if kind == "u" and page.photometric == 0 and _PHOTOMETRIC_TAG in page.tags:
        values = values.dtype.type((1 << bits) - 1) - values
    if kind == "f":
        faulty = np.count_nonzero(~np.isfinite(values)) - np.count_nonzero(absent & ~np.isfinite(values))
        if faulty:
            share = f" ({faulty / values.size:.2%})" if faulty / values.size >= 1e-4 else ""
            raise ImageRefused("not_finite", f"{faulty} of {values.size} pixels{share} are NaN or infinite")
    if share := float(absent.mean()):
        if share > MAX_NODATA_SHARE:
            raise ImageRefused("mostly_nodata", f"{share:.1%} of the pixels hold no data, over {MAX_NODATA_SHARE:.0%}")
        numbers["nodata_share"] = share
        values = np.where(absent, values[~absent].min(), values)
    if values.dtype == np.uint8:
        return values, numbers
    if values.dtype == np.uint16:
        return values, {**numbers, "unit": "count"}
    if values.dtype == np.int8:
        return values.view(np.uint8) ^ 0x80, {**numbers, "unit": "source", "scale": 1.0, "offset": -128.0}
    pixels, units = _to_16_bit(values)
    return pixels, {**numbers, **units}


def _nodata_mask(values: np.ndarray, declared: Any) -> np.ndarray:
    """(H, W) bool: the pixels that hold the value of a GDAL_NODATA tag, a number as text."""
    try:
        nodata = float(str(declared).strip("\0 ").replace(",", "."))
    except ValueError:
        return np.zeros(values.shape, bool)
    if math.isnan(nodata):
        return np.isnan(values)
    with np.errstate(over="ignore"):
        # The tag has more or fewer digits than the pixels, which matters for the lowest 32-bit float.
        if values.dtype.kind == "f" and abs(nodata) > 1e30:
            low, high = sorted(values.dtype.type(nodata * factor) for factor in (1 - 1e-5, 1 + 1e-5))
            return (low <= values) & (values <= high)
        return values == (values.dtype.type(nodata) if values.dtype.kind == "f" else nodata)


def _to_16_bit(values: np.ndarray) -> tuple[np.ndarray, dict[str, Any]]:
    """Stores finite numbers (H, W) as uint16: exactly where possible, else with a power-of-two step.

    A step that is a power of two, and an offset that is a multiple of it, make `v * scale + offset` exact in floats.
    """
    low, high = float(values.min()), float(values.max())
    if not math.isfinite(high - low):
        raise ImageRefused("unsupported_layout", f"values from {low:g} to {high:g}: the span is no finite number")
    flat, pixels = values.reshape(-1), np.empty(values.shape, np.uint16)
    blocks = [slice(start, start + _BLOCK) for start in range(0, flat.size, _BLOCK)]
    if high - low <= 65535 and all(np.array_equal(flat[block], np.rint(flat[block])) for block in blocks):
        # The common cases get an offset that does not depend on the frame.
        scale, offset = 1.0, 0.0 if 0 <= low and high <= 65535 else -32768.0 if -32768 <= low and high <= 32767 else low
    else:
        # 65534: one level is left for the rounding of the offset.
        scale = 2.0 ** math.ceil(math.log2(max((high - low) / 65534, _SMALLEST_STEP)))
        offset = math.floor(low / scale) * scale
    for block in blocks:
        pixels.reshape(-1)[block] = np.rint((flat[block].astype(np.float64) - offset) / scale)
    return pixels, {"unit": "source", "scale": scale, "offset": offset}

"""TIFF: every layout equals its array or is refused by name; pages, no-data values and limits by their stated rules."""

import io
import itertools
import struct
import zlib

import numpy as np
import pytest
import tifffile
from hypothesis import given, settings
from hypothesis import strategies as st

from data_pipelines import tiff
from data_pipelines.decode import ImageRefused, decode_image

SHAPE = (37, 45)
SCENE = np.add.outer(np.arange(SHAPE[0]), np.arange(SHAPE[1])).astype(np.float64)


def written(pages, **options) -> bytes:
    """A TIFF file of one page, or of (array, options) pairs."""
    buffer = io.BytesIO()
    if isinstance(pages, np.ndarray):
        pages = [(pages, {})]
    bigtiff, byteorder = options.pop("bigtiff", False), options.pop("byteorder", None)
    with tifffile.TiffWriter(buffer, bigtiff=bigtiff, byteorder=byteorder) as writer:
        for array, more in pages:
            writer.write(array, **{"photometric": "minisblack", "metadata": None, **options, **more})
    return buffer.getvalue()


def source_values(image) -> np.ndarray:
    return image.pixels * image.attributes.get("scale", 1.0) + image.attributes.get("offset", 0.0)


def reason_of(data: bytes) -> str:
    with pytest.raises(ImageRefused) as refusal:
        decode_image(data)
    assert "\n" not in refusal.value.detail
    return refusal.value.reason


LAYOUTS = list(
    itertools.product(
        ["u1", "i1", "u2", "i2", "u4", "i4", "u8", "i8", "f2", "f4", "f8", "c8", "?"],
        "<>",
        [None, "zlib", "lzw", "packbits", "lzma", "zstd", "jpeg", "jpeg2000", "lerc", "png"],
        [None, (16, 16)],
        [None, 2, 3],
        ["minisblack", "miniswhite"],
    )
)


@settings(deadline=None)
@given(st.lists(st.sampled_from(LAYOUTS), min_size=12, max_size=12), st.booleans(), st.integers(0, 2**32 - 1))
def test_every_layout_equals_its_array_or_is_refused_by_name(layouts, wide, seed):
    rng = np.random.default_rng(seed)
    for kind, order, compression, tile, predictor, photometric in layouts:
        dtype = np.dtype(kind)
        values = (SCENE + rng.normal(0, 3, SHAPE)).astype(dtype) if dtype.kind in "fc" else rng.random(SHAPE) > 0.5
        if dtype.kind in "ui":
            limits = np.iinfo(dtype) if wide else np.iinfo(np.uint8 if dtype.kind == "u" else np.int8)
            values = rng.integers(limits.min, limits.max, SHAPE, dtype=dtype, endpoint=True)
        try:
            data = written(
                values,
                byteorder=order,
                compression=compression,
                tile=tile,
                predictor=predictor,
                photometric=photometric,
            )
        except Exception:  # The writer has no such layout.
            continue
        expected = values
        if photometric == "miniswhite" and dtype.kind in "bu":
            expected = ~values
        try:
            image = decode_image(data)
        except ImageRefused as refusal:
            assert refusal.reason == "unsupported_layout"
            assert dtype.kind in "c?" or predictor or compression in ("jpeg", "jpeg2000", "lerc", "png"), refusal
            continue
        if compression == "jpeg":
            continue
        scale = image.attributes.get("scale", 1.0)
        expected = expected.astype(np.float64) * (255 if dtype.kind == "b" else 1)
        tolerance = 0 if scale == 1 else scale / 2 * 1.001
        np.testing.assert_allclose(source_values(image), expected, atol=tolerance, rtol=0)


def test_compressed_big_endian_equals_its_uncompressed_twin():
    for dtype, compression in itertools.product(("f4", "i2", "i4"), ("lzw", "zlib", "zstd", "packbits", "lzma")):
        values = (SCENE * 3 - 50).astype(dtype)
        twin = decode_image(written(values))
        swapped = decode_image(written(values, byteorder=">", compression=compression))
        np.testing.assert_array_equal(swapped.pixels, twin.pixels)
        assert swapped.attributes == twin.attributes


def test_signed_8_bit_stays_8_bit_with_an_offset():
    values = np.arange(-33, 9, dtype=np.int8).reshape(6, 7)
    image = decode_image(written(values))
    assert image.pixels.dtype == np.uint8
    np.testing.assert_array_equal(source_values(image), values)


def test_several_wide_channels_are_named_not_called_damaged():
    for channels in (2, 3):
        values = np.zeros((channels, *SHAPE), np.float32)
        assert reason_of(written(values, planarconfig="separate")) == "unsupported_depth"
    assert reason_of(written(np.zeros((5, *SHAPE), np.uint8), planarconfig="separate")) == "unsupported_layout"


@pytest.mark.parametrize("kind", [0, 1])
def test_a_thumbnail_is_not_the_picture(kind):
    """First page marked as reduced, or unmarked but a smaller page of the same shape."""
    whole = np.random.default_rng(0).integers(0, 1 << 14, (240, 320), dtype=np.uint16)
    small = (whole[::8, ::8] >> 6).astype(np.uint8)
    image = decode_image(written([(small, {"subfiletype": kind}), (whole, {})]))
    np.testing.assert_array_equal(image.pixels, whole)
    assert image.attributes["frames"] == 2


def test_the_photo_beside_a_thermal_page_is_not_the_picture_nor_is_an_overview():
    thermal = np.arange(240 * 320, dtype=np.uint16).reshape(240, 320)
    photo = np.zeros((480, 640, 3), np.uint8)
    image = decode_image(written([(thermal, {}), (photo, {"photometric": "rgb"})]))
    np.testing.assert_array_equal(image.pixels, thermal)
    image = decode_image(written([(thermal, {}), (thermal[::2, ::2], {"subfiletype": 1})]))
    np.testing.assert_array_equal(image.pixels, thermal)


def test_a_full_resolution_page_in_a_sub_directory():
    whole = np.arange(240 * 320, dtype=np.uint16).reshape(240, 320)
    small = whole[::8, ::8]
    data = written([(small, {"subifds": 1, "subfiletype": 1}), (whole, {"subfiletype": 0})])
    np.testing.assert_array_equal(decode_image(data).pixels, whole)


@pytest.mark.parametrize("bigtiff", [False, True])
def test_8_bit_color_pages_after_a_thumbnail(bigtiff):
    color = np.repeat(np.arange(240, dtype=np.uint8)[:, None, None], 320, 1).repeat(3, 2)
    pages = [(color[::8, ::8], {"subfiletype": 1}), (color, {})]
    image = decode_image(written(pages, photometric="rgb", bigtiff=bigtiff))
    np.testing.assert_array_equal(image.pixels, color[..., 0])


def nodata_tag(text: str):
    return [(42113, "s", 0, text, True)]


@pytest.mark.parametrize(
    ("dtype", "value", "text"),
    [
        ("f4", -9999, "-9999"),
        ("f4", 0, "0"),
        ("f4", np.finfo(np.float32).min, "-3.4028234663852886e+38"),
        ("f4", np.finfo(np.float32).min, "-3.40282e+38"),
        ("f4", np.nan, "nan"),
        ("f8", -1e300, "-1e+300"),
        ("u2", 65535, "65535"),
        ("u1", 0, "0"),
        ("i2", -32768, "-32768"),
    ],
)
def test_declared_nodata_is_left_out_and_filled_with_the_lowest_value(dtype, value, text):
    scene = (SCENE + 100).astype(dtype)
    holes = np.zeros(SHAPE, bool)
    holes[:5, :9] = True
    stored = np.where(holes, np.array(value, dtype), scene)
    image = decode_image(written(stored, extratags=nodata_tag(text)))
    assert image.attributes["nodata_share"] == holes.mean()
    step = image.attributes.get("scale", 1.0)
    assert step <= 1
    expected = np.where(holes, scene[~holes].min(), scene)
    np.testing.assert_allclose(source_values(image), expected, atol=0 if step == 1 else step / 2)


def test_nodata_that_no_pixel_holds_changes_nothing_and_most_pixels_are_too_many():
    plain = decode_image(written(SCENE.astype(np.float32)))
    for text in ("-9999", "1e400", "none"):
        declared = decode_image(written(SCENE.astype(np.float32), extratags=nodata_tag(text)))
        assert declared.attributes == plain.attributes
        np.testing.assert_array_equal(declared.pixels, plain.pixels)
    mostly = np.where(SCENE < SCENE.mean() + 3, -9999, SCENE).astype(np.float32)
    assert reason_of(written(mostly, extratags=nodata_tag("-9999"))) == "mostly_nodata"
    assert reason_of(written(np.full(SHAPE, -9999, np.float32), extratags=nodata_tag("-9999"))) == "mostly_nodata"


def test_a_single_nan_among_many_pixels_is_counted():
    values = np.ones((1000, 1000), np.float32)
    values[7, 7] = np.nan
    with pytest.raises(ImageRefused, match="1 of 1000000 pixels are NaN"):
        decode_image(written(values))


def directory(tags: dict, following: int = 0, order: str = "<") -> bytes:
    """A classic page directory of {code: value} or {code: (count, place of the values)}, 4 bytes each."""
    entries = b"".join(
        struct.pack(f"{order}HHII", code, 4, *(value if isinstance(value, tuple) else (1, value)))
        for code, value in sorted(tags.items())
    )
    return struct.pack(f"{order}H", len(tags)) + entries + struct.pack(f"{order}I", following)


def single_page(width: int, height: int, bits: int, payload: bytes, more: dict | None = None, order="<") -> bytes:
    """A file of one zlib-compressed float page in one strip, `payload`, unless tags in `more` say otherwise."""
    tags = {256: width, 257: height, 258: bits, 259: 8, 262: 1, 277: 1, 278: height, 279: len(payload), 339: 3}
    tags |= {273: 0} | (more or {})
    if not tags[273]:
        tags[273] = 8 + len(directory(tags))
    mark = b"II*\0" if order == "<" else b"MM\0*"
    return mark + struct.pack(f"{order}I", 8) + directory(tags, order=order) + payload


@pytest.mark.parametrize("bits", [10, 12, 14])
@pytest.mark.parametrize("order", "<>")
def test_packed_samples(bits, order):
    """Bits follow each other from the highest on, in files of either byte order."""
    values = np.random.default_rng(bits).integers(0, 1 << bits, SHAPE, dtype=np.uint16)
    digits = values[..., None] >> np.arange(bits - 1, -1, -1) & 1
    payload = np.packbits(digits.reshape(SHAPE[0], -1).astype(np.uint8), axis=1).tobytes()
    for photometric, expected in ((1, values), (0, (1 << bits) - 1 - values)):
        tags = {259: 1, 339: 1, 262: photometric}
        image = decode_image(single_page(*SHAPE[::-1], bits, payload, tags, order))
        np.testing.assert_array_equal(image.pixels, expected)


def page_chain(count: int, back_to: int | None = None) -> bytes:
    tags = {256: 16, 257: 16, 258: 8, 259: 1, 262: 1, 273: 8, 277: 1, 278: 16, 279: 256}
    size = len(directory(tags))
    places = [8 + size * number for number in range(count)]
    following = [*places[1:], 0 if back_to is None else places[back_to]]
    return b"II*\0" + struct.pack("<I", 8) + b"".join(directory(tags, place) for place in following)


def test_pages_without_end_are_refused_and_long_sequences_are_not():
    assert decode_image(page_chain(500)).attributes["frames"] == 500
    assert reason_of(page_chain(tiff.MAX_PAGES + 1)) == "decompression_bomb"
    assert reason_of(page_chain(300, back_to=150)) == "decompression_bomb"


def test_sizes_are_bounded_before_anything_is_unpacked():
    zeros = zlib.compress(bytes(1 << 16))
    assert reason_of(single_page(8192, 8192, 64, zeros)) == "decompression_bomb"
    tile = {322: 1 << 15, 323: 1 << 15, 324: 8, 325: 100}
    assert reason_of(single_page(16, 16, 32, bytes(200), tile)) == "decompression_bomb"
    assert reason_of(single_page(64, 64, 32, zlib.compress(bytes(1 << 26)))) == "corrupt_data"


def test_strips_that_share_their_bytes_are_refused():
    rows = 2000
    # Every strip is the same 12,000 bytes: those of the two lists themselves.
    tags = {256: 16, 257: rows, 258: 32, 259: 5, 262: 1, 277: 1, 278: 1, 339: 3}
    start = 8 + len(directory(tags | {273: 0, 279: 0}))
    tags |= {273: (rows, start), 279: (rows, start + 4 * rows)}
    lists = struct.pack("<I", start) * rows + struct.pack("<I", 12_000) * rows
    assert reason_of(b"II*\0" + struct.pack("<I", 8) + directory(tags) + lists) == "decompression_bomb"


@pytest.mark.parametrize("compression", [None, "zlib", "lzw", "zstd", "lzma", "packbits"])
def test_a_file_without_its_end_is_refused(compression):
    data = written((SCENE * 7).astype(np.float32), compression=compression)
    for share in (0.3, 0.7, 0.99):
        assert reason_of(data[: int(len(data) * share)]) in ("truncated", "corrupt_data")

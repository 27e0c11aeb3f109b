"""Decoding: every supported format by its stated rule, every unusable file refused with a reason, nothing crashes."""

import errno
import io
import struct
import zlib
from unittest.mock import Mock

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image, TiffImagePlugin

from data_pipelines import decode
from data_pipelines.decode import ImageRefused, decode_image, encode_png, make_example, read_image_file
from data_pipelines.errors import InputError
from data_pipelines.examples import CorruptExample, Example, decode_example, decode_pixels, encode_example, source_units
from data_pipelines.intensity import Intensity
from tests.data_pipelines.damaged import DEEP, GRAY, RAMP, REFUSALS, damaged_files, saved


def luma(rgb: np.ndarray) -> np.ndarray:
    """ITU-R 601 luma of (H, W, 3)."""
    return np.rint(rgb.astype(float) @ [0.299, 0.587, 0.114])


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        ("PNG", {}),
        ("BMP", {}),
        ("TIFF", {}),
        ("TIFF", {"compression": "tiff_lzw"}),
        ("TIFF", {"compression": "tiff_adobe_deflate"}),
        ("WEBP", {"lossless": True}),
        ("GIF", {}),
    ],
)
def test_lossless_gray_formats_are_exact(kind, options):
    image = Image.fromarray(GRAY) if kind != "WEBP" else Image.fromarray(GRAY).convert("RGB")
    np.testing.assert_array_equal(decode_image(saved(image, kind, **options)).pixels, GRAY)


@pytest.mark.parametrize("options", [{}, {"progressive": True}, {"quality": 30}])
def test_gray_jpeg_is_what_pillow_reads_and_is_stored_as_it_is(options):
    data = saved(Image.fromarray(RAMP), "JPEG", **options)
    image = decode_image(data)
    np.testing.assert_array_equal(image.pixels, np.asarray(Image.open(io.BytesIO(data))))
    record = make_example("a.jpg", data, image)
    assert image.verbatim and record.image == data and record.encoding == "jpeg"


@pytest.mark.parametrize("kind", ["PNG", "TIFF"])
def test_16_bit_is_bit_identical_through_the_record(kind):
    data = saved(Image.fromarray(DEEP), kind)
    image = decode_image(data)
    assert image.pixels.dtype == np.uint16
    record = decode_example(encode_example(make_example("a", data, image)))
    assert record.bit_depth == 16
    np.testing.assert_array_equal(decode_pixels(record), DEEP)


@pytest.mark.parametrize("order", ["II", "MM"])
@pytest.mark.parametrize(
    ("values", "offset"),
    [
        (DEEP.astype(np.int32), 0),
        (DEEP.astype(np.int32) - 32768, -32768),
        (DEEP.astype(np.int32) + 100_000, 100_000 + int(DEEP.min())),
    ],
)
def test_32_bit_integers_of_16_bit_span_are_exact(values, offset, order):
    info = TiffImagePlugin.ImageFileDirectory_v2(prefix=order.encode())
    image = decode_image(saved(Image.fromarray(values), "TIFF", tiffinfo=info))
    scale, shift, _ = source_units(image.attributes)
    assert (scale, shift) == (1, offset)
    np.testing.assert_array_equal(image.pixels * scale + shift, values)


@given(st.floats(-300, 3000), st.floats(1e-3, 1e4), st.integers(0, 2**32))
@settings(deadline=None)
def test_float_values_come_back_within_half_a_step(low, span, seed):
    values = (low + span * np.random.default_rng(seed).random((9, 11))).astype(np.float32)
    image = decode_image(saved(Image.fromarray(values), "TIFF"))
    scale, offset, unit = source_units(image.attributes)
    assert unit == "source" and np.log2(scale) == np.rint(np.log2(scale))
    assert scale <= 2 * (float(values.max()) - float(values.min())) / 65534 or scale == 1
    np.testing.assert_allclose(image.pixels * scale + offset, values, atol=scale / 2, rtol=0)


def test_not_finite_is_refused():
    values = np.ones((5, 5), np.float32)
    values[2, 2] = np.nan
    with pytest.raises(ImageRefused, match="not_finite.*4.00%"):
        decode_image(saved(Image.fromarray(values), "TIFF"))


def test_color_becomes_luma_and_gray_in_color_is_exact():
    rgb = np.random.default_rng(2).integers(0, 256, (24, 40, 3), dtype=np.uint8)
    np.testing.assert_allclose(decode_image(saved(Image.fromarray(rgb), "PNG")).pixels, luma(rgb), atol=1)
    same = np.repeat(GRAY[..., None], 3, axis=2)
    np.testing.assert_array_equal(decode_image(saved(Image.fromarray(same), "PNG")).pixels, GRAY)
    smooth = np.stack([RAMP, RAMP // 2, 255 - RAMP], axis=-1)
    decoded = decode_image(saved(Image.fromarray(smooth), "JPEG", quality=95, subsampling=0))
    np.testing.assert_allclose(decoded.pixels, luma(smooth), atol=6)
    assert not decoded.verbatim


def test_palette_alpha_bilevel_cmyk_and_frames():
    palette = Image.fromarray(GRAY // 4)
    palette = palette.convert("P")
    palette.putpalette([v for i in range(256) for v in (i * 4 % 256, i, 255 - i)])
    expected = luma(np.asarray(palette.convert("RGB")))
    np.testing.assert_allclose(decode_image(saved(palette, "PNG")).pixels, expected, atol=1)

    alpha = Image.fromarray(RAMP)
    for mode in ("LA", "RGBA"):
        picture = Image.fromarray(GRAY).convert(mode)
        picture.putalpha(alpha)
        np.testing.assert_array_equal(decode_image(saved(picture, "PNG")).pixels, GRAY)

    bilevel = decode_image(saved(Image.fromarray(GRAY > 128), "PNG"))
    np.testing.assert_array_equal(bilevel.pixels, np.where(GRAY > 128, 255, 0))

    cmyk = saved(Image.fromarray(RAMP).convert("CMYK"), "JPEG", quality=98)
    np.testing.assert_allclose(decode_image(cmyk).pixels.astype(int), RAMP, atol=4)

    frames = [Image.fromarray(GRAY), Image.fromarray(RAMP)]
    for kind in ("GIF", "TIFF"):
        several = decode_image(saved(frames[0], kind, save_all=True, append_images=frames[1:]))
        np.testing.assert_array_equal(several.pixels, GRAY)
        assert several.attributes["frames"] == 2


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("kind", ["JPEG", "PNG", "TIFF"])
def test_exif_orientation_is_applied(orientation, kind):
    exif = Image.Exif()
    exif[0x0112] = orientation
    stored = RAMP.copy()
    stored[:12, :20] = 255
    data = saved(Image.fromarray(stored), kind, exif=exif, **({"quality": 100} if kind == "JPEG" else {}))
    turns = {
        1: lambda p: p,
        2: np.fliplr,
        3: lambda p: np.rot90(p, 2),
        4: np.flipud,
        5: lambda p: p.T,
        6: lambda p: np.rot90(p, -1),
        7: lambda p: np.rot90(p, 2).T,
        8: np.rot90,
    }
    image = decode_image(data)
    expected = turns[orientation](stored).astype(int)
    assert image.pixels.shape == expected.shape
    np.testing.assert_allclose(image.pixels.astype(int), expected, atol=3 if kind == "JPEG" else 0)
    assert not (image.verbatim and orientation != 1)


def tiny_png(width: int, height: int, bit_depth: int, color_type: int, body: bytes = b"\0" * 10) -> bytes:
    def chunk(name: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))

    header = struct.pack(">IIBBBBB", width, height, bit_depth, color_type, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(body)) + chunk(b"IEND", b"")


JPEG = saved(Image.fromarray(RAMP), "JPEG")
PNG = saved(Image.fromarray(GRAY), "PNG")


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"", "empty_file"),
        (b"plain text\n", "not_an_image"),
        (bytes(100), "not_an_image"),
        (JPEG[: len(JPEG) // 2], "truncated"),
        (JPEG[:30], "truncated"),
        (PNG[: len(PNG) // 2], "truncated"),
        (PNG[:20], "truncated"),
        (JPEG.replace(b"\xff\xda", b"\xff\xdb"), "truncated"),
        (tiny_png(100_000, 100_000, 8, 0), "decompression_bomb"),
        (saved(Image.new("L", (20_000, 20_000)), "TIFF", compression="tiff_adobe_deflate"), "decompression_bomb"),
        (tiny_png(4, 4, 16, 2, bytes(4 * 25)), "unsupported_depth"),
        (tiny_png(4, 4, 16, 4, bytes(4 * 17)), "unsupported_depth"),
        (JPEG[:-2] + b"\xff\xda" * 300 + b"\xff\xd9", "decompression_bomb"),
    ],
)
def test_refusals(data, reason):
    with pytest.raises(ImageRefused) as refusal:
        decode_image(data)
    assert refusal.value.reason == reason and reason in REFUSALS
    assert "\n" not in refusal.value.detail


def test_size_limit_is_a_parameter():
    with pytest.raises(ImageRefused, match="40x24 is over the limit of 959 pixels"):
        decode_image(PNG, max_pixels=959)
    assert decode_image(PNG, max_pixels=960).pixels.shape == (24, 40)


def test_damaged_jpeg_data_are_refused():
    data = bytearray(saved(Image.fromarray(GRAY), "JPEG"))
    start = bytes(data).index(b"\xff\xda") + 40
    data[start : start + 60] = b"\xff\x01" * 30
    with pytest.raises(ImageRefused) as refusal:
        decode_image(bytes(data))
    assert refusal.value.reason in ("corrupt_data", "truncated")


def test_record_that_contradicts_its_payload_is_corrupt():
    with pytest.raises(CorruptExample, match="key: stored as 41x24"):
        decode_pixels(Example("key", encode_png(GRAY), "png", 24, 41, 8))
    with pytest.raises(CorruptExample, match="of 16 bit"):
        decode_pixels(Example("key", encode_png(GRAY), "png", 24, 40, 16))
    with pytest.raises(CorruptExample, match="does not decode"):
        decode_pixels(Example("key", JPEG[:-30], "jpeg", 24, 40, 8))


def test_read_image_file_names_the_file(tmp_path):
    (tmp_path / "good.png").write_bytes(PNG)
    np.testing.assert_array_equal(read_image_file(tmp_path / "good.png"), GRAY)
    (tmp_path / "bad.png").write_bytes(PNG[:100])
    for name, named in (("bad.png", "truncated"), ("missing.png", "No such file"), (".", "Is a directory")):
        with pytest.raises(InputError, match=named) as error:
            read_image_file(tmp_path / name)
        assert "\n" not in str(error.value)


def test_flir_counts_are_the_published_ones(shared_folder):
    data = (shared_folder / "data/flir/12_IR_moving_mercedes.jpg").read_bytes()
    counts = np.asarray(Image.open(shared_folder / "data/corrupt/thermal_16bit.png"))
    image = decode_image(data)
    np.testing.assert_array_equal(image.pixels, counts)
    # The camera's constants turn counts into the temperatures of the Kelvin file (emissivity and optics left out).
    camera = image.attributes["camera"]
    shifted = camera["planck_r2"] * (counts + camera["planck_o"])
    kelvin = camera["planck_b"] / np.log(camera["planck_r1"] / shifted + camera["planck_f"])
    published = np.asarray(Image.open(shared_folder / "data/corrupt/kelvin_x100_16bit.png")) / 100
    assert np.corrcoef(kelvin.ravel(), published.ravel())[0, 1] > 0.999


def test_flir_with_damaged_array_is_refused_not_kept_as_false_color():
    data = JPEG[:2] + b"\xff\xe1\x00\x0eFLIR\x00\x01\x00\x00abcd" + JPEG[2:]
    with pytest.raises(ImageRefused) as refusal:
        decode_image(data)
    assert refusal.value.reason == "radiometric_unreadable"


HARMLESS = {
    "JFIF revision": lambda data: data.replace(b"JFIF\0\1\1", b"JFIF\0\0\2"),
    "ICC": lambda data: data[:2] + b"\xff\xe2\0\x10ICC_PROFILE\0\0\0" + data[2:],
    "stray byte before a table": lambda data: data.replace(b"\xff\xdb", b"\0\xff\xdb", 1),
    "stray bytes before a restart": lambda data: data.replace(b"\xff\xd3", b"\0\1\xff\xd3", 1),
    "stray bytes before the end": lambda data: data.replace(b"\xff\xd9", b"\0\0\xff\xd9", 1),
    "two faults": lambda data: HARMLESS["JFIF revision"](HARMLESS["stray byte before a table"](data)),
    "scan parameters": lambda data: data.replace(b"\0\x3f\0", b"\0\0\0", 1),
    "fill bytes": lambda data: data.replace(b"\xff\xc4", b"\xff\xff\xff\xc4", 1),
    "trailing bytes": lambda data: data + b"trailer" * 99,
}


@pytest.mark.parametrize("fault", HARMLESS)
def test_faults_of_a_jpeg_that_touch_no_pixel_are_passed_over(fault):
    data = saved(Image.fromarray(RAMP), "JPEG", restart_marker_blocks=2)
    faulty = HARMLESS[fault](data)
    assert faulty != data
    image = decode_image(faulty)
    np.testing.assert_array_equal(image.pixels, decode_image(data).pixels)
    # What is stored decodes by the strict rule.
    np.testing.assert_array_equal(decode_pixels(make_example("key", faulty, image)), image.pixels)


def test_many_leftover_bytes_in_the_picture_are_damage():
    data = saved(Image.fromarray(RAMP), "JPEG", restart_marker_blocks=2)
    for marker in (b"\xff\xd3", b"\xff\xd9"):
        with pytest.raises(ImageRefused, match="extraneous"):
            decode_image(data.replace(marker, bytes(range(1, 15)) + marker, 1))


def png_chunk(name: bytes, content: bytes) -> bytes:
    return struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))


@pytest.mark.parametrize("pixels", [GRAY, DEEP])
@pytest.mark.parametrize("kind", ["zTXt", "iTXt", "iCCP", "tEXt with a wrong checksum"])
def test_metadata_of_a_png_do_not_decide_over_its_pixels(pixels, kind):
    packed = zlib.compress(bytes(3_000_000))
    chunk = {
        "zTXt": png_chunk(b"zTXt", b"Comment\0\0" + packed),
        "iTXt": png_chunk(b"iTXt", b"Comment\0\1\0\0\0" + packed),
        "iCCP": png_chunk(b"iCCP", b"profile\0\0" + packed),
        "tEXt with a wrong checksum": png_chunk(b"tEXt", b"Comment\0text")[:-1] + b"?",
    }[kind]
    data = saved(Image.fromarray(pixels), "PNG")
    np.testing.assert_array_equal(decode_image(data[:33] + chunk + data[33:]).pixels, pixels)
    with pytest.raises(ImageRefused):
        decode_image(data[:33] + chunk + data[33:-40])


@pytest.mark.parametrize(
    ("data", "said"),
    [
        (b"RIFF\x10\0\0\0AVI LIST" + bytes(300), "RIFF file of sound or video"),
        (b"BM is how this note begins\n" * 20, "text"),
        (b"GIF8 is a text as well", "text"),
    ],
)
def test_other_kinds_of_files_are_not_called_damaged(data, said):
    with pytest.raises(ImageRefused, match=said) as refusal:
        decode_image(data)
    assert refusal.value.reason == "not_an_image"


def test_read_image_file_takes_the_mapping_of_a_run(tmp_path):
    (tmp_path / "deep.tif").write_bytes(saved(Image.fromarray(DEEP.astype(np.int32) - 32768), "TIFF"))
    path = tmp_path / "deep.tif"
    fixed = read_image_file(path, Intensity("fixed", -32768, 32767))
    np.testing.assert_array_equal(fixed, Intensity("full_range").apply(DEEP))
    np.testing.assert_array_equal(read_image_file(path), Intensity().apply(DEEP))
    assert not np.array_equal(fixed, read_image_file(path))


@settings(deadline=2000, suppress_health_check=[HealthCheck.too_slow])
@given(damaged_files())
def test_damaged_files_are_decoded_or_refused(data):
    try:
        image = decode_image(data, max_pixels=1 << 20)
    except ImageRefused as refusal:
        assert refusal.reason in REFUSALS
        return
    assert image.pixels.ndim == 2 and image.pixels.dtype in (np.uint8, np.uint16)
    assert image.pixels.size <= 1 << 20
    record = decode_example(encode_example(make_example("key", data, image)))
    np.testing.assert_array_equal(decode_pixels(record), image.pixels)


def test_what_the_machine_lacks_is_no_fault_of_a_file(tmp_path, monkeypatch):
    """Where images that cannot be read are left out, those that could be read otherwise must not be."""
    Image.fromarray(np.arange(256, dtype=np.uint8).reshape(16, 16)).save(tmp_path / "a.png")
    with monkeypatch.context() as patch:
        patch.setattr("builtins.open", Mock(side_effect=OSError(errno.EMFILE, "Too many open files", "a.png")))
        with pytest.raises(OSError, match="Too many open files"):
            read_image_file(tmp_path / "a.png")
    monkeypatch.setattr(decode, "MAX_FILE_BYTES", 50)
    with pytest.raises(InputError, match="a.png is larger than"):
        read_image_file(tmp_path / "a.png")

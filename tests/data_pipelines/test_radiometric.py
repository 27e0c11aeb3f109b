"""Radiometric JPEG: the raw array in either byte order, or a refusal; never the false-colour picture."""

import struct

import numpy as np
import pytest
from PIL import Image

from data_pipelines.decode import ImageRefused, decode_image
from tests.data_pipelines.damaged import RAMP, saved

JPEG = saved(Image.fromarray(np.stack([RAMP, 255 - RAMP, RAMP], -1)), "JPEG")
COUNTS = (12_000 + np.add.outer(np.arange(24) * 3, np.arange(40) * 5)).astype(np.uint16)
NOISE = np.random.default_rng(0).integers(0, 65536, (24, 40), dtype=np.uint16)


def segment(marker: int, content: bytes) -> bytes:
    return bytes([0xFF, marker]) + struct.pack(">H", len(content) + 2) + content


def with_segments(*segments: bytes) -> bytes:
    return JPEG[:2] + b"".join(segments) + JPEG[2:]


def raw_record(counts: np.ndarray, order: str, png_swapped: bool | None = None, mark: int = 2) -> bytes:
    header = struct.pack(f"{order}HHH", mark, counts.shape[1], counts.shape[0]).ljust(32, b"\0")
    if png_swapped is None:
        return header + counts.astype(f"{order}u2").tobytes()
    return header + saved(Image.fromarray(counts.byteswap() if png_swapped else counts), "PNG")


def camera_record(order: str) -> bytes:
    record = bytearray(900)
    struct.pack_into(f"{order}H", record, 0, 2)
    struct.pack_into(f"{order}f", record, 32, 0.95)
    struct.pack_into(f"{order}fff", record, 88, 17_000.0, 1450.0, 1.5)
    struct.pack_into(f"{order}if", record, 776, -4096, 0.0125)
    return bytes(record)


def flir_jpeg(raw: bytes, camera: bytes, directory_order: str = ">", parts: int = 3) -> bytes:
    records, place, entries = [(1, raw), (32, camera)], 64 + 2 * 32, b""
    for kind, content in records:
        entries += struct.pack(f"{directory_order}HHIIII", kind, 1, 100, 1, place, len(content)).ljust(32, b"\0")
        place += len(content)
    header = b"FFF\0".ljust(20, b"\0") + struct.pack(f"{directory_order}III", 100, 64, 2)
    whole = header.ljust(64, b"\0") + entries + raw + camera
    size = -(-len(whole) // parts)
    pieces = [whole[start : start + size] for start in range(0, len(whole), size)]
    heads = [b"FLIR\0\1" + bytes([number, len(pieces) - 1]) for number in range(len(pieces))]
    return with_segments(*(segment(0xE1, head + piece) for head, piece in zip(heads, pieces, strict=True)))


def reason_of(data: bytes) -> str:
    with pytest.raises(ImageRefused) as refusal:
        decode_image(data)
    assert "\n" not in refusal.value.detail
    return refusal.value.reason


@pytest.mark.parametrize("order", "<>")
@pytest.mark.parametrize("camera_order", "<>")
@pytest.mark.parametrize("directory_order", "<>")
@pytest.mark.parametrize("png_swapped", [None, False, True])
def test_counts_and_constants_in_every_byte_order(order, camera_order, directory_order, png_swapped):
    raw, camera = raw_record(COUNTS, order, png_swapped), camera_record(camera_order)
    image = decode_image(flir_jpeg(raw, camera, directory_order))
    np.testing.assert_array_equal(image.pixels, COUNTS)
    camera = image.attributes["camera"]
    assert (camera["planck_r1"], camera["planck_b"], camera["planck_f"]) == (17_000, 1450, 1.5)
    assert (camera["planck_o"], camera["planck_r2"]) == (-4096, pytest.approx(0.0125))


@pytest.mark.parametrize(
    "raw",
    [
        raw_record(COUNTS, "<", mark=0x0707),
        raw_record(NOISE, "<", png_swapped=False),
        raw_record(np.full((24, 40), 0x3434, np.uint16), "<", png_swapped=False),
        raw_record(COUNTS, "<")[:-100],
        raw_record(COUNTS, "<", png_swapped=False)[:-100],
        struct.pack("<HHH", 2, 65_535, 65_535).ljust(32, b"\0"),
    ],
    ids=["no order mark", "noise", "constant", "cut", "cut PNG", "too large"],
)
def test_what_cannot_be_told_is_refused(raw):
    assert reason_of(flir_jpeg(raw, camera_record("<"))) == "radiometric_unreadable"


def test_missing_parts_and_endless_directories_are_refused():
    whole = flir_jpeg(raw_record(COUNTS, "<"), camera_record("<"))
    second = whole.index(b"FLIR\0\1\1")
    assert reason_of(whole[:second] + b"XXXX" + whole[second + 4 :]) == "radiometric_unreadable"
    endless = segment(0xE1, b"FLIR\0\1\0\0" + (b"FFF\0".ljust(20, b"\0") + struct.pack(">III", 100, 64, 1 << 32 - 1)))
    assert reason_of(with_segments(endless)) == "radiometric_unreadable"


@pytest.mark.parametrize("marker", [0xE3, 0xE5])
@pytest.mark.parametrize("stray", [b"", b"\0"])
def test_raw_arrays_of_other_makers_are_named_not_kept_as_false_color(marker, stray):
    """DJI writes a 16-bit array of the picture's size into APP3."""
    array = np.random.default_rng(1).integers(0, 65536, (100, 100), dtype=np.uint16).tobytes()
    halves = [segment(marker, array[:10_000]), stray, segment(marker, array[10_000:])]
    with pytest.raises(ImageRefused, match=f"20000 bytes in APP{marker - 0xE0}") as refusal:
        decode_image(with_segments(*halves))
    assert refusal.value.reason == "radiometric_unreadable"


def test_common_metadata_is_no_raw_array():
    for extra in (segment(0xE2, b"ICC_PROFILE\0" + bytes(60_000)), segment(0xED, b"Photoshop 3.0\0" + bytes(60_000))):
        assert decode_image(with_segments(extra)).pixels.shape == RAMP.shape
    assert decode_image(with_segments(segment(0xE4, bytes(5000)))).pixels.shape == RAMP.shape

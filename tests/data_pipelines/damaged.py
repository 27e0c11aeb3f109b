"""Image files of every supported kind, and damaged versions of them."""

import io

import numpy as np
from hypothesis import strategies as st
from PIL import Image

REFUSALS = {
    "empty_file", "not_an_image", "truncated", "corrupt_data", "decompression_bomb", "unsupported_depth",
    "unsupported_layout", "not_finite", "mostly_nodata", "radiometric_unreadable",
}  # fmt: skip
GRAY = np.random.default_rng(0).integers(0, 256, (24, 40), dtype=np.uint8)
DEEP = np.random.default_rng(1).integers(0, 65536, (24, 40), dtype=np.uint16)
RAMP = np.tile(np.arange(0, 240, 6, dtype=np.uint8), (24, 1))


def saved(image: Image.Image, kind: str, **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


SEEDS = [
    saved(Image.fromarray(RAMP), "JPEG"),
    saved(Image.fromarray(GRAY), "PNG"),
    saved(Image.fromarray(DEEP), "PNG"),
    saved(Image.fromarray(DEEP), "TIFF", compression="tiff_lzw"),
    saved(Image.fromarray(GRAY.astype(np.float32)), "TIFF"),
    saved(Image.fromarray(RAMP).convert("RGB"), "WEBP"),
    saved(Image.fromarray(RAMP), "GIF"),
    saved(Image.fromarray(RAMP), "BMP"),
    saved(Image.fromarray(RAMP).convert("CMYK"), "JPEG", progressive=True),
]


@st.composite
def damaged_files(draw) -> bytes:
    """Random bytes, bit flips in real files, truncations of them, blocks overwritten."""
    kind = draw(st.sampled_from(["random", "flips", "cut", "overwrite"]))
    if kind == "random":
        start = draw(st.sampled_from([b"", b"\xff\xd8\xff", b"\x89PNG\r\n\x1a\n", b"BM", b"II*\0", b"GIF89a", b"RIFF"]))
        return start + draw(st.binary(max_size=400))
    data = bytearray(draw(st.sampled_from(SEEDS)))
    if kind == "cut":
        return bytes(data[: draw(st.integers(0, len(data)))])
    if kind == "overwrite":
        start = draw(st.integers(0, len(data) - 1))
        block = draw(st.binary(min_size=1, max_size=40))
        data[start : start + len(block)] = block
        return bytes(data)
    for _ in range(draw(st.integers(1, 20))):
        data[draw(st.integers(0, len(data) - 1))] ^= 1 << draw(st.integers(0, 7))
    return bytes(data)

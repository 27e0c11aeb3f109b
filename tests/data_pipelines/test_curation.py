"""Filters of single images: planted borders found to the pixel, scenes without borders left alone."""

import io

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from data_pipelines.decode import DecodedImage, ImageRefused
from data_pipelines.prepare.curate import Filters, apply_filters, count_levels, crop_black_borders
from tests.data_pipelines.planted import synthetic_scenes

widths = st.tuples(*[st.integers(0, 40)] * 4)


def scene(dtype=np.uint8) -> np.ndarray:
    noise = np.random.default_rng(0).integers(90, 200, (60, 80))
    return noise.astype(dtype) * (1 if dtype == np.uint8 else 250)


@given(widths, st.integers(0, 16), st.sampled_from([np.uint8, np.uint16]))
@settings(deadline=None)
def test_planted_borders_are_cut_to_the_pixel(border, level, dtype):
    top, bottom, left, right = (width if width >= 4 else 0 for width in border)
    inside = scene(dtype)
    framed = np.pad(inside, ((top, bottom), (left, right)), constant_values=level if dtype == np.uint8 else 0)
    image = crop_black_borders(DecodedImage(framed, {"format": "PNG"}))
    np.testing.assert_array_equal(image.pixels, inside)
    if any((top, bottom, left, right)):
        assert image.attributes == {"format": "PNG", "border_crop": [top, left, 60, 80]}


@given(widths, st.integers(60, 95))
@settings(deadline=None, max_examples=30)
def test_borders_of_compressed_frames_are_cut(border, quality):
    top, bottom, left, right = (width if width >= 12 else 0 for width in border)
    inside = np.asarray(Image.fromarray(scene()[::8, ::8]).resize((80, 60), Image.Resampling.BICUBIC))
    buffer = io.BytesIO()
    Image.fromarray(np.pad(inside, ((top, bottom), (left, right)))).save(buffer, "JPEG", quality=quality)
    framed = np.asarray(Image.open(buffer))
    height, width = crop_black_borders(DecodedImage(framed, {})).pixels.shape
    # Ripples reach at most one block of 8 pixels into each border, and an edge line may be lost to them.
    assert 58 <= height <= 60 + 16 and 78 <= width <= 80 + 16


def test_scenes_without_borders_are_left_alone():
    shares = [crop_black_borders(DecodedImage(image, {})).pixels.size / image.size for image in synthetic_scenes(40, 3)]
    assert sum(share == 1 for share in shares) >= 38 and min(shares) > 0.95


def test_dark_noise_gradients_and_thin_lines_are_no_borders():
    rng = np.random.default_rng(1)
    bright = scene()
    night = np.concatenate([rng.integers(0, 20, (20, 80), dtype=np.uint8), bright])
    gradient = np.concatenate([np.repeat(np.arange(20, dtype=np.uint8), 80).reshape(20, 80), bright // 4])
    line = np.concatenate([np.zeros((3, 80), np.uint8), bright])
    for pixels in (night, gradient, line, np.zeros((30, 30), np.uint8), np.full((5, 5), 300, np.uint16)):
        assert crop_black_borders(DecodedImage(pixels, {})).pixels is pixels


@pytest.mark.parametrize(
    ("pixels", "filters", "reason"),
    [
        (scene()[:19, :19], Filters(), "too_small"),
        (np.full((30, 30), 9, np.uint8), Filters(), "constant"),
        (np.uint8([[0, 255]] * 30).repeat(20, 1), Filters(), "too_few_levels"),
        (np.pad(scene()[:15, :15], 10), Filters(), "too_small"),
        (scene(), Filters(min_levels=200), "too_few_levels"),
    ],
)
def test_refusals(pixels, filters, reason):
    with pytest.raises(ImageRefused) as refusal:
        apply_filters(DecodedImage(pixels, {}), filters)
    assert refusal.value.reason == reason


@pytest.mark.parametrize(
    ("pixels", "filters"),
    [
        (scene()[:19, :20], Filters()),
        (scene()[:1, :1], Filters(min_side=0, min_levels=0)),
        (np.full((30, 30), 9, np.uint8), Filters(min_levels=0)),
        (np.pad(scene()[:15, :15], 10), Filters(crop_borders=False)),
    ],
)
def test_every_filter_can_be_switched_off(pixels, filters):
    assert apply_filters(DecodedImage(pixels, {}), filters).pixels is pixels


@given(st.integers(0, 2**32), st.sampled_from([np.uint8, np.uint16]))
def test_levels_are_distinct_values(seed, dtype):
    pixels = np.random.default_rng(seed).integers(0, 256, (7, 9)).astype(dtype)
    assert count_levels(pixels) == len(np.unique(pixels))

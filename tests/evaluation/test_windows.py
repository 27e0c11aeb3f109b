"""Sliding windows against a slow loop, and the grouping of images."""

import functools
import threading

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from data_pipelines.errors import InputError
from data_pipelines.transforms import PAD_GRAY
from infmae_jax.evaluation import windows
from infmae_jax.evaluation.windows import Windows
from infmae_jax.models.patches import PIXEL_MEAN, PIXEL_STD

WEIGHT = np.random.default_rng(0).normal(size=3).astype(np.float32)


def of_window(weight, pixels):
    """Scores that depend on the place inside the window and on the whole window: like a network with padding."""
    count, height, width, _ = pixels.shape
    place = jnp.arange(height * width, dtype=jnp.float32).reshape(height, width)[None] / (height * width)
    whole = pixels.mean(axis=(1, 2, 3))[:, None, None]
    return (pixels[..., 0] * place + whole)[..., None] * weight.reshape(1, 1, 1, -1)


def slowly(image, size, stride):
    """One image: every window by itself, in float64 NumPy."""
    height, width = image.shape
    size = min(size[0], height), min(size[1], width)
    total, seen = np.zeros((height, width, len(WEIGHT))), np.zeros((height, width, 1))
    tops, lefts = {0}, {0}
    for starts, extent, window, step in ((tops, height, size[0], stride[0]), (lefts, width, size[1], stride[1])):
        start = 0
        while start + window < extent:
            start = min(start + step, extent - window)
            starts.add(start)
    for top in tops:
        for left in lefts:
            part = image[top : top + size[0], left : left + size[1]]
            pixels = (part.astype(np.float64) / 255 - PIXEL_MEAN) / PIXEL_STD
            place = np.arange(part.size).reshape(part.shape) / part.size
            total[top : top + size[0], left : left + size[1]] += (pixels * place + pixels.mean())[..., None] * WEIGHT
            seen[top : top + size[0], left : left + size[1]] += 1
    return total / seen


@pytest.mark.parametrize(
    ("height", "width", "size", "stride", "at_once"),
    [
        (64, 64, (64, 64), (32, 32), 4), (32, 96, (64, 64), (43, 43), 3), (96, 160, (64, 64), (43, 43), 1),
        (96, 160, (64, 64), (43, 43), 4), (160, 64, (32, 32), (32, 20), 7), (64, 128, (0, 0), (1, 1), 2),
    ],
)  # fmt: skip
def test_windows_equal_a_slow_loop(height, width, size, stride, at_once):
    images = np.random.default_rng(1).integers(0, 256, (2, height, width), dtype=np.uint8)
    how = Windows(size, stride, at_once)
    found = jax.jit(functools.partial(windows.window_scores, of_window, windows=how))(WEIGHT, images)
    truth = [slowly(image, size if any(size) else image.shape, stride) for image in images]
    np.testing.assert_allclose(found, truth, atol=2e-5)


@hypothesis.given(st.integers(1, 300), st.integers(1, 100), st.data())
@hypothesis.settings(deadline=None)
def test_windows_cover_a_side_and_stay_inside(extent, window, data):
    stride = data.draw(st.integers(1, window))
    starts = windows.window_starts(extent, window, stride)
    covered = np.zeros(extent, bool)
    for start in starts:
        assert 0 <= start and (start + window <= extent or starts == [0])
        covered[start : start + window] = True
    assert covered.all() and starts == sorted(set(starts))
    # mmsegmentation's number of windows
    assert len(starts) == max(-(-(extent - window) // stride), 0) + 1


def test_unusable_windows_are_named():
    for wrong in (
        dict(size=(100, 96)),
        dict(size=(0, 96)),
        dict(stride=(0, 4)),
        dict(stride=(600, 4)),
        dict(batch_size=0),
    ):
        with pytest.raises(InputError, match=r"windows\."):
            Windows(**wrong)


def test_groups_hold_one_kind_and_lose_nothing():
    items = [(kind, number) for number, kind in enumerate("aabacbbbaa")]
    most = {"a": 2, "b": 3, "c": 2}
    groups = list(windows.in_groups(items, lambda item: item[0], most.__getitem__))
    assert sorted(item for group in groups for item in group) == sorted(items)
    assert all(len({kind for kind, _ in group}) == 1 and len(group) <= most[group[0][0]] for group in groups)
    assert [len(group) for group in groups] == [2, 3, 2, 1, 1, 1]


def test_large_canvases_come_in_smaller_groups(monkeypatch):
    size = windows.batch_size_of(Windows(batch_size=4))
    devices = jax.local_device_count()
    canvases = (512, 512), (1024, 1024), (1056, 1920), (2048, 2048), (9216, 9216)
    assert [size(canvas) // devices for canvas in ((256, 256), (512, 256), *canvases)] == [4, 2, 1, 1, 1, 1, 1]
    monkeypatch.setattr(windows, "_PIXELS_ON_CPU", windows._PIXELS)  # as on accelerators
    size = windows.batch_size_of(Windows(batch_size=4))
    assert [size(canvas) // devices for canvas in canvases] == [4, 4, 2, 1, 1]


def test_tiles_share_a_third_unless_told():
    assert Windows().tiled((512, 512)) == Windows() and Windows().tiled((96, 64), 32).stride == (64, 32)


def test_ahead_keeps_the_order_and_does_not_run_away():
    started, lock = [], threading.Lock()

    def work(item):
        with lock:
            started.append(item)
        return item * item

    found = windows.ahead(work, range(100), threads=3, most=5)
    assert [next(found) for _ in range(10)] == [n * n for n in range(10)]
    assert len(started) <= 10 + 5
    assert list(found) == [n * n for n in range(10, 100)]


def test_canvas_is_the_image_and_padding():
    image = np.arange(35, dtype=np.uint8).reshape(5, 7)
    assert windows.canvas_of(5, 7) == (32, 32) and windows.canvas_of(64, 65) == (64, 96)
    ((group, batch, sizes),) = windows.on_canvases(["name"], lambda _: image, lambda canvas: 2)
    canvas = batch[0]
    assert group == ["name"] and batch.shape == (2, 32, 32) and sizes.tolist() == [[5, 7], [32, 32]]
    assert (canvas[:5, :7] == image).all() and (canvas[5:] == PAD_GRAY).all() and (canvas[:, 7:] == PAD_GRAY).all()

"""RoIAlign, both forms, against a twin that reads one sample after the other."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from infmae_jax.models.heads.roi_align import bin_matrix, levels_of, roi_align

STRIDES, BINS = (4, 8), 3
SIZES = ((12, 16), (6, 8))


def slow_bilinear(x, row, column):
    """x (H,W,C) at a point in cells, whose centres are at whole numbers; 0 from a cell outside on."""
    height, width = x.shape[:2]
    if not (-1 <= row <= height and -1 <= column <= width):
        return np.zeros(x.shape[2])
    row, column = np.clip(row, 0, height - 1), np.clip(column, 0, width - 1)
    top, left = int(row), int(column)
    bottom, right = min(top + 1, height - 1), min(left + 1, width - 1)
    a, b = row - top, column - left
    upper, lower = ((1 - b) * x[row, left] + b * x[row, right] for row in (top, bottom))
    return (1 - a) * upper + a * lower


def slow_align(x, roi, stride, bins):
    """x (H,W,C) -> (bins,bins,C): the mean of 2 x 2 samples of each bin."""
    x0, y0, x1, y1 = np.float64(roi) / stride - 0.5
    out = np.zeros((bins, bins, x.shape[2]))
    for i, j, a, b in np.ndindex(bins, bins, 2, 2):
        row = y0 + (y1 - y0) / bins * (i + (a + 0.5) / 2)
        column = x0 + (x1 - x0) / bins * (j + (b + 0.5) / 2)
        out[i, j] += slow_bilinear(x, row, column) / 4
    return out


def slow_level(roi):
    side = max(roi[2] - roi[0], 0) * max(roi[3] - roi[1], 0)
    return int(np.clip(np.floor(4 + np.log2(np.sqrt(side) / 224 + 1e-8)), 2, 3)) - 2


maps = [np.random.default_rng(i).standard_normal((2, *size, 5)).astype(np.float32) for i, size in enumerate(SIZES)]
both = {form: jax.jit(lambda maps, rois, form=form: roi_align(maps, STRIDES, rois, BINS, form))
        for form in ("gather", "einsum", "auto")}  # fmt: skip
edge = st.floats(-40, 160, width=32)
some_rois = st.lists(st.tuples(edge, edge, edge, edge), min_size=6, max_size=6)


@given(some_rois)
@settings(deadline=None, max_examples=30)
def test_both_forms(rois):
    """Boxes across and beyond the edges, in the wrong order, of both levels."""
    rois = np.array(rois, np.float32)
    rois[:3] = np.sort(rois[:3].reshape(3, 2, 2), axis=1).reshape(3, 4)
    rois = rois.reshape(2, 3, 4)
    wanted = np.array([[
        slow_align(maps[slow_level(roi)][image], roi, STRIDES[slow_level(roi)], BINS) for roi in rois[image]
    ] for image in range(2)])  # fmt: skip
    for form, pool in both.items():
        np.testing.assert_allclose(pool(maps, rois), wanted, atol=2e-4, err_msg=form)


def test_a_box_of_whole_cells_averages_them():
    """Two samples in each cell lie evenly about its centre, where a plane is exact."""
    rows, columns = np.meshgrid(np.arange(12.0), np.arange(16.0), indexing="ij")
    plane = np.stack([rows, columns], axis=-1)[None].astype(np.float32)
    found = roi_align([jnp.asarray(plane)], (4,), jnp.array([[[8.0, 4.0, 20.0, 16.0]]]), 3)[0, 0]
    np.testing.assert_allclose(found[..., 0], np.repeat([[1.0], [2.0], [3.0]], 3, axis=1), atol=1e-5)
    np.testing.assert_allclose(found[..., 1], np.repeat([[2.0, 3.0, 4.0]], 3, axis=0), atol=1e-5)


def test_gradients_are_the_same_and_none_flows_into_boxes():
    rois = np.array([[[3, 5, 40, 30], [0, 0, 0, 0]], [[-9, 2, 150, 150], [60, 40, 64, 48]]], np.float32)
    weight = np.random.default_rng(5).standard_normal((2, 2, BINS, BINS, 5)).astype(np.float32)

    def total(maps, rois, form):
        return (roi_align(maps, STRIDES, rois, BINS, form) * weight).sum()

    gradient = jax.jit(jax.grad(total, (0, 1)), static_argnums=2)
    gather, einsum = (gradient(maps, rois, form) for form in ("gather", "einsum"))
    for first, second in zip(gather[0], einsum[0], strict=True):
        np.testing.assert_allclose(first, second, atol=1e-4)
        assert abs(first).max() > 0.1
    assert not np.any(gather[1]) and not np.any(einsum[1])


def test_bfloat16_maps_are_summed_in_float32():
    narrow = [jnp.asarray(x, jnp.bfloat16) for x in maps]
    rois = jnp.array([[[3.0, 5.0, 40.0, 30.0]], [[-9.0, 2.0, 150.0, 150.0]]])
    wanted = both["gather"]([x.astype(jnp.float32) for x in narrow], rois)
    for form in ("gather", "einsum"):
        found = both[form](narrow, rois)
        assert found.dtype == jnp.bfloat16
        np.testing.assert_allclose(found.astype(jnp.float32), wanted, atol=0.02)


@pytest.mark.parametrize("side, level", [(0, 0), (10, 0), (111.9, 0), (112, 1), (223, 1), (224, 2), (448, 3), (9e3, 3)])
def test_levels_by_size(side, level):
    """224 x 224 reads stride 16; half as large reads stride 8, and so on to the ends."""
    assert levels_of(jnp.array([[7.0, 9.0, 7.0 + side, 9.0 + side]]), 2, 5).tolist() == [level]


def test_weights_of_a_bin_sum_to_one_inside():
    low, high = jnp.array([0.0, 2.5, -30.0]), jnp.array([7.0, 3.0, -20.0])
    sums = bin_matrix(low, high, 7, 4).sum(axis=-1)
    np.testing.assert_allclose(sums, [[1] * 4, [1] * 4, [0] * 4], atol=1e-6)

"""Depthwise convolution against nested loops, values and gradients."""

import jax
import jax.numpy as jnp
import jax.test_util
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from infmae_jax.models import depthwise, patches


def slow_depthwise(cells, kernel):
    """(R,S,C), (5,5,C) -> (R,S,C), zero padding, term by term."""
    rows, columns, _ = cells.shape
    out = np.zeros_like(cells)
    for y in range(rows):
        for x in range(columns):
            for i in range(5):
                for j in range(5):
                    if 0 <= y + i - 2 < rows and 0 <= x + j - 2 < columns:
                        out[y, x] += cells[y + i - 2, x + j - 2] * kernel[i, j]
    return out


@pytest.fixture(autouse=True)
def float64():
    with jax.enable_x64(True):
        yield


@settings(max_examples=6, deadline=None)
@given(h=st.integers(1, 3), w=st.integers(1, 3), r=st.sampled_from([2, 4]), seed=st.integers(0, 1000), data=st.data())
def test_visible_patches_against_nested_loops(h, w, r, seed, data):
    with jax.enable_x64(True):
        keep = data.draw(st.integers(1, h * w))
        rng = np.random.default_rng(seed)
        ids = rng.permutation(h * w)[None, :keep].astype(np.int32)
        cells, kernel = rng.standard_normal((1, keep, r, r, 3)), rng.standard_normal((5, 5, 3))
        whole = np.zeros((h * r, w * r, 3))
        for token, patch in zip(ids[0], cells[0]):
            row, column = divmod(int(token), w)
            whole[row * r : row * r + r, column * r : column * r + r] = patch
        expected = slow_depthwise(whole, kernel)
        convolve = jax.jit(depthwise.convolve, static_argnums=2)
        out = convolve(jnp.asarray(cells), jnp.asarray(kernel), (h, w), jnp.asarray(ids))
        for token, patch in zip(ids[0], out[0]):
            row, column = divmod(int(token), w)
            np.testing.assert_allclose(patch, expected[row * r : row * r + r, column * r : column * r + r], atol=1e-12)


@pytest.mark.parametrize("r", [2, 4])
def test_gradients_of_both_forms_against_finite_differences(r):
    rng = np.random.default_rng(0)
    ids = jnp.asarray(np.stack([rng.permutation(6)[:3] for _ in range(2)]), jnp.int32)
    kernel = jnp.asarray(rng.standard_normal((5, 5, 2)))
    cells = jnp.asarray(rng.standard_normal((2, 3, r, r, 2)))
    jax.test_util.check_grads(
        jax.jit(lambda c, k: depthwise.convolve(c, k, (2, 3), ids)), (cells, kernel), order=1, modes=["rev"]
    )
    whole = jnp.asarray(rng.standard_normal((2, 2 * r, 3 * r, 2)))
    on_map = jax.jit(lambda c, k: depthwise.convolve(c, k, (2, 3)))
    jax.test_util.check_grads(on_map, (whole, kernel), order=1, modes=["rev"])


def test_whole_map_against_nested_loops():
    rng = np.random.default_rng(0)
    cells, kernel = rng.standard_normal((2, 8, 12, 3)), rng.standard_normal((5, 5, 3))
    out = depthwise.convolve(jnp.asarray(cells), jnp.asarray(kernel), (2, 3))
    for got, sample in zip(out, cells, strict=True):
        np.testing.assert_allclose(got, slow_depthwise(sample, kernel), atol=1e-12)


def test_bfloat16_is_rounded_once():
    rng = np.random.default_rng(0)
    cells = jnp.asarray(rng.standard_normal((1, 8, 8, 3)), jnp.bfloat16)
    kernel = jnp.asarray(rng.standard_normal((5, 5, 3)), jnp.bfloat16)
    out = jax.jit(depthwise.convolve, static_argnums=2)(cells, kernel, (2, 2))
    assert out.dtype == jnp.bfloat16
    exact = slow_depthwise(np.asarray(cells[0], np.float64), np.asarray(kernel, np.float64))
    np.testing.assert_allclose(np.asarray(out[0], np.float64), exact, rtol=2**-8, atol=1e-5)


@settings(max_examples=10, deadline=None)
@given(h=st.integers(1, 4), w=st.integers(1, 4), channels=st.integers(1, 3))
def test_patchify_is_row_column_channel_and_inverts(h, w, channels):
    images = np.arange(h * w * 256 * channels, dtype=np.float32).reshape(1, h * 16, w * 16, channels)
    out = np.asarray(patches.patchify(jnp.asarray(images)))
    for token in range(h * w):
        row, column = divmod(token, w)
        patch = images[0, row * 16 : row * 16 + 16, column * 16 : column * 16 + 16]
        np.testing.assert_array_equal(out[0, token], patch.reshape(-1))
    cells = out.reshape(1, h * w, 16, 16, channels)
    np.testing.assert_array_equal(patches.tokens_to_grid(jnp.asarray(cells), (h, w)), images)

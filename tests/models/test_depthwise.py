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


def patches_of(whole, ids, grid, r):
    """(h*r,w*r,C) -> (K,r,r,C): the listed patches."""
    corners = [(int(token) // grid[1] * r, int(token) % grid[1] * r) for token in ids]
    return np.stack([whole[row : row + r, column : column + r] for row, column in corners])


@pytest.mark.parametrize("method", ["shift", "conv", "products", "windows"])
@settings(max_examples=5, deadline=None)
@given(h=st.integers(1, 3), w=st.integers(1, 4), r=st.sampled_from([2, 4]), seed=st.integers(0, 1000), data=st.data())
def test_every_form_and_its_gradients_against_nested_loops(method, h, w, r, seed, data):
    """Convolution is linear: its gradients follow from those of single kernel positions and from the turned kernel."""
    with jax.enable_x64(True):
        rng, grid, keep = np.random.default_rng(seed), (h, w), data.draw(st.integers(1, h * w))
        ids = np.stack([rng.permutation(h * w)[:keep] for _ in range(2)]).astype(np.int32)
        cells, grad = rng.standard_normal((2, 2, keep, r, r, 3))
        kernel = rng.standard_normal((5, 5, 3))

        def convolved(cells, kernel):
            return depthwise.convolve(cells, kernel, jnp.asarray(ids), grid, method)

        out, pullback = jax.vjp(jax.jit(convolved), cells, kernel)
        cells_grad, kernel_grad = pullback(jnp.asarray(grad))
        expected = np.zeros((5, 5, 3))
        for sample in range(2):
            whole, whole_grad = np.zeros((2, h * r, w * r, 3))
            for token, patch, patch_grad in zip(ids[sample], cells[sample], grad[sample], strict=True):
                row, column = divmod(int(token), w)
                whole[row * r : row * r + r, column * r : column * r + r] = patch
                whole_grad[row * r : row * r + r, column * r : column * r + r] = patch_grad
            convolved, turned = slow_depthwise(whole, kernel), slow_depthwise(whole_grad, kernel[::-1, ::-1])
            np.testing.assert_allclose(out[sample], patches_of(convolved, ids[sample], grid, r), atol=1e-12)
            np.testing.assert_allclose(cells_grad[sample], patches_of(turned, ids[sample], grid, r), atol=1e-12)
            padded = np.pad(whole, ((2, 2), (2, 2), (0, 0)))
            for i in range(5):
                for j in range(5):
                    expected[i, j] += (padded[i : i + h * r, j : j + w * r] * whole_grad).sum(axis=(0, 1))
        np.testing.assert_allclose(kernel_grad, expected, atol=1e-11)


@pytest.mark.parametrize("r, method", [(2, "auto"), (4, "auto"), (2, "conv")])
def test_gradients_against_finite_differences(r, method):
    rng = np.random.default_rng(0)
    ids = jnp.asarray(np.stack([rng.permutation(6)[:3] for _ in range(2)]), jnp.int32)
    kernel = jnp.asarray(rng.standard_normal((5, 5, 2)))
    cells = jnp.asarray(rng.standard_normal((2, 3, r, r, 2)))
    jax.test_util.check_grads(
        jax.jit(lambda c, k: depthwise.convolve(c, k, ids, (2, 3), method)), (cells, kernel), order=1, modes=["rev"]
    )
    whole = jnp.asarray(rng.standard_normal((2, 2 * r, 3 * r, 2)))
    on_map = jax.jit(lambda c, k: depthwise.convolve(c, k, None, (2, 3), method))
    jax.test_util.check_grads(on_map, (whole, kernel), order=1, modes=["rev"])


def test_whole_map_against_nested_loops():
    rng = np.random.default_rng(0)
    cells, kernel = rng.standard_normal((2, 8, 12, 3)), rng.standard_normal((5, 5, 3))
    out = depthwise.convolve(jnp.asarray(cells), jnp.asarray(kernel), None, (2, 3))
    for got, sample in zip(out, cells, strict=True):
        np.testing.assert_allclose(got, slow_depthwise(sample, kernel), atol=1e-12)


def test_products_place_and_take_patches_exactly_in_bfloat16():
    """Ones and zeros times bfloat16, summed in float32: not one value is rounded on its way."""
    rng, grid = np.random.default_rng(0), (3, 4)
    ids = jnp.asarray(np.stack([rng.permutation(12)[:7] for _ in range(2)]), jnp.int32)
    cells = jnp.asarray(rng.standard_normal((2, 7, 4, 4, 3)), jnp.bfloat16)
    whole = depthwise._place_by_products(cells, ids, grid)
    assert whole.dtype == jnp.bfloat16 and whole.shape == (2, 12, 16, 3)
    scattered = patches.place_tokens(cells, ids, jnp.zeros((2, 12, 4, 4, 3), jnp.bfloat16))
    np.testing.assert_array_equal(whole, patches.tokens_to_grid(scattered, grid))
    np.testing.assert_array_equal(depthwise._take_by_products(whole, ids, grid), cells)
    cut = depthwise._windows_by_product(cells, ids, grid)
    assert cut.dtype == jnp.bfloat16
    np.testing.assert_array_equal(cut, depthwise._windows(cells, ids, grid))


@pytest.mark.parametrize("visible, windows", [(128, True), (129, False)])
def test_windows_are_for_few_visible_patches(visible, windows):
    shapes = [((1, visible, 2, 2, 8), "float32"), ((5, 5, 8), "float32"), ((1, visible), "int32")]
    arguments = [jax.ShapeDtypeStruct(*shape) for shape in shapes]
    form = jax.jit(depthwise.convolve, static_argnums=(3, 4)).lower(*arguments, (16, 16), "windows").as_text()
    assert ("1x32x32x8" not in form) == windows  # the whole map


def test_bfloat16_is_rounded_once():
    rng = np.random.default_rng(0)
    cells = jnp.asarray(rng.standard_normal((1, 8, 8, 3)), jnp.bfloat16)
    kernel = jnp.asarray(rng.standard_normal((5, 5, 3)), jnp.bfloat16)
    out = jax.jit(depthwise.convolve, static_argnums=3)(cells, kernel, None, (2, 2))
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

"""5 x 5 depthwise convolution over visible patches or whole maps, with a hand-written backward pass.

Written as 25 shifted multiply-adds that XLA fuses: its grouped convolution is slow, most of all backward. Two facts
make the backward pass cheap. Spreading visible patches over a zero map and gathering them again are transposes of each
other, so the gradient with respect to the cells is the same operation with the kernel turned by 180 degrees: it gathers
and never scatters. And the kernel's gradient is summed over the r x r cells of a patch before the (slow) reduction over
patches.
"""

import functools

import jax
import jax.numpy as jnp

from infmae_jax.models import patches

SIZE = 5
RADIUS = SIZE // 2
_TAPS = [(i, j) for i in range(SIZE) for j in range(SIZE)]


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def convolve(cells: jax.Array, kernel: jax.Array, grid: tuple[int, int], ids: jax.Array | None = None) -> jax.Array:
    """Depthwise convolution with zero padding of whole maps, or at visible patches with masked ones reading as zero.

    Args:
      cells: (B,h*r,w*r,C), or (B,K,r,r,C), the cells of the visible patches.
      kernel: (5,5,C), applied without flipping, as convolutions in deep learning are.
      grid: token rows and columns (h, w).
      ids: (B,K) int32, which patches are visible, no repeats; None: `cells` are whole maps.

    Returns:
      The shape of `cells`.
    """
    return _multiply_add(_surrounded(cells, grid, ids), kernel)


def _convolve_forward(cells, kernel, grid, ids):
    return convolve(cells, kernel, grid, ids), (cells, kernel, ids)


def _convolve_backward(grid, saved, grad):
    cells, kernel, ids = saved
    side = cells.shape[1] // grid[0] if ids is None else cells.shape[2]
    return (
        _multiply_add(_surrounded(grad, grid, ids), kernel[::-1, ::-1]).astype(cells.dtype),
        _kernel_gradient(_surrounded(cells, grid, ids), grad, side).astype(kernel.dtype),
        None,
    )


convolve.defvjp(_convolve_forward, _convolve_backward)


def _surrounded(cells: jax.Array, grid: tuple[int, int], ids: jax.Array | None) -> jax.Array:
    """Cells with what the kernel reads beyond their edge."""
    return _pad(cells) if ids is None else _windows(cells, ids, grid)


def _pad(cells: jax.Array) -> jax.Array:
    return jnp.pad(cells, ((0, 0), (RADIUS, RADIUS), (RADIUS, RADIUS), (0, 0)))


def _windows(cells: jax.Array, ids: jax.Array, grid: tuple[int, int]) -> jax.Array:
    """(B,K,r,r,C) -> (B,K,r+4,r+4,C): each visible patch with its surroundings, zero where nothing is visible."""
    batch, _, r, _, channels = cells.shape
    empty = jnp.zeros((batch, grid[0] * grid[1], r, r, channels), cells.dtype)
    whole = _pad(patches.tokens_to_grid(patches.place_tokens(cells, ids, empty), grid))
    rows, columns = ids // grid[1] * r, ids % grid[1] * r
    side = r + 2 * RADIUS

    def cut(sample, row, column):
        return jax.lax.dynamic_slice(sample, (row, column, jnp.zeros_like(row)), (side, side, channels))

    return jax.vmap(jax.vmap(cut, in_axes=(None, 0, 0)))(whole, rows, columns)


def _multiply_add(windows: jax.Array, kernel: jax.Array) -> jax.Array:
    """(..., R+4, S+4, C), (5,5,C) -> (..., R, S, C), accumulated at least in float32."""
    accumulate = jnp.promote_types(windows.dtype, jnp.float32)
    rows, columns = windows.shape[-3] - 2 * RADIUS, windows.shape[-2] - 2 * RADIUS
    lead = (1,) * (windows.ndim - 1)
    taps = (
        windows[..., i : i + rows, j : j + columns, :].astype(accumulate)
        * kernel[i, j].astype(accumulate).reshape(*lead, -1)
        for i, j in _TAPS
    )
    return functools.reduce(jnp.add, taps).astype(windows.dtype)


def _kernel_gradient(windows: jax.Array, grad: jax.Array, step: int) -> jax.Array:
    """(..., R+4, S+4, C), (..., R, S, C) -> (5,5,C), accumulated at least in float32."""
    accumulate = jnp.promote_types(grad.dtype, jnp.float32)
    rows, columns, channels = grad.shape[-3:]

    def tap_row(i):
        """A loop over kernel rows, not 25 unrolled taps: a third of the compile time."""
        part = jax.lax.dynamic_slice_in_dim(windows, i, rows, axis=-3).astype(accumulate)
        sums = jnp.concatenate([_patch_sum(part[..., j : j + columns, :], grad, step) for j in range(SIZE)], axis=-1)
        return jnp.ones((1, sums.shape[1]), accumulate) @ sums

    # Samples are summed after the loop: they lie on several devices, whose exchange inside a loop XLA's CPU backend
    # does not put in one order with that outside.
    return jax.lax.map(tap_row, jnp.arange(SIZE)).sum(axis=(1, 2)).reshape(SIZE, SIZE, channels)


def _patch_sum(cells: jax.Array, grad: jax.Array, step: int) -> jax.Array:
    """(B, ..., R, S, C), (B, ..., R, S, C) -> (B, n, C): products summed over each step x step block of cells."""
    products = (
        cells[..., y::step, x::step, :] * grad[..., y::step, x::step, :].astype(cells.dtype)
        for y in range(step)
        for x in range(step)
    )
    return functools.reduce(jnp.add, products).reshape(cells.shape[0], -1, cells.shape[-1])

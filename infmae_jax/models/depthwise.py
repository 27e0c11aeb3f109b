"""5 x 5 depthwise convolution over visible patches or whole maps, with a hand-written backward pass.

The values do not depend on how it is computed; the time does (`_FORMS`; "auto" takes `_BEST` of each backend):

shift     25 shifted multiply-adds that XLA fuses; visible patches are put on a map of zeros, out of which windows are
          cut. For CPUs, whose grouped convolution is slow, most of all backward.
conv      XLA's grouped convolution of the whole map. For NVIDIA GPUs.
products  the same, but products with matrices of zeros and ones, which are exact, put patches on the map and take them.
          For TPUs, which hold the last two dimensions of arrays in tiles of 8 x 128: scattering patches there, and
          windows of r x r cells, cost several times their bytes.
windows   such a product cuts the windows of visible patches, and the grouped convolution computes those alone. For TPUs
          while it is the cheaper: the product grows with K^2, and more than 128 visible patches are left to "products".

Two facts make the backward pass cheap. Spreading visible patches over a zero map and gathering them again are
transposes of each other, so the gradient with respect to the cells is the same operation with the kernel turned by 180
degrees: it gathers and never scatters. And "shift" sums the kernel's gradient over the r x r cells of a patch before
the (slow) reduction over patches.
"""

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from infmae_jax.models import patches

SIZE = 5
RADIUS = SIZE // 2
_FEW = 128  # visible patches: where the cycles that the v5e compiler expects of "windows" and "products" cross
_TAPS = [(i, j) for i in range(SIZE) for j in range(SIZE)]


class _Form(NamedTuple):
    """One way to compute. Whole maps, which come without ids, are spread and taken as they are.

    Attributes:
      spread: cells of visible patches, ids, grid -> what is convolved: the map of zeros and patches, or windows.
      convolve: that, kernel -> its convolution.
      kernel_gradient: that, the gradient of its convolution, r -> (5,5,C).
      take: that convolution of a map, ids, grid -> visible patches; None for windows, which give those alone.
    """

    spread: Callable
    convolve: Callable
    kernel_gradient: Callable
    take: Callable | None = None


@functools.partial(jax.custom_vjp, nondiff_argnums=(3, 4))
def convolve(
    cells: jax.Array, kernel: jax.Array, ids: jax.Array | None, grid: tuple[int, int], method: str = "auto"
) -> jax.Array:
    """Zero-padded depthwise convolution of whole maps, or at visible patches alone, masked ones reading as zero.

    Args:
      cells: (B,h*r,w*r,C), or (B,K,r,r,C), the cells of the visible patches.
      kernel: (5,5,C), applied without flipping, as convolutions in deep learning are.
      ids: None, or (B,K) int32, which patches they are; no repeats.
      grid: token rows and columns (h, w).
      method: of `EncoderConfig.depthwise`; those for visible patches alone are "conv" for whole maps.

    Returns:
      As `cells`.
    """
    return _computed(_forward, method, grid, cells, kernel, ids)


def _convolve_forward(cells, kernel, ids, grid, method):
    return convolve(cells, kernel, ids, grid, method), (cells, kernel, ids)


def _convolve_backward(grid, method, saved, grad):
    return *_computed(_backward, method, grid, *saved, grad), None


convolve.defvjp(_convolve_forward, _convolve_backward)


def _computed(direction: Callable, method: str, grid: tuple[int, int], cells: jax.Array, *arrays: jax.Array | None):
    """A form's result, `_forward` or `_backward`. What depends on the backend is chosen when the program is lowered for
    it, so that another machine can compile for it too."""
    whole = arrays[1] is None
    if method != "auto":
        return direction(_form(method, cells, whole), grid, cells, *arrays)
    best = {backend: functools.partial(direction, _form(name, cells, whole), grid) for backend, name in _BEST.items()}
    return jax.lax.platform_dependent(cells, *arrays, **best)


def _form(method: str, cells: jax.Array, whole: bool) -> _Form:
    """That of a method: two are for whole maps, and windows are for few visible patches."""
    if whole and method != "shift":
        return _FORMS["conv"]
    return _FORMS["products" if method == "windows" and cells.shape[1] > _FEW else method]


def _forward(
    form: _Form, grid: tuple[int, int], cells: jax.Array, kernel: jax.Array, ids: jax.Array | None
) -> jax.Array:
    """The convolution. With products a cell that is not finite makes its whole sample so, not only what is near it."""
    out = form.convolve(form.spread(cells, ids, grid), kernel)
    return form.take(out, ids, grid) if form.take else out


def _backward(
    form: _Form, grid: tuple[int, int], cells: jax.Array, kernel: jax.Array, ids: jax.Array | None, grad: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Gradients with respect to cells and kernel."""
    turned = _forward(form, grid, grad, kernel[::-1, ::-1], ids)
    out_grad = form.spread(grad, ids, grid) if form.take else grad  # XLA computes once what `turned` spreads too
    r = cells.shape[2] if ids is not None else cells.shape[1] // grid[0]
    kernel_gradient = form.kernel_gradient(form.spread(cells, ids, grid), out_grad, r)
    return turned.astype(cells.dtype), kernel_gradient.astype(kernel.dtype)


def _convolve_map(whole: jax.Array, kernel: jax.Array, padding: str = "SAME") -> jax.Array:
    """(B,R,S,C), (5,5,C) -> (B,R,S,C) by XLA's grouped convolution."""
    return jax.lax.conv_general_dilated(
        whole, kernel[:, :, None, :], (1, 1), padding, dimension_numbers=("NHWC", "HWIO", "NHWC"),
        feature_group_count=kernel.shape[-1], precision=_exact(whole),
    )  # fmt: skip


def _place(cells: jax.Array, ids: jax.Array | None, grid: tuple[int, int]) -> jax.Array:
    """(B,K,r,r,C) -> (B,h*r,w*r,C), zero where no patch is visible."""
    if ids is None:
        return cells
    batch, _, r, _, channels = cells.shape
    empty = jnp.zeros((batch, grid[0] * grid[1], r, r, channels), cells.dtype)
    return patches.tokens_to_grid(patches.place_tokens(cells, ids, empty), grid)


def _take(whole: jax.Array, ids: jax.Array | None, grid: tuple[int, int]) -> jax.Array:
    """(B,h*r,w*r,C) -> (B,K,r,r,C): the visible patches."""
    return whole if ids is None else patches.take_tokens(patches.grid_to_tokens(whole, grid), ids)


def _place_by_products(cells: jax.Array, ids: jax.Array, grid: tuple[int, int]) -> jax.Array:
    """As `_place`."""
    batch, _, r, _, channels = cells.shape
    whole = jnp.einsum("bkhw,bkyxc->bhywxc", _positions(ids, grid, cells.dtype), cells, precision=_exact(cells))
    return whole.reshape(batch, grid[0] * r, grid[1] * r, channels)


def _take_by_products(whole: jax.Array, ids: jax.Array, grid: tuple[int, int]) -> jax.Array:
    """As `_take`."""
    batch, rows, columns, channels = whole.shape
    whole = whole.reshape(batch, grid[0], rows // grid[0], grid[1], columns // grid[1], channels)
    return jnp.einsum("bkhw,bhywxc->bkyxc", _positions(ids, grid, whole.dtype), whole, precision=_exact(whole))


def _positions(ids: jax.Array, grid: tuple[int, int], dtype: jnp.dtype) -> jax.Array:
    """(B,K) -> (B,K,h,w): one where a patch lies."""
    return jax.nn.one_hot(ids, grid[0] * grid[1], dtype=dtype).reshape(*ids.shape, *grid)


def _exact(factor: jax.Array) -> jax.lax.Precision | None:
    """TPUs round wider factors than bfloat16 unless told otherwise."""
    return None if factor.dtype == jnp.bfloat16 else jax.lax.Precision.HIGHEST


def _pad(cells: jax.Array) -> jax.Array:
    return jnp.pad(cells, ((0, 0), (RADIUS, RADIUS), (RADIUS, RADIUS), (0, 0)))


@functools.partial(jax.jit, static_argnums=2)
def _windows(cells: jax.Array, ids: jax.Array | None, grid: tuple[int, int]) -> jax.Array:
    """(B,K,r,r,C) -> (B,K,r+4,r+4,C): each visible patch with its surroundings, zero where nothing is visible."""
    if ids is None:
        return _pad(cells)
    r, channels = cells.shape[2], cells.shape[-1]
    whole = _pad(_place(cells, ids, grid))
    rows, columns = ids // grid[1] * r, ids % grid[1] * r
    side = r + 2 * RADIUS

    def cut(sample, row, column):
        return jax.lax.dynamic_slice(sample, (row, column, jnp.zeros_like(row)), (side, side, channels))

    return jax.vmap(jax.vmap(cut, in_axes=(None, 0, 0)))(whole, rows, columns)


def _windows_by_product(cells: jax.Array, ids: jax.Array, grid: tuple[int, int]) -> jax.Array:
    """As `_windows`. Rows of the product are cells of windows, whose columns are made whole tiles of TPUs; a one stands
    where the position of a visible patch's cell is the same."""
    batch, k, r, _, channels = cells.shape
    side = r + 2 * RADIUS
    columns = -(-side // 8) * 8
    width = grid[1] * r + columns  # of a map on which no window reaches the next row
    corners = (ids // grid[1] * width + ids % grid[1]) * r

    def positions(first: int, rows: int, columns: int) -> jax.Array:
        inside = (first + jnp.arange(rows))[:, None] * width + (first + jnp.arange(columns))[None, :]
        return (corners[:, :, None, None] + inside[None, None]).reshape(batch, -1)

    same = positions(-RADIUS, side, columns)[:, :, None] == positions(0, r, r)[:, None, :]
    shown = jnp.einsum(
        "bwn,bnc->bwc", same.astype(cells.dtype), cells.reshape(batch, -1, channels), precision=_exact(cells)
    )
    return shown.reshape(batch, k, side, columns, channels)[:, :, :, :side]


def _convolve_windows(windows: jax.Array, kernel: jax.Array) -> jax.Array:
    """(B,K,r+4,r+4,C), (5,5,C) -> (B,K,r,r,C) by XLA's grouped convolution."""
    out = _convolve_map(windows.reshape(-1, *windows.shape[2:]), kernel, "VALID")
    return out.reshape(*windows.shape[:2], *out.shape[1:])


def _transposed(convolve: Callable, cells: jax.Array, grad: jax.Array, _: int) -> jax.Array:
    """As `_kernel_gradient`, by XLA."""
    kernel = jax.ShapeDtypeStruct((SIZE, SIZE, grad.shape[-1]), grad.dtype)
    return jax.linear_transpose(lambda weights: convolve(cells, weights), kernel)(grad)[0]


@jax.jit
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


@functools.partial(jax.jit, static_argnums=2)
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


_of_map, _of_windows = (functools.partial(_transposed, convolve) for convolve in (_convolve_map, _convolve_windows))
_FORMS = {
    "shift": _Form(_windows, _multiply_add, _kernel_gradient),
    "conv": _Form(_place, _convolve_map, _of_map, _take),
    "products": _Form(_place_by_products, _convolve_map, _of_map, _take_by_products),
    "windows": _Form(_windows_by_product, _convolve_windows, _of_windows),
}
_BEST = {"tpu": "windows", "cuda": "conv", "default": "shift"}

"""The depthwise convolution at visible patches as one kernel for NVIDIA GPUs, and one for the gradient of its weights.

XLA writes the 25 shifted products as loops that compute an address for every number they read, and first makes windows
around the patches: together a quarter of the training step of Base on an H200. Here a program takes a patch and some
channels, reads every cell around it once and keeps the sums in registers. Values are those of `depthwise.on_visible`.

JAX has deprecated the backend of Pallas that these are written for (0.11). Where it is gone, `AVAILABLE` is False and
`depthwise` leaves the work to XLA.
"""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.custom_partitioning import custom_partitioning
from jax.sharding import NamedSharding

try:
    from jax.experimental.pallas import triton
except ImportError:
    triton = None

AVAILABLE = triton is not None
_SIZE, _RADIUS = 5, 2
_MOST_CHANNELS = 256  # of one program, two for each thread
_MOST_GROUPS = 8  # parts of a sample's patches whose sums for the gradient of the weights are apart
_INTERPRET = False  # for tests, on a CPU
warnings.filterwarnings("ignore", message=".*Pallas Triton backend is deprecated")


def forward(grid: tuple[int, int], cells: jax.Array, kernel: jax.Array, ids: jax.Array) -> jax.Array:
    """`depthwise.on_visible`: (B,K,r,r,C), (5,5,C), (B,K) -> (B,K,r,r,C)."""
    return _convolve(cells, kernel, _neighbours(ids, grid))


def backward(
    grid: tuple[int, int], cells: jax.Array, kernel: jax.Array, ids: jax.Array, grad: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Gradients of `forward` with respect to cells and kernel."""
    neighbours = _neighbours(ids, grid)
    sums = _weight_gradient(cells, grad, neighbours).sum(axis=(0, 1))
    return _convolve(grad, kernel[::-1, ::-1], neighbours), sums.reshape(kernel.shape).astype(kernel.dtype)


def _neighbours(ids: jax.Array, grid: tuple[int, int]) -> jax.Array:
    """(B,K) -> (B,K,9) int32: where the 3 x 3 patches around each are among the visible ones, -1 where masked."""
    (batch, kept), (rows, columns) = ids.shape, grid
    bordered = columns + 2
    inside = (ids // columns + 1) * bordered + ids % columns + 1
    empty = jnp.full((batch, (rows + 2) * bordered), -1, jnp.int32)
    places = jax.vmap(lambda row, at: row.at[at].set(jnp.arange(kept, dtype=jnp.int32)))(empty, inside)
    around = jnp.array([y * bordered + x for y in (-1, 0, 1) for x in (-1, 0, 1)], inside.dtype)
    wanted = (inside[:, :, None] + around[None, None]).reshape(batch, kept * 9)
    return jnp.take_along_axis(places, wanted, axis=1).reshape(batch, kept, 9)


def _on_each_device(rule: str, undivided: tuple[str, ...]) -> Callable:
    """Decorates what XLA cannot split: every device does its own samples and channels; `undivided` dimensions whole."""

    def decorate(function: Callable[..., jax.Array]) -> Callable[..., jax.Array]:
        split = custom_partitioning(function)

        def partition(mesh, arguments, result):
            def placed(shape):
                return NamedSharding(mesh, shape.sharding.spec)

            return mesh, function, placed(result), tuple(map(placed, arguments))

        split.def_partition(partition=partition, sharding_rule=rule, need_replication_factors=undivided)
        return functools.wraps(function)(split)

    return decorate


@_on_each_device("b k y x c, i j c, b k n -> b k y x c", ("k", "y", "x", "i", "j", "n"))
def _convolve(cells: jax.Array, kernel: jax.Array, neighbours: jax.Array) -> jax.Array:
    """(B,K,r,r,C), (5,5,C), (B,K,9) -> (B,K,r,r,C)."""
    batch, kept, r, _, width = cells.shape
    channels, dtype = _channels(width), jnp.promote_types(cells.dtype, jnp.float32)

    def program(cells_ref, kernel_ref, neighbours_ref, out_ref):
        patch, first = pl.program_id(0), pl.program_id(1) * channels
        taps = [_load(kernel_ref, tap * width + first, channels).astype(dtype) for tap in range(_SIZE**2)]
        sums = {(y, x): jnp.zeros(channels, dtype) for y in range(r) for x in range(r)}
        around = _around(cells_ref, neighbours_ref, patch, patch // kept * kept, first, (r, width, channels))
        for (row, column), cell in around:
            for y, x in _reached(row, column, r):
                sums[y, x] += cell.astype(dtype) * taps[_tap(row - y, column - x)]
        for (y, x), total in sums.items():
            at = pl.ds((patch * r * r + y * r + x) * width + first, channels)
            triton.store(out_ref.at[at], total.astype(out_ref.dtype))

    out = jax.ShapeDtypeStruct((cells.size,), cells.dtype)
    return _call(program, out, (batch * kept, width // channels), channels, cells, kernel, neighbours).reshape(
        cells.shape
    )


@_on_each_device("b k y x c, b k y x c, b k n -> b g t c", ("k", "y", "x", "n", "g", "t"))
def _weight_gradient(cells: jax.Array, grad: jax.Array, neighbours: jax.Array) -> jax.Array:
    """(B,K,r,r,C), (B,K,r,r,C), (B,K,9) -> (B,G,25,C), sums over the patches of each of G groups."""
    batch, kept, r, _, width = cells.shape
    channels, dtype = _channels(width), jnp.promote_types(cells.dtype, jnp.float32)
    groups = max(count for count in range(1, _MOST_GROUPS + 1) if kept % count == 0)
    each = kept // groups

    def program(cells_ref, grad_ref, neighbours_ref, out_ref):
        group, first = pl.program_id(0), pl.program_id(1) * channels

        def add_patch(number, sums):
            patch, sums = group * each + number, list(sums)
            grads = {
                (y, x): _load(grad_ref, (patch * r * r + y * r + x) * width + first, channels).astype(dtype)
                for y in range(r)
                for x in range(r)
            }
            around = _around(cells_ref, neighbours_ref, patch, patch // kept * kept, first, (r, width, channels))
            for (row, column), cell in around:
                for y, x in _reached(row, column, r):
                    sums[_tap(row - y, column - x)] += cell.astype(dtype) * grads[y, x]
            return tuple(sums)

        zeros = tuple(jnp.zeros(channels, dtype) for _ in range(_SIZE**2))
        for tap, total in enumerate(jax.lax.fori_loop(0, each, add_patch, zeros)):
            triton.store(out_ref.at[pl.ds((group * _SIZE**2 + tap) * width + first, channels)], total)

    out = jax.ShapeDtypeStruct((batch * groups * _SIZE**2 * width,), dtype)
    sums = _call(program, out, (batch * groups, width // channels), channels, cells, grad, neighbours)
    return sums.reshape(batch, groups, _SIZE**2, width)


def _around(cells, neighbours, patch, start, first, sizes: tuple[int, int, int]):
    """Cells of a patch and up to 2 beside it: ((row, column) from the patch's first cell, its channels, 0 if masked).

    `start` is the first patch of the sample, `first` the first channel; sizes: r, all channels, those of a program.
    """
    r, width, channels = sizes
    places = [triton.load(neighbours.at[patch * 9 + n]) for n in range(9)]
    for row in range(-_RADIUS, r + _RADIUS):
        for column in range(-_RADIUS, r + _RADIUS):
            place = places[(row // r + 1) * 3 + column // r + 1]
            at = ((start + jnp.maximum(place, 0)) * r * r + row % r * r + column % r) * width + first
            shown = jnp.broadcast_to(place >= 0, (channels,))
            yield (row, column), triton.load(cells.at[pl.ds(at, channels)], mask=shown, other=0)


def _reached(row: int, column: int, r: int) -> list[tuple[int, int]]:
    """Cells of a patch whose 5 x 5 surroundings hold the cell at (row, column)."""
    return [(y, x) for y in range(r) for x in range(r) if abs(row - y) <= _RADIUS and abs(column - x) <= _RADIUS]


def _tap(rows: int, columns: int) -> int:
    """Number of the weight for a cell so far down and right."""
    return (rows + _RADIUS) * _SIZE + columns + _RADIUS


def _load(ref, start, channels: int) -> jax.Array:
    return triton.load(ref.at[pl.ds(start, channels)])


def _channels(width: int) -> int:
    """Of one program: a power of two that divides the width."""
    return min(_MOST_CHANNELS, width & -width)


def _call(
    program: Callable, out: jax.ShapeDtypeStruct, grid: tuple[int, int], channels: int, *arrays: jax.Array
) -> jax.Array:
    call = pl.pallas_call(
        program, out_shape=out, grid=grid, interpret=_INTERPRET,
        compiler_params=triton.CompilerParams(num_warps=max(1, channels // 64)),
    )  # fmt: skip
    return call(*(array.reshape(-1) for array in arrays))

"""RoIAlign on the levels of a feature pyramid (arXiv 1703.06870), with two samples a bin in each direction.

Half-pixel coordinates (`aligned=True` of torchvision, `sampling_ratio=2`): the value at a cell belongs to its centre.
Two forms with the same result: "gather" reads four cells a sample, little arithmetic but a scatter in the backward
pass; "einsum" multiplies with matrices of interpolation weights, over a hundred times the arithmetic, which suits TPUs.
"""

import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

RATIO = 2  # samples a bin and direction
_CANONICAL_SIZE, _CANONICAL_LEVEL = 224.0, 4  # a box of ImageNet's size reads the level of stride 16


def levels_of(rois: jax.Array, finest: int, coarsest: int) -> jax.Array:
    """(...,4) -> (...) int32 from 0, the level that a box is read from: the larger, the coarser (arXiv 1612.03144).

    `finest`, `coarsest`: binary logarithms of the strides of the first and the last level.
    """
    sides = jnp.maximum(rois[..., 2:] - rois[..., :2], 0)
    level = jnp.floor(_CANONICAL_LEVEL + jnp.log2(jnp.sqrt(jnp.prod(sides, axis=-1)) / _CANONICAL_SIZE + 1e-8))
    return (jnp.clip(level, finest, coarsest) - finest).astype(jnp.int32)


def taps(low: jax.Array, high: jax.Array, length: jax.Array, bins: int) -> tuple[jax.Array, jax.Array]:
    """What each bin reads along one axis, samples outside by more than a cell reading 0.

    Args:
      low, high: (R,) float32 edges of the RoIs in cells; length: (R,) int32 cells of the axis.

    Returns:
      cell (R,bins,2*RATIO) int32 and weight (R,bins,2*RATIO) float32, which sum to 1 inside.
    """
    offsets = np.arange(bins)[:, None] + (np.arange(RATIO)[None] + 0.5) / RATIO
    offsets = jnp.asarray(offsets.reshape(1, -1), jnp.float32)
    at = low[:, None] - 0.5 + offsets * ((high - low) / bins)[:, None]
    last = (length - 1)[:, None]
    inside = (at >= -1) & (at <= length[:, None])
    at = jnp.clip(at, 0, last.astype(at.dtype))
    cell = jnp.minimum(jnp.floor(at).astype(jnp.int32), last)
    part = at - cell
    cells = jnp.stack([cell, jnp.minimum(cell + 1, last)], axis=-1)
    weights = jnp.stack([1 - part, part], axis=-1) * inside[..., None] / RATIO
    return cells.reshape(-1, bins, 2 * RATIO), weights.reshape(-1, bins, 2 * RATIO)


def bin_matrix(low: jax.Array, high: jax.Array, length: int, bins: int) -> jax.Array:
    """The same as a matrix (R,bins,length) of weights."""
    cells, weights = taps(low, high, jnp.full(low.shape, length, jnp.int32), bins)
    return jnp.where(cells[..., None] == jnp.arange(length).reshape(1, 1, 1, -1), weights[..., None], 0).sum(axis=2)


def roi_align(
    maps: Sequence[jax.Array], strides: Sequence[int], rois: jax.Array, bins: int, form: str = "gather"
) -> jax.Array:
    """Pools each RoI from the level that suits its size.

    Args:
      maps: levels (B,H_i,W_i,C) from the finest to the coarsest.
      strides: theirs, each twice the one before.
      rois: (B,R,4) float32 in pixels; no gradient flows into them.
      bins: of the output, on each side.
      form: "gather", "einsum", or "auto": einsum in programs for TPUs, gather in all others.

    Returns:
      (B,R,bins,bins,C) in the dtype of the maps.
    """
    rois = jax.lax.stop_gradient(rois)
    finest, coarsest = (int(stride).bit_length() - 1 for stride in (strides[0], strides[-1]))
    levels = levels_of(rois, finest, coarsest)
    forms = {
        name: functools.partial(how, strides=tuple(strides), bins=bins)
        for name, how in (("gather", _by_gather), ("einsum", _by_einsum))
    }
    if form != "auto":
        return forms[form](list(maps), rois, levels)
    return jax.lax.platform_dependent(list(maps), rois, levels, tpu=forms["einsum"], default=forms["gather"])


def _by_gather(
    maps: Sequence[jax.Array], rois: jax.Array, levels: jax.Array, strides: tuple[int, ...], bins: int
) -> jax.Array:
    sizes = np.array([x.shape[1:3] for x in maps], np.int32)
    firsts = np.concatenate([[0], np.cumsum(sizes.prod(axis=1))[:-1]]).astype(np.int32)
    cells = jnp.concatenate([x.reshape(x.shape[0], -1, x.shape[-1]) for x in maps], axis=1)
    wide = jnp.promote_types(cells.dtype, jnp.float32)

    def image(cells: jax.Array, rois: jax.Array, levels: jax.Array) -> jax.Array:
        rois = rois / jnp.asarray(strides, jnp.float32)[levels][:, None]
        rows, columns = (jnp.asarray(sizes[:, axis])[levels] for axis in (0, 1))
        y, y_weight = taps(rois[:, 1], rois[:, 3], rows, bins)
        x, x_weight = taps(rois[:, 0], rois[:, 2], columns, bins)
        y = jnp.asarray(firsts)[levels][:, None, None] + y * columns[:, None, None]

        def add(total: jax.Array, pair: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, None]:
            i, j = pair
            index = y[:, :, i][:, :, None] + x[:, :, j][:, None, :]
            weight = y_weight[:, :, i][:, :, None] * x_weight[:, :, j][:, None, :]
            return total + cells[index].astype(wide) * weight[..., None], None

        # One corner of one sample at a time: all sixteen at once would be the largest array of the whole network.
        pairs = tuple(jnp.asarray(places.ravel()) for places in np.indices((2 * RATIO, 2 * RATIO)))
        start = jnp.zeros((rois.shape[0], bins, bins, cells.shape[-1]), wide)
        return jax.lax.scan(add, start, pairs)[0]

    return jax.vmap(image)(cells, rois, levels).astype(cells.dtype)


def _by_einsum(
    maps: Sequence[jax.Array], rois: jax.Array, levels: jax.Array, strides: tuple[int, ...], bins: int
) -> jax.Array:
    wide = jnp.promote_types(maps[0].dtype, jnp.float32)
    precision = "highest" if maps[0].dtype == wide else "default"

    def image(maps: Sequence[jax.Array], rois: jax.Array, levels: jax.Array) -> jax.Array:
        total = jnp.zeros((), wide)
        for level, (x, stride) in enumerate(zip(maps, strides, strict=True)):
            part = rois / stride
            rows = bin_matrix(part[:, 1], part[:, 3], x.shape[0], bins) * (levels == level)[:, None, None]
            columns = bin_matrix(part[:, 0], part[:, 2], x.shape[1], bins)
            half = jnp.einsum("rjw,hwc->rjhc", columns.astype(x.dtype), x, precision=precision)
            # Once for each column: bringing the columns of a RoI together would copy the largest array of the network.
            rows = jnp.broadcast_to(rows.astype(x.dtype)[:, None], (*half.shape[:2], bins, x.shape[0]))
            found = jnp.einsum("rjih,rjhc->rjic", rows, half, precision=precision, preferred_element_type=wide)
            total = found if level == 0 else total + found
        return jnp.swapaxes(total, 1, 2)

    return jax.vmap(image)(list(maps), rois, levels).astype(maps[0].dtype)

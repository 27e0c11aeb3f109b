"""Boxes as arrays: areas, overlaps, the regression code, clipping, non-maximum suppression.

A box is x0, y0, x1, y1 in pixels of the canvas, edges and not centres of pixels: the first pixel alone is 0, 0, 1, 1.
All is float32, gradients flow where they exist, and nothing here has a shape that depends on values.
"""

import math

import jax
import jax.numpy as jnp

MOST_GROWTH = math.log(1000 / 16)  # of a side, as a logarithm: what decoding cuts larger predictions to


def area(boxes: jax.Array) -> jax.Array:
    """(...,4) -> (...); 0 where the edges are in the wrong order."""
    return jnp.maximum(boxes[..., 2] - boxes[..., 0], 0) * jnp.maximum(boxes[..., 3] - boxes[..., 1], 0)


def intersection(first: jax.Array, second: jax.Array) -> jax.Array:
    """(...,N,4), (...,M,4) -> (...,N,M): area that each box of the first shares with each of the second."""
    first, second = first[..., :, None, :], second[..., None, :, :]
    low = jnp.maximum(first[..., :2], second[..., :2])
    high = jnp.minimum(first[..., 2:], second[..., 2:])
    return jnp.prod(jnp.maximum(high - low, 0), axis=-1)


def pairwise_iou(first: jax.Array, second: jax.Array) -> jax.Array:
    """(...,N,4), (...,M,4) -> (...,N,M): intersection over union, 0 where both boxes are empty."""
    shared = intersection(first, second)
    union = area(first)[..., :, None] + area(second)[..., None, :] - shared
    return shared / jnp.where(union > 0, union, 1)


def coverage(first: jax.Array, second: jax.Array) -> jax.Array:
    """(...,N,4), (...,M,4) -> (...,N,M): share of each box of the first that lies in each of the second."""
    whole = area(first)[..., :, None]
    return intersection(first, second) / jnp.where(whole > 0, whole, 1)


def clip(boxes: jax.Array, size: jax.Array) -> jax.Array:
    """(...,4) boxes cut to an image of `size` (2,) rows, columns."""
    height, width = size[0], size[1]
    limit = jnp.stack([width, height, width, height]).astype(boxes.dtype)
    return jnp.clip(boxes, 0, limit.reshape((1,) * (boxes.ndim - 1) + (4,)))


def encode(targets: jax.Array, boxes: jax.Array, weights: tuple[float, ...]) -> jax.Array:
    """What moves boxes onto targets (the regression code of R-CNN): (...,4), (...,4) -> (...,4).

    Shifts of the centre in widths and heights of the box, logarithms of the ratios of the sides, each times its weight.
    No box may be empty: give a dummy in its place, for a `where` afterwards would not keep NaN out of gradients.
    """
    sides, target_sides = boxes[..., 2:] - boxes[..., :2], targets[..., 2:] - targets[..., :2]
    shift = ((targets[..., :2] + target_sides / 2) - (boxes[..., :2] + sides / 2)) / sides
    return jnp.concatenate([shift, jnp.log(target_sides / sides)], axis=-1) * _like(weights, boxes)


def decode(deltas: jax.Array, boxes: jax.Array, weights: tuple[float, ...]) -> jax.Array:
    """The boxes that a code (...,4) makes of boxes (...,4): inverse of `encode` up to the limit on growth."""
    deltas = deltas / _like(weights, deltas)
    sides = boxes[..., 2:] - boxes[..., :2]
    centre = boxes[..., :2] + sides / 2 + deltas[..., :2] * sides
    sides = sides * jnp.exp(jnp.minimum(deltas[..., 2:], MOST_GROWTH))
    return jnp.concatenate([centre - sides / 2, centre + sides / 2], axis=-1)


def _like(weights: tuple[float, ...], boxes: jax.Array) -> jax.Array:
    return jnp.asarray(weights, boxes.dtype).reshape((1,) * (boxes.ndim - 1) + (4,))


def nms(boxes: jax.Array, valid: jax.Array, threshold: float, groups: jax.Array | None = None) -> jax.Array:
    """Greedy non-maximum suppression, exactly: a box goes if a kept one before it overlaps it by more.

    The greedy answer is the fixed point of "kept = valid and suppressed by none that is kept", which is reached in as
    many rounds as the longest chain of boxes that decide on each other (4 to 7 for 2,000 proposals), not one per box.

    Args:
      boxes: (N,4), from the highest score to the lowest.
      valid: (N,) bool; others neither stay nor suppress.
      threshold: IoU that may not be exceeded.
      groups: (N,) int; only boxes of equal group suppress each other (classes, say). None: all do.

    Returns:
      (N,) bool: which boxes stay.
    """
    order = jnp.arange(boxes.shape[0])
    suppresses = (pairwise_iou(boxes, boxes) > threshold) & (order[:, None] < order[None, :])
    if groups is not None:
        suppresses &= groups[:, None] == groups[None, :]

    def again(state: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        kept = state[0]
        return valid & ~jnp.any(suppresses & kept[:, None], axis=0), kept

    return jax.lax.while_loop(lambda state: jnp.any(state[0] != state[1]), again, again((valid, valid)))[0]

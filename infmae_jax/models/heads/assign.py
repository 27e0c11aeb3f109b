"""Which object a candidate box (anchor or proposal) is to learn, and which candidates a loss looks at.

Objects come padded to a fixed number with a mask of validity; a padded one is never matched, forces nothing and adds
nothing. Crowds (COCO) are regions of objects that nobody counted: what lies mostly in one is neither object nor
background.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from infmae_jax.models.heads import boxes as box

POSITIVE, NEGATIVE, IGNORED = 1, 0, -1
_IN_CROWD = 0.5  # share of a candidate in a crowd from which on it is ignored
_DUMMY = (0.0, 0.0, 1.0, 1.0)  # in place of boxes that are not there, so that no logarithm meets an empty one


class Targets(NamedTuple):
    """Labelled objects of a batch.

    Attributes:
      sizes: (B,2) int32 true rows and columns; what is beyond them on the canvas is padding.
      boxes: (B,M,4) float32 x0, y0, x1, y1 in pixels of the canvas.
      classes: (B,M) int32 from 0.
      valid: (B,M) bool; the others are padding.
      crowd: (B,M) bool.
      masks: (B,M,S,S) float32 in [0, 1], each object's mask over its own box, or None.
    """

    sizes: jax.Array
    boxes: jax.Array
    classes: jax.Array
    valid: jax.Array
    crowd: jax.Array
    masks: jax.Array | None = None


def in_order(targets: Targets) -> Targets:
    """The same objects sorted by validity, box and class, invalid and empty ones last with a dummy box.

    What follows depends on order (the first of equal overlaps is matched, noise is drawn by place): after this, not on
    the order in which the data named its objects.
    """
    valid = targets.valid & (box.area(targets.boxes) > 0)
    boxes = jnp.where(valid[..., None], targets.boxes.astype(jnp.float32), _dummies(targets.boxes.shape))
    keys = (targets.crowd, targets.classes, *(boxes[..., i] for i in range(4)), ~valid)
    order = jnp.lexsort(keys, axis=-1)
    take = jax.vmap(lambda values, places: values[places])
    found = [take(values, order) for values in (boxes, targets.classes, valid, targets.crowd & valid)]
    return Targets(targets.sizes, *found, None if targets.masks is None else take(targets.masks, order))


def or_dummy(boxes: jax.Array, valid: jax.Array) -> jax.Array:
    """(...,4), (...) bool -> (...,4): a box of one pixel wherever there is none."""
    return jnp.where(valid[..., None], boxes, _dummies(boxes.shape))


def _dummies(shape: tuple[int, ...]) -> jax.Array:
    return jnp.broadcast_to(jnp.asarray(_DUMMY, jnp.float32).reshape((1,) * (len(shape) - 1) + (4,)), shape)


def match(
    candidates: jax.Array, usable: jax.Array, targets: Targets, low: float, high: float, force: bool = False
) -> tuple[jax.Array, jax.Array]:
    """Matches the candidates of one image with its objects by IoU.

    Args:
      candidates: (N,4).
      usable: (N,) bool; the others are ignored.
      targets: of one image, without batch dimension.
      low, high: below `low` is background, from `high` on the object, ignored in between.
      force: every object also takes all candidates that overlap it best, however little (RPN). Such a candidate still
        learns the object that it overlaps most itself, as in detectron2.

    Returns:
      matched (N,) int32: the object of largest IoU, the first of equal ones; 0 where there is no object.
      label (N,) int32: POSITIVE, NEGATIVE or IGNORED.
    """
    objects = targets.valid & ~targets.crowd
    overlap = jnp.where(objects[None, :] & usable[:, None], box.pairwise_iou(candidates, targets.boxes), -1.0)
    matched, most = overlap.argmax(axis=1).astype(jnp.int32), overlap.max(axis=1)
    label = jnp.where(most >= high, POSITIVE, jnp.where(most < low, NEGATIVE, IGNORED))
    crowds = jnp.where(targets.crowd[None, :], box.coverage(candidates, targets.boxes), 0.0).max(axis=1)
    label = jnp.where((crowds >= _IN_CROWD) & (label == NEGATIVE), IGNORED, label)
    if force:
        best = overlap.max(axis=0)
        forced = jnp.any((overlap == best[None, :]) & (best[None, :] > 0), axis=1)
        label = jnp.where(forced, POSITIVE, label)
    return matched, jnp.where(usable, label, IGNORED)


class Sample(NamedTuple):
    """Candidates chosen for a loss: index (n,) int32, positive (n,) bool, valid (n,) bool; positive ones come first."""

    index: jax.Array
    positive: jax.Array
    valid: jax.Array


def most_positive(count: int, share: float) -> int:
    """How many of a sample of `count` may be positive."""
    return max(int(count * share), 1)


def sample(label: jax.Array, noise: jax.Array, count: int, share: float) -> Sample:
    """Draws up to `count` candidates, of which at most a share are positive, the rest negative as far as there are any.

    Args:
      label: (N,) of `match`.
      noise: (N,) float32 in [0, 1); those with the highest are drawn. It is to be random, but a function of nothing
        that devices or the order of data change.
    """

    def highest(wanted: int, most: int) -> tuple[jax.Array, jax.Array]:
        index = jax.lax.top_k(jnp.where(label == wanted, noise, -1.0), min(most, label.shape[0]))[1]
        return index, jnp.minimum((label == wanted).sum(), most)

    positive, n_positive = highest(POSITIVE, most_positive(count, share))
    negative, n_negative = highest(NEGATIVE, count)
    place = jnp.arange(count)
    first = place < n_positive
    rest = jnp.clip(place - n_positive, 0, negative.shape[0] - 1)
    index = jnp.where(first, positive[jnp.minimum(place, positive.shape[0] - 1)], negative[rest])
    return Sample(index, first, place < n_positive + n_negative)

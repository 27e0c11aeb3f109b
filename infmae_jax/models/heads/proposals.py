"""Region proposal network (arXiv 1506.01497): where on the canvas something may lie, whatever its class."""

import math
from collections.abc import Sequence
from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from infmae_jax.models.config import DetectionHeadConfig
from infmae_jax.models.heads import anchors
from infmae_jax.models.heads import boxes as box
from infmae_jax.models.heads.assign import POSITIVE, Targets, match, or_dummy, sample
from infmae_jax.models.heads.layers import Output, conv

_WEIGHTS = (1.0, 1.0, 1.0, 1.0)  # of the regression code
# Share of objects that anchors and regions begin with: from even odds, the first steps teach nothing but "no object".
PRIOR = 0.05
_NOWHERE = -1e30  # score of what is no proposal; finite, so that no arithmetic on it gives NaN


class Proposals(NamedTuple):
    """boxes (B,P,4) float32 from the best down, valid (B,P) bool, anchor (B,P) int32 that each comes from."""

    boxes: jax.Array
    valid: jax.Array
    anchor: jax.Array


class RegionLayers(nn.Module):
    """Two 3 x 3 convolutions with ReLU, then logit and regression code of each anchor; shared by all levels."""

    config: DetectionHeadConfig
    dtype: str

    def setup(self):
        options = dict(use_bias=True, kernel_init=nn.initializers.normal(0.01), name=None)
        self.convs = [conv(self.config.channels, 3, self.dtype, **options) for _ in range(2)]
        self.logits = Output(len(self.config.ratios), 0.01, bias=math.log(PRIOR / (1 - PRIOR)))
        self.deltas = Output(4 * len(self.config.ratios), 0.01)

    def __call__(self, maps: Sequence[jax.Array]) -> tuple[list[jax.Array], list[jax.Array]]:
        """Levels (B,h,w,C) -> for each logits (B,n) and codes (B,n,4) float32 of its anchors in their order."""
        logits, deltas = [], []
        for x in maps:
            for layer in self.convs:
                x = nn.relu(layer(x))
            logits.append(self.logits(x).reshape(x.shape[0], -1))
            deltas.append(self.deltas(x).reshape(x.shape[0], -1, 4))
        return logits, deltas


def anchors_of(maps: Sequence[jax.Array], config: DetectionHeadConfig) -> list[np.ndarray]:
    """Levels (B,h,w,C) -> their anchors, each (n,4) float32."""
    return [
        anchors.level_anchors(*x.shape[1:3], stride, size, config.ratios)
        for x, stride, size in zip(maps, anchors.STRIDES, config.anchor_sizes, strict=True)
    ]


def inside(level: np.ndarray, sizes: jax.Array) -> jax.Array:
    """(n,4) anchors, (B,2) true rows and columns -> (B,n) bool: their centre lies on the image, not on the padding.
    The others are neither learnt nor proposed."""
    centre = np.rint((level[:, :2] + level[:, 2:]) / 2)  # a corner of a cell, but for rounding
    x, y = (jnp.asarray(centre[:, axis]).reshape(1, -1) for axis in (0, 1))
    return (x < sizes[:, 1:]) & (y < sizes[:, :1])


def propose(
    levels: Sequence[np.ndarray],
    logits: Sequence[jax.Array],
    deltas: Sequence[jax.Array],
    sizes: jax.Array,
    config: DetectionHeadConfig,
    train: bool,
) -> Proposals:
    """The best boxes of each level, less those that a better one of the same level covers, then the best of all.

    Args:
      levels: anchors (n_i,4); logits: (B,n_i); deltas: (B,n_i,4).
      sizes: (B,2) true rows and columns, which proposals are cut to; empty ones are dropped.
      train: with the numbers of training.

    Without gradient. There are fewer than `proposals_train` or `proposals_test` rows on a canvas with fewer anchors.
    """
    best = config.pre_nms_train if train else config.pre_nms_test
    most = min(best, max(len(level) for level in levels))
    first, found = 0, []
    for level, level_logits, level_deltas in zip(levels, logits, deltas, strict=True):
        scores = jnp.where(inside(level, sizes), jax.lax.stop_gradient(level_logits), _NOWHERE)
        scores, index = jax.lax.top_k(scores, min(best, len(level)))
        codes = jnp.take_along_axis(jax.lax.stop_gradient(level_deltas), index[..., None], axis=1)
        boxes = box.decode(codes, jnp.asarray(level)[index], _WEIGHTS)
        missing = ((0, 0), (0, most - scores.shape[1]))
        found.append((
            jnp.pad(scores, missing, constant_values=_NOWHERE),
            jnp.pad(boxes, (*missing, (0, 0))),
            jnp.pad(index + first, missing),
        ))  # fmt: skip
        first += len(level)
    scores, boxes, index = (jnp.stack(parts, axis=1) for parts in zip(*found, strict=True))

    def image(scores: jax.Array, boxes: jax.Array, index: jax.Array, size: jax.Array) -> Proposals:
        boxes = box.clip(boxes, size)
        valid = (scores > _NOWHERE) & (box.area(boxes) > 0)
        valid = jax.vmap(lambda boxes, valid: box.nms(boxes, valid, config.rpn_nms))(boxes, valid)
        count = min(config.proposals_train if train else config.proposals_test, scores.size)
        scores, order = jax.lax.top_k(jnp.where(valid, scores, _NOWHERE).reshape(-1), count)
        valid = scores > _NOWHERE
        return Proposals(or_dummy(boxes.reshape(-1, 4)[order], valid), valid, index.reshape(-1)[order])

    return jax.vmap(image)(scores, boxes, index, sizes)


def region_losses(
    levels: Sequence[np.ndarray],
    logits: Sequence[jax.Array],
    deltas: Sequence[jax.Array],
    targets: Targets,
    noise: jax.Array,
    config: DetectionHeadConfig,
) -> dict[str, jax.Array]:
    """Losses of each image, (B,): "rpn_class" (binary cross-entropy) and "rpn_box" (L1 of the code, positives only),
    both divided by the number of anchors that are to be drawn, whether there are as many or not.

    `noise` (anchors,) decides which are drawn, the same in every image: so a loss depends neither on the place of an
    image in the batch nor on the device that it is computed on.
    """
    usable = jnp.concatenate([inside(level, targets.sizes) for level in levels], axis=1)
    whole = jnp.asarray(np.concatenate(levels))
    count = config.rpn_samples

    def image(logits: jax.Array, deltas: jax.Array, usable: jax.Array, targets: Targets) -> dict[str, jax.Array]:
        matched, label = match(whole, usable, targets, *config.rpn_iou, force=True)
        drawn = sample(label, noise, count, config.rpn_positive)
        logit, wanted = logits[drawn.index], (label[drawn.index] == POSITIVE).astype(jnp.float32)
        entropy = jax.nn.softplus(logit) - wanted * logit
        objects = targets.boxes[matched[drawn.index]]
        errors = abs(deltas[drawn.index] - box.encode(objects, whole[drawn.index], _WEIGHTS)).sum(axis=-1)
        return {
            "rpn_class": jnp.where(drawn.valid, entropy, 0).sum() / count,
            "rpn_box": jnp.where(drawn.positive, errors, 0).sum() / count,
        }

    joined = (jnp.concatenate(parts, axis=1) for parts in (logits, deltas))
    return jax.vmap(image)(*joined, usable, targets)

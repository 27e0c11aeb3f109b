"""What is said of a region: its class, a better box, a mask. Layers, and the losses of each image."""

import math
from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from infmae_jax.models import blocks
from infmae_jax.models.config import DetectionHeadConfig
from infmae_jax.models.heads import boxes as box
from infmae_jax.models.heads.assign import IGNORED, POSITIVE, Targets, match, or_dummy, sample
from infmae_jax.models.heads.layers import ConvModule, Output, kaiming_normal, uniform_fan_in
from infmae_jax.models.heads.proposals import PRIOR, Proposals
from infmae_jax.models.heads.roi_align import bin_matrix

BOX_BINS, MASK_BINS, MASK_SIZE = 7, 14, 28


class Regions(NamedTuple):
    """Regions to learn from, with what each is to become.

    Attributes:
      boxes: (B,R,4) float32.
      valid: (B,R) bool; the others count in no loss.
      matched: (B,R) int32, the object of each.
      positive: (B,R) bool, it is that object; the others are background.
    """

    boxes: jax.Array
    valid: jax.Array
    matched: jax.Array
    positive: jax.Array


class BoxHead(nn.Module):
    """3 x 3 convolutions and a fully connected layer, then class and box: detectron2's "4conv1fc".

    Attributes:
      num_classes: K. Background is class K, the last.
      codes: boxes said of a region: K, one for each class, or 1 for all.
    """

    config: DetectionHeadConfig
    num_classes: int
    codes: int
    dtype: str

    @nn.compact
    def __call__(self, pooled: jax.Array) -> tuple[jax.Array, jax.Array]:
        """(B,R,7,7,C) -> logits (B,R,K+1) and codes (B,R,codes,4), float32."""
        c = self.config
        x = pooled.reshape(-1, *pooled.shape[2:])
        for i in range(c.box_convs):
            x = ConvModule(c.channels, 3, c.norm, self.dtype, name=f"layer{i + 1}")(x)
        x = nn.relu(nn.Dense(
            c.box_channels, dtype=jnp.dtype(self.dtype), param_dtype=blocks.float_dtype(self.dtype),
            kernel_init=uniform_fan_in, name="full",
        )(x.reshape(x.shape[0], -1)))  # fmt: skip
        background = math.log(self.num_classes * (1 - PRIOR) / PRIOR)
        logits = Output(self.num_classes + 1, 0.01, bias=(0.0,) * self.num_classes + (background,), name="logits")(x)
        codes = Output(4 * self.codes, 0.001, name="codes")(x)
        first = pooled.shape[:2]
        return logits.reshape(*first, -1), codes.reshape(*first, self.codes, 4)


class MaskHead(nn.Module):
    """3 x 3 convolutions, a transposed one that doubles the sides, and a mask for each class."""

    config: DetectionHeadConfig
    num_classes: int
    dtype: str

    @nn.compact
    def __call__(self, pooled: jax.Array, classes: jax.Array) -> jax.Array:
        """(B,R,14,14,C), (B,R) int32 -> (B,R,28,28) float32 logits of the masks of those classes."""
        c = self.config
        x = pooled.reshape(-1, *pooled.shape[2:])
        for i in range(c.mask_convs):
            x = ConvModule(c.channels, 3, c.norm, self.dtype, name=f"layer{i + 1}")(x)
        x = nn.relu(nn.ConvTranspose(
            c.channels, (2, 2), (2, 2), dtype=jnp.dtype(self.dtype), param_dtype=blocks.float_dtype(self.dtype),
            kernel_init=kaiming_normal, name="doubled",
        )(x))  # fmt: skip
        logits = Output(self.num_classes, 0.001, name="logits")(x)
        own = jnp.take_along_axis(logits, classes.reshape(-1, 1, 1, 1), axis=-1)
        return own.reshape(*pooled.shape[:2], *logits.shape[1:3])


def draw_regions(proposals: Proposals, targets: Targets, noise: jax.Array, config: DetectionHeadConfig) -> Regions:
    """The regions that the (first) box head learns from: of proposals and of the objects themselves, which are added to
    the proposals, up to `rois` an image, those on objects first.

    `noise` (anchors + M,) decides which: a proposal has that of the anchor it comes from, an object that of its place.
    """
    objects = targets.valid & ~targets.crowd
    boxes = jnp.concatenate([proposals.boxes, targets.boxes], axis=1)
    usable = jnp.concatenate([proposals.valid, objects], axis=1)
    places = noise.shape[0] - objects.shape[1] + jnp.arange(objects.shape[1], dtype=jnp.int32)
    places = jnp.concatenate([proposals.anchor, jnp.broadcast_to(places[None], objects.shape)], axis=1)

    def image(boxes: jax.Array, usable: jax.Array, places: jax.Array, targets: Targets) -> Regions:
        matched, label = match(boxes, usable, targets, config.roi_iou, config.roi_iou)
        drawn = sample(label, noise[places], config.rois, config.roi_positive)
        chosen = or_dummy(boxes[drawn.index], drawn.valid)
        return Regions(chosen, drawn.valid, matched[drawn.index], drawn.positive)

    return jax.vmap(image)(boxes, usable, places, targets)


def again_matched(boxes: jax.Array, valid: jax.Array, targets: Targets, iou: float) -> Regions:
    """Regions of the next head of a cascade: boxes (B,R,4) that the one before gave, matched at a higher IoU. None is
    drawn or added; empty ones no longer count."""
    valid = valid & (box.area(boxes) > 0)
    boxes = or_dummy(boxes, valid)
    matched, label = jax.vmap(lambda *args: match(*args, iou, iou))(boxes, valid, targets)
    return Regions(boxes, valid & (label != IGNORED), matched, label == POSITIVE)


def box_losses(
    logits: jax.Array, codes: jax.Array, regions: Regions, targets: Targets, weights: tuple[float, ...]
) -> tuple[jax.Array, jax.Array]:
    """Cross-entropy, and L1 of the code of positive regions, of each image: (B,), (B,).

    Both are divided by the image's number of regions, as in detectron2: every region counts the same, also for boxes.

    Args:
      logits: (B,R,K+1), background last; codes: (B,R,K or 1,4).
      weights: of the regression code.
    """
    background = logits.shape[-1] - 1
    classes = jnp.take_along_axis(targets.classes, regions.matched, axis=1)
    wanted = jnp.where(regions.positive, classes, background)
    entropy = -jnp.take_along_axis(jax.nn.log_softmax(logits), wanted[..., None], axis=-1)[..., 0]
    own = jnp.zeros_like(classes) if codes.shape[2] == 1 else classes
    codes = jnp.take_along_axis(codes, own[..., None, None], axis=2)[:, :, 0]
    objects = jnp.take_along_axis(targets.boxes, regions.matched[..., None], axis=1)
    errors = abs(codes - box.encode(objects, regions.boxes, weights)).sum(axis=-1)
    count = jnp.maximum(regions.valid.sum(axis=1), 1)
    positive = regions.positive & regions.valid
    return tuple(
        jnp.where(counted, values, 0).sum(axis=1) / count
        for counted, values in ((regions.valid, entropy), (positive, errors))
    )


def mask_targets(regions: Regions, targets: Targets) -> jax.Array:
    """(B,R,28,28) float32, 0 or 1: each object's mask as seen through its region, 0 outside the object's box."""

    def image(boxes: jax.Array, matched: jax.Array, objects: jax.Array, masks: jax.Array) -> jax.Array:
        size = masks.shape[-1]
        masks, objects = jnp.pad(masks, ((0, 0), (1, 1), (1, 1)))[matched], objects[matched]
        sides = objects[:, 2:] - objects[:, :2]
        low, high = ((boxes[:, i : i + 2] - objects[:, :2]) / sides * size + 1 for i in (0, 2))
        columns, rows = (bin_matrix(low[:, i], high[:, i], size + 2, MASK_SIZE) for i in (0, 1))
        found = jnp.einsum("rih,rhw,rjw->rij", rows, masks, columns, precision="highest")
        return (found >= 0.5).astype(jnp.float32)

    return jax.vmap(image)(regions.boxes, regions.matched, targets.boxes, targets.masks)


def mask_losses(logits: jax.Array, wanted: jax.Array, positive: jax.Array) -> jax.Array:
    """Binary cross-entropy of each image, the mean over its positive regions: (B,R,28,28) twice, (B,R) -> (B,)."""
    entropy = (jax.nn.softplus(logits) - wanted * logits).mean(axis=(2, 3))
    return jnp.where(positive, entropy, 0).sum(axis=1) / jnp.maximum(positive.sum(axis=1), 1)

"""Two-stage object detection: Faster, Mask and Cascade R-CNN on the hybrid encoder's maps, with static shapes.

Structure and numbers are detectron2's: a feature pyramid, a region proposal network (`proposals`), RoIAlign, one box
head or a cascade of three, and a mask head where masks are given (`regions`). What differs is said here:

- RoIAlign takes two samples a bin and direction, detectron2 as many as the bin has cells.
- A loss is that of each image, averaged over images; detectron2 divides the box and mask losses of a batch by its
  regions. The same wherever images have as many regions, which is the rule for boxes; it makes accumulation exact.
- Anchors whose centre lies on padding do not exist.
- Logits begin at the odds of a rare object, as in RetinaNet (arXiv 1708.02002), and not at even odds.
- Which anchors and regions are learnt from is drawn with the same noise in every image of a batch, so that a loss is a
  function of the images and not of their places, and of the objects and not of their order.
"""

from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from infmae_jax.models.config import DetectionHeadConfig, EncoderConfig
from infmae_jax.models.heads import boxes as box
from infmae_jax.models.heads import regions as region
from infmae_jax.models.heads.anchors import STRIDES
from infmae_jax.models.heads.assign import Targets, in_order, most_positive
from infmae_jax.models.heads.proposals import RegionLayers, anchors_of, propose, region_losses
from infmae_jax.models.heads.pyramid import FeaturePyramid
from infmae_jax.models.heads.roi_align import roi_align
from infmae_jax.models.infmae import ENCODER_MODULES

_CODE_WEIGHTS = (10.0, 10.0, 5.0, 5.0)  # times 1, 2, 3 in the heads of a cascade
_CASCADE_STEP = 0.1  # of the IoU from which on a region is an object
_ROI_STRIDES = STRIDES[:4]  # P6 is for proposals alone


class Detections(NamedTuple):
    """What was found, from the highest score down.

    Attributes:
      boxes: (B,D,4) float32 x0, y0, x1, y1 in pixels of the canvas, within the image.
      scores: (B,D) float32 probabilities.
      classes: (B,D) int32 from 0.
      valid: (B,D) bool; the other rows are padding.
      masks: (B,D,28,28) float32 probabilities over each box, or None.
    """

    boxes: jax.Array
    scores: jax.Array
    classes: jax.Array
    valid: jax.Array
    masks: jax.Array | None = None


class Detector(nn.Module):
    """An encoder and a two-stage detector: parameters `encoder`, `pyramid`, `rpn`, `box` (with a cascade `box1`,
    `box2`, `box3`) and `mask`.

    Attributes:
      encoder, head: architectures; the anchor sizes must be given. With `fuse_stages` the encoder's embedded stages 1
        and 2 are added to stage 3, as in pretraining; MCMAE leaves them out.
      num_classes: K, without background.
      masks: with a mask head.
    """

    encoder: EncoderConfig
    head: DetectionHeadConfig
    num_classes: int
    masks: bool = False

    def setup(self):
        c, dtype = self.head, self.encoder.dtype
        c.check_encoder(self.encoder)
        if not c.anchor_sizes:
            raise ValueError("model.head.anchor_sizes is empty; see heads.anchors.propose_sizes")
        self.backbone = ENCODER_MODULES[self.encoder.kind](self.encoder, name="encoder")
        self.pyramid = FeaturePyramid(c.channels, c.norm, dtype)
        self.rpn = RegionLayers(c, dtype)
        if c.cascade:
            self.box_heads = [region.BoxHead(c, self.num_classes, 1, dtype, name=f"box{i}") for i in (1, 2, 3)]
        else:
            self.box_heads = [region.BoxHead(c, self.num_classes, self.num_classes, dtype, name="box")]
        if self.masks:
            self.mask_head = region.MaskHead(c, self.num_classes, dtype, name="mask")

    def __call__(self, pixels: jax.Array) -> Detections:
        """Detections on whole canvases, (B,H,W,C) float32; what parameters are initialised by."""
        return self.detect(pixels, jnp.broadcast_to(jnp.asarray([pixels.shape[1:3]], jnp.int32), (len(pixels), 2)))

    def losses(self, pixels: jax.Array, targets: Targets, key: jax.Array) -> dict[str, tuple[jax.Array, jax.Array]]:
        """Losses by name, each the sum over images and their number, () float32.

        Args:
          pixels: (B,H,W,C) float32, normalised, sides divisible by 16; one channel stands for C equal ones.
          targets: objects; with masks where there is a mask head.
          key: of the drawing of anchors and regions.

        Returns:
          rpn_class, rpn_box, box_class, box_box and, with a mask head, mask; box_class_1, box_box_1, ... of the heads
          of a cascade.

        Raises:
          ValueError: a mask head without masks, impossible images.
        """
        if self.masks and targets.masks is None:
            raise ValueError("a detector with a mask head learns from masks, and the targets have none")
        c, targets = self.head, in_order(targets)
        maps, levels, logits, deltas = self._regions(pixels)
        anchors = sum(len(level) for level in levels)
        rpn_key, roi_key = jax.random.split(key)
        found = region_losses(levels, logits, deltas, targets, jax.random.uniform(rpn_key, (anchors,)), c)
        proposals = propose(levels, logits, deltas, targets.sizes, c, train=True)
        noise = jax.random.uniform(roi_key, (anchors + targets.valid.shape[1],))
        drawn = now = region.draw_regions(proposals, targets, noise, c)
        for i, head in enumerate(self.box_heads):
            weights, name = self._weights(i), f"_{i + 1}" if c.cascade else ""
            logits, codes = head(self._pooled(maps, now.boxes, scaled=True))
            losses = region.box_losses(logits, codes, now, targets, weights)
            found["box_class" + name], found["box_box" + name] = losses
            if head is not self.box_heads[-1]:
                boxes = self._moved(codes, now.boxes, targets.sizes, weights)
                now = region.again_matched(boxes, now.valid, targets, c.roi_iou + (i + 1) * _CASCADE_STEP)
        if self.masks:
            found["mask"] = self._mask_loss(maps, drawn, targets)
        count = jnp.asarray(pixels.shape[0], jnp.float32)
        return {name: (values.sum(), count) for name, values in found.items()}

    def detect(self, pixels: jax.Array, sizes: jax.Array) -> Detections:
        """Finds objects.

        Args:
          pixels: as in `losses`.
          sizes: (B,2) int32 true rows and columns.
        """
        c = self.head
        maps, levels, logits, deltas = self._regions(pixels)
        proposals = propose(levels, logits, deltas, sizes, c, train=False)
        boxes, scores = proposals.boxes, 0.0
        for i, head in enumerate(self.box_heads):
            logits, codes = head(self._pooled(maps, boxes))
            scores = scores + jax.nn.softmax(logits)[..., :-1] / len(self.box_heads)
            if head is not self.box_heads[-1]:
                boxes = self._moved(codes, boxes, sizes, self._weights(i))
        boxes = box.decode(codes, boxes[:, :, None], self._weights(len(self.box_heads) - 1))
        found = jax.vmap(lambda *args: best_detections(*args, c))(boxes, scores, proposals.valid, sizes)
        if not self.masks:
            return found
        pooled = self._pooled(maps, found.boxes, region.MASK_BINS)
        return found._replace(masks=jax.nn.sigmoid(self.mask_head(pooled, found.classes)))

    def _regions(self, pixels: jax.Array) -> tuple[list, list, list, list]:
        """Pixels -> maps of the pyramid, and anchors, logits and codes of its levels."""
        stages = self.backbone.features(pixels, self.encoder.fuse_stages)
        maps = self.pyramid([stages[name] for name in ("stage1", "stage2", "stage3")])
        return maps, anchors_of(maps, self.head), *self.rpn(maps)

    def _pooled(
        self, maps: list[jax.Array], boxes: jax.Array, bins: int = region.BOX_BINS, scaled: bool = False
    ) -> jax.Array:
        """Maps, (B,R,4) -> (B,R,bins,bins,C); `scaled`: the gradient shared out among the heads of a cascade."""
        pooled = roi_align(maps[:4], _ROI_STRIDES, boxes, bins, self.head.roi_align)
        heads = len(self.box_heads)
        if scaled and heads > 1:
            fixed = jax.lax.stop_gradient(pooled)
            pooled = fixed + (pooled - fixed) / heads
        return pooled

    def _weights(self, head: int) -> tuple[float, ...]:
        return tuple(weight * (head + 1) for weight in _CODE_WEIGHTS)

    def _moved(self, codes: jax.Array, boxes: jax.Array, sizes: jax.Array, weights: tuple[float, ...]) -> jax.Array:
        """Boxes (B,R,4) for the next head of a cascade by codes (B,R,1,4), cut to the image, without gradient."""
        moved = box.decode(jax.lax.stop_gradient(codes[:, :, 0]), boxes, weights)
        return jax.vmap(box.clip)(moved, sizes)

    def _mask_loss(self, maps: list[jax.Array], drawn: region.Regions, targets: Targets) -> jax.Array:
        most = most_positive(self.head.rois, self.head.roi_positive)  # they come first
        drawn = jax.tree.map(lambda x: x[:, :most], drawn)
        classes = jnp.take_along_axis(targets.classes, drawn.matched, axis=1)
        logits = self.mask_head(self._pooled(maps, drawn.boxes, region.MASK_BINS), classes)
        return region.mask_losses(logits, region.mask_targets(drawn, targets), drawn.positive)


def best_detections(
    boxes: jax.Array, scores: jax.Array, valid: jax.Array, size: jax.Array, config: DetectionHeadConfig
) -> Detections:
    """The detections of one image: pairs of region and class above the threshold, less those that a better one of the
    same class covers, then the best.

    Args:
      boxes: (R,K or 1,4), not yet cut to the image; scores: (R,K); valid: (R,) bool.
      size: (2,) true rows and columns.

    Of the pairs only the `max_candidates` best are looked at, where detectron2 takes all: far more than are kept.
    """
    regions, classes = scores.shape
    wanted = valid[:, None] & (scores > config.score_threshold)
    count = min(config.max_candidates, scores.size)
    scores, pairs = jax.lax.top_k(jnp.where(wanted, scores, -1.0).reshape(-1), count)
    boxes = jnp.broadcast_to(box.clip(boxes, size), (regions, classes, 4)).reshape(-1, 4)[pairs]
    kept = box.nms(boxes, (scores > 0) & (box.area(boxes) > 0), config.nms, pairs % classes)
    scores, order = jax.lax.top_k(jnp.where(kept, scores, -1.0), min(config.max_detections, count))
    found = Detections(boxes[order], scores, (pairs % classes)[order].astype(jnp.int32), scores > 0)

    def row(x: jax.Array) -> jax.Array:
        """Zero where nothing was found, and as many rows as the config says."""
        valid = found.valid.reshape((-1,) + (1,) * (x.ndim - 1))
        missing = ((0, config.max_detections - len(x)), *((0, 0),) * (x.ndim - 1))
        return jnp.pad(jnp.where(valid, x, 0).astype(x.dtype), missing)

    return jax.tree.map(row, found)

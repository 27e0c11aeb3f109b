"""Architectures: what each part of the model takes, and the variants by name."""

import dataclasses
import typing
from typing import Annotated, Any, Self

from data_pipelines.errors import InputError

Norm = Annotated[str, "group, layer"]
HeadWidth = Annotated[int, "[8, inf)"]
Convolutions = Annotated[int, "[1, 64]"]
Positive = Annotated[int, "[1, inf)"]
Share = Annotated[float, "(0, 1]"]
# Configs may come from strangers: no architecture takes a program without end.
_MOST_WIDTH, _MOST_BLOCKS, _LONGEST_SIDE = 1 << 16, 1000, 1 << 12
_DECODER_KEYS = ("decoder_width", "decoder_depth", "decoder_heads", "predict_masked_only")


def within(value: Any, allowed: str) -> bool:
    """Whether a number lies in an interval such as "[0, 1)", or a text is among "a, b"."""
    if allowed[0] not in "[(":
        return value in allowed.split(", ")
    low, high = (float(end) for end in allowed[1:-1].split(","))
    above = low <= value if allowed[0] == "[" else low < value
    return above and (value <= high if allowed[-1] == "]" else value < high)


def _check(config: Any, section: str, *others: tuple[str, bool, str]) -> None:
    """ValueError where a value is not what the annotation of its field allows, see `within`, or one of `others` is not
    valid: field, whether it is, what it must be."""
    annotated = (
        (name, within(getattr(config, name), allowed), f"{'in' if allowed[0] in '[(' else 'one of'} {allowed}")
        for name, hint in typing.get_type_hints(type(config), include_extras=True).items()
        for allowed in getattr(hint, "__metadata__", ())
    )
    for field, valid, allowed in (*annotated, *others):
        if not valid:
            raise ValueError(f"{section}.{field}={getattr(config, field)!r} must be {allowed}")


def _check_heads(width: int, heads: int) -> None:
    if heads < 1 or width < 4 or width % heads or width % 4:
        raise ValueError(f"model width {width} must be divisible by 4 and by its {heads} attention heads")


@dataclasses.dataclass(frozen=True)
class EncoderConfig:
    """Encoder; the defaults are those of the published InfMAE-Base.

    Attributes:
      kind: "hybrid" (InfMAE) or "vit" (MAE; uses the last entry of `widths` and `depths`).
      in_channels: 3 as published (one-channel images are repeated), or 1.
      widths, depths: of stages 1, 2 and 3.
      heads: attention heads of stage 3.
      mlp_ratio: hidden over outer width of every MLP.
      fuse_stages: in pretraining, add stages 1 and 2, embedded, to the tokens before the final norm.
      dtype: of the computation ("float32", "bfloat16", "float64"), the decoder's too; parameters, norms, softmax and
        loss stay at least float32.
      remat: recompute block activations in the backward pass to save memory.
      visible_only: compute the convolution stages on visible patches alone; False computes masked patches too, as
        published. Same values and gradients.
      depthwise: how the 5 x 5 depthwise convolutions are computed, see `depthwise`; "auto": by backend.
      attention: "xla", "heads", "cudnn" (in bfloat16 on NVIDIA GPUs, elsewhere as "auto"), or "auto", see
        `transformer.Attention`.
      drop_path: stochastic depth: how often the last block is left out in training, [0, 1). The share grows linearly
        from 0 in the first block. Active only where a random stream "drop_path" is given.
      position: position embeddings of other grids than `position_grid`: "recompute" the sines and cosines, or
        "interpolate" those of `position_grid` (MCMAE), which keeps to the phases seen in pretraining.
      position_grid: token rows and columns of the images in pretraining.
    """

    kind: Annotated[str, "hybrid, vit"] = "hybrid"
    in_channels: int = 3
    widths: tuple[int, int, int] = (256, 384, 768)
    depths: tuple[int, int, int] = (2, 2, 11)
    heads: int = 12
    mlp_ratio: Annotated[int, "[1, 64]"] = 4
    fuse_stages: bool = True
    dtype: Annotated[str, "float32, bfloat16, float64"] = "float32"
    remat: bool = False
    visible_only: bool = True
    depthwise: Annotated[str, "auto, shift, conv, products, windows"] = "auto"
    attention: Annotated[str, "auto, xla, heads, cudnn"] = "auto"
    drop_path: Annotated[float, "[0, 1)"] = 0.0
    position: Annotated[str, "recompute, interpolate"] = "recompute"
    position_grid: tuple[int, int] = (14, 14)

    def __post_init__(self):
        widths, depths, grid = self.widths, self.depths, self.position_grid
        short = len(grid) == 2 and all(1 <= side <= _LONGEST_SIDE for side in grid)
        _check(
            self,
            "model.encoder",
            ("in_channels", self.in_channels in (1, 3), "one of 1, 3"),
            ("widths", len(widths) == 3 and all(1 <= n <= _MOST_WIDTH for n in widths), f"three, 1 to {_MOST_WIDTH}"),
            ("depths", len(depths) == 3 and all(0 <= n <= _MOST_BLOCKS for n in depths), f"three, 0 to {_MOST_BLOCKS}"),
            ("position_grid", short, "token rows, columns"),
        )
        _check_heads(self.widths[-1], self.heads)


@dataclasses.dataclass(frozen=True)
class DecoderConfig:
    """The transformer that predicts pixels in pretraining; dtype, attention, remat and MLP ratio are the encoder's.

    Attributes:
      width, depth, heads: of its blocks.
      predict_masked_only: the loss decodes masked patches alone; False decodes visible ones too, as published. Same
        values and gradients.
    """

    width: Annotated[int, f"[1, {_MOST_WIDTH}]"] = 512
    depth: Annotated[int, f"[1, {_MOST_BLOCKS}]"] = 2
    heads: int = 16
    predict_masked_only: bool = True

    def __post_init__(self):
        _check(self, "model.decoder")
        _check_heads(self.width, self.heads)


@dataclasses.dataclass(frozen=True)
class InfMAEConfig:
    """A masked autoencoder; the defaults are the published InfMAE-Base.

    Attributes:
      encoder, decoder: its two parts.
      norm_pix_loss: compare with pixels normalised per patch (unbiased variance, eps 1e-6).
    """

    encoder: EncoderConfig = EncoderConfig()
    decoder: DecoderConfig = DecoderConfig()
    norm_pix_loss: bool = False

    def replace(self, **changes: Any) -> Self:
        """The config with some values changed, each in the part that has it.

        Args:
          **changes: fields of the encoder; `decoder_width`, `decoder_depth`, `decoder_heads`; `predict_masked_only`;
            `norm_pix_loss`.

        Raises:
          ValueError: an impossible architecture. TypeError: no part has such a field.
        """
        whole = {key: changes.pop(key) for key in ("norm_pix_loss",) if key in changes}
        decoder = {key.removeprefix("decoder_"): changes.pop(key) for key in _DECODER_KEYS if key in changes}
        return dataclasses.replace(
            self,
            encoder=dataclasses.replace(self.encoder, **changes),
            decoder=dataclasses.replace(self.decoder, **decoder),
            **whole,
        )


@dataclasses.dataclass(frozen=True)
class SegmentationHeadConfig:
    """Head of semantic segmentation, see `heads.segmentation`.

    Attributes:
      kind: "upernet" (all stages; MCMAE) or "fcn" (one map).
      channels: its width; 768 in MCMAE, at 8.6 times the cost of 256.
      norm: "group" (up to 32 groups) or "layer".
      dropout: share of the channels dropped before the last convolution, in training, [0, 1).
      auxiliary_weight: of the auxiliary loss on stage 3; 0 is without that head.
      auxiliary_channels: its width.
      fcn_stage: the map that FCN reads: 1, 2, 3, or 4 for stride 32.
      fcn_convs: its convolutions before the one that reads the map again.
      pool_scales: bins per side of UperNet's pyramid pooling.
    """

    kind: Annotated[str, "upernet, fcn"] = "upernet"
    channels: HeadWidth = 256
    norm: Norm = "group"
    dropout: Annotated[float, "[0, 1)"] = 0.1
    auxiliary_weight: Annotated[float, "[0, inf)"] = 0.4
    auxiliary_channels: HeadWidth = 256
    fcn_stage: Annotated[int, "[1, 4]"] = 3
    fcn_convs: Convolutions = 2
    pool_scales: tuple[int, ...] = (1, 2, 3, 6)

    def __post_init__(self):
        scales = self.pool_scales
        different = all(1 <= n <= 64 for n in scales) and len({*scales}) == len(scales)
        _check(self, "model.head", ("pool_scales", different, "different, 1 to 64"))

    def check_encoder(self, encoder: EncoderConfig) -> None:
        """ValueError if the head reads maps that the encoder does not have."""
        if encoder.kind != "vit":
            return
        if encoder.fuse_stages:
            raise ValueError("fuse_stages adds stages 1 and 2, which a vit encoder lacks; set it to False")
        if self.kind == "upernet" or self.fcn_stage in (1, 2):
            reads = "kind=upernet" if self.kind == "upernet" else f"fcn_stage={self.fcn_stage}"
            raise ValueError(f"model.head.{reads} reads stages that a vit encoder lacks; use kind=fcn, fcn_stage=3")


class _ReadsFineMaps:
    def check_encoder(self, encoder: EncoderConfig) -> None:
        """ValueError if the encoder lacks the maps of strides 4 and 8."""
        if encoder.kind == "vit":
            raise ValueError("model.head reads maps of strides 4 and 8, which a vit encoder lacks; use a hybrid one")


@dataclasses.dataclass(frozen=True)
class DetectionHeadConfig(_ReadsFineMaps):
    """Two-stage detector, see `heads.detection`; the numbers are detectron2's.

    Attributes:
      channels: width of the pyramid, the region proposal network and the convolutions of the box and mask heads.
      box_channels: width of the box head's fully connected layer.
      norm: "layer" or "group" (up to 32 groups), of pyramid and heads.
      box_convs, mask_convs: 3 x 3 convolutions of the box head and the mask head.
      cascade: three box heads in a row (Cascade R-CNN), each trained on the boxes of the one before.
      roi_align: "gather", "einsum" (same result; for TPUs), or "auto", which asks what the program is compiled for.
      anchor_sizes: pixels, one for each of the strides 4, 8, 16, 32, 64; (32, 64, 128, 256, 512) as published. None:
        to be proposed from the training boxes, see `heads.anchors.propose_sizes`.
      ratios: height / width of the anchors.
      rpn_iou: an anchor is background below the first, object from the second on.
      rpn_samples, rpn_positive: anchors an image that are learnt from, and the largest share of objects among them.
      pre_nms_train, pre_nms_test: best anchors of each level that become proposals.
      rpn_nms: IoU above which the lower of two proposals goes.
      proposals_train, proposals_test: kept of an image.
      rois, roi_positive: proposals an image that the box heads learn from, and the largest share of objects.
      roi_iou: a proposal is an object from here on; the later heads of a cascade add 0.1 and 0.2.
      score_threshold: detections below are left out.
      nms: IoU above which the lower of two detections of a class goes.
      max_candidates: best pairs of proposal and class that go into that.
      max_detections: kept of an image.
    """

    channels: HeadWidth = 256
    box_channels: HeadWidth = 1024
    norm: Norm = "layer"
    box_convs: Convolutions = 4
    mask_convs: Convolutions = 4
    cascade: bool = False
    roi_align: Annotated[str, "auto, gather, einsum"] = "auto"
    anchor_sizes: tuple[float, ...] = ()
    ratios: tuple[float, ...] = (0.5, 1.0, 2.0)
    rpn_iou: tuple[float, float] = (0.3, 0.7)
    rpn_samples: Positive = 256
    rpn_positive: Share = 0.5
    pre_nms_train: Positive = 2000
    pre_nms_test: Positive = 1000
    rpn_nms: Share = 0.7
    proposals_train: Positive = 1000
    proposals_test: Positive = 1000
    rois: Positive = 512
    roi_positive: Share = 0.25
    roi_iou: float = 0.5
    score_threshold: Annotated[float, "[0, 1)"] = 0.05
    nms: Share = 0.5
    max_candidates: Positive = 1000
    max_detections: Positive = 100

    def __post_init__(self):
        sizes, ratios, low_high = self.anchor_sizes, self.ratios, self.rpn_iou
        five = len(sizes) in (0, 5) and all(0 < size < float("inf") for size in sizes)
        ordered = len(low_high) == 2 and 0 < low_high[0] <= low_high[1] < 1
        _check(
            self,
            "model.head",
            ("anchor_sizes", five, "five positive numbers, or none"),
            ("ratios", 0 < len(ratios) <= 64 and all(0 < r < 1e6 for r in ratios), "1 to 64 numbers above 0"),
            ("rpn_iou", ordered, "two numbers in (0, 1), in order"),
            ("roi_iou", 0 < self.roi_iou <= (0.7 if self.cascade else 0.9), "in (0, 0.9], with a cascade (0, 0.7]"),
            ("max_detections", self.max_detections <= self.max_candidates, "at most max_candidates"),
        )


@dataclasses.dataclass(frozen=True)
class SmallTargetHeadConfig(_ReadsFineMaps):
    """Decoder of small-target detection, see `heads.small_targets`.

    Attributes:
      widths: at strides 16, 8, 4, 2 and 1.
      norm: "group" (up to 32 groups) or "layer".
      deep_supervision: predict at strides 2 and 4 too, in training.
      prior: probability of a target with which every pixel begins, (0, 1).
    """

    widths: tuple[int, int, int, int, int] = (256, 128, 64, 32, 16)
    norm: Norm = "group"
    deep_supervision: bool = True
    prior: Annotated[float, "(0, 1)"] = 0.01

    def __post_init__(self):
        wide = len(self.widths) == 5 and min(self.widths) >= 8
        _check(self, "model.head", ("widths", wide, "five numbers of at least 8"))


VARIANTS: dict[str, dict[str, Any]] = {
    "tiny": dict(widths=(48, 96, 192), depths=(2, 2, 4), heads=6, decoder_width=128, decoder_heads=4),
    "small": dict(widths=(128, 192, 384), depths=(2, 2, 11), heads=6, decoder_width=256, decoder_heads=8),
    "base": dict(),
    "large": dict(widths=(384, 768, 1024), depths=(2, 2, 20), heads=16),
    "huge": dict(widths=(512, 1024, 1280), depths=(2, 2, 28), heads=16),
}


def variant(name: str, **overrides: Any) -> InfMAEConfig:
    """Config of a named variant (tiny, small, base, large, huge).

    Args:
      name: of `VARIANTS`.
      **overrides: as in `InfMAEConfig.replace`.

    Raises:
      InputError: an unknown name. ValueError: an impossible architecture.
    """
    if name not in VARIANTS:
        raise InputError(f"model variant {name!r} is not one of {', '.join(VARIANTS)}")
    return InfMAEConfig().replace(**VARIANTS[name] | overrides)

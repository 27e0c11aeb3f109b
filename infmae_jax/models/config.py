"""Architectures: what each part of the model takes, and the variants by name."""

import dataclasses
from typing import Any, Self

ENCODERS = ("hybrid", "vit")
DTYPES = ("float32", "bfloat16", "float64")
DEPTHWISE_METHODS = ("auto", "shift", "conv", "products", "windows")
ATTENTION_METHODS = ("auto", "xla", "heads", "cudnn")
POSITIONS = ("recompute", "interpolate")
SEGMENTATION_HEADS = ("upernet", "fcn")
HEAD_NORMS = ("group", "layer")
ROI_ALIGNS = ("auto", "gather", "einsum")
# Configs may come from strangers: no architecture takes a program without end.
_MOST_WIDTH, _MOST_BLOCKS, _MOST_RATIO, _LONGEST_SIDE = 1 << 16, 1000, 64, 1 << 12
_DECODER_KEYS = ("decoder_width", "decoder_depth", "decoder_heads", "predict_masked_only")


def _check_heads(width: int, heads: int, attention: str = "auto") -> None:
    if heads < 1 or width < 4 or width % heads or width % 4:
        raise ValueError(f"model width {width} must be divisible by 4 and by its {heads} attention heads")
    if attention == "cudnn" and (width // heads % 8 or width // heads > 128):
        raise ValueError(
            f"model.encoder.attention=cudnn takes heads of 8, 16, ... 128 features, not {width} / {heads}; use xla"
        )


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

    kind: str = "hybrid"
    in_channels: int = 3
    widths: tuple[int, int, int] = (256, 384, 768)
    depths: tuple[int, int, int] = (2, 2, 11)
    heads: int = 12
    mlp_ratio: int = 4
    fuse_stages: bool = True
    dtype: str = "float32"
    remat: bool = False
    visible_only: bool = True
    depthwise: str = "auto"
    attention: str = "auto"
    drop_path: float = 0.0
    position: str = "recompute"
    position_grid: tuple[int, int] = (14, 14)

    def __post_init__(self):
        for field, allowed in (
            ("kind", ENCODERS),
            ("in_channels", (1, 3)),
            ("dtype", DTYPES),
            ("depthwise", DEPTHWISE_METHODS),
            ("attention", ATTENTION_METHODS),
            ("position", POSITIONS),
        ):
            value = getattr(self, field)
            if value not in allowed:
                raise ValueError(f"model.encoder.{field}={value!r} is not one of {', '.join(map(str, allowed))}")
        if len(self.widths) != 3 or not all(1 <= width <= _MOST_WIDTH for width in self.widths):
            raise ValueError(f"model.encoder.widths={self.widths} must be three from 1 to {_MOST_WIDTH}")
        if len(self.depths) != 3 or not all(0 <= depth <= _MOST_BLOCKS for depth in self.depths):
            raise ValueError(f"model.encoder.depths={self.depths} must be three from 0 to {_MOST_BLOCKS}")
        if not 1 <= self.mlp_ratio <= _MOST_RATIO:
            raise ValueError(f"model.encoder.mlp_ratio={self.mlp_ratio} must be from 1 to {_MOST_RATIO}")
        if not 0 <= self.drop_path < 1:
            raise ValueError(f"model.encoder.drop_path={self.drop_path} must be in [0, 1)")
        if len(self.position_grid) != 2 or not all(1 <= side <= _LONGEST_SIDE for side in self.position_grid):
            raise ValueError(f"model.encoder.position_grid={self.position_grid} must be token rows, columns")
        if self.attention == "cudnn" and self.dtype != "bfloat16":
            raise ValueError(f"model.encoder.attention=cudnn computes in bfloat16, not {self.dtype}; use xla")
        _check_heads(self.widths[-1], self.heads, self.attention)

    @property
    def position_source(self) -> tuple[int, int] | None:
        """The grid whose position embeddings are interpolated, None where they are recomputed."""
        return self.position_grid if self.position == "interpolate" else None


@dataclasses.dataclass(frozen=True)
class DecoderConfig:
    """The transformer that predicts pixels in pretraining; dtype, attention, remat and MLP ratio are the encoder's.

    Attributes:
      width, depth, heads: of its blocks.
      predict_masked_only: the loss decodes masked patches alone; False decodes visible ones too, as published. Same
        values and gradients.
    """

    width: int = 512
    depth: int = 2
    heads: int = 16
    predict_masked_only: bool = True

    def __post_init__(self):
        if not 1 <= self.depth <= _MOST_BLOCKS or self.width > _MOST_WIDTH:
            raise ValueError(
                f"model.decoder.depth={self.depth} must be from 1 to {_MOST_BLOCKS}, its width at most {_MOST_WIDTH}"
            )
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

    def __post_init__(self):
        _check_heads(self.decoder.width, self.decoder.heads, self.encoder.attention)

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

    kind: str = "upernet"
    channels: int = 256
    norm: str = "group"
    dropout: float = 0.1
    auxiliary_weight: float = 0.4
    auxiliary_channels: int = 256
    fcn_stage: int = 3
    fcn_convs: int = 2
    pool_scales: tuple[int, ...] = (1, 2, 3, 6)

    def __post_init__(self):
        scales = self.pool_scales
        for field, valid, allowed in (
            ("kind", self.kind in SEGMENTATION_HEADS, f"one of {', '.join(SEGMENTATION_HEADS)}"),
            ("channels", self.channels >= 8, "at least 8"),
            ("norm", self.norm in HEAD_NORMS, f"one of {', '.join(HEAD_NORMS)}"),
            ("dropout", 0 <= self.dropout < 1, "in [0, 1)"),
            ("auxiliary_weight", 0 <= self.auxiliary_weight < float("inf"), "a number of at least 0"),
            ("auxiliary_channels", self.auxiliary_channels >= 8, "at least 8"),
            ("fcn_stage", self.fcn_stage in (1, 2, 3, 4), "one of 1, 2, 3, 4"),
            ("fcn_convs", 1 <= self.fcn_convs <= 64, "from 1 to 64"),
            ("pool_scales", all(1 <= n <= 64 for n in scales) and len({*scales}) == len(scales), "different, 1 to 64"),
        ):
            if not valid:
                raise ValueError(f"model.head.{field}={getattr(self, field)!r} must be {allowed}")

    def check_encoder(self, encoder: EncoderConfig, fuse_stages: bool = False) -> None:
        """ValueError if the head reads maps that the encoder does not have."""
        if encoder.kind != "vit":
            return
        if fuse_stages:
            raise ValueError("fuse_stages adds stages 1 and 2, which a vit encoder lacks; set it to False")
        if self.kind == "upernet" or self.fcn_stage in (1, 2):
            reads = "kind=upernet" if self.kind == "upernet" else f"fcn_stage={self.fcn_stage}"
            raise ValueError(f"model.head.{reads} reads stages that a vit encoder lacks; use kind=fcn, fcn_stage=3")


@dataclasses.dataclass(frozen=True)
class DetectionHeadConfig:
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

    channels: int = 256
    box_channels: int = 1024
    norm: str = "layer"
    box_convs: int = 4
    mask_convs: int = 4
    cascade: bool = False
    roi_align: str = "auto"
    anchor_sizes: tuple[float, ...] = ()
    ratios: tuple[float, ...] = (0.5, 1.0, 2.0)
    rpn_iou: tuple[float, float] = (0.3, 0.7)
    rpn_samples: int = 256
    rpn_positive: float = 0.5
    pre_nms_train: int = 2000
    pre_nms_test: int = 1000
    rpn_nms: float = 0.7
    proposals_train: int = 1000
    proposals_test: int = 1000
    rois: int = 512
    roi_positive: float = 0.25
    roi_iou: float = 0.5
    score_threshold: float = 0.05
    nms: float = 0.5
    max_candidates: int = 1000
    max_detections: int = 100

    def __post_init__(self):
        counts = (
            "rpn_samples", "pre_nms_train", "pre_nms_test", "proposals_train",
            "proposals_test", "rois", "max_candidates", "max_detections",
        )  # fmt: skip
        shares = ("rpn_positive", "roi_positive")
        sizes, low_high = self.anchor_sizes, self.rpn_iou
        positive = all(0 < size < float("inf") for size in sizes)
        for field, valid, allowed in (
            ("channels", self.channels >= 8, "at least 8"),
            ("box_channels", self.box_channels >= 8, "at least 8"),
            ("norm", self.norm in HEAD_NORMS, f"one of {', '.join(HEAD_NORMS)}"),
            ("roi_align", self.roi_align in ROI_ALIGNS, f"one of {', '.join(ROI_ALIGNS)}"),
            ("anchor_sizes", len(sizes) in (0, 5) and positive, "five positive numbers, or none"),
            ("ratios", 0 < len(self.ratios) <= 64 and all(0 < r < 1e6 for r in self.ratios), "1 to 64 numbers above 0"),
            *((name, 1 <= getattr(self, name) <= 64, "from 1 to 64") for name in ("box_convs", "mask_convs")),
            ("rpn_iou", len(low_high) == 2 and 0 < low_high[0] <= low_high[1] < 1, "two numbers in (0, 1), in order"),
            ("roi_iou", 0 < self.roi_iou <= (0.7 if self.cascade else 0.9), "in (0, 0.9], with a cascade (0, 0.7]"),
            ("score_threshold", 0 <= self.score_threshold < 1, "in [0, 1)"),
            ("max_detections", self.max_detections <= self.max_candidates, "at most max_candidates"),
            *((name, getattr(self, name) >= 1, "at least 1") for name in counts),
            *((name, 0 < getattr(self, name) <= 1, "in (0, 1]") for name in (*shares, "rpn_nms", "nms")),
        ):
            if not valid:
                raise ValueError(f"model.head.{field}={getattr(self, field)!r} must be {allowed}")

    def check_encoder(self, encoder: EncoderConfig, fuse_stages: bool = False) -> None:
        """ValueError if the encoder lacks the maps of strides 4 and 8."""
        _check_fine_maps("detection", encoder)


@dataclasses.dataclass(frozen=True)
class SmallTargetHeadConfig:
    """Decoder of small-target detection, see `heads.small_targets`.

    Attributes:
      widths: at strides 16, 8, 4, 2 and 1.
      norm: "group" (up to 32 groups) or "layer".
      deep_supervision: predict at strides 2 and 4 too, in training.
      prior: probability of a target with which every pixel begins, (0, 1).
    """

    widths: tuple[int, int, int, int, int] = (256, 128, 64, 32, 16)
    norm: str = "group"
    deep_supervision: bool = True
    prior: float = 0.01

    def __post_init__(self):
        if len(self.widths) != 5 or min(self.widths) < 8:
            raise ValueError(f"model.head.widths={self.widths} must be five numbers of at least 8")
        if self.norm not in HEAD_NORMS or not 0 < self.prior < 1:
            raise ValueError(
                f"model.head.norm={self.norm} must be one of {', '.join(HEAD_NORMS)}, prior={self.prior} in (0, 1)"
            )

    def check_encoder(self, encoder: EncoderConfig, fuse_stages: bool = False) -> None:
        """ValueError if the encoder lacks the maps of strides 4 and 8."""
        _check_fine_maps("small targets", encoder)


def _check_fine_maps(task: str, encoder: EncoderConfig) -> None:
    if encoder.kind == "vit":
        raise ValueError(f"{task} reads maps of strides 4 and 8, which a vit encoder lacks; use a hybrid one")


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
      ValueError: an unknown name, or an impossible architecture.
    """
    if name not in VARIANTS:
        raise ValueError(f"model variant {name!r} is not one of {', '.join(VARIANTS)}")
    return InfMAEConfig().replace(**VARIANTS[name] | overrides)

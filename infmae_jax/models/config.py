"""Architectures: what each part of the model takes, and the variants by name."""

import dataclasses
from typing import Any, Self

ENCODERS = ("hybrid", "vit")
DTYPES = ("float32", "bfloat16", "float64")
DEPTHWISE_METHODS = ("shift", "conv")
ATTENTION_METHODS = ("xla", "cudnn")
_DECODER_KEYS = ("decoder_width", "decoder_depth", "decoder_heads", "predict_masked_only")


def _check_heads(width: int, heads: int, attention: str = "xla") -> None:
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
      depthwise: how the 5 x 5 depthwise convolutions are computed, see `blocks.DepthwiseConv`.
      attention: "xla", or "cudnn" in bfloat16 on NVIDIA GPUs, see `blocks.Attention`.
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
    depthwise: str = "shift"
    attention: str = "xla"

    def __post_init__(self):
        for field, allowed in (
            ("kind", ENCODERS),
            ("in_channels", (1, 3)),
            ("dtype", DTYPES),
            ("depthwise", DEPTHWISE_METHODS),
            ("attention", ATTENTION_METHODS),
        ):
            value = getattr(self, field)
            if value not in allowed:
                raise ValueError(f"model.encoder.{field}={value!r} is not one of {', '.join(map(str, allowed))}")
        if len(self.widths) != 3 or len(self.depths) != 3 or min(self.widths) < 1 or min(self.depths) < 0:
            raise ValueError(f"model.encoder needs three widths and depths, not {self.widths} and {self.depths}")
        if self.mlp_ratio < 1:
            raise ValueError(f"model.encoder.mlp_ratio={self.mlp_ratio} must be at least 1")
        if self.attention == "cudnn" and self.dtype != "bfloat16":
            raise ValueError(f"model.encoder.attention=cudnn computes in bfloat16, not {self.dtype}; use xla")
        _check_heads(self.widths[-1], self.heads, self.attention)


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
        if self.depth < 1:
            raise ValueError(f"model.decoder.depth={self.depth} must be at least 1")
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

"""InfMAE: encoder, decoder and masked reconstruction loss, with the variants by name."""

from __future__ import annotations

import dataclasses
from typing import Any

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp

from infmae_jax.models import blocks, patches
from infmae_jax.models.decoder import Decoder
from infmae_jax.models.encoder import HybridEncoder
from infmae_jax.models.vit import ViTEncoder

ENCODERS = {"hybrid": HybridEncoder, "vit": ViTEncoder}


@dataclasses.dataclass(frozen=True)
class InfMAEConfig:
    """Architecture of a masked autoencoder; the defaults are the published InfMAE-Base.

    Attributes:
      encoder: "hybrid" (InfMAE) or "vit" (MAE; uses the last entry of `widths` and `depths`).
      in_channels: 3 as published (one-channel images are repeated), or 1.
      widths, depths: of stages 1, 2 and 3.
      heads: attention heads of stage 3.
      mlp_ratio: hidden over outer width of every MLP.
      fuse_stages: in pretraining, add stages 1 and 2, embedded, to the tokens before the final norm.
      decoder_width, decoder_depth, decoder_heads: the transformer decoder.
      norm_pix_loss: compare with pixels normalised per patch (unbiased variance, eps 1e-6).
      dtype: of the computation ("float32", "bfloat16", "float64"); parameters, norms, softmax and loss stay at least
        float32.
      visible_only: compute the convolution stages on visible patches alone; False computes masked patches too, as
        published. Same values and gradients.
      predict_masked_only: the loss decodes masked patches alone; False decodes visible ones too, as published. Same
        values and gradients.
      remat: recompute block activations in the backward pass to save memory.
      depthwise: how the 5 x 5 depthwise convolutions are computed, see `blocks.DepthwiseConv`.
      attention: "xla", or "cudnn" in bfloat16 on NVIDIA GPUs, see `blocks.Attention`.
    """

    encoder: str = "hybrid"
    in_channels: int = 3
    widths: tuple[int, int, int] = (256, 384, 768)
    depths: tuple[int, int, int] = (2, 2, 11)
    heads: int = 12
    mlp_ratio: int = 4
    fuse_stages: bool = True
    decoder_width: int = 512
    decoder_depth: int = 2
    decoder_heads: int = 16
    norm_pix_loss: bool = False
    dtype: str = "float32"
    visible_only: bool = True
    predict_masked_only: bool = True
    remat: bool = False
    depthwise: str = "shift"
    attention: str = "xla"

    def __post_init__(self):
        for field, allowed in (
            ("encoder", tuple(ENCODERS)),
            ("in_channels", (1, 3)),
            ("dtype", ("float32", "bfloat16", "float64")),
            ("depthwise", blocks.DEPTHWISE_METHODS),
            ("attention", blocks.ATTENTION_METHODS),
        ):
            if getattr(self, field) not in allowed:
                raise ValueError(f"model.{field}={getattr(self, field)!r} is not one of {', '.join(map(str, allowed))}")
        for width, heads in ((self.widths[-1], self.heads), (self.decoder_width, self.decoder_heads)):
            if width % heads or width % 4:
                raise ValueError(f"model width {width} must be divisible by 4 and by its {heads} attention heads")
            if self.attention == "cudnn" and (width // heads % 8 or width // heads > 128):
                raise ValueError(
                    f"model.attention=cudnn takes heads of 8, 16, ... 128 features, not {width} / {heads}; use xla"
                )
        if self.attention == "cudnn" and self.dtype != "bfloat16":
            raise ValueError(f"model.attention=cudnn computes in bfloat16, not {self.dtype}; use xla")
        if self.decoder_depth < 1:
            raise ValueError(f"model.decoder_depth={self.decoder_depth} must be at least 1")


VARIANTS: dict[str, dict[str, Any]] = {
    "tiny": dict(widths=(48, 96, 192), depths=(2, 2, 4), heads=6, decoder_width=128, decoder_heads=4),
    "small": dict(widths=(128, 192, 384), depths=(2, 2, 11), heads=6, decoder_width=256, decoder_heads=8),
    "base": dict(),
    "large": dict(widths=(384, 768, 1024), depths=(2, 2, 20), heads=16),
    "huge": dict(widths=(512, 1024, 1280), depths=(2, 2, 28), heads=16),
}


def variant(name: str, **overrides: Any) -> InfMAEConfig:
    """Config of a named variant (tiny, small, base, large, huge); ValueError names an unknown one."""
    if name not in VARIANTS:
        raise ValueError(f"model variant {name!r} is not one of {', '.join(VARIANTS)}")
    return InfMAEConfig(**{**VARIANTS[name], **overrides})


@flax.struct.dataclass
class InfMAEOutput:
    """loss () float32; pred (B,N,P); latent (B,K,D), with MAE's class token first (B,1+K,D); mask (B,N), 1 = masked.

    `pred` covers visible patches too. Under `jax.jit`, XLA leaves out what is not read.
    """

    loss: jax.Array
    pred: jax.Array
    latent: jax.Array
    mask: jax.Array


class InfMAE(nn.Module):
    """Masked autoencoder. `__call__` is the pretraining pass, `features` the dense one; parameters are shared."""

    config: InfMAEConfig = InfMAEConfig()

    def setup(self):
        self.encoder = ENCODERS[self.config.encoder](self.config)
        self.decoder = Decoder(self.config)

    def __call__(self, images: jax.Array, ids_keep: jax.Array) -> InfMAEOutput:
        """Reconstructs masked patches.

        Args:
          images: (B,H,W,C) float32, normalised (`patches.normalize`), sides divisible by 16; one channel stands for C
            equal ones.
          ids_keep: (B,K) int32, the visible tokens of each sample; no repeats.
        """
        c = self.config
        patches.check_channels(images, c.in_channels)
        grid = patches.token_grid(*images.shape[1:3])
        latent = self.encoder(images, ids_keep)
        ids_masked = patches.masked_ids(ids_keep, grid[0] * grid[1])
        tokens = self.decoder(latent, ids_keep, ids_masked, grid)
        in_order = jnp.argsort(jnp.concatenate([ids_keep, ids_masked], axis=1), axis=1)
        pred = patches.take_tokens(self._predict(tokens, latent.shape[1] - ids_keep.shape[1]), in_order)
        mask = patches.token_mask(ids_keep, grid[0] * grid[1])
        target = patches.patchify(images)
        if c.predict_masked_only:
            masked = self._predict(tokens, latent.shape[1])
            loss = patch_errors(masked, patches.take_tokens(target, ids_masked), c.norm_pix_loss).mean()
        else:
            loss = masked_loss(pred, target, mask, c.norm_pix_loss)
        return InfMAEOutput(loss=loss, pred=pred, latent=latent, mask=mask)

    def _predict(self, tokens: jax.Array, first: int) -> jax.Array:
        return self.decoder.predict(tokens, first).astype(blocks.float_dtype(self.config.dtype))

    def features(self, images: jax.Array, **options: bool) -> dict[str, jax.Array]:
        """Feature maps of whole images, see the encoder's `features`. Needs only the encoder's parameters."""
        return self.encoder.features(images, **options)


def masked_loss(pred: jax.Array, target: jax.Array, mask: jax.Array, norm_pix: bool) -> jax.Array:
    """Mean squared error over masked patches: (B,N,P), (B,N,P) or one channel of it, (B,N) -> ()."""
    return (patch_errors(pred, target, norm_pix) * mask).sum() / mask.sum()


def patch_errors(pred: jax.Array, target: jax.Array, norm_pix: bool) -> jax.Array:
    """Mean squared error of each patch.

    Args:
      pred: (...,P).
      target: (...,P), or (...,P/C) when all C channels of the image are equal.
      norm_pix: compare with the target normalised per patch: unbiased variance over all P values, eps 1e-6.

    Returns:
      (...).
    """
    size = pred.shape[-1]
    if norm_pix:
        variance = target.var(axis=-1, keepdims=True) * (size / (size - 1))
        target = (target - target.mean(axis=-1, keepdims=True)) / jnp.sqrt(variance + 1e-6)
    pred = pred.reshape(*target.shape, size // target.shape[-1])
    return jnp.square(pred - target[..., None]).mean(axis=(-2, -1))


def abstract_params(config: InfMAEConfig) -> dict[str, Any]:
    """Shapes and dtypes of a model's parameters, without computing anything."""
    images = jax.ShapeDtypeStruct((1, 32, 32, 1), jnp.float32)
    ids_keep = jax.ShapeDtypeStruct((1, 1), jnp.int32)
    return jax.eval_shape(InfMAE(config).init, jax.random.key(0), images, ids_keep)["params"]

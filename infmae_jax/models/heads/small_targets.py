"""Small-target detection: a U-shaped decoder from the encoder's strides 16, 8 and 4 back to single pixels.

A target has some 4 to 330 pixels, half of them fewer than 20: one or two cells of stride 4. So the decoder goes on to
full resolution, where a shallow stem on the image itself brings back what the patches have averaged.
"""

import functools
import math

import flax.linen as nn
import jax
import jax.numpy as jnp

from infmae_jax.models.config import EncoderConfig, SmallTargetHeadConfig
from infmae_jax.models.heads.layers import ConvModule, Output
from infmae_jax.models.heads.segmentation import resize
from infmae_jax.models.infmae import ENCODER_MODULES


class Decoder(nn.Module):
    """From the coarsest map up: resize by two, join with the next finer map, two 3 x 3 convolutions."""

    config: SmallTargetHeadConfig
    dtype: str

    @nn.compact
    def __call__(self, images: jax.Array, stages: list[jax.Array], deep: bool) -> list[jax.Array]:
        """Images (B,H,W,C), maps of strides 4, 8, 16 -> logits (B,H,W); with `deep` also those of strides 2 and 4."""
        c = self.config
        conv = functools.partial(ConvModule, norm=c.norm, dtype=self.dtype)
        pixels = images[..., :1].astype(jnp.dtype(self.dtype))
        stem1 = conv(c.widths[4], 3, name="stem1")(pixels)
        stem2 = conv(c.widths[3], 3, name="stem2")(nn.max_pool(stem1, (2, 2), (2, 2)))
        x = conv(c.widths[0], 1, name="coarsest")(stages[2])
        found: list[jax.Array] = []
        finer = (stages[1], stages[0], stem2, stem1)
        for level, (skip, width) in enumerate(zip(finer, c.widths[1:], strict=True)):
            x = jnp.concatenate([resize(x, skip.shape[1:3]), conv(width, 1, name=f"skip{level}")(skip)], axis=-1)
            x = conv(width, 3, name=f"up{level}")(x)
            x = conv(width, 3, name=f"refine{level}")(x)
            if level == 3 or (c.deep_supervision and level in (1, 2)):
                odds = 0.0 if found else math.log(c.prior / (1 - c.prior))
                logits = Output(1, 0.01, bias=odds, name=f"logit{level}")(x)
                if found:  # what a finer level says is added, so that it cannot lose what a coarser one has found
                    logits += resize(found[0], logits.shape[1:3])
                found.insert(0, logits)
        return [logits[..., 0] for logits in (found if deep else found[:1])]


class TargetDetector(nn.Module):
    """An encoder and the decoder above: parameters `encoder` and `head`."""

    encoder: EncoderConfig
    head: SmallTargetHeadConfig

    @nn.compact
    def __call__(self, images: jax.Array, deep: bool = True) -> list[jax.Array]:
        """Logits that a pixel is target.

        Args:
          images: (B,H,W,C) float32, normalised, sides divisible by 16; one channel stands for C equal ones.
          deep: give those of strides 2 and 4 too, where the head has them; initialisation needs True.

        Returns:
          (B,H,W), and with `deep` (B,H/2,W/2) and (B,H/4,W/4); float32, or float64 when computing in float64.

        Raises:
          ValueError: a ViT encoder, which has no finer maps; impossible images.
        """
        self.head.check_encoder(self.encoder)
        encoder = ENCODER_MODULES[self.encoder.kind](self.encoder, name="encoder")
        maps = encoder.features(images, self.encoder.fuse_stages)
        stages = [maps[name] for name in ("stage1", "stage2", "stage3")]
        return Decoder(self.head, self.encoder.dtype, name="head")(images, stages, deep)

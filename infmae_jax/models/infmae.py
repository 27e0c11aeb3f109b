"""InfMAE: encoder, decoder and masked reconstruction loss."""

import functools
from typing import Any

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp

from infmae_jax.models import blocks, patches
from infmae_jax.models.config import InfMAEConfig
from infmae_jax.models.decoder import Decoder
from infmae_jax.models.encoder import HybridEncoder
from infmae_jax.models.vit import ViTEncoder

ENCODER_MODULES = {"hybrid": HybridEncoder, "vit": ViTEncoder}


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
        self.encoder = ENCODER_MODULES[self.config.encoder.kind](self.config.encoder)
        self.decoder = Decoder(self.config.decoder, self.config.encoder)

    def __call__(self, images: jax.Array, ids_keep: jax.Array) -> InfMAEOutput:
        """Reconstructs masked patches.

        Args:
          images: (B,H,W,C) float32, normalised (`patches.normalize`), sides divisible by 16; one channel stands for C
            equal ones.
          ids_keep: (B,K) int32, the visible tokens of each sample; no repeats.
        """
        c = self.config
        grid = patches.check_images(images, c.encoder.in_channels)
        patches.check_ids(ids_keep, images.shape[0], grid)
        latent = self.encoder(images, ids_keep)
        ids_masked = patches.masked_ids(ids_keep, grid[0] * grid[1])
        tokens = self.decoder(latent, ids_keep, ids_masked, grid)
        in_order = jnp.argsort(jnp.concatenate([ids_keep, ids_masked], axis=1), axis=1)
        pred = patches.take_tokens(self._predict(tokens, latent.shape[1] - ids_keep.shape[1]), in_order)
        mask = patches.token_mask(ids_keep, grid[0] * grid[1])
        target = patches.patchify(images)
        if c.decoder.predict_masked_only:
            masked = self._predict(tokens, latent.shape[1])
            loss = patch_errors(masked, patches.take_tokens(target, ids_masked), c.norm_pix_loss).mean()
        else:
            loss = masked_loss(pred, target, mask, c.norm_pix_loss)
        return InfMAEOutput(loss=loss, pred=pred, latent=latent, mask=mask)

    def _predict(self, tokens: jax.Array, first: int) -> jax.Array:
        return self.decoder.predict(tokens, first).astype(blocks.float_dtype(self.config.encoder.dtype))

    def features(self, images: jax.Array, fuse_stages: bool = False) -> dict[str, jax.Array]:
        """Feature maps of whole images, see the encoder's `features`. Needs only the encoder's parameters."""
        return self.encoder.features(images, fuse_stages)


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


@functools.cache  # tracing takes a second
def abstract_params(config: InfMAEConfig) -> dict[str, Any]:
    """Shapes and dtypes of a model's parameters, not to be changed, without computing anything."""
    images = jax.ShapeDtypeStruct((1, 32, 32, 1), jnp.float32)
    ids_keep = jax.ShapeDtypeStruct((1, 1), jnp.int32)
    return jax.eval_shape(InfMAE(config).init, jax.random.key(0), images, ids_keep)["params"]

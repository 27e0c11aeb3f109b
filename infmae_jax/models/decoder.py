"""The light transformer decoder: latent of visible tokens to the pixels of every patch."""

from __future__ import annotations

from typing import TYPE_CHECKING

import flax.linen as nn
import jax
import jax.numpy as jnp

from infmae_jax.models import blocks, patches

if TYPE_CHECKING:
    from infmae_jax.models.infmae import InfMAEConfig


class Decoder(nn.Module):
    """Puts visible tokens back in place, a learned mask token everywhere else, and predicts each patch's pixels."""

    config: InfMAEConfig

    def setup(self):
        c = self.config
        width, param_dtype = c.decoder_width, blocks.float_dtype(c.dtype)
        block = nn.remat(blocks.TransformerBlock) if c.remat else blocks.TransformerBlock
        self.embed = blocks.linear(width, c.widths[-1], c.dtype)
        self.mask_token = self.param("mask_token", nn.initializers.normal(0.02), (1, 1, width), param_dtype)
        self.blocks = [block(c.decoder_heads, c.mlp_ratio, c.dtype) for _ in range(c.decoder_depth)]
        self.norm = blocks.layer_norm(c.dtype, blocks.TOKEN_EPS)
        self.pred = blocks.linear(patches.PATCH**2 * c.in_channels, width, c.dtype)

    def __call__(self, latent: jax.Array, ids_keep: jax.Array, grid: tuple[int, int]) -> jax.Array:
        """(B,[1+]K,D), (B,K) int32 -> (B,N,P) predicted (normalised) pixels.

        Tokens before the K visible ones (MAE's class token) take part in attention and have no position embedding.
        """
        tokens = self.embed(latent)
        prefix, visible = jnp.split(tokens, [latent.shape[1] - ids_keep.shape[1]], axis=1)
        batch, n, width = tokens.shape[0], grid[0] * grid[1], tokens.shape[-1]
        background = jnp.broadcast_to(self.mask_token.astype(tokens.dtype), (batch, n, width))
        tokens = patches.place_tokens(visible, ids_keep, background)
        tokens = tokens + jnp.asarray(patches.position_embedding(grid, width), tokens.dtype)[None]
        tokens = jnp.concatenate([prefix, tokens], axis=1)
        for block in self.blocks:
            tokens = block(tokens)
        return self.pred(self.norm(tokens)[:, prefix.shape[1] :])

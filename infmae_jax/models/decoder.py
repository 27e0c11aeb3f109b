"""The light transformer decoder: latent of visible tokens to the pixels of other patches."""

import flax.linen as nn
import jax
import jax.numpy as jnp

from infmae_jax.models import blocks, patches, transformer
from infmae_jax.models.config import DecoderConfig, EncoderConfig


class Decoder(nn.Module):
    """Joins visible tokens and learned mask tokens, and predicts the pixels of patches.

    A transformer does not mind the order of its tokens once they carry their positions, so visible tokens stay in front
    and masked ones follow: nothing is scattered, and predicting masked patches alone is a slice.
    """

    config: DecoderConfig
    encoder: EncoderConfig

    def setup(self):
        c, width, param_dtype = self.encoder, self.config.width, blocks.float_dtype(self.encoder.dtype)
        block = nn.remat(transformer.TransformerBlock, static_argnums=(2,)) if c.remat else transformer.TransformerBlock
        self.embed = blocks.linear(width, c.widths[-1], c.dtype)
        self.mask_token = self.param("mask_token", nn.initializers.normal(0.02), (1, 1, width), param_dtype)
        heads, depth = self.config.heads, self.config.depth
        self.blocks = [block(heads, c.mlp_ratio, c.dtype, c.attention) for _ in range(depth)]
        self.norm = blocks.layer_norm(c.dtype, blocks.TOKEN_EPS)
        self.pred = blocks.linear(patches.PATCH**2 * c.in_channels, width, c.dtype)

    def __call__(
        self, latent: jax.Array, ids_keep: jax.Array, ids_masked: jax.Array, grid: tuple[int, int]
    ) -> jax.Array:
        """Tokens before the last block, for `predict`.

        Args:
          latent: (B,[1+]K,D). A token before the K visible ones (MAE's class token) takes part in attention and has no
            position embedding.
          ids_keep, ids_masked: (B,K) and (B,N-K) int32, together all tokens.
          grid: token rows and columns.

        Returns:
          (B,[1+]N,width): the tokens of `latent`, then the masked ones.
        """
        tokens = self.embed(latent)
        prefix, visible = jnp.split(tokens, [latent.shape[1] - ids_keep.shape[1]], axis=1)
        width, dtype = tokens.shape[-1], tokens.dtype
        positions = jnp.asarray(patches.position_embedding(grid, width), dtype)
        masked = self.mask_token.astype(dtype) + positions[ids_masked]
        tokens = jnp.concatenate([prefix, visible + positions[ids_keep], masked], axis=1)
        for block in self.blocks[:-1]:
            tokens = block(tokens, 0)
        return tokens

    def predict(self, tokens: jax.Array, first: int) -> jax.Array:
        """(B,[1+]N,width) from `__call__` -> (B,[1+]N-first,P): (normalised) pixels of the tokens from `first` on."""
        return self.pred(self.norm(self.blocks[-1](tokens, first)))

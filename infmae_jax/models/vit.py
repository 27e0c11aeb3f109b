"""The plain ViT encoder of MAE, for comparison and for imported MAE checkpoints."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from infmae_jax.models import blocks, patches, transformer
from infmae_jax.models.config import EncoderConfig


class ViTEncoder(nn.Module):
    """Patch embedding and transformer blocks with a class token; masked patches are dropped before the blocks."""

    config: EncoderConfig

    def setup(self):
        c = self.config
        width = c.widths[-1]
        block = nn.remat(transformer.TransformerBlock) if c.remat else transformer.TransformerBlock
        self.patch_embed = blocks.NonOverlappingConv(
            width, patches.PATCH, c.in_channels, c.dtype, blocks.flattened_xavier_uniform
        )
        self.cls_token = self.param(
            "cls_token", nn.initializers.normal(0.02), (1, 1, width), blocks.float_dtype(c.dtype)
        )
        drops = np.linspace(0.0, c.drop_path, c.depths[-1]).tolist()
        self.blocks = [block(c.heads, c.mlp_ratio, c.dtype, c.attention, rate) for rate in drops]
        self.norm = blocks.layer_norm(c.dtype, blocks.TOKEN_EPS)

    def __call__(self, images: jax.Array, ids_keep: jax.Array) -> jax.Array:
        """(B,H,W,C) float32 normalised, (B,K) int32 -> (B,1+K,D) after the final norm, the class token first."""
        return self.norm(self._tokens(images, ids_keep))

    def features(self, images: jax.Array, fuse_stages: bool = False) -> dict[str, jax.Array]:
        """stage3 (B,h,w,D) before the final norm; after it: tokens (B,1+N,D), class token first, and pooled (B,D),
        the mean over the patch tokens. It has no stages that could be fused, as in pretraining."""
        del fuse_stages
        tokens = self._tokens(images, None)
        stage3 = tokens[:, 1:].reshape(tokens.shape[0], *patches.token_grid(*images.shape[1:3]), tokens.shape[-1])
        tokens = self.norm(tokens)
        return {"stage3": stage3, "tokens": tokens, "pooled": tokens[:, 1:].mean(axis=1)}

    def _tokens(self, images: jax.Array, ids_keep: jax.Array | None) -> jax.Array:
        c = self.config
        grid = patches.check_images(images, c.in_channels)
        layout = blocks.Layout(grid, ids_keep, packed=ids_keep is not None)
        tokens = layout.tokens(self.patch_embed(layout.gather(images)))
        tokens = tokens + layout.positions(c, tokens.dtype)
        cls = jnp.broadcast_to(self.cls_token.astype(tokens.dtype), (tokens.shape[0], 1, tokens.shape[-1]))
        tokens = jnp.concatenate([cls, tokens], axis=1)
        for block in self.blocks:
            tokens = block(tokens)
        return tokens

"""The hybrid convolution + transformer encoder of InfMAE."""

import flax.linen as nn
import jax
import numpy as np

from infmae_jax.models import blocks, patches, transformer
from infmae_jax.models.config import EncoderConfig


class HybridEncoder(nn.Module):
    """Two convolution stages (strides 4 and 8), then a transformer on 16 x 16 patches (InfMAE, section 3).

    Pretraining (`__call__`) sees the visible patches alone: everything in the convolution stages stays inside a patch
    except the depthwise convolutions, and those read masked positions as zero, so computing only visible patches
    changes neither outputs nor gradients. `features` has no masks.
    """

    config: EncoderConfig

    def setup(self):
        c = self.config
        block = nn.remat(blocks.ConvBlock) if c.remat else blocks.ConvBlock
        transformer_block = nn.remat(transformer.TransformerBlock) if c.remat else transformer.TransformerBlock
        width1, width2, width3 = c.widths
        drops = iter(np.linspace(0.0, c.drop_path, sum(c.depths)).tolist())
        self.patch_embed1 = blocks.PatchEmbed(width1, 4, c.in_channels, c.dtype)
        self.patch_embed2 = blocks.PatchEmbed(width2, 2, width1, c.dtype)
        self.patch_embed3 = blocks.PatchEmbed(width3, 2, width2, c.dtype, blocks.flattened_xavier_uniform)
        self.patch_embed4 = blocks.linear(width3, width3, c.dtype)
        self.blocks1 = [block(width1, c.mlp_ratio, c.dtype, c.depthwise, next(drops)) for _ in range(c.depths[0])]
        self.blocks2 = [block(width2, c.mlp_ratio, c.dtype, c.depthwise, next(drops)) for _ in range(c.depths[1])]
        self.blocks3 = [transformer_block(c.heads, c.mlp_ratio, c.dtype, c.attention, rate) for rate in drops]
        if c.fuse_stages:
            self.stage1_output_decode = blocks.NonOverlappingConv(width3, 4, width1, c.dtype)
            self.stage2_output_decode = blocks.NonOverlappingConv(width3, 2, width2, c.dtype)
        self.norm = blocks.layer_norm(c.dtype, blocks.TOKEN_EPS)

    def __call__(self, images: jax.Array, ids_keep: jax.Array) -> jax.Array:
        """Latent of the visible tokens.

        Args:
          images: (B,H,W,C) float32, normalised, sides divisible by 16; one channel stands for C equal ones.
          ids_keep: (B,K) int32, the visible tokens.

        Returns:
          (B,K,D) in the compute dtype, after the final norm, in the order of `ids_keep`.
        """
        grid = patches.check_images(images, self.config.in_channels)
        layout = blocks.Layout(grid, ids_keep, packed=self.config.visible_only)
        cells = layout.gather(images)
        return self.norm(self._stages(cells, layout, self.config.fuse_stages)[2])

    def features(self, images: jax.Array, fuse_stages: bool = False) -> dict[str, jax.Array]:
        """Feature maps of whole images.

        Args:
          images: (B,H,W,C) float32, normalised, sides divisible by 16; one channel stands for C equal ones.
          fuse_stages: add the embedded stages 1 and 2 to the tokens, as pretraining does. The published transfer path
            leaves them out.

        Returns:
          stage1 (B,H/4,W/4,C1), stage2 (B,H/8,W/8,C2), stage3 (B,h,w,D) before the final norm, and pooled (B,D): the
          mean over tokens after the final norm.
        """
        grid = patches.check_images(images, self.config.in_channels)
        stage1, stage2, tokens = self._stages(images, blocks.Layout(grid), fuse_stages)
        stage3 = tokens.reshape(tokens.shape[0], *grid, tokens.shape[-1])
        return {"stage1": stage1, "stage2": stage2, "stage3": stage3, "pooled": self.norm(tokens).mean(axis=1)}

    def _stages(
        self, cells: jax.Array, layout: blocks.Layout, fuse_stages: bool
    ) -> tuple[jax.Array, jax.Array, jax.Array]:
        """Pixels in `layout` -> cells of stages 1 and 2, and tokens before the final norm."""
        stage1 = self.patch_embed1(cells)
        for block in self.blocks1:
            stage1 = block(stage1, layout)
        stage2 = self.patch_embed2(stage1)
        for block in self.blocks2:
            stage2 = block(stage2, layout)
        tokens = layout.tokens(self.patch_embed4(self.patch_embed3(stage2)))
        tokens = tokens + layout.positions(self.config, tokens.dtype)
        for block in self.blocks3:
            tokens = block(tokens)
        if fuse_stages:
            tokens = tokens + layout.tokens(self.stage1_output_decode(stage1))
            tokens = tokens + layout.tokens(self.stage2_output_decode(stage2))
        return stage1, stage2, tokens

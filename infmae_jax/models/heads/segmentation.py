"""Semantic segmentation: UperNet (arXiv 1807.10221) and FCN heads, and the encoder with heads on it.

Parts, widths and initialisation follow mmsegmentation's UPerHead and FCNHead, with which MCMAE (arXiv 2205.03892) was
measured, except for the norm: LayerNorm or GroupNorm, which need no statistics of a whole batch. All randomness is
spatial dropout (whole channels), active only where a random stream "dropout" is given.
"""

import functools
from collections.abc import Sequence

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from infmae_jax.models import blocks
from infmae_jax.models.config import EncoderConfig, SegmentationHeadConfig
from infmae_jax.models.heads.layers import ConvModule, Output, conv, norm
from infmae_jax.models.infmae import ENCODER_MODULES


def adaptive_pool_matrix(size: int, bins: int) -> np.ndarray:
    """(bins, size) float32 weights of adaptive average pooling: bin i is the mean over the cells from
    floor(i * size / bins) to ceil((i + 1) * size / bins). Bins overlap where `bins` does not divide `size`."""
    matrix = np.zeros((bins, size), np.float32)
    for i, row in enumerate(matrix):
        first, end = i * size // bins, -(-(i + 1) * size // bins)
        row[first:end] = 1 / (end - first)
    return matrix


def bilinear_matrix(size: int, out: int) -> np.ndarray:
    """(out, size) float32 weights of linear interpolation: half-pixel centres, edge values repeated outside, no
    smoothing before shrinking."""
    centre = np.clip((np.arange(out) + 0.5) * size / out - 0.5, 0, size - 1)
    return np.maximum(0, 1 - abs(centre[:, None] - np.arange(size)[None])).astype(np.float32)


def resize(x: jax.Array, size: tuple[int, int]) -> jax.Array:
    """(B,H,W,C) -> (B,*size,C), bilinear as `bilinear_matrix` says, computed at least in float32."""
    if x.shape[1:3] == tuple(size):
        return x
    return _weighted(x, *(bilinear_matrix(*sides) for sides in zip(x.shape[1:3], size, strict=True)))


def _weighted(x: jax.Array, rows: np.ndarray, columns: np.ndarray) -> jax.Array:
    """(B,H,W,C), (h,H), (w,W) -> (B,h,w,C): weighted sums over rows and columns."""
    wide = x.astype(blocks.float_dtype(x.dtype))
    weights = (jnp.asarray(matrix, wide.dtype) for matrix in (rows, columns))
    return jnp.einsum("bhwc,ih,jw->bijc", wide, *weights, precision="highest").astype(x.dtype)


class Stride32(nn.Module):
    """The coarsest map of MCMAE: 3 x 3 convolution of stride 2 without padding, norm, exact GELU.

    (B,h,w,C) -> (B,(h-1)//2,(w-1)//2,C). A side below 3 is padded with zeros to 3.
    """

    norm: str
    dtype: str

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        missing = [max(3 - side, 0) for side in x.shape[1:3]]
        x = jnp.pad(x, ((0, 0), *((count // 2, -(-count // 2)) for count in missing), (0, 0)))
        x = conv(x.shape[-1], 3, self.dtype, strides=2, padding="VALID")(x)
        return blocks.gelu(norm(self.norm, x.shape[-1], self.dtype)(x))


class UperNet(nn.Module):
    """Pyramid pooling on the coarsest map, then a top-down feature pyramid, all levels joined on the finest one."""

    config: SegmentationHeadConfig
    num_classes: int
    dtype: str

    @nn.compact
    def __call__(self, maps: Sequence[jax.Array]) -> jax.Array:
        """Maps (B,H_i,W_i,C_i) from the finest to the coarsest -> logits (B,H_0,W_0,K), at least float32."""
        c = self.config
        conv = functools.partial(ConvModule, c.channels, norm=c.norm, dtype=self.dtype)
        *fine, coarse = maps
        pooled = []
        for bins in c.pool_scales:
            cells = _weighted(coarse, *(adaptive_pool_matrix(side, bins) for side in coarse.shape[1:3]))
            pooled.append(resize(conv(kernel=1, name=f"pool{bins}")(cells), coarse.shape[1:3]))
        levels = [conv(kernel=1, name=f"lateral{i}")(x) for i, x in enumerate(fine, 1)]
        levels.append(conv(kernel=3, name="bottleneck")(jnp.concatenate([coarse, *pooled], axis=-1)))
        for i in reversed(range(len(fine))):
            levels[i] = levels[i] + resize(levels[i + 1], levels[i].shape[1:3])
        levels[:-1] = [conv(kernel=3, name=f"pyramid{i}")(x) for i, x in enumerate(levels[:-1], 1)]
        whole = jnp.concatenate([resize(x, maps[0].shape[1:3]) for x in levels], axis=-1)
        return Output(self.num_classes, 0.01, c.dropout, name="classifier")(conv(kernel=3, name="fuse")(whole))


class FCN(nn.Module):
    """3 x 3 convolutions on one map (arXiv 1411.4038): `convs` of them, and one more on their output joined with the
    map itself where `join_input` says so."""

    channels: int
    convs: int
    join_input: bool
    config: SegmentationHeadConfig
    num_classes: int
    dtype: str

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """(B,h,w,C) -> logits (B,h,w,K), at least float32."""
        conv = functools.partial(ConvModule, self.channels, 3, self.config.norm, self.dtype)
        out = x
        for i in range(self.convs):
            out = conv(name=f"conv{i + 1}")(out)
        if self.join_input:
            out = conv(name="join")(jnp.concatenate([x, out], axis=-1))
        return Output(self.num_classes, 0.01, self.config.dropout, name="classifier")(out)


class Segmenter(nn.Module):
    """An encoder and its heads: parameters `encoder`, `head` and, where they are used, `stride32` and `auxiliary`.

    Attributes:
      encoder, head: architectures. With `fuse_stages` the encoder's embedded stages 1 and 2 are added to stage 3, as in
        pretraining; MCMAE leaves them out.
      num_classes: K.
    """

    encoder: EncoderConfig
    head: SegmentationHeadConfig
    num_classes: int

    @nn.compact
    def __call__(self, images: jax.Array, auxiliary: bool = True) -> dict[str, jax.Array]:
        """Logits of whole images, at the resolution of the map that the head predicts on.

        Args:
          images: (B,H,W,C) float32, normalised, sides divisible by 16; one channel stands for C equal ones.
          auxiliary: compute the auxiliary head, which only training needs; initialisation needs True.

        Returns:
          logits (B,H/4,W/4,K) of UperNet, (B,H/s,W/s,K) of FCN on the map of stride s; auxiliary (B,H/16,W/16,K) where
          asked for and its weight is not 0. Both float32, or float64 when computing in float64.

        Raises:
          ValueError: the head reads maps that the encoder does not have, or impossible images.
        """
        c, dtype = self.head, self.encoder.dtype
        c.check_encoder(self.encoder)
        encoder = ENCODER_MODULES[self.encoder.kind](self.encoder, name="encoder")
        found = encoder.features(images, self.encoder.fuse_stages)
        maps = {stage: found[f"stage{stage}"] for stage in (1, 2, 3) if f"stage{stage}" in found}
        if c.kind == "upernet" or c.fcn_stage == 4:
            maps[4] = Stride32(c.norm, dtype, name="stride32")(maps[3])
        if c.kind == "upernet":
            out = {"logits": UperNet(c, self.num_classes, dtype, name="head")([maps[stage] for stage in (1, 2, 3, 4)])}
        else:
            head = FCN(c.channels, c.fcn_convs, True, c, self.num_classes, dtype, name="head")
            out = {"logits": head(maps[c.fcn_stage])}
        if auxiliary and c.auxiliary_weight:
            head = FCN(c.auxiliary_channels, 1, False, c, self.num_classes, dtype, name="auxiliary")
            out["auxiliary"] = head(maps[3])
        return out

"""Layers that the heads share: convolution, norm and ReLU; linear layers that end in float32."""

from collections.abc import Callable

import flax.linen as nn
import jax
import jax.numpy as jnp

from infmae_jax.models import blocks

kaiming_normal = nn.initializers.variance_scaling(2.0, "fan_out", "normal")
uniform_fan_in = nn.initializers.variance_scaling(1.0, "fan_in", "uniform")  # detectron2's "c2_xavier_fill"


def norm(kind: str, channels: int, dtype: str) -> nn.Module:
    """LayerNorm, or GroupNorm of at most 32 groups of at least 8 channels: over the 1 x 1 cells of a pooled map,
    groups of one channel would be zero whatever their input."""
    if kind == "layer":
        return blocks.layer_norm(dtype, blocks.CONV_EPS, "norm")
    groups = next(g for g in (32, 16, 8, 4, 2, 1) if channels % g == 0 and (channels >= 8 * g or g == 1))
    return nn.GroupNorm(
        groups, epsilon=blocks.CONV_EPS, dtype=jnp.dtype(dtype), param_dtype=blocks.float_dtype(dtype),
        use_fast_variance=False, name="norm",
    )  # fmt: skip


def conv(channels: int, kernel: int, dtype: str, **options) -> nn.Conv:
    """Convolution without bias, named "conv"; `options` are those of `nn.Conv`."""
    defaults = dict(use_bias=False, kernel_init=kaiming_normal, name="conv")
    return nn.Conv(
        channels, (kernel, kernel), dtype=jnp.dtype(dtype), param_dtype=blocks.float_dtype(dtype),
        **defaults | options,
    )  # fmt: skip


class ConvModule(nn.Module):
    """Convolution without bias, norm and, unless told otherwise, ReLU: (B,H,W,C_in) -> (B,H,W,channels); stride 1,
    zero padding."""

    channels: int
    kernel: int
    norm: str
    dtype: str
    relu: bool = True
    kernel_init: Callable = kaiming_normal

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        x = conv(self.channels, self.kernel, self.dtype, kernel_init=self.kernel_init)(x)
        x = norm(self.norm, self.channels, self.dtype)(x)
        return nn.relu(x) if self.relu else x


class Output(nn.Module):
    """A last linear layer with bias: (...,C) -> (...,features), at least float32; normal initialisation of the given
    spread. Before it, spatial dropout of (B,H,W,C). `bias`: its first values, one for all or one for each feature."""

    features: int
    spread: float
    dropout: float = 0.0
    bias: float | tuple[float, ...] = 0.0

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        wide = blocks.float_dtype(x.dtype)
        if self.dropout:
            x = nn.Dropout(self.dropout, broadcast_dims=(1, 2), deterministic=not self.has_rng("dropout"))(x)
        kernel = self.param("kernel", nn.initializers.normal(self.spread), (x.shape[-1], self.features), wide)
        bias = self.param("bias", lambda _: jnp.broadcast_to(jnp.asarray(self.bias, wide), (self.features,)))
        found = jnp.einsum("...c,ck->...k", x, kernel.astype(x.dtype), preferred_element_type=wide)
        return found + bias.reshape((1,) * (x.ndim - 1) + (-1,))

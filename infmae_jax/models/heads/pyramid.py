"""Feature pyramid (arXiv 1612.03144) on the three stages of the hybrid encoder."""

import functools
from collections.abc import Sequence

import flax.linen as nn
import jax
import jax.numpy as jnp

from infmae_jax.models.heads.layers import ConvModule, uniform_fan_in


class FeaturePyramid(nn.Module):
    """Levels P2 to P6 (strides 4 to 64) of equal width.

    As in MCMAE's detector the stages of strides 4, 8 and 16 enter as they are, stride 32 is a 2 x 2 max-pool of stage
    3, and P6 is every other cell of P5. Laterals 1 x 1, outputs 3 x 3, each with a norm and without activation.
    """

    channels: int
    norm: str
    dtype: str

    @nn.compact
    def __call__(self, stages: Sequence[jax.Array]) -> list[jax.Array]:
        """Stages 1, 2, 3 (B,H/4,W/4,C1), (B,H/8,W/8,C2), (B,H/16,W/16,C3) -> five maps (B,H_i,W_i,channels), the
        sides halved and rounded up from each to the next."""
        layer = functools.partial(
            ConvModule, self.channels, norm=self.norm, dtype=self.dtype, relu=False, kernel_init=uniform_fan_in
        )
        stages = [*stages, nn.max_pool(stages[-1], (2, 2), (2, 2), "SAME")]
        levels = [layer(kernel=1, name=f"lateral{i}")(x) for i, x in enumerate(stages, 2)]
        for i in reversed(range(len(levels) - 1)):
            levels[i] = levels[i] + _doubled(levels[i + 1], levels[i].shape[1:3])
        levels = [layer(kernel=3, name=f"output{i}")(x) for i, x in enumerate(levels, 2)]
        return [*levels, levels[-1][:, ::2, ::2]]


def _doubled(x: jax.Array, size: tuple[int, int]) -> jax.Array:
    """(B,h,w,C) -> (B,*size,C): every cell twice in both directions, what is too much cut off."""
    return jnp.repeat(jnp.repeat(x, 2, axis=1), 2, axis=2)[:, : size[0], : size[1]]

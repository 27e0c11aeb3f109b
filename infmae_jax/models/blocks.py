"""Building blocks: non-overlapping patch embedding, masked convolution block, MLP. Transformer blocks: `transformer`.

Layers that stay inside a patch act on arrays of any leading shape (..., rows, columns, C), so one set of modules
serves the dense map (B, h*r, w*r, C) and the packed visible patches (B, K, r, r, C). Only the depthwise convolution
looks across patches; `Layout` tells it how.
"""

import functools
import math

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp
from jax.experimental.xla_metadata import set_xla_metadata

from infmae_jax.models import depthwise, patches
from infmae_jax.models.config import EncoderConfig

CONV_EPS = 1e-5  # LayerNorm in patch embeddings and convolution blocks
TOKEN_EPS = 1e-6  # LayerNorm in transformer blocks and final norms

xavier_uniform = nn.initializers.xavier_uniform()


def fan_in_uniform(fan_in: int) -> nn.initializers.Initializer:
    """Uniform in +-1/sqrt(fan_in): the published initialisation of convolution kernels and their biases."""
    bound = fan_in**-0.5

    def init(key, shape, dtype=jnp.float32):
        return jax.random.uniform(key, shape, dtype, -bound, bound)

    return init


def flattened_xavier_uniform(key, shape, dtype=jnp.float32):
    """Xavier-uniform over a convolution kernel (p, p, C_in, C_out) seen as a (p*p*C_in, C_out) matrix."""
    return xavier_uniform(key, (shape[0] * shape[1] * shape[2], shape[3]), dtype).reshape(shape)


def float_dtype(dtype: str) -> jnp.dtype:
    """Dtype of parameters, norms and softmax for a compute dtype: float32, or float64 when computing in float64."""
    return jnp.promote_types(jnp.dtype(dtype), jnp.float32)


def layer_norm(dtype: str, epsilon: float, name: str | None = None) -> nn.LayerNorm:
    """LayerNorm whose statistics are at least float32 and whose output has the compute dtype.

    Of bfloat16 values the variance comes from the sums of x and x^2, which takes one pass less: what float32 loses in
    their difference is less than what the values themselves were rounded by.
    """
    return nn.LayerNorm(
        epsilon=epsilon,
        dtype=jnp.dtype(dtype),
        param_dtype=float_dtype(dtype),
        use_fast_variance=jnp.dtype(dtype) == jnp.bfloat16,
        name=name,
    )


@jax.custom_vjp
def gelu(x: jax.Array) -> jax.Array:
    """Exact GELU, x * Phi(x), computed at least in float32.

    Written out because `jax.nn.gelu` takes erfc, which costs twice what erf does, and keeps several arrays of the size
    of x for the backward pass in place of x alone.
    """
    wide = x.astype(float_dtype(x.dtype))
    return (wide * _normal_cdf(wide)).astype(x.dtype)


def _gelu_backward(x, grad):
    wide = x.astype(float_dtype(x.dtype))
    density = jnp.exp(-0.5 * wide * wide) * (2 * math.pi) ** -0.5
    return (((_normal_cdf(wide) + wide * density) * grad).astype(x.dtype),)


gelu.defvjp(lambda x: (gelu(x), x), _gelu_backward)


def _normal_cdf(x: jax.Array) -> jax.Array:
    return 0.5 * (1.0 + jax.lax.erf(x * 0.5**0.5))


@jax.custom_vjp
def residual(x: jax.Array) -> jax.Array:
    """x, where it enters a block: its gradient is summed up once and kept.

    XLA's CPU backend would fuse that sum into each of its uses, and so compute the sums of all later blocks again in
    every block: a ninth of the training step of Base.
    """
    return x


def _residual_backward(_, grad):
    return (jax.lax.platform_dependent(grad, cpu=_unfused, default=lambda x: x),)


residual.defvjp(lambda x: (x, None), _residual_backward)


def _unfused(x: jax.Array) -> jax.Array:
    """x, through a call that XLA does not inline; it expands optimization barriers before it fuses."""
    with set_xla_metadata(inlineable="false"):
        return _identity(x)


@jax.jit
def _identity(x: jax.Array) -> jax.Array:
    return x


@flax.struct.dataclass
class Layout:
    """Which patches the arrays of the convolution stages hold, and what their neighbours are.

    Attributes:
      grid: token rows and columns (h, w).
      ids_keep: (B,K) int32 visible tokens, or None: every patch is visible.
      packed: arrays hold the K visible patches only, (B,K,r,r,C), not the whole map (B,h*r,w*r,C).
    """

    grid: tuple[int, int] = flax.struct.field(pytree_node=False)
    ids_keep: jax.Array | None = None
    packed: bool = flax.struct.field(pytree_node=False, default=False)

    def shown(self, cells: jax.Array) -> jax.Array:
        """What the depthwise convolution reads: packed cells, or a whole map (B,h*r,w*r,C), zero at masked patches."""
        if self.packed or self.ids_keep is None:
            return cells
        batch, n = cells.shape[0], self.grid[0] * self.grid[1]
        r = cells.shape[1] // self.grid[0]
        visible = (1.0 - patches.token_mask(self.ids_keep, n)).astype(cells.dtype)
        visible = jnp.broadcast_to(visible[:, :, None, None, None], (batch, n, r, r, 1))
        return cells * patches.tokens_to_grid(visible, self.grid)

    def gather(self, cells: jax.Array) -> jax.Array:
        """Back from the whole map to the layout's own shape."""
        if not self.packed:
            return cells
        return patches.take_tokens(patches.grid_to_tokens(cells, self.grid), self.ids_keep)

    def positions(self, config: EncoderConfig, dtype: jnp.dtype) -> jax.Array:
        """Position embeddings of the encoder's tokens: (B,K,D), or (1,N,D) where all are visible."""
        source = config.position_grid if config.position == "interpolate" else None
        table = jnp.asarray(patches.position_embedding(self.grid, config.widths[-1], source), dtype)
        return table[None] if self.ids_keep is None else table[self.ids_keep]

    def tokens(self, cells: jax.Array) -> jax.Array:
        """One cell a patch, (B,K,1,1,D) or (B,h,w,D), to tokens: (B,K,D), or (B,N,D) where all are visible."""
        tokens = cells.reshape(cells.shape[0], -1, cells.shape[-1])
        return tokens if self.packed or self.ids_keep is None else patches.take_tokens(tokens, self.ids_keep)


def drop_path(module: nn.Module, branch: jax.Array, rate: float) -> jax.Array:
    """Stochastic depth (arXiv 1603.09382): `branch` of a residual block, zero in a share `rate` of the samples (axis 0)
    and 1 / (1 - rate) times itself in the others, if the random stream "drop_path" is given; else `branch`."""
    if not rate or not module.has_rng("drop_path"):
        return branch
    kept = jax.random.bernoulli(module.make_rng("drop_path"), 1 - rate, (len(branch), *(1,) * (branch.ndim - 1)))
    return (branch * (kept / (1 - rate)).astype(float_dtype(branch.dtype))).astype(branch.dtype)


class NonOverlappingConv(nn.Module):
    """Convolution with kernel = stride = `patch`: (..., r*patch, s*patch, C) -> (..., r, s, features).

    Written as a matrix product, because nothing crosses the border of a kernel position. `channels` is C of the kernel;
    x of one channel stands for C equal ones: summing the kernel over them is the same as repeating x.
    """

    features: int
    patch: int
    channels: int
    dtype: str
    kernel_init: nn.initializers.Initializer | None = None

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        *lead, rows, columns, channels = x.shape
        p, fan_in = self.patch, self.patch**2 * self.channels
        param_dtype = float_dtype(self.dtype)
        init = self.kernel_init or fan_in_uniform(fan_in)
        kernel = self.param("kernel", init, (p, p, self.channels, self.features), param_dtype)
        bias = self.param("bias", fan_in_uniform(fan_in), (self.features,), param_dtype)
        if channels < self.channels:
            kernel = kernel.sum(axis=2, keepdims=True)
        x = x.reshape(*lead, rows // p, p, columns // p, p, channels)
        dtype = jnp.dtype(self.dtype)
        return add_bias(patch_product(x.astype(dtype), kernel.astype(dtype)), bias)


def patch_product(x: jax.Array, kernel: jax.Array) -> jax.Array:
    """(..., r, p, s, p, C), (p, p, C, features) -> (..., r, s, features): the sum over the cells of a kernel position.

    On TPUs the contraction as it stands, without the copy that brings the cells together; elsewhere a matrix product.
    """
    return jax.lax.platform_dependent(x, kernel, tpu=_contract, default=_as_matrices)


def _contract(x: jax.Array, kernel: jax.Array) -> jax.Array:
    return jnp.einsum("...yaxbc,abcf->...yxf", x, kernel)


def _as_matrices(x: jax.Array, kernel: jax.Array) -> jax.Array:
    x = jnp.swapaxes(x, -4, -3)
    return x.reshape(*x.shape[:-3], -1) @ kernel.reshape(-1, kernel.shape[-1])


class PatchEmbed(nn.Module):
    """Non-overlapping convolution, LayerNorm, exact GELU."""

    features: int
    patch: int
    channels: int
    dtype: str
    kernel_init: nn.initializers.Initializer | None = None

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        conv = NonOverlappingConv(self.features, self.patch, self.channels, self.dtype, self.kernel_init, name="proj")
        x = conv(x)
        return gelu(layer_norm(self.dtype, CONV_EPS, "norm")(x))


class DepthwiseConv(nn.Module):
    """5 x 5 depthwise convolution with zero padding over the map of a `Layout`; `method`: how, see `depthwise`."""

    dtype: str
    method: str = "auto"

    @nn.compact
    def __call__(self, cells: jax.Array, layout: Layout) -> jax.Array:
        channels, size = cells.shape[-1], depthwise.SIZE
        init, param_dtype = fan_in_uniform(size * size), float_dtype(self.dtype)
        kernel = self.param("kernel", init, (size, size, channels), param_dtype).astype(cells.dtype)
        bias = self.param("bias", init, (channels,), param_dtype)
        ids = layout.ids_keep if layout.packed else None
        return add_bias(depthwise.convolve(layout.shown(cells), kernel, ids, layout.grid, self.method), bias)


def add_bias(x: jax.Array, bias: jax.Array) -> jax.Array:
    return x + bias.astype(x.dtype).reshape((1,) * (x.ndim - 1) + (-1,))


class Mlp(nn.Module):
    """Two linear layers with exact GELU between; `convolutional` takes the initialisation of 1x1 convolutions."""

    hidden: int
    dtype: str
    convolutional: bool = False

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        width = x.shape[-1]
        x = linear(self.hidden, width, self.dtype, self.convolutional, "fc1")(x)
        return linear(width, self.hidden, self.dtype, self.convolutional, "fc2")(gelu(x))


def linear(features: int, fan_in: int, dtype: str, convolutional: bool = False, name: str | None = None) -> nn.Dense:
    """Dense layer initialised as published: Xavier-uniform and zero bias, or as a 1x1 convolution."""
    uniform = fan_in_uniform(fan_in)
    return nn.Dense(
        features,
        dtype=jnp.dtype(dtype),
        param_dtype=float_dtype(dtype),
        kernel_init=uniform if convolutional else xavier_uniform,
        bias_init=uniform if convolutional else nn.initializers.zeros_init(),
        name=name,
    )


class ConvBlock(nn.Module):
    """x + conv1x1(dwconv5x5(m * conv1x1(LN(x)))), then x + MLP(LN(x)); m is the visibility of the layout.

    `drop_path` is the rate of stochastic depth, on each of the two branches.
    """

    width: int
    mlp_ratio: int
    dtype: str
    depthwise: str
    drop_path: float = 0.0

    @nn.compact
    def __call__(self, x: jax.Array, layout: Layout) -> jax.Array:
        pointwise = functools.partial(linear, self.width, self.width, self.dtype, True)
        x = residual(x)
        y = pointwise("conv1")(layer_norm(self.dtype, CONV_EPS, "norm1")(x))
        y = DepthwiseConv(self.dtype, self.depthwise, name="dwconv")(y, layout)
        x = residual(x + drop_path(self, pointwise("conv2")(y), self.drop_path))
        y = layer_norm(self.dtype, CONV_EPS, "norm2")(x)
        y = Mlp(self.width * self.mlp_ratio, self.dtype, convolutional=True, name="mlp")(y)
        return x + drop_path(self, y, self.drop_path)

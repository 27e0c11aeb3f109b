"""Transformer blocks: attention, in the form that suits each backend, and MLP."""

import functools
import math
from collections.abc import Callable

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.nn import dot_product_attention

from infmae_jax.models import blocks

# Bytes of a device's attention logits above which one head is taken at a time: less than the 128 MiB of fast memory of
# a v5e, whose compiler then expects a half to a third of the cycles, and where it pays on CPUs (bench/README.md).
_MOST_LOGITS = 100 * 2**20

Weights = tuple[jax.Array, jax.Array]  # kernel and bias of a linear layer


def _has_fused_attention(dtype: str, head_width: int) -> bool:
    """Whether this machine's GPUs, of Ampere or later, have cuDNN's attention for such heads."""
    if dtype != "bfloat16" or head_width % 8 or head_width > 128 or jax.default_backend() != "gpu":
        return False
    capability = str(getattr(jax.devices()[0], "compute_capability", ""))  # "9.0"; AMD's is no number
    return capability.split(".")[0].isdigit() and int(capability.split(".")[0]) >= 8


class _Linear(nn.Module):
    """Kernel and bias of a linear layer as `blocks.linear` declares them, for whoever multiplies by them."""

    features: int
    dtype: str

    @nn.compact
    def __call__(self, fan_in: int) -> Weights:
        param_dtype = blocks.float_dtype(self.dtype)
        kernel = self.param("kernel", blocks.xavier_uniform, (fan_in, self.features), param_dtype)
        bias = self.param("bias", nn.initializers.zeros_init(), (self.features,), param_dtype)
        return kernel.astype(self.dtype), bias.astype(self.dtype)


class Attention(nn.Module):
    """Multi-head self-attention with qkv bias; logits and softmax at least in float32.

    `method`: how, the values do not depend on it:

    xla    written out, tokens before heads.
    heads  heads before all else, so that products make and take q, k and v in the layout that TPUs multiply in; one
           head at a time where the logits of all do not fit fast memory, computed again in the backward pass.
    cudnn  the fused kernel of NVIDIA GPUs, in bfloat16; elsewhere as "auto". It trains on even numbers of tokens only;
           odd ones (the 49 visible of 196) go to "xla".
    auto   "heads" on TPUs, and on CPUs where that takes one at a time; "cudnn" on GPUs that have it; else "xla".
    """

    heads: int
    dtype: str
    method: str = "auto"

    @nn.compact
    def __call__(self, x: jax.Array, first: int = 0) -> jax.Array:
        """(B,N,D) -> (B,N-first,D): what the tokens from `first` on read from all tokens."""
        n, width = x.shape[1:]
        x = x.astype(self.dtype)
        weights = _Linear(3 * width, self.dtype, name="qkv")(width), _Linear(width, self.dtype, name="proj")(width)
        on_gpu = _cudnn if n % 2 == 0 else _written_out
        forms: dict[str, Callable] = {
            "xla": functools.partial(_tokens_first, _written_out, self.heads, first),
            "heads": functools.partial(_heads_first, self.heads, first),
            "cudnn": functools.partial(_tokens_first, on_gpu, self.heads, first),
        }
        fused = _has_fused_attention(self.dtype, width // self.heads)
        if self.method != "auto" and (self.method != "cudnn" or fused):
            return forms[self.method](x, *weights)
        best = {"tpu": forms["heads"], "default": forms["xla"]}
        if _one_at_a_time(x, self.heads, first):
            best["cpu"] = forms["heads"]
        if fused:
            best["cuda"] = forms["cudnn"]
        return jax.lax.platform_dependent(x, *weights, **best)


def _tokens_first(attend: Callable, heads: int, first: int, x: jax.Array, qkv: Weights, proj: Weights) -> jax.Array:
    """`attend`: (B,N,heads,D/heads) q, k and v, first -> (B,N-first,heads,D/heads)."""
    batch, n, width = x.shape
    parts = jnp.split(_product(x, qkv), 3, axis=-1)
    out = attend(*(part.reshape(batch, n, heads, width // heads) for part in parts), first)
    return _product(out.reshape(batch, n - first, width), proj)


def _product(x: jax.Array, weights: Weights) -> jax.Array:
    return blocks.add_bias(jnp.dot(x, weights[0]), weights[1])


def _cudnn(q: jax.Array, k: jax.Array, v: jax.Array, first: int) -> jax.Array:
    return dot_product_attention(q, k, v, implementation="cudnn")[:, first:]


def _written_out(q: jax.Array, k: jax.Array, v: jax.Array, first: int) -> jax.Array:
    weights = _shares("bqhd,bkhd->bhqk", q[:, first:], k)
    # Heads first, then moved: XLA writes products with the heads in the middle three times slower on a CPU.
    return jnp.swapaxes(jnp.einsum("bhqk,bkhd->bhqd", weights, v), 1, 2)


def _heads_first(heads: int, first: int, x: jax.Array, qkv: Weights, proj: Weights) -> jax.Array:
    width = x.shape[-1]
    kernels, biases = qkv[0].reshape(width, 3, heads, -1), qkv[1].reshape(3, heads, 1, 1, -1)
    q, k, v = (
        jnp.einsum("bnc,chd->hbnd", tokens, kernels[:, part]) + biases[part]  # (heads, B, N, D/heads)
        for part, tokens in enumerate((x[:, first:], x, x))
    )
    if _one_at_a_time(x, heads, first):
        out = jax.lax.map(lambda one: jax.checkpoint(_one_head)(*one), (q, k, v))
    else:
        out = jax.vmap(_one_head)(q, k, v)
    return blocks.add_bias(jnp.einsum("hbnd,hdc->bnc", out, proj[0].reshape(heads, -1, width)), proj[1])


def _one_head(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
    """(B,N-first,D/heads), (B,N,D/heads) twice -> as the first."""
    weights = _shares("bqd,bkd->bqk", q, k)
    return jnp.einsum("bqk,bkd->bqd", weights, v)


def _shares(product: str, q: jax.Array, k: jax.Array) -> jax.Array:
    """How much each query takes of each key: softmax, in the dtype of q."""
    logits = jnp.einsum(product, q, k, preferred_element_type=blocks.float_dtype(q.dtype))
    return jax.nn.softmax(logits * q.shape[-1] ** -0.5, axis=-1).astype(q.dtype)


def _one_at_a_time(x: jax.Array, heads: int, first: int) -> bool:
    """Whether the logits of all heads are too many for a device. Where a program is traced for a mesh, batches are cut
    over all its axes but `tensor`; one that is exported for any batch is judged by one image."""
    mesh = jax.sharding.get_abstract_mesh()
    parts = math.prod(size for name, size in mesh.shape.items() if name != "tensor")
    batch, n = x.shape[:2]
    images = batch / parts if isinstance(batch, int) else 1
    return heads * images * (n - first) * n * blocks.float_dtype(x.dtype).itemsize > _MOST_LOGITS


class TransformerBlock(nn.Module):
    """Pre-norm transformer block; `drop_path` is its rate of stochastic depth, on each of its two branches."""

    heads: int
    mlp_ratio: int
    dtype: str
    attention: str = "auto"
    drop_path: float = 0.0

    @nn.compact
    def __call__(self, x: jax.Array, first: int = 0) -> jax.Array:
        """(B,N,D) -> (B,N-first,D): the tokens from `first` on, which attend to all."""
        x = blocks.residual(x)
        y = blocks.layer_norm(self.dtype, blocks.TOKEN_EPS, "norm1")(x)
        attention = Attention(self.heads, self.dtype, self.attention, name="attn")
        x = blocks.residual(x[:, first:] + blocks.drop_path(self, attention(y, first), self.drop_path))
        y = blocks.layer_norm(self.dtype, blocks.TOKEN_EPS, "norm2")(x)
        y = blocks.Mlp(x.shape[-1] * self.mlp_ratio, self.dtype, name="mlp")(y)
        return x + blocks.drop_path(self, y, self.drop_path)

"""The step's small kernels, each written in several ways, forward and backward: which one should be the default here.

A Pallas kernel of the depthwise convolution is not among them: it could only pay on a GPU or TPU, where it could not be
measured.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from infmae_jax.bench import timing
from infmae_jax.bench.results import NEEDS_ACCELERATOR, Row, report
from infmae_jax.bench.step import settings_of, visible_tokens
from infmae_jax.models import blocks, patches
from infmae_jax.tasks.pretrain import PretrainConfig

Kernel = Callable[..., jax.Array]
_TOLERANCE = {"float32": 1e-3, "bfloat16": 1e-1}  # of gradients that sum over a batch, relative to their largest value


def kernels(config: PretrainConfig, batch: int, rounds: int) -> dict[str, Any]:
    """Milliseconds of forward and backward, and how many times faster than the first way of each group.

    Raises:
      ArithmeticError: two ways do not compute the same.
    """
    grid, keep = patches.token_grid(*config.data.image_size), visible_tokens(config)
    rng = np.random.default_rng(0)
    ids = jnp.asarray(np.stack([rng.permutation(grid[0] * grid[1])[:keep] for _ in range(batch)]), jnp.int32)
    groups = _depthwise(config, ids, grid, rng) | _tokens(config, ids, grid, rng) | _attention(config, batch, rng)
    rows: list[Row] = []
    for group, (ways, arrays) in groups.items():
        measured = {way: kernel for way, kernel in ways.items() if kernel is not None}
        calls = {way: _ForwardBackward(kernel, arrays) for way, kernel in measured.items()}
        _check_same(group, calls, config.model.encoder.dtype)
        seconds = timing.take_turns(calls, rounds, slice_seconds=0.1)
        first = seconds[next(iter(calls))]
        for way in ways:
            if way in calls:
                low, median, high = timing.spread(seconds[way] * 1e3)
                faster = timing.ratio(first, seconds[way])
                rows.append({"kernel": group, "way": way, "ms": median, "low": low, "high": high, "faster_by": faster})
            else:
                rows.append({"kernel": group, "way": way, "note": NEEDS_ACCELERATOR})
    settings = settings_of(config) | {"batch": batch, "visible_tokens": keep, "rounds": rounds}
    return report("kernels", settings, rows)


def _depthwise(config: PretrainConfig, ids: jax.Array, grid: tuple[int, int], rng: np.random.Generator) -> dict:
    groups = {}
    for stage, side in ((1, 4), (2, 2)):
        width = config.model.encoder.widths[stage - 1]
        weights = {"kernel": rng.normal(size=(5, 5, width)), "bias": rng.normal(size=width)}
        weights = {name: jnp.asarray(value, jnp.float32) for name, value in weights.items()}
        for what, layout, shape in (
            ("visible", blocks.Layout(grid, ids, packed=True), (*ids.shape, side, side, width)),
            ("whole map", blocks.Layout(grid), (len(ids), grid[0] * side, grid[1] * side, width)),
        ):

            def way(method: str, layout=layout) -> Kernel:
                module = blocks.DepthwiseConv(config.model.encoder.dtype, method)
                return lambda cells, weights: module.apply({"params": weights}, cells, layout)

            cells = jnp.asarray(rng.normal(size=shape), config.model.encoder.dtype)
            ways = {"grouped convolution": way("conv"), "shifted multiply-adds": way("shift")}
            groups[f"depthwise 5x5, stage {stage}, {what}"] = (ways, (cells, weights))
    return groups


def _tokens(config: PretrainConfig, ids: jax.Array, grid: tuple[int, int], rng: np.random.Generator) -> dict:
    """Between the visible tokens and all of them, at the decoder's width."""
    n, width, dtype = grid[0] * grid[1], config.model.decoder.width, config.model.encoder.dtype
    visible = jnp.asarray(rng.normal(size=(*ids.shape, width)), dtype)
    everything = jnp.asarray(rng.normal(size=(len(ids), n, width)), dtype)

    def place_by_product(tokens: jax.Array, background: jax.Array) -> jax.Array:
        chosen = jax.nn.one_hot(ids, n, dtype=tokens.dtype)
        placed = jnp.einsum("bkn,bkd->bnd", chosen, tokens)
        return placed + (1 - chosen.sum(axis=1))[..., None] * background

    return {
        f"place {ids.shape[1]} of {n} tokens": (
            {
                "scatter": lambda tokens, background: patches.place_tokens(tokens, ids, background),
                "one-hot matrix product": place_by_product,
            },
            (visible, everything),
        ),
        f"take {ids.shape[1]} of {n} tokens": (
            {
                "gather": lambda tokens: patches.take_tokens(tokens, ids),
                "one-hot matrix product": lambda tokens: jnp.einsum(
                    "bkn,bnd->bkd", jax.nn.one_hot(ids, n, dtype=tokens.dtype), tokens
                ),
            },
            (everything,),
        ),
    }


def _attention(config: PretrainConfig, batch: int, rng: np.random.Generator) -> dict:
    """softmax(QK^T)V of encoder and decoder."""
    h, w = patches.token_grid(*config.data.image_size)
    model, keep = config.model, visible_tokens(config)

    def library(implementation: str) -> Kernel:
        return lambda q, k, v: jax.nn.dot_product_attention(q, k, v, implementation=implementation)

    def written_out(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
        logits = jnp.einsum("bqhd,bkhd->bhqk", q, k, preferred_element_type=jnp.float32)
        weights = jax.nn.softmax(logits * q.shape[-1] ** -0.5, axis=-1).astype(q.dtype)
        return jnp.einsum("bhqk,bkhd->bqhd", weights, v)

    groups = {}
    encoder, decoder = model.encoder, model.decoder
    for n, heads, width in ((keep, encoder.heads, encoder.widths[-1]), (h * w, decoder.heads, decoder.width)):
        shape = (batch, n, heads, width // heads)
        arrays = tuple(jnp.asarray(rng.normal(size=shape), encoder.dtype) for _ in range(3))
        # cuDNN takes half precision only, and for training no odd number of tokens.
        ways: dict[str, Kernel | None] = {"written out": written_out, "jax.nn, XLA": library("xla")}
        if model.encoder.dtype == "bfloat16" and n % 2 == 0:
            ways["jax.nn, cuDNN"] = library("cudnn") if jax.default_backend() == "gpu" else None
        groups[f"attention, {n} tokens, {heads} heads of {width // heads}"] = (ways, arrays)
    return groups


class _ForwardBackward:
    """Forward and backward of a kernel for a fixed gradient of its output."""

    def __init__(self, kernel: Kernel, arrays: tuple[Any, ...]):
        shape = jax.eval_shape(kernel, *arrays)
        gradient = jnp.asarray(np.random.default_rng(1).normal(size=shape.shape), shape.dtype)

        @jax.jit
        def both(gradient, *arrays):
            value, backward = jax.vjp(kernel, *arrays)
            return value, backward(gradient)

        self._work = lambda: both(gradient, *arrays)

    def __call__(self, times: int) -> Any:
        for _ in range(times):
            out = self._work()
        return jax.block_until_ready(out)


def _check_same(group: str, calls: dict[str, timing.Call], dtype: str) -> None:
    results = {way: jax.tree.leaves(call(1)) for way, call in calls.items()}
    first = next(iter(results.values()))
    for way, result in results.items():
        for ours, theirs in zip(first, result, strict=True):
            ours, theirs = np.asarray(ours, np.float64), np.asarray(theirs, np.float64)
            if np.abs(ours - theirs).max() > _TOLERANCE[dtype] * max(np.abs(ours).max(), 1e-6):
                raise ArithmeticError(f"{group}: {way} computes something else")

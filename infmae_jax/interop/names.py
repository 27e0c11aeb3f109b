"""One table: where each parameter of this project stands in a published checkpoint, and in which layout.

Import and export both walk it. Our arrays are channels-last and map inputs to outputs, (in, out); published ones put
the output first, (out, in).
"""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from infmae_jax.models.config import DecoderConfig, EncoderConfig, InfMAEConfig


@dataclass(frozen=True)
class Layout:
    """How a published array lays out one of ours.

    Attributes:
      axes: for each published axis the axis of ours that it holds, or None for an axis of length one; () for arrays
        that are the same in both.
    """

    axes: tuple[int | None, ...] = ()

    def publish(self, array: np.ndarray) -> np.ndarray:
        """Our array in the published layout, contiguous."""
        if not self.axes:
            return np.ascontiguousarray(array).reshape(array.shape)
        order = [axis for axis in self.axes if axis is not None]
        return np.ascontiguousarray(array.transpose(order)).reshape(self.shape(array.shape))

    def adopt(self, array: np.ndarray) -> np.ndarray:
        """A published array in our layout, contiguous."""
        if not self.axes:
            return np.ascontiguousarray(array).reshape(array.shape)
        order = [axis for axis in self.axes if axis is not None]
        kept = [extent for extent, axis in zip(array.shape, self.axes, strict=True) if axis is not None]
        return np.ascontiguousarray(array.reshape(kept).transpose(np.argsort(order)))

    def shape(self, ours: tuple[int, ...]) -> tuple[int, ...]:
        """Published shape of an array that has the shape `ours` here."""
        return tuple(1 if axis is None else ours[axis] for axis in self.axes) if self.axes else tuple(ours)


SAME = Layout()
LINEAR = Layout((1, 0))  # ours (in, out)
CONV = Layout((3, 2, 0, 1))  # ours (rows, columns, in, out)
POINTWISE = Layout((1, 0, None, None))  # ours (in, out), published as a 1 x 1 convolution
DEPTHWISE = Layout((2, None, 0, 1))  # ours (rows, columns, C)


@dataclass(frozen=True)
class Entry:
    """One parameter: its path in our tree, its published name and layout."""

    path: tuple[str, ...]
    name: str
    layout: Layout


def table(config: InfMAEConfig) -> list[Entry]:
    """An entry for every parameter of the model that `config` describes, in the order of the forward pass."""
    encoder = _hybrid(config.encoder) if config.encoder.kind == "hybrid" else _vit(config.encoder)
    return [*encoder, *_decoder(config.decoder)]


def _hybrid(config: EncoderConfig) -> Iterator[Entry]:
    for stage in (1, 2, 3):
        yield from _layer(f"encoder/patch_embed{stage}/proj", f"patch_embed{stage}.proj", CONV)
        yield from _norm(f"encoder/patch_embed{stage}/norm", f"patch_embed{stage}.norm")
    yield from _layer("encoder/patch_embed4", "patch_embed4", LINEAR)
    for stage, depth in zip((1, 2), config.depths[:2], strict=True):
        for index in range(depth):
            yield from _conv_block(f"encoder/blocks{stage}_{index}", f"blocks{stage}.{index}")
    for index in range(config.depths[2]):
        yield from _transformer_block(f"encoder/blocks3_{index}", f"blocks3.{index}")
    if config.fuse_stages:
        for stage in (1, 2):
            yield from _layer(f"encoder/stage{stage}_output_decode", f"stage{stage}_output_decode", CONV)
    yield from _norm("encoder/norm", "norm")


def _vit(config: EncoderConfig) -> Iterator[Entry]:
    yield from _layer("encoder/patch_embed", "patch_embed.proj", CONV)
    yield Entry(("encoder", "cls_token"), "cls_token", SAME)
    for index in range(config.depths[-1]):
        yield from _transformer_block(f"encoder/blocks_{index}", f"blocks.{index}")
    yield from _norm("encoder/norm", "norm")


def _decoder(config: DecoderConfig) -> Iterator[Entry]:
    yield from _layer("decoder/embed", "decoder_embed", LINEAR)
    yield Entry(("decoder", "mask_token"), "mask_token", SAME)
    for index in range(config.depth):
        yield from _transformer_block(f"decoder/blocks_{index}", f"decoder_blocks.{index}")
    yield from _norm("decoder/norm", "decoder_norm")
    yield from _layer("decoder/pred", "decoder_pred", LINEAR)


def _conv_block(ours: str, published: str) -> Iterator[Entry]:
    yield from _norm(f"{ours}/norm1", f"{published}.norm1")
    yield from _layer(f"{ours}/conv1", f"{published}.conv1", POINTWISE)
    yield from _layer(f"{ours}/dwconv", f"{published}.attn", DEPTHWISE)
    yield from _layer(f"{ours}/conv2", f"{published}.conv2", POINTWISE)
    yield from _norm(f"{ours}/norm2", f"{published}.norm2")
    yield from _layer(f"{ours}/mlp/fc1", f"{published}.mlp.fc1", POINTWISE)
    yield from _layer(f"{ours}/mlp/fc2", f"{published}.mlp.fc2", POINTWISE)


def _transformer_block(ours: str, published: str) -> Iterator[Entry]:
    yield from _norm(f"{ours}/norm1", f"{published}.norm1")
    yield from _layer(f"{ours}/attn/qkv", f"{published}.attn.qkv", LINEAR)
    yield from _layer(f"{ours}/attn/proj", f"{published}.attn.proj", LINEAR)
    yield from _norm(f"{ours}/norm2", f"{published}.norm2")
    yield from _layer(f"{ours}/mlp/fc1", f"{published}.mlp.fc1", LINEAR)
    yield from _layer(f"{ours}/mlp/fc2", f"{published}.mlp.fc2", LINEAR)


def _layer(ours: str, published: str, layout: Layout) -> Iterator[Entry]:
    yield Entry((*ours.split("/"), "kernel"), f"{published}.weight", layout)
    yield Entry((*ours.split("/"), "bias"), f"{published}.bias", SAME)


def _norm(ours: str, published: str) -> Iterator[Entry]:
    yield Entry((*ours.split("/"), "scale"), f"{published}.weight", SAME)
    yield Entry((*ours.split("/"), "bias"), f"{published}.bias", SAME)

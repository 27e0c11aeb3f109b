"""One table: where each parameter of this project stands in a published checkpoint, and in which layout.

Import and export both walk it. Our arrays are channels-last and map inputs to outputs, (in, out); published ones put
the output first, (out, in).
"""

import re
from dataclasses import dataclass

import numpy as np
from flax import traverse_util

from infmae_jax.models.config import InfMAEConfig
from infmae_jax.models.infmae import abstract_params


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
        order = [axis for axis in self.axes or range(array.ndim) if axis is not None]
        return np.ascontiguousarray(array.transpose(order)).reshape(self.shape(array.shape))

    def adopt(self, array: np.ndarray) -> np.ndarray:
        """A published array in our layout, contiguous."""
        axes = self.axes or range(array.ndim)
        order = [axis for axis in axes if axis is not None]
        kept = [extent for extent, axis in zip(array.shape, axes, strict=True) if axis is not None]
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
    """One parameter: its path in our tree, its published name and layout, and its published shape."""

    path: tuple[str, ...]
    name: str
    layout: Layout
    shape: tuple[int, ...]


# From our path, joined by dots and without `encoder.`, to the published name.
_RENAMES = (
    (r"^patch_embed\.(?=kernel|bias)", "patch_embed.proj."),  # of the ViT
    (r"^decoder\.(?!mask_token)", "decoder_"),
    (r"^decoder\.", ""),
    (r"(blocks\d?)_(\d+)", r"\1.\2"),
    (r"\.dwconv\.", ".attn."),
    (r"(kernel|scale)$", "weight"),
)


def table(config: InfMAEConfig) -> list[Entry]:
    """An entry for every parameter of the model that `config` describes."""
    entries = []
    for path, leaf in traverse_util.flatten_dict(abstract_params(config)).items():
        layout = _layout(path, len(leaf.shape))
        entries.append(Entry(path, _published_name(path), layout, layout.shape(leaf.shape)))
    return entries


def _published_name(path: tuple[str, ...]) -> str:
    name = ".".join(path).removeprefix("encoder.")
    for pattern, new in _RENAMES:
        name = re.sub(pattern, new, name)
    return name


def _layout(path: tuple[str, ...], rank: int) -> Layout:
    if path[-1] != "kernel":
        return SAME
    in_convolution_block = re.match(r"blocks[12]_", path[1]) is not None
    return {4: CONV, 3: DEPTHWISE, 2: POINTWISE if in_convolution_block else LINEAR}[rank]

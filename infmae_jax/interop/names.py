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
class Entry:
    """One parameter in both forms.

    Attributes:
      path, ours: its place in our tree, and its shape there.
      name, shape: its published name and shape.
      axes: for each published axis the axis of ours that it holds; published axes of length one that hold none are
        left out.
    """

    path: tuple[str, ...]
    ours: tuple[int, ...]
    name: str
    shape: tuple[int, ...]
    axes: tuple[int, ...]

    def publish(self, array: np.ndarray) -> np.ndarray:
        """Our array in the published layout, contiguous."""
        return np.ascontiguousarray(array.transpose(self.axes)).reshape(self.shape)

    def adopt(self, array: np.ndarray) -> np.ndarray:
        """A published array in our layout, contiguous."""
        kept = [self.ours[axis] for axis in self.axes]
        return np.ascontiguousarray(array.reshape(kept).transpose(np.argsort(self.axes)))


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
        entries.append(Entry(path, leaf.shape, _published_name(path), *_published_layout(path, leaf.shape)))
    return entries


def _published_name(path: tuple[str, ...]) -> str:
    name = ".".join(path).removeprefix("encoder.")
    for pattern, new in _RENAMES:
        name = re.sub(pattern, new, name)
    return name


def _published_layout(path: tuple[str, ...], ours: tuple[int, ...]) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """`Entry.shape` and `Entry.axes`."""
    if path[-1] != "kernel":
        return ours, tuple(range(len(ours)))
    # Convolutions (rows, columns, in, out), depthwise ones (rows, columns, C), linear layers (in, out).
    axes = {4: (3, 2, 0, 1), 3: (2, 0, 1), 2: (1, 0)}[len(ours)]
    shape = tuple(ours[axis] for axis in axes)
    if len(ours) == 3:
        return (shape[0], 1, *shape[1:]), axes
    pointwise = len(ours) == 2 and re.match(r"blocks[12]_", path[1])  # published as a 1 x 1 convolution
    return (*shape, 1, 1) if pointwise else shape, axes

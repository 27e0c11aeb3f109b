"""Where arrays live: the device mesh, the rule table for parameters, and the layout of batches.

Models know nothing of this. XLA would place their intermediate results by the layout of the parameters alone, and then
moves activations where moving weights is cheaper; so the training step says which layout the weights have while the
loss is computed (`gathered`), and the batch decides all the rest.
"""

import math
import re
from collections import Counter
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from data_pipelines.errors import InputError
from infmae_jax.training.config import MeshConfig

AXES = ("data", "fsdp", "tensor")  # from the slowest network to the fastest
BATCH_AXES = ("data", "fsdp")

# Each parameter of our models is matched by exactly one rule (a test holds this); `_largest` serves all others. A rule
# names the dimension that is cut, from the end, and the axes it is cut over; () keeps the parameter whole. MLPs are cut
# by hidden unit over `tensor`, so that nothing is exchanged between their two layers. Attention is not: the qkv kernel
# holds q, k and v side by side, and no contiguous cut of its columns is a cut by head, so that activations would be
# gathered.
PARAMETER_RULES: tuple[tuple[str, int, tuple[str, ...]], ...] = (
    (r"/fc1/kernel$", -1, ("tensor", "fsdp")),
    (r"/fc1/bias$", -1, ("tensor",)),
    (r"/fc2/kernel$", -2, ("tensor", "fsdp")),
    (r"/(conv1|conv2|qkv|embed|pred)/kernel$", -1, ("fsdp",)),
    (r"/attn/proj/kernel$", -2, ("fsdp",)),
    (r"/(patch_embed\d?(/proj)?|stage\d_output_decode)/kernel$", -1, ("fsdp",)),
    (r"/dwconv/kernel$", -1, ("fsdp",)),
    (r"/(mask_token|cls_token)$", -1, ()),
    (r"(?<!/fc1)/(bias|scale)$", -1, ()),
)


def make_mesh(config: MeshConfig, devices: Sequence[jax.Device] | None = None) -> Mesh:
    """Mesh with the axes `data`, `fsdp` and `tensor` over all devices (or those given).

    Raises:
      InputError: the sizes do not fit the devices, their slices or their processes.
    """
    array = arrange(config, jax.devices() if devices is None else devices)
    return Mesh(array, AXES, axis_types=(AxisType.Auto,) * len(AXES))


def arrange(config: MeshConfig, devices: Sequence[jax.Device]) -> np.ndarray:
    """Devices as an array (data, fsdp, tensor), each slice of the mesh one block of neighbours along `data`.

    Raises:
      InputError: as `make_mesh`.
    """
    sizes = _axis_sizes(config, len(devices))
    slices = _slices(devices, config.slices)
    if devices[0].platform == "tpu":  # JAX knows how the chips are wired
        shape, types = (sizes[0] // config.slices, *sizes[1:]), (AxisType.Auto,) * len(AXES)
        meshes = [jax.make_mesh(shape, AXES, axis_types=types, devices=group.tolist()) for group in slices]
        slices = np.stack([mesh.devices for mesh in meshes])
    array = slices.reshape(sizes)
    spanned = next((group for group in array.reshape(-1, sizes[2]) if len({d.process_index for d in group}) > 1), None)
    if spanned is not None:
        raise InputError(
            f"mesh.tensor={sizes[2]} spans several processes, each of which reads its own images: "
            "use at most the devices of one process"
        )
    return array


def _axis_sizes(config: MeshConfig, devices: int) -> list[int]:
    sizes = [config.data, config.fsdp, config.tensor]
    given = ", ".join(f"mesh.{axis}={size}" for axis, size in zip(AXES, sizes, strict=True))
    if sizes.count(-1) > 1 or any(s == 0 or s < -1 for s in sizes):
        raise InputError(f"{given}: positive sizes, at most one -1")
    if -1 in sizes:
        sizes[sizes.index(-1)] = devices // -math.prod(sizes)
    if math.prod(sizes) != devices:
        raise InputError(f"{given} do not multiply to {devices} devices")
    if config.slices < 1 or sizes[0] % config.slices:
        raise InputError(
            f"mesh.slices={config.slices} does not divide mesh.data={sizes[0]}, the only axis that may span slices"
        )
    return sizes


def _slices(devices: Sequence[jax.Device], count: int) -> np.ndarray:
    """(count, n) devices: those slices that the platform reports, else neighbouring processes."""
    slices = Counter(getattr(device, "slice_index", 0) for device in devices)
    if devices[0].platform == "tpu" and len(slices) != count:
        raise InputError(f"mesh.slices={count}, but the devices form {len(slices)}: set mesh.slices={len(slices)}")
    if len(slices) == count and len({*slices.values()}) > 1:
        raise InputError(f"mesh.slices={count}: the slices have {', '.join(map(str, slices.values()))} devices")
    ordered = sorted(devices, key=lambda d: (getattr(d, "slice_index", 0), d.process_index, d.id))
    return np.array(ordered, object).reshape(count, -1)


def path_text(path: tuple[Any, ...]) -> str:
    """A JAX key path as text with slashes: encoder/blocks3_0/attn/qkv/kernel."""
    return jax.tree_util.keystr(path, simple=True, separator="/")


def state_shardings(state: Any, mesh: Mesh) -> Any:
    """NamedSharding for every leaf of a training state (arrays or shapes).

    Parameters follow the rule table, and optimizer moments the parameter whose path theirs ends in; scalars are
    replicated. A dimension that the `fsdp` axis does not divide is not cut over it. Of a parameter without a rule the
    largest dimension that `fsdp` divides is cut.

    Raises:
      InputError: the `tensor` axis does not divide a dimension that is to be cut over it.
    """

    def sharding(path: tuple[Any, ...], leaf: Any) -> NamedSharding:
        spec: list[Any] = [None] * leaf.ndim
        if leaf.ndim:
            name, rest = path_text(path), (_largest(leaf.shape, mesh.shape["fsdp"]), ("fsdp",))
            dim, axes = next((rule for pattern, *rule in PARAMETER_RULES if re.search(pattern, f"/{name}")), rest)
            spec[dim] = _dividing(mesh, axes, leaf.shape[dim], name) or None
        return NamedSharding(mesh, PartitionSpec(*spec) if any(spec) else PartitionSpec())

    return jax.tree_util.tree_map_with_path(sharding, state)


def _largest(shape: tuple[int, ...], parts: int) -> int:
    """The largest dimension that can be cut into `parts`, the last of equals; any where there is none."""
    return max(range(len(shape)), key=lambda dim: (shape[dim] % parts == 0, shape[dim], dim))


def _dividing(mesh: Mesh, axes: tuple[str, ...], size: int, path: str) -> tuple[str, ...]:
    cut = []
    for axis in (axis for axis in axes if mesh.shape[axis] > 1):
        if size % mesh.shape[axis] == 0:
            size //= mesh.shape[axis]
            cut.append(axis)
        elif axis == "tensor":
            raise InputError(f"mesh.tensor={mesh.shape[axis]} does not divide the {size} units of {path}")
    return tuple(cut)


def gathered(shardings: Any) -> Any:
    """The layout in which a loss reads parameters: whole along `fsdp`, still cut over `tensor`."""

    def whole(sharding: NamedSharding) -> NamedSharding:
        spec = ("tensor" if axes is not None and "tensor" in axes else None for axes in sharding.spec)
        return NamedSharding(sharding.mesh, PartitionSpec(*spec))

    return jax.tree.map(whole, shardings)


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Batches are cut along their first axis over `data` and `fsdp`; devices along `tensor` share a part."""
    return NamedSharding(mesh, PartitionSpec(BATCH_AXES))


def batch_parts(mesh: Mesh) -> int:
    """How many parts a batch is cut into; its size must be a multiple."""
    return math.prod(mesh.shape[axis] for axis in BATCH_AXES)


def place_batch(batch: dict[str, np.ndarray], mesh: Mesh) -> dict[str, jax.Array]:
    """This host's part of a batch to global arrays on the mesh (an explicit transfer)."""
    sharding = batch_sharding(mesh)
    with jax.transfer_guard_host_to_device("allow"):  # with several processes JAX does not count it as explicit
        return {key: jax.make_array_from_process_local_data(sharding, value) for key, value in batch.items()}

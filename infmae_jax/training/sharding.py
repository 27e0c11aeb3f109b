"""Where arrays live: the device mesh, the rule table for parameters, and the layout of batches."""

from __future__ import annotations

import re
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from data_pipelines.errors import InputError
from infmae_jax.training.config import MeshConfig

AXES = ("data", "fsdp")

# Each parameter is matched by exactly one rule (a test holds this). A rule names the dimension, counted from the end,
# that is cut over the `fsdp` axis; None keeps the parameter whole on every device.
PARAMETER_RULES: tuple[tuple[str, int | None], ...] = (
    (r"/(conv1|conv2|fc1|qkv|embed|pred)/kernel$", -1),
    (r"/(attn/proj|fc2)/kernel$", -2),
    (r"/(patch_embed\d?(/proj)?|stage\d_output_decode)/kernel$", -1),
    (r"/dwconv/kernel$", -1),
    (r"/(mask_token|cls_token)$", None),
    (r"/(bias|scale)$", None),
)


def make_mesh(config: MeshConfig, devices: list[jax.Device] | None = None) -> Mesh:
    """Mesh over all devices with the axes `data` and `fsdp`.

    Raises:
      InputError: the sizes do not multiply to the number of devices.
    """
    devices = devices if devices is not None else jax.devices()
    sizes = [config.data, config.fsdp]
    if sizes.count(-1) > 1 or any(s == 0 or s < -1 for s in sizes):
        raise InputError(f"mesh.data={config.data}, mesh.fsdp={config.fsdp}: positive sizes, at most one -1")
    if -1 in sizes:
        sizes[sizes.index(-1)] = len(devices) // -int(np.prod(sizes))
    if int(np.prod(sizes)) != len(devices):
        raise InputError(f"mesh.data={config.data}, mesh.fsdp={config.fsdp} do not multiply to {len(devices)} devices")
    return jax.make_mesh(tuple(sizes), AXES, axis_types=(AxisType.Auto,) * len(AXES), devices=devices)


def parameter_rule(path: str) -> int | None:
    """The dimension of a parameter (path with slashes) cut over `fsdp`; KeyError when not exactly one rule matches."""
    matches = [dim for pattern, dim in PARAMETER_RULES if re.search(pattern, "/" + path)]
    if len(matches) != 1:
        raise KeyError(f"parameter {path} matches {len(matches)} sharding rules, not one")
    return matches[0]


def path_text(path: tuple[Any, ...]) -> str:
    """A JAX key path as text with slashes: encoder/blocks3_0/attn/qkv/kernel."""
    return jax.tree_util.keystr(path, simple=True, separator="/")


def state_shardings(state: Any, mesh: Mesh) -> Any:
    """NamedSharding for every leaf of a training state (arrays or shapes).

    Parameters follow the rule table, and optimizer moments the parameter whose path theirs ends in; scalars are
    replicated, and so is a dimension that the `fsdp` axis does not divide.
    """
    fsdp = mesh.shape["fsdp"]

    def sharding(path, leaf):
        if leaf.ndim == 0:
            return NamedSharding(mesh, PartitionSpec())
        dim = parameter_rule(path_text(path))
        if dim is None or leaf.shape[dim] % fsdp or fsdp == 1:
            return NamedSharding(mesh, PartitionSpec())
        spec = [None] * leaf.ndim
        spec[dim] = "fsdp"
        return NamedSharding(mesh, PartitionSpec(*spec))

    return jax.tree_util.tree_map_with_path(sharding, state)


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Batches are cut along their first axis over all devices."""
    return NamedSharding(mesh, PartitionSpec(AXES))


def place_batch(batch: dict[str, np.ndarray], mesh: Mesh) -> dict[str, jax.Array]:
    """This host's part of a batch to global arrays on the mesh (an explicit transfer)."""
    sharding = batch_sharding(mesh)
    return {key: jax.make_array_from_process_local_data(sharding, value) for key, value in batch.items()}

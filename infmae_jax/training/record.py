"""The step-0 record: what exactly ran. Written once, before the first step, to RUN/record.json."""

from __future__ import annotations

import importlib.metadata
import json
import platform
from pathlib import Path
from typing import Any

import jax
from jax.sharding import Mesh

from infmae_jax.training.sharding import path_text
from infmae_jax.training.state import TrainState

RECORD_NAME = "record.json"
_PACKAGES = ("infmae-jax", "jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain", "array-record", "numpy")


def package_versions() -> dict[str, str]:
    """Versions of the packages that decide what is computed, and of Python."""
    versions = {"python": platform.python_version()}
    for name in _PACKAGES:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            versions[name] = "not installed"
    return versions


def write_record(
    run: str | Path,
    state: TrainState,
    mesh: Mesh,
    compiled: jax.stages.Compiled,
    batch_size: int,
    data: dict[str, Any],
) -> dict[str, Any]:
    """Writes and returns the record: parameter table, GFLOP per image (XLA's count), mesh, versions, data.

    Args:
      state: training state or its shapes, with shardings.
      compiled: the training step for a global batch of `batch_size` images.
      data: what the task says of its data set.
    """
    flops = compiled.cost_analysis().get("flops", 0.0) * mesh.size  # XLA counts the program of one device
    memory = compiled.memory_analysis()
    table = [
        {"name": path_text(path), "shape": list(leaf.shape), "sharding": str(leaf.sharding.spec)}
        for path, leaf in jax.tree_util.tree_leaves_with_path(state.params)
    ]
    record = {
        "parameters": sum(leaf.size for leaf in jax.tree.leaves(state.params)),
        "gflop_per_image": flops / batch_size / 1e9,
        "device_memory_mib": memory and (memory.temp_size_in_bytes + memory.argument_size_in_bytes) / 2**20,
        "mesh": dict(mesh.shape),
        "devices": f"{mesh.size} x {mesh.devices.flat[0].device_kind}",
        "processes": jax.process_count(),
        "versions": package_versions(),
        "data": data,
        "parameter_table": table,
    }
    path = Path(run) / RECORD_NAME
    temporary = path.with_suffix(".tmp")
    temporary.write_text(json.dumps(record, indent=1) + "\n")
    temporary.replace(path)
    return record

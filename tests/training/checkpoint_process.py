"""A process that saves or restores a small training state, alone or as one of several; see `main` for its commands."""

from __future__ import annotations

import argparse
import hashlib
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from infmae_jax.training.checkpoint import Checkpointer
from infmae_jax.training.state import TrainState

OPTIMIZER = optax.adam(1e-3)
ROOT = Path(__file__).resolve().parents[2]


def start(*runs, **options):
    """A process of this module."""
    flags = [f"--{name}={value}" for name, value in options.items()]
    command = [sys.executable, "-m", "tests.training.checkpoint_process", *map(str, runs), *flags]
    return subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def make_mesh(count: int) -> Mesh:
    return jax.make_mesh((count,), ("fsdp",), axis_types=(AxisType.Auto,), devices=jax.devices()[:count])


def create(key: jax.Array, width: int = 64) -> TrainState:
    params = {
        "encoder": {"kernel": jax.random.normal(key, (width, 24)), "bias": jnp.arange(5.0)},
        "decoder": {"kernel": jax.random.normal(key, (8, 16)).astype(jnp.bfloat16), "scale": jnp.float32(3)},
    }
    state = TrainState.create(params, OPTIMIZER)
    return state.replace(opt_state=jax.tree.map(lambda x: x + 1, state.opt_state))


def shardings(mesh: Mesh, width: int = 64) -> TrainState:
    """Kernels cut over the mesh, the rest whole everywhere."""
    return jax.tree.map(
        lambda leaf: NamedSharding(mesh, PartitionSpec("fsdp") if leaf.ndim == 2 else PartitionSpec()),
        jax.eval_shape(lambda: create(jax.random.key(0), width)),
    )


def make_state(mesh: Mesh, seed: int, width: int = 64) -> TrainState:
    return jax.jit(create, static_argnums=1, out_shardings=shardings(mesh, width))(jax.random.key(seed), width)


def abstract_state(mesh: Mesh, width: int = 64) -> TrainState:
    shapes = jax.eval_shape(lambda: create(jax.random.key(0), width))
    return jax.tree.map(
        lambda leaf, where: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=where), shapes, shardings(mesh, width)
    )


def content(state: TrainState) -> str:
    """A hash of all arrays, as this process has them when gathered to every device."""
    mesh = jax.tree.leaves(state)[0].sharding.mesh
    whole = jax.jit(lambda x: x, out_shardings=NamedSharding(mesh, PartitionSpec()))(state)
    digest = hashlib.sha256()
    for leaf in jax.tree.leaves((whole.params, whole.opt_state, whole.guard)):
        digest.update(np.asarray(leaf.addressable_data(0)).tobytes())
    return digest.hexdigest()


def main() -> None:
    """Saves checkpoints 1 and 2 of the run `--save`, of states with these seeds, printing "saving S" before each; then
    restores the newest checkpoint of each run and prints a JSON line of what it found."""
    parser = argparse.ArgumentParser()
    parser.add_argument("runs", nargs="*")
    parser.add_argument("--save", default="")
    for name, default in {"width": 64, "devices": 2, "processes": 1, "index": 0, "port": 0}.items():
        parser.add_argument(f"--{name}", type=int, default=default)
    args = parser.parse_args()
    jax.config.update("jax_num_cpu_devices", args.devices)
    if args.processes > 1:
        jax.distributed.initialize(f"localhost:{args.port}", args.processes, args.index)
    mesh = make_mesh(jax.device_count())
    if args.save:
        save(args.save, mesh, args.width)
    for run in args.runs:
        print(json.dumps(restore(run, mesh, args.width)), flush=True)


def save(run: str, mesh: Mesh, width: int) -> None:
    with Checkpointer(run) as checkpointer:
        for step in (1, 2):
            state = make_state(mesh, step, width)
            print("saving", step, flush=True)
            checkpointer.save(state, step, {"loss": 1.0 / step}, {"data_order": step})


def restore(run: str, mesh: Mesh, width: int) -> dict[str, Any]:
    damage: list[tuple[int, str]] = []
    with Checkpointer(run, on_damage=lambda step, reason: damage.append((step, reason))) as checkpointer:
        state, step, metadata = checkpointer.restore(abstract_state(mesh, width))
    found = {"step": step, "count": int(state.step), "metadata": metadata, "content": content(state)}
    return {"damage": damage, **found}


if __name__ == "__main__":
    sys.exit(main())

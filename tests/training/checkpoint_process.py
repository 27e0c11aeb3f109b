"""A process that saves or restores a small training state, alone or as one of several; see `main` for its commands."""

from __future__ import annotations

import argparse
import hashlib
import json
import resource
import sys

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from infmae_jax.training.checkpoint import Checkpointer, SaveFailed
from infmae_jax.training.state import TrainState

OPTIMIZER = optax.adam(1e-3)


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
    """Prints one JSON line.

    save: saves checkpoints 1, 2, ... `--last` of states with these seeds, one after the other, with `--pace` printed
      lines "saving S" and "saved S" before and after each; at checkpoint `--limit-from` files become limited to 100 kB.
    restore: restores the newest.
    """
    parser = argparse.ArgumentParser()
    parser.add_argument("command", choices=("save", "restore"))
    parser.add_argument("run")
    parser.add_argument("--last", type=int, default=2)
    parser.add_argument("--width", type=int, default=64)
    parser.add_argument("--devices", type=int, default=2)
    parser.add_argument("--processes", type=int, default=1)
    parser.add_argument("--index", type=int, default=0)
    parser.add_argument("--port", type=int, default=0)
    parser.add_argument("--limit-from", type=int, default=0)
    args = parser.parse_args()
    jax.config.update("jax_num_cpu_devices", args.devices)
    if args.processes > 1:
        jax.distributed.initialize(f"localhost:{args.port}", args.processes, args.index)
    mesh = make_mesh(jax.device_count())
    damage: list[tuple[int, str]] = []
    with Checkpointer(args.run, keep=3, on_damage=lambda step, reason: damage.append((step, reason))) as checkpointer:
        if args.command == "save":
            failures = save(checkpointer, mesh, args)
            report = {"failures": failures, "latest": checkpointer.latest_step()}
        else:
            restored = checkpointer.restore(abstract_state(mesh, args.width))
            report = {"damage": damage, "step": None}
            if restored is not None:
                state, step, metadata = restored
                report |= {"step": step, "metadata": metadata, "content": content(state), "count": int(state.step)}
    print(json.dumps(report), flush=True)


def save(checkpointer: Checkpointer, mesh: Mesh, args: argparse.Namespace) -> list[str]:
    failures = []
    for step in range(1, args.last + 1):
        if args.limit_from == step:
            resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, resource.RLIM_INFINITY))
        state = make_state(mesh, step, args.width)
        jax.block_until_ready(state)
        print("saving", step, flush=True)
        try:
            checkpointer.save(state, step, {"loss": 1.0 / step}, {"data_order": step})
            checkpointer.wait()
        except SaveFailed as error:
            failures.append(str(error))
        print("saved", step, flush=True)
    return failures


if __name__ == "__main__":
    sys.exit(main())

"""How the training step scales, from programs compiled ahead of time for meshes of up to hundreds of devices.

Nothing is run: a child process compiles the step for virtual CPU devices. What it exchanges and keeps is counted; what
that costs on named networks is predicted by formulas.
"""

from __future__ import annotations

import dataclasses
import json
import math
import os
import subprocess
import sys
from collections.abc import Iterable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from data_pipelines.commands import run_command
from data_pipelines.errors import InputError
from infmae_jax.benchmarks.collectives import KINDS, Collective, by_kind, collectives
from infmae_jax.benchmarks.report import report, table
from infmae_jax.benchmarks.training import visible_tokens
from infmae_jax.models import patches
from infmae_jax.models.infmae import InfMAE
from infmae_jax.training import sharding
from infmae_jax.training.config import MeshConfig, PretrainConfig, from_config, to_config
from infmae_jax.training.hardware import peak_flops
from infmae_jax.training.optimizer import make_optimizer
from infmae_jax.training.state import TrainState
from infmae_jax.training.step import make_train_step, stop_sharding

MESHES = (MeshConfig(1), MeshConfig(1, 8), MeshConfig(8, 8), MeshConfig(32, 8))
QUICK_MESHES = (MeshConfig(1), MeshConfig(4, 2))
_MIB, _GB = 2**20, 1e9
# The machine code is not run, so it need not be good. The second flag halves compile time; not every XLA has it.
_COMPILER_FLAGS = (
    "--xla_backend_optimization_level=0 --xla_cpu_use_fusion_emitters=false",
    "--xla_backend_optimization_level=0",
)


@dataclasses.dataclass(frozen=True)
class Network:
    """What joins devices. Bandwidths are bytes a second that one device sends, all its links together.

    Attributes:
      device_kind: for its peak rate, see `hardware.peak_flops`.
      node: devices joined by the fast network; neighbours in the mesh.
      inside, between: bandwidth within a node, and of one device's share of the links that leave the node.
    """

    name: str
    device_kind: str
    node: int
    inside: float
    between: float


# Vendors' public data sheets: NVLink 4 900 GB/s a GPU both ways, ConnectX-7 NDR 400 Gb/s, TPU interchip interconnect
# 1,600 Gb/s (v5e) and 4,800 Gb/s (v5p) a chip.
NETWORKS = (
    Network("H100: NVLink 4, InfiniBand NDR 400 Gb/s a GPU", "NVIDIA H100", 8, 450 * _GB, 50 * _GB),
    Network("H100: NVLink 4, DCN 100 Gb/s a host of 8", "NVIDIA H100", 8, 450 * _GB, 12.5 / 8 * _GB),
    Network("TPU v5e: ICI, one slice", "TPU v5e", 256, 200 * _GB, 200 * _GB),
    Network("TPU v5e: ICI, slices of 64, DCN 100 Gb/s a host of 8", "TPU v5e", 64, 200 * _GB, 12.5 / 8 * _GB),
    Network("TPU v5p: ICI, one slice", "TPU v5p", 4096, 600 * _GB, 600 * _GB),
)
ASSUMED_MFU = 0.4
ASSUMED_BANDWIDTH = 0.7

ASSUMPTIONS = (
    "counted: the float32 step, compiled for CPU, of one device. A collective's size is that of the whole array.",
    "sent: by a ring, 2(n-1)/n of the size for an all-reduce, (n-1)/n for an all-gather, reduce-scatter or all-to-all.",
    "CPU programs sum sharded gradients by all-reduce and slice; GPU and TPU compilers make reduce-scatters of them, "
    "which send half: times with fsdp are upper bounds.",
    "temporaries: as XLA schedules for CPU, in float32; other backends differ, and bfloat16 needs about half.",
    f"predicted: compute at {ASSUMED_MFU:.0%} of the data sheet's bfloat16 peak (assumed, not measured), networks at "
    f"{ASSUMED_BANDWIDTH:.0%} of theirs, no latency. A ring that leaves a node crosses its border once each way, over "
    "the links of all members in the node.",
    "efficiency: of weak scaling (same images a device), nothing hidden behind compute; hidden: all that can be.",
)


def scaling(config: PretrainConfig, meshes: Sequence[MeshConfig] = MESHES, batch: int = 64) -> dict[str, Any]:
    """Counts and predictions for each mesh.

    Args:
      meshes: sizes without -1.
      batch: images a device along `data` and `fsdp`, the same for all meshes.

    Returns:
      A report; rows a mesh, and `predictions`, a row a mesh and network.

    Raises:
      InputError: a mesh that does not fit the model.
    """
    config = dataclasses.replace(config, model=config.model.replace(dtype="float32"))
    rows, predictions = [], []
    for program in _in_child(config, meshes, batch):
        rows.append(program["row"])
        found = [Collective(**{**each, "groups": tuple(map(tuple, each["groups"]))}) for each in program["collectives"]]
        predictions += [predict(network, program["row"], found, program["flops"]) for network in NETWORKS]
    settings = {"images_a_device": batch, "image_size": list(config.data.image_size), "dtype": "float32"}
    result = report("scaling", settings, rows, ["", table(predictions), "", *ASSUMPTIONS])
    return {**result, "predictions": predictions}


def parse_meshes(texts: Iterable[str]) -> tuple[MeshConfig, ...]:
    """Meshes written "data x fsdp x tensor", the last ones left out where they are 1: "32x8", "4x1x2".

    Raises:
      InputError: another form.
    """
    meshes = []
    for text in texts:
        sizes = text.split("x")
        if not 1 <= len(sizes) <= len(sharding.AXES) or not all(s.isdigit() and int(s) > 0 for s in sizes):
            raise InputError(f"mesh {text!r} is not of the form 32, 32x8 or 4x1x2 (data x fsdp x tensor)")
        meshes.append(MeshConfig(*map(int, sizes)))
    return tuple(meshes)


def predict(network: Network, row: dict[str, Any], found: Iterable[Collective], flops: float) -> dict[str, Any]:
    """Times of a step on a network, and the efficiency of weak scaling without and with all exchange hidden.

    Args:
      row: of the mesh.
      flops: operations of a step on one device.
    """
    compute = flops / (peak_flops(network.device_kind, "bfloat16") * ASSUMED_MFU)
    exchange = sum(seconds(each, network) for each in found)
    return {
        "mesh": row["mesh"],
        "network": network.name,
        "compute_ms": compute * 1e3,
        "exchange_ms": exchange * 1e3,
        "efficiency": compute / (compute + exchange),
        "efficiency_hidden": compute / max(compute, exchange),
    }


def seconds(collective: Collective, network: Network) -> float:
    """Time of a collective: the slower of its way inside nodes and its way between them."""
    here = max(_most_in_a_node(group, network.node) for group in collective.groups)
    inside = collective.sent / network.inside if here > 1 else 0.0
    leaves = any(group[0] // network.node != device // network.node for group in collective.groups for device in group)
    between = collective.sent / (network.between * here) if leaves else 0.0
    return max(inside, between) / ASSUMED_BANDWIDTH


def _most_in_a_node(group: tuple[int, ...], node: int) -> int:
    nodes = [device // node for device in group]
    return max(nodes.count(each) for each in set(nodes))


def count(config: PretrainConfig, mesh_config: MeshConfig, batch: int) -> dict[str, Any]:
    """Compiles the step for a mesh of the first of this process's devices: `row`, `collectives` and `flops`."""
    size = mesh_config.data * mesh_config.fsdp * mesh_config.tensor
    mesh = sharding.make_mesh(mesh_config, jax.devices()[:size])
    compiled = compile_step(config, mesh, batch * sharding.batch_parts(mesh))
    memory, found = compiled.memory_analysis(), collectives(compiled.as_text())
    totals = by_kind(found)
    row = {
        "devices": size,
        "mesh": "x".join(str(n) for n in mesh.shape.values()),
        **{f"{kind}_mib".replace("-", "_"): totals.get(kind, (0, 0))[1] / _MIB for kind in KINDS},
        "collectives": sum(n for n, _ in totals.values()),
        "sent_mib": sum(each.sent for each in found) / _MIB,
        "state_and_batch_mib": memory.argument_size_in_bytes / _MIB,
        "temporaries_mib": memory.temp_size_in_bytes / _MIB,
    }
    flops = compiled.cost_analysis()["flops"]
    return {"row": row, "collectives": [dataclasses.asdict(each) for each in found], "flops": flops}


def compile_step(config: PretrainConfig, mesh: jax.sharding.Mesh, batch: int) -> jax.stages.Compiled:
    """The pretraining step for global batches of a size, from shapes alone."""
    model, optimizer = InfMAE(config.model), make_optimizer(config.optimizer)
    height, width = config.data.image_size
    keep = visible_tokens(config)

    def create(key: jax.Array) -> TrainState:
        ids_keep = jnp.arange(keep)[None]
        return TrainState.create(model.init(key, jnp.zeros((1, height, width, 1)), ids_keep)["params"], optimizer)

    def loss(params: Any, batch: dict[str, jax.Array], key: jax.Array) -> tuple[jax.Array, dict[str, jax.Array]]:
        del key
        return model.apply({"params": params}, patches.normalize(batch["image"]), batch["ids_keep"]).loss, {}

    shapes = jax.eval_shape(create, jax.random.key(config.seed))
    shardings = sharding.state_shardings(shapes, mesh)
    step = make_train_step(
        loss, optimizer, lambda _: jnp.float32(1e-4), mesh, shardings, config.seed, config.optimizer.accumulate
    )
    images = {
        "image": jax.ShapeDtypeStruct((batch, height, width, 1), jnp.uint8),
        "ids_keep": jax.ShapeDtypeStruct((batch, keep), jnp.int32),
    }
    stop = jax.ShapeDtypeStruct((mesh.size,), jnp.int32, sharding=stop_sharding(mesh))
    return step.lower(shapes, images, stop).compile()


def _in_child(config: PretrainConfig, meshes: Sequence[MeshConfig], batch: int) -> list[dict[str, Any]]:
    """`count` of each mesh, from a process that has enough virtual devices."""
    order = {
        "config": to_config(config).to_dict(), "meshes": [dataclasses.asdict(mesh) for mesh in meshes], "batch": batch
    }  # fmt: skip
    devices = max(math.prod((mesh.data, mesh.fsdp, mesh.tensor)) for mesh in meshes)
    for flags in _COMPILER_FLAGS:
        environment = {
            **os.environ, "JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": str(devices), "XLA_FLAGS": flags
        }  # fmt: skip
        command = [sys.executable, "-m", __name__]
        child = subprocess.run(command, input=json.dumps(order), capture_output=True, text=True, env=environment)
        if "Unknown flag" not in child.stderr:
            break
    if child.returncode == InputError.exit_code:
        raise InputError(child.stderr.strip().splitlines()[-1].removeprefix("error: "))
    if child.returncode:
        raise RuntimeError(f"compiling for {devices} virtual devices failed:\n{child.stderr[-4000:]}")
    return [json.loads(line) for line in child.stdout.splitlines()]


def _child(argv: Sequence[str]) -> None:
    del argv
    order = json.load(sys.stdin)
    config = from_config(PretrainConfig, order["config"])
    for mesh in order["meshes"]:
        print(json.dumps(count(config, MeshConfig(**mesh), order["batch"])), flush=True)


if __name__ == "__main__":
    run_command(_child)

"""What a run will need and cost on a TPU slice or GPUs that are not there: python -m infmae_jax.compile_ahead \\
    --config=configs/pretrain/inf30_base.py --topology=v5e-16 [--batch=1024] [--largest_batch] [--output=FILE.json]
    [--features=512x640]: what `model.features` takes for --batch images of that size, on one of the devices

Configs of fine-tuning are compiled for random weights of their variant and, unless `classes` names others, 9 classes.

Compiles the program that trains with the compiler of those devices, on any machine: whether it fits, what the devices
exchange, what the compiler expects it to take. Nothing is run. Minutes for large models; needs no data.

Topologies: v5e-16, v6e-64 (chips), v4-32, v5p-128 (cores, two a chip, as Google Cloud names slices), h100, h100x8.
"""

import dataclasses
import math
import os
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from absl import flags
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from data_pipelines.commands import flags_only, run_command
from data_pipelines.errors import InputError
from data_pipelines.files import output_file, writing
from infmae_jax.ahead import account, targets
from infmae_jax.bench.flops import useful_gflop
from infmae_jax.bench.results import table
from infmae_jax.bench.step import endless_run, task_of, visible_tokens
from infmae_jax.models import patches
from infmae_jax.models.config import EncoderConfig
from infmae_jax.models.infmae import InfMAE, abstract_params
from infmae_jax.tasks.finetune import FineTuneConfig, without_data
from infmae_jax.tasks.finetuned import kind_of
from infmae_jax.tasks.pretrain import PretrainConfig
from infmae_jax.training import sharding
from infmae_jax.training.config import MeshConfig, define_config, from_config, to_config
from infmae_jax.training.program import Program
from infmae_jax.training.run_folder import package_versions, write_object

Config = PretrainConfig | FineTuneConfig
_BASE = Path(__file__).resolve().parents[1] / "configs" / "pretrain" / "inf30_base.py"
_MOST_IMAGES = 2**20  # a batch, see `PipelineConfig`
_GRANULE = 8  # images a device between the batches that --largest_batch tries


def _define_flags() -> None:
    define_config(_BASE, "Config of any training; every key can be overridden.")
    flags.DEFINE_string("topology", "v5e-16", "Devices to compile for: v5e-16, v5p-128, v6e-64, h100, h100x8, ...")
    flags.DEFINE_integer("batch", 0, "Images a step over all devices; 0: the config's.", lower_bound=0)
    flags.DEFINE_boolean("largest_batch", False, "Also find the largest batch that fits; compiles several times.")
    flags.DEFINE_string("features", "", "HEIGHTxWIDTH: features of --batch images on one device, no training step.")
    flags.DEFINE_string("compilers", "", f"Folder that pip installed the compilers into; empty: ${targets.COMPILERS}.")
    flags.DEFINE_string("output", "", "JSON file to write the account to.")


def compile_ahead(
    config: Config, target: targets.Target, devices: Sequence[jax.Device], features: bool = False
) -> dict[str, Any]:
    """The account of a config's training step (or of features of its batch), see `ahead.account.account`, with what it
    was made for.

    A program that does not fit has "fits" false, "memory_bytes" with what it needs and "chip_memory_bytes"; where the
    compiler refuses it, nothing else.

    Raises:
      InputError: batch or model do not fit the mesh.
    """
    images = config.data.batch_size
    traced = _traced(config, devices, features)
    told: dict[str, Any] = {
        "topology": target.name,
        "device": f"{len(devices)} x {devices[0].device_kind}",
        "mesh": dict(traced.mesh.shape),
        "batch": images,
        "batch_per_device": images / len(devices),
        "versions": package_versions(),
        "config": to_config(config).to_dict(),
    }
    useful = _counted_gflop(config, features) if features else _useful_gflop(config) * images / len(devices)
    try:
        told |= account.account(traced, target, useful, _encoder(config).dtype)
    except account.DoesNotFit as error:
        needed = {"needed": error.needed} if error.needed else {}
        capacity = error.capacity or target.chip.memory
        told |= {"fits": False, "memory_bytes": needed, "chip_memory_bytes": capacity}
    return told if told["fits"] else told | {"help": _helps(config, images // len(devices), len(devices), features)}


def largest_batch(config: Config, target: targets.Target, devices: Sequence[jax.Device]) -> dict[str, Any]:
    """Images of the largest batch whose program fits, and what each try needed; compiles once a try."""
    parts = sharding.batch_parts(_mesh(config, devices)) * config.optimizer.accumulate
    granule = _GRANULE if config.data.batch_size // parts >= _GRANULE else 1
    tried: dict[int, float] = {}

    def needed(each: int) -> float:
        if each * parts > _MOST_IMAGES:
            return math.inf
        try:
            traced = _traced(_with_batch(config, each * parts), devices)
            tried[each * parts] = account.compile_step(traced)[1]["memory_bytes"]["needed"]
        except account.DoesNotFit as error:
            # What the compiler says it lacks may be temporaries alone, less than the chip's memory.
            tried[each * parts] = max(error.needed or math.inf, target.chip.memory + 1)
        print(f"batch {each * parts}: {_gib(tried[each * parts])} a device", file=sys.stderr, flush=True)
        return tried[each * parts]

    start = max(config.data.batch_size // parts // granule, 1) * granule
    found = account.largest_batch(needed, target.chip.memory, start, granule)
    tries = {str(batch): size if math.isfinite(size) else None for batch, size in tried.items()}
    return {"images": found * parts, "multiple_of": granule * parts, "bytes_needed": tries}


def _with_batch(config: Config, images: int) -> Config:
    return dataclasses.replace(config, data=dataclasses.replace(config.data, batch_size=images))


def _mesh(config: Config, devices: Sequence[jax.Device]) -> Mesh:
    return sharding.make_mesh(config.mesh, devices)


def _program(config: Config, devices: Sequence[jax.Device]) -> Program:
    """The program that trains; durations, which may be in epochs of data that are not here, do not change it."""
    run = endless_run(config, config.data.batch_size)
    return Program.build(task_of(run), run, _mesh(config, devices))


def _traced(config: Config, devices: Sequence[jax.Device], features: bool = False) -> account.Traced:
    """The step of the program that trains or, in its place, features of whole images."""
    if not features:
        program = _program(config, devices)
        return account.Traced(program.lowered(), program.mesh, program.batch_shapes)
    model, mesh = InfMAE(config.model), _mesh(config, devices)
    layout = sharding.batch_sharding(mesh)
    shape = (config.data.batch_size, *config.data.image_size, 1)
    batch = {"image": jax.ShapeDtypeStruct(shape, jnp.uint8, sharding=layout)}

    def of_images(params: Any, batch: dict[str, jax.Array]) -> dict[str, jax.Array]:
        return model.apply({"params": params}, patches.normalize(batch["image"]), method="features")

    program = jax.jit(of_images, in_shardings=(NamedSharding(mesh, PartitionSpec()), layout))
    return account.Traced(program.lower({"encoder": abstract_params(config.model)["encoder"]}, batch), mesh, batch)


def _encoder(config: Config) -> EncoderConfig:
    return config.model.encoder if isinstance(config, PretrainConfig) else config.encoder


def _useful_gflop(config: Config) -> float:
    """Of the step per image: by hand, of fine-tuning by XLA's count of what is traced, norms and losses included."""
    if isinstance(config, PretrainConfig):
        return useful_gflop(config.model, config.data.image_size, visible_tokens(config))
    alone = dataclasses.replace(
        _with_batch(config, 1), mesh=MeshConfig(1), optimizer=dataclasses.replace(config.optimizer, accumulate=1)
    )
    return _counted_gflop(alone)


def _counted_gflop(config: Config, features: bool = False) -> float:
    """Of a batch, as one device would compute it."""
    return _traced(config, jax.devices("cpu")[:1], features).lowered.cost_analysis()["flops"] / 1e9


def _helps(config: Config, each: int, devices: int, features: bool = False) -> list[str]:
    """What would make a program smaller, the cheapest first."""
    smaller = ["a smaller --batch"] if each > 1 else []
    if features:
        return [*smaller, "smaller --features"]
    key = "model.encoder.remat" if isinstance(config, PretrainConfig) else "encoder.remat"
    remat = [] if _encoder(config).remat else [f"--config.{key}=True (recomputes activations)"]
    cut = min(8, devices)
    fsdp = [] if cut == 1 or config.mesh.fsdp > 1 else [f"--config.mesh.fsdp={cut} (cuts weights and optimizer state)"]
    accumulate = ["--config.optimizer.accumulate=2 (half the activations)"] if each > 1 else []
    return [*smaller, *accumulate, *remat, *fsdp]


def _gib(size: float) -> str:
    return f"{size / account.GIB:.2f} GiB" if math.isfinite(size) else "more than the compiler says"


def text(told: dict[str, Any]) -> str:
    """The account for people."""
    head = f"{told['topology']}: {told['device']}, mesh " + " x ".join(
        f"{axis} {size}" for axis, size in told["mesh"].items()
    )
    lines = [head, f"batch {told['batch']}, {told['batch_per_device']:g} a device", _memory(told)]
    if "operations" in told:
        lines += [*_work(told), *_estimate(told), "", "most expensive operations"]
        lines.append(table([_shown(row) for row in told["most_expensive"]]))
    if "largest_batch" in told:
        largest = told["largest_batch"]
        lines.append(f"largest batch that fits: {largest['images']} (multiples of {largest['multiple_of']} tried)")
    return "\n".join(lines)


def _memory(told: dict[str, Any]) -> str:
    memory, chip = told["memory_bytes"], told["chip_memory_bytes"]
    parts = ", ".join(f"{name} {_gib(size)}" for name, size in memory.items() if name != "needed")
    needed = memory.get("needed", math.inf)
    if told["fits"]:
        return f"fits: {_gib(needed)} of {_gib(chip)} a device ({parts})"
    over = "by an unknown amount"
    if math.isfinite(needed):
        over = f"by {_gib(needed - chip)}: needs {_gib(needed)} at least"
    return f"does not fit a device's {_gib(chip)} {over}{f' ({parts})' if parts else ''}; try {'; '.join(told['help'])}"


def _work(told: dict[str, Any]) -> list[str]:
    counted = ""
    if told["gflop_counted"]:
        counted = (
            f"; XLA counts {told['gflop_counted']:,.0f} GFLOP and {told['gigabytes_counted']:,.1f} GB read and "
            "written, bodies of loops once"
        )
    exchanged = ", ".join(
        f"{each['times']} {kind} ({each['bytes'] / 2**20:,.1f} MiB)" for kind, each in told["collectives"].items()
    )
    return [
        f"work a device and step: {told['gflop_useful']:,.0f} useful GFLOP{counted}",
        f"exchanges a step: {exchanged or 'none'}; a device sends {told['bytes_sent'] / 2**20:,.1f} MiB",
        "operations one after the other: " + ", ".join(f"{n:,} {name}" for name, n in told["operations"].items()),
        f"compiled in {told['compile_seconds']:.0f} s on {os.cpu_count()} cores",
    ]


def _estimate(told: dict[str, Any]) -> list[str]:
    if "cycles" not in told:
        return ["estimated time: none, this compiler estimates no cycles"]
    cycles, guess = told["cycles"], told["estimate"]
    kinds = ", ".join(f"{name} {n / 1e6:.1f}" for name, n in cycles["by_kind"].items())
    parts = ", ".join(f"{name} {n / 1e6:.1f}" for name, n in cycles["by_part"].items())
    return [
        f"estimated Mcycles: {cycles['total'] / 1e6:.1f} ({kinds})",
        f"  by part: {parts}",
        f"estimated step: {1e3 * guess['step_seconds']:.1f} ms, MFU {100 * guess['mfu']:.0f} % "
        f"({1e3 * guess['step_seconds_hidden']:.1f} ms, {100 * guess['mfu_hidden']:.0f} % with exchanges hidden)",
        f"  = {1e3 * guess['computing_seconds']:.1f} ms of the compiler's cycles at the clock that makes the peak rate "
        f"+ {1e3 * guess['moving_seconds']:.1f} ms for {cycles['operations_without_estimate']} operations without "
        f"(scatters, gathers: {cycles['bytes_without_estimate'] / 2**20:,.0f} MiB at the memory's full rate) "
        f"+ {1e3 * guess['exchanging_seconds']:.1f} ms of exchanges at the links' full rate;",
        "  not measured: it leaves out overlap of operations, waiting for data, latencies and launches",
    ]


def _shown(row: dict[str, Any]) -> dict[str, Any]:
    cost = {"Mcycles": row["cycles"] / 1e6} if "cycles" in row else {"MiB touched": row["bytes_touched"] / 2**20}
    result = row["result"].split("{")[0]
    return {"part": row["part"], **cost, "times": row["times"], "operation": row["operation"], "result": result}


def _with_size(config: Config, size: str) -> PretrainConfig:
    """For features of images of "HxW" on one device."""
    found = re.fullmatch(r"(\d+)x(\d+)", size)
    sides = tuple(map(int, found.groups())) if found else (0,)
    if not all(side and side % patches.PATCH == 0 for side in sides):
        raise InputError(f"--features={size} is not HEIGHTxWIDTH, both multiples of {patches.PATCH}, such as 512x640")
    if not isinstance(config, PretrainConfig):
        raise InputError("--features takes a config of pretraining: the features of its encoder")
    return dataclasses.replace(config, data=dataclasses.replace(config.data, image_size=sides), mesh=MeshConfig(1))


def _config_of(given: Any) -> Config:
    if "task" not in given:
        return from_config(PretrainConfig, given)
    return without_data(from_config(kind_of(given, "--config").config, given))


def main(argv: Sequence[str]) -> int:
    """Exit code 0 where the program fits, 1 where it does not."""
    flags_only(argv)
    jax.config.update("jax_platforms", "cpu")  # whatever else is here is not to be touched
    values = flags.FLAGS
    target, config = targets.target(values.topology), _config_of(values.config)
    config = _with_batch(config, values.batch or config.data.batch_size)
    output = values.output and output_file(values.output, "output")
    if values.features and values.largest_batch:
        raise InputError("--largest_batch is of training steps: leave it or --features out")
    config = _with_size(config, values.features) if values.features else config
    devices = target.devices(values.compilers)[: 1 if values.features else None]
    told = compile_ahead(config, target, devices, bool(values.features))
    if values.largest_batch:
        told["largest_batch"] = largest_batch(config, target, devices)
    if output:
        with writing(output):
            write_object(output, told)
    print(text(told))
    return 0 if told["fits"] else 1


if __name__ == "__main__":
    run_command(main, define_flags=_define_flags)

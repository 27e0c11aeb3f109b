"""Measurements, as JSON on standard output: python -m infmae_jax.bench SUBJECT [flags].

flops   floating-point operations of a training step by XLA's count, visible-only against dense: --config
data    images a second of the input pipeline, of its parts and of the classic one: --shards, --workers, --seconds
"""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from absl import flags
from ml_collections import config_flags

from data_pipelines import throughput
from data_pipelines.commands import run_command
from data_pipelines.errors import InputError
from data_pipelines.masking import num_visible
from infmae_jax.models import patches
from infmae_jax.models.infmae import InfMAE, InfMAEConfig
from infmae_jax.training.config import PretrainConfig, from_config
from infmae_jax.training.record import package_versions

_BASE = Path(__file__).resolve().parents[1] / "configs" / "pretrain" / "inf30_base.py"


def count_flops(model: InfMAEConfig, image_size: tuple[int, int], keep: int, batch: int = 2) -> dict[str, float]:
    """GFLOP an image by XLA's cost analysis of the compiled program: the loss alone, and with all gradients."""
    module = InfMAE(model)
    images = jax.ShapeDtypeStruct((batch, *image_size, 1), jnp.uint8)
    ids_keep = jax.ShapeDtypeStruct((batch, keep), jnp.int32)

    def loss(params, images, ids_keep):
        return module.apply({"params": params}, patches.normalize(images), ids_keep).loss

    params = jax.eval_shape(module.init, jax.random.key(0), jnp.zeros((1, *image_size, 1)), jnp.zeros((1, keep), int))
    counts = {}
    for name, function in (("forward", loss), ("forward_backward", jax.value_and_grad(loss))):
        compiled = jax.jit(function).lower(params["params"], images, ids_keep).compile()
        counts[name] = compiled.cost_analysis()["flops"] / batch / 1e9
    return counts


def flops(config: PretrainConfig) -> dict[str, Any]:
    """GFLOP an image, visible-only and dense (every masked patch computed, as published)."""
    height, width = config.data.image_size
    keep = num_visible(config.data.mask, (height // patches.PATCH) * (width // patches.PATCH))
    # Float32 keeps conversions, which XLA counts as operations, out of the figures.
    model = dataclasses.replace(config.model, dtype="float32")
    return {
        "unit": "GFLOP an image, XLA cost analysis of the compiled program",
        "image_size": [height, width],
        "visible_tokens": keep,
        "visible_only": count_flops(dataclasses.replace(model, visible_only=True), (height, width), keep),
        "dense": count_flops(dataclasses.replace(model, visible_only=False), (height, width), keep),
        "device": jax.devices()[0].device_kind,
        "versions": package_versions(),
    }


def data() -> dict[str, Any]:
    """Rates of the input pipeline on the shards given by flags, see `throughput.run`."""
    if not flags.FLAGS.shards:
        raise InputError("no shards given: pass --shards=DIR, made by python -m data_pipelines.prepare")
    rows = throughput.run(flags.FLAGS.shards, flags.FLAGS.workers, flags.FLAGS.seconds)
    return {"shards": flags.FLAGS.shards, "rows": rows, "versions": package_versions()}


SUBJECTS = {"flops": lambda: flops(from_config(PretrainConfig, flags.FLAGS.config)), "data": data}


def _define_flags() -> None:
    config_flags.DEFINE_config_file("config", str(_BASE), "flops: pretraining config with model and sizes.")
    flags.DEFINE_list("shards", [], "data: shard sets to read.")
    flags.DEFINE_integer("workers", 0, "data: also measure this many worker processes.", lower_bound=0)
    flags.DEFINE_float("seconds", 60.0, "data: time for all rows together.", lower_bound=1.0)


def main(argv: list[str]) -> None:
    if len(argv) != 2 or argv[1] not in SUBJECTS:
        raise InputError(f"say what to measure: python -m infmae_jax.bench {'|'.join(SUBJECTS)}")
    print(json.dumps(SUBJECTS[argv[1]](), indent=1))


if __name__ == "__main__":
    _define_flags()
    run_command(main)

"""Measurements: python -m infmae_jax.bench SUBJECT [flags]. A table on standard error, JSON on standard output.

flops       operations of a training step by stage, on visible patches and as published: XLA's count and one by hand
step        the training step: images/s, MFU, memory, compile time; with --torch in turns with PyTorch
profile     where the step's time goes: by kind of work, by part of the model, the slowest operations
kernels     depthwise convolutions, placing and taking tokens, attention: ways to compute them
features    dense features of whole images; with --torch in turns with PyTorch
data        the input pipeline, its parts, and the classic one: --shards, --workers, --seconds
end_to_end  the training loop on shards: share of time that it waits for data
memory      device memory against the published way, and the largest batch that fits
growth      images/s over batch size, image size and masking stride, as a plot too: --plot
overhead    what checkpoints and observability cost
scaling     bytes exchanged and memory a device on meshes of up to 256 devices, and what networks make of that: --meshes
all         each of them

--quick shrinks model and sizes until a CPU runs it in seconds. The figures then say nothing; that it runs does.
"""

from __future__ import annotations

import dataclasses
import json
import os
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
from absl import flags
from ml_collections import config_flags

from data_pipelines.commands import run_command
from data_pipelines.errors import InputError
from infmae_jax.benchmarks.end_to_end import end_to_end
from infmae_jax.benchmarks.features import features
from infmae_jax.benchmarks.flops import flops
from infmae_jax.benchmarks.growth import Range, growth
from infmae_jax.benchmarks.data import data
from infmae_jax.benchmarks.kernels import kernels
from infmae_jax.benchmarks.memory import memory
from infmae_jax.benchmarks.overhead import overhead
from infmae_jax.benchmarks.profile import profile
from infmae_jax.benchmarks.report import on_accelerator, text
from infmae_jax.benchmarks.scaling import MESHES, QUICK_MESHES, parse_meshes, scaling
from infmae_jax.benchmarks.step import TORCH_FORMS, Grid, step, step_against_torch
from infmae_jax.benchmarks.training import visible_tokens
from infmae_jax.models.infmae import VARIANTS
from infmae_jax.training.config import PretrainConfig, from_config

_BASE = Path(__file__).resolve().parents[1] / "configs" / "pretrain" / "inf30_base.py"
_QUICK_MODEL = dict(
    widths=(16, 24, 32), depths=(1, 1, 2), heads=2, decoder_width=32, decoder_depth=1, decoder_heads=2
)


def _define_flags() -> None:
    config_flags.DEFINE_config_file("config", str(_BASE), "Pretraining config with model and sizes.")
    flags.DEFINE_boolean("quick", False, "Shrink model and sizes until a CPU runs it in seconds.")
    flags.DEFINE_integer("rounds", 0, "Turns that each contender gets; 0: 7, or 3 with --quick.", lower_bound=0)
    flags.DEFINE_list("batch_sizes", [], "Images a batch; most subjects take the first. Empty: by subject and device.")
    flags.DEFINE_list("variants", [], f"step: of {', '.join(VARIANTS)}; empty: the config's model.")
    flags.DEFINE_list("dtypes", [], "Most subjects take the first. Empty: float32 on a CPU, else the config's.")
    flags.DEFINE_list("remat", ["off"], "step: off, on or both.")
    flags.DEFINE_boolean("torch", False, "step, features: measure PyTorch in turns with this project.")
    flags.DEFINE_list("torch_forms", list(TORCH_FORMS), "step --torch: which forms of the PyTorch model.")
    flags.DEFINE_float("memory_gib", 16.0, "memory, on a CPU: the budget that the largest batch must fit.")
    flags.DEFINE_list("image_sizes", ["224", "320", "448"], "growth: sides of images.")
    flags.DEFINE_list("strides", ["4", "2", "7"], "growth: masking strides, the usual one first.")
    flags.DEFINE_string("plot", "growth.png", "growth: where the plot goes; empty: none.")
    flags.DEFINE_list("shards", [], "data, end_to_end, overhead: shard sets to read; empty: synthetic scenes.")
    flags.DEFINE_integer("workers", 0, "data: also measure this many worker processes.", lower_bound=0)
    flags.DEFINE_float("seconds", 60.0, "data: time for all rows together.", lower_bound=1.0)
    flags.DEFINE_list("meshes", [], "scaling: data x fsdp x tensor, as 8, 4x2 or 4x1x2; empty: 1, 1x8, 8x8, 32x8.")
    flags.DEFINE_integer("steps", 0, "profile, end_to_end, overhead: steps a round; 0: 20, or 3.", lower_bound=0)


class _Settings:
    """Flags, with what depends on the device filled in."""

    def __init__(self):
        values = flags.FLAGS
        self.quick = values.quick
        self.rounds = values.rounds or (2 if self.quick else 7)
        self.steps = values.steps or (3 if self.quick else 20)
        config = from_config(PretrainConfig, values.config)
        shards = tuple(values.shards) or config.data.shards
        config = dataclasses.replace(config, data=dataclasses.replace(config.data, shards=shards))
        if self.quick:
            model = dataclasses.replace(config.model, **_QUICK_MODEL)
            data = dataclasses.replace(config.data, image_size=(64, 64), workers=0)
            config = dataclasses.replace(config, model=model, data=data)
        self.dtypes = values.dtypes or [config.model.dtype if on_accelerator() else "float32"]
        try:
            self.config = dataclasses.replace(config, model=dataclasses.replace(config.model, dtype=self.dtypes[0]))
        except ValueError as error:
            raise InputError(f"--dtypes={','.join(self.dtypes)}: {error}") from error

    def batches(self, on_cpu: int, accelerated: int) -> list[int]:
        """--batch_sizes, or the usual one of a subject."""
        usual = 4 if self.quick else accelerated if on_accelerator() else on_cpu
        return _integers("batch_sizes") or [usual]

    def batch(self, on_cpu: int, accelerated: int) -> int:
        return self.batches(on_cpu, accelerated)[0]


def _integers(flag: str) -> list[int]:
    texts = flags.FLAGS[flag].value
    if not all(text.isdigit() and int(text) > 0 for text in texts):
        raise InputError(f"--{flag}={','.join(texts)}: positive numbers separated by commas are expected")
    return [int(text) for text in texts]


def _step(s: _Settings) -> dict[str, Any]:
    switches, values = {"off": False, "on": True}, flags.FLAGS
    unknown = [text for text in values.remat if text not in switches]
    unknown += [name for name in values.variants if name not in VARIANTS]
    unknown += [form for form in values.torch_forms if form not in TORCH_FORMS]
    if unknown:
        raise InputError(f"--remat, --variants or --torch_forms: {unknown[0]!r} is unknown, see --help")
    if values.torch:
        return step_against_torch(s.config, s.batch(8, 256), values.torch_forms, s.rounds)
    grid = Grid(s.batches(8, 256), values.variants, s.dtypes, [switches[text] for text in values.remat])
    return step(s.config, grid, s.rounds)


def _growth(s: _Settings) -> dict[str, Any]:
    sizes, strides = (_integers(flag) for flag in ("image_sizes", "strides"))
    batches = _integers("batch_sizes") or ([64, 16, 32, 128, 256] if on_accelerator() else [4, 1, 2, 8])
    if s.quick:
        batches, sizes, strides = batches[:2], [64, 96], [4, 2]
    ranges = Range(tuple(batches), tuple(sizes), tuple(strides))
    return growth(s.config, ranges, s.rounds, Path(flags.FLAGS.plot) if flags.FLAGS.plot else None)


def _scaling(s: _Settings) -> dict[str, Any]:
    usual = QUICK_MESHES if s.quick else MESHES
    return scaling(s.config, parse_meshes(flags.FLAGS.meshes) or usual, s.batch(64, 64))


SUBJECTS: dict[str, Callable[[_Settings], dict[str, Any]]] = {
    "flops": lambda s: flops(s.config.model, s.config.data.image_size, visible_tokens(s.config), not s.quick),
    "step": _step,
    "profile": lambda s: profile(s.config, s.batch(8, 256), s.steps),
    "kernels": lambda s: kernels(s.config, s.batch(8, 256), s.rounds),
    "features": lambda s: features(s.config, s.batch(64, 256), s.rounds, flags.FLAGS.torch),
    "data": lambda s: data(s.config, flags.FLAGS.workers, 3.0 if s.quick else flags.FLAGS.seconds, s.quick),
    "end_to_end": lambda s: end_to_end(s.config, s.batch(8, 256), s.rounds, s.steps),
    "memory": lambda s: memory(s.config, s.batch(256, 256), flags.FLAGS.memory_gib),
    "growth": _growth,
    "overhead": lambda s: overhead(s.config, s.batch(8, 256), 1 if s.quick else s.rounds, s.steps, log_every=10),
    "scaling": _scaling,
}


def main(argv: list[str]) -> None:
    subjects = list(SUBJECTS) if argv[1:] == ["all"] else argv[1:]
    if len(argv) != 2 or subjects[0] not in SUBJECTS:
        raise InputError(f"say what to measure: python -m infmae_jax.bench {'|'.join(SUBJECTS)}|all")
    # So that PyTorch and child processes find memory too.
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    if flags.FLAGS.quick:  # compiling is most of the time then
        os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} --xla_backend_optimization_level=0"
    settings, results = _Settings(), []
    with tempfile.TemporaryDirectory(prefix="infmae-bench-cache-") as cache:
        jax.config.update("jax_compilation_cache_dir", cache)  # fresh: compile times are those of the first time
        for subject in subjects:
            since = time.perf_counter()
            results.append(SUBJECTS[subject](settings))
            results[-1]["measuring_took_seconds"] = round(time.perf_counter() - since, 1)
            print(text(results[-1]), end="\n\n", file=sys.stderr, flush=True)
    print(json.dumps(results[0] if len(argv) == 2 and argv[1] != "all" else results, indent=1))


if __name__ == "__main__":
    run_command(main, define_flags=_define_flags)

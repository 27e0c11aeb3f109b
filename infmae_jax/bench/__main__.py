"""Measurements: python -m infmae_jax.bench SUBJECT [flags]. A table on standard error, JSON on standard output.

flops       operations of a training step by stage, on visible patches and as published: XLA's count and one by hand
step        the training step: images/s, MFU, memory, compile time over --batch_sizes; what else varies is a key of the
            config (--config.data.image_size=320x320, --config.model.encoder.remat=true); with --torch in turns with
            PyTorch
forms       the step with every way to compute depthwise convolutions and attention, in turns, with --torch PyTorch too
profile     the operations of a step that take most time, by part of the model
features    dense features of whole images; with --torch in turns with PyTorch
segment, detect, small_target
            a fine-tuning task (--config of that task, --variant): images/s of training and prediction, and what
            evaluation takes of a run
data        the input pipeline, its parts, and the classic one: --shards, --workers, --seconds
all         each of them, the most telling first: --minutes (none begins later); one that fails does not stop the
            others

--output names a folder for JSON and tables, written after each subject.

--quick shrinks model and sizes until a CPU runs it in seconds. It only checks that the benchmark runs; ignore its
figures.
"""

import dataclasses
import functools
import json
import os
import sys
import tempfile
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any

import jax
from absl import flags

from configs import common
from data_pipelines.commands import run_command
from data_pipelines.errors import InputError
from data_pipelines.files import output_file
from infmae_jax.bench.data import data
from infmae_jax.bench.every import JSON_NAME, run_all
from infmae_jax.bench.features import features
from infmae_jax.bench.finetune import finetune
from infmae_jax.bench.flops import flops
from infmae_jax.bench.forms import forms, profile
from infmae_jax.bench.results import on_accelerator
from infmae_jax.bench.step import TORCH_FORMS, step, visible_tokens
from infmae_jax.models.config import VARIANTS, EncoderConfig, variant
from infmae_jax.tasks.finetune import FineTuneConfig
from infmae_jax.tasks.finetuned import KINDS
from infmae_jax.tasks.pretrain import PretrainConfig
from infmae_jax.training.config import define_config, from_config

_BASE = Path(__file__).resolve().parents[2] / "configs" / "pretrain" / "inf30_base.py"
_FINETUNING = {  # task -> its config for CPUs
    "segment": "configs.segment.masks_tiny_cpu",
    "detect": "configs.detect.boxes_tiny_cpu",
    "small_target": "configs.small_target.targets_tiny_cpu",
}


def _define_flags() -> None:
    asked = next((_FINETUNING[word] for word in sys.argv[1:] if word in _FINETUNING), "")
    default = _BASE.parents[2] / f"{asked.replace('.', '/')}.py" if asked else _BASE
    form = ":smoke" if asked and "--quick" in sys.argv else ""
    define_config(f"{default}{form}", "Config of pretraining, or of the fine-tuning task.")
    flags.DEFINE_boolean("quick", False, "Shrink model and sizes until a CPU runs it in seconds.")
    flags.DEFINE_integer("rounds", 0, "Turns that each contender gets; 0: 7, or 2 with --quick.", lower_bound=0)
    flags.DEFINE_list("batch_sizes", [], "Images per batch; most subjects take the first. Empty: by subject, device.")
    flags.DEFINE_string("dtype", "", "Of the computation. Empty: float32 on a CPU, else the config's.")
    flags.DEFINE_enum("variant", None, list(VARIANTS), "Model to measure in place of the config's.")
    flags.DEFINE_boolean("torch", False, "step, forms, features: measure PyTorch in turns with this project.")
    flags.DEFINE_multi_enum("torch_forms", list(TORCH_FORMS), TORCH_FORMS, "--torch: forms of the PyTorch model.")
    flags.DEFINE_list("shards", [], "data: shard sets to read; without any, synthetic scenes are made.")
    flags.DEFINE_integer("workers", 0, "data: also measure this many worker processes.", lower_bound=0)
    flags.DEFINE_float("minutes", 0.0, "all: no subject begins later; 0: no limit.", lower_bound=0.0)
    flags.DEFINE_string("output", "", "Folder for bench.json and bench.txt, written anew after every subject.")
    flags.DEFINE_float("seconds", 60.0, "data: time for all rows together.", lower_bound=1.0)


class _Settings:
    """Flags, with what depends on the device filled in; `all`: every subject is measured."""

    def __init__(self, all: bool):
        values, self.all = flags.FLAGS, all
        self.quick = values.quick
        self.rounds = values.rounds or (2 if self.quick else 7)
        self.torch_forms = values.torch_forms if values.torch else ()

    @functools.cached_property
    def config(self) -> PretrainConfig:
        values = flags.FLAGS
        config = from_config(PretrainConfig, values.config)
        data = dataclasses.replace(config.data, shards=tuple(values.shards) or config.data.shards)
        model = variant(values.variant) if values.variant else config.model
        config = dataclasses.replace(config, model=model, data=data)
        if self.quick:
            config = from_config(PretrainConfig, common.pretrain(config, "smoke"))
        model = dataclasses.replace(config.model, encoder=_computed(config.model.encoder))
        return dataclasses.replace(config, model=model)

    def finetuning(self, task: str) -> FineTuneConfig:
        """--config, which must be of this task; among `all` subjects, the task's config for CPUs."""
        values = flags.FLAGS.config
        if self.all:
            values = import_module(_FINETUNING[task]).get_config("smoke" if self.quick else "")
        elif values.get("task") != task:
            raise InputError(f"--config is not of the task {task}: name such a config, or leave --config out")
        config = from_config(KINDS[task].config, values)
        encoder, name = _computed(config.encoder), flags.FLAGS.variant or config.variant
        return dataclasses.replace(config, encoder=encoder, variant=name)

    def batches(self, on_cpu: int, accelerated: int) -> list[int]:
        """--batch_sizes, or the usual one of a subject."""
        texts = flags.FLAGS.batch_sizes or [str(4 if self.quick else accelerated if on_accelerator() else on_cpu)]
        if not all(text.isdigit() and int(text) > 0 for text in texts):
            raise InputError(f"--batch_sizes={','.join(texts)}: positive numbers separated by commas are expected")
        return [int(text) for text in texts]


def _computed(encoder: EncoderConfig) -> EncoderConfig:
    """With --dtype, or what is usual on this device."""
    dtype = flags.FLAGS.dtype or (encoder.dtype if on_accelerator() else "float32")
    try:
        return dataclasses.replace(encoder, dtype=dtype)
    except ValueError as error:
        raise InputError(f"--dtype={dtype}: {error}") from error


def _finetune(task: str, s: _Settings) -> dict[str, Any]:
    config = s.finetuning(task)
    return finetune(KINDS[task], config, s.batches(config.data.batch_size, config.data.batch_size)[0], s.rounds)


SUBJECTS: dict[str, Callable[[_Settings], dict[str, Any]]] = {
    "flops": lambda s: flops(s.config.model, s.config.data.image_size, visible_tokens(s.config), not s.quick),
    "step": lambda s: step(s.config, s.batches(8, 256), s.rounds, s.torch_forms),
    "forms": lambda s: forms(s.config, s.batches(8, 256)[0], s.rounds, s.torch_forms),
    "profile": lambda s: profile(s.config, s.batches(8, 256)[0]),
    "features": lambda s: features(s.config, s.batches(64, 256)[0], s.rounds, flags.FLAGS.torch),
    **{task: functools.partial(_finetune, task) for task in _FINETUNING},
    "data": lambda s: data(s.config, flags.FLAGS.workers, 3.0 if s.quick else flags.FLAGS.seconds, s.quick),
}


def main(argv: list[str]) -> int:
    """Exit code 0, or 1 where a subject of `all`, or the comparison with PyTorch's step, failed."""
    if len(argv) != 2 or argv[1] not in (*SUBJECTS, "all"):
        raise InputError(f"say what to measure: python -m infmae_jax.bench {'|'.join(SUBJECTS)}|all")
    # So that PyTorch and child processes find memory too.
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    if flags.FLAGS.quick:  # compiling is most of the time then
        os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} --xla_backend_optimization_level=0"
    every, folder = argv[1] == "all", None
    if flags.FLAGS.output:
        folder = output_file(Path(flags.FLAGS.output) / JSON_NAME, "output").parent
    settings, names = _Settings(every), SUBJECTS if every else argv[1:]
    with tempfile.TemporaryDirectory(prefix="infmae-bench-cache-") as cache:
        jax.config.update("jax_compilation_cache_dir", cache)  # fresh: compile times are those of the first time
        subjects = {name: functools.partial(SUBJECTS[name], settings) for name in names}
        results = run_all(subjects, flags.FLAGS.minutes, folder)
    print(json.dumps(results if every else results[0], indent=1))
    return int(any(result.get("failed") for result in results))


if __name__ == "__main__":
    run_command(main, define_flags=_define_flags)

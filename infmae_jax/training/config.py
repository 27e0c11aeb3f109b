"""ConfigDict stops here: configs become nested frozen dataclasses, and every mistake names its key.

Config files build a dataclass and return `to_config` of it; commands turn the ConfigDict, with the overrides of the
command line, back with `from_config`.
"""

from __future__ import annotations

import dataclasses
import difflib
import types
import typing
from collections.abc import Mapping
from typing import Any, TypeVar

from ml_collections import ConfigDict

from data_pipelines.errors import InputError
from data_pipelines.pipeline import PipelineConfig
from infmae_jax.models.config import InfMAEConfig, variant
from infmae_jax.training.duration import in_steps

T = TypeVar("T")


@dataclasses.dataclass(frozen=True)
class OptimizerConfig:
    """AdamW with per-step linear warm-up and half-cosine decay to zero (InfMAE, training recipe).

    Attributes:
      base_learning_rate: for 256 images; the peak is base_learning_rate * batch_size / 256.
      warmup: duration of the linear warm-up.
      weight_decay: decoupled; not applied to biases and other one-dimensional parameters.
      b1, b2: AdamW's moment decays.
      clip_norm: clip gradients to this global norm; 0 is off.
      accumulate: micro-batches a step; the batch size stays the global one.
      mu_dtype: of AdamW's first moment, "float32" or "bfloat16" (a quarter of the training state less).
    """

    base_learning_rate: float = 1.5e-4
    warmup: str = "40 epochs"
    weight_decay: float = 0.05
    b1: float = 0.9
    b2: float = 0.95
    clip_norm: float = 0.0
    accumulate: int = 1
    mu_dtype: str = "float32"


@dataclasses.dataclass(frozen=True)
class MeshConfig:
    """Devices along each mesh axis; one of them may be -1, "the rest".

    Attributes:
      data: replicates parameters; every device has its own part of the batch.
      fsdp: shards parameters and optimizer state too; gathered when used.
      tensor: shards the kernels of attention and MLPs and what they compute.
      slices: groups of devices that only the slower network between slices joins; the `data` axis spans them.
    """

    data: int = -1
    fsdp: int = 1
    tensor: int = 1
    slices: int = 1


@dataclasses.dataclass(frozen=True)
class DistributedConfig:
    """How the processes of a job find each other; values may differ between hosts.

    Attributes:
      method: "none" (one process), "tpu" (Cloud TPU, also on GKE), "slurm", "open_mpi", or "addresses" (the three
        keys below).
      coordinator: host:port of process 0, reachable from all hosts.
      num_processes, process_id: of the job; this process, from 0.
      timeout_seconds: how long to wait for all hosts at the start.
      heartbeat_seconds: a process silent for so long counts as lost, and the others end.
      stall_seconds: without a step of any process for so long, the job ends and names who is behind; 0 is never.
      notice_url: a URL that answers TRUE when this machine is about to be taken away; empty: only signals count.
    """

    method: str = "none"
    coordinator: str = ""
    num_processes: int = 1
    process_id: int = 0
    timeout_seconds: int = 300
    heartbeat_seconds: int = 100
    stall_seconds: int = 900
    notice_url: str = ""


@dataclasses.dataclass(frozen=True)
class GuardConfig:
    """What happens when numbers go wrong. An update with a non-finite loss or gradient is always skipped.

    Attributes:
      rollback_after: so many skipped updates in a row go back to the last checkpoint, with a new data order.
      max_rollbacks: after so many, the run stops.
      spike_factor: also skip updates whose loss is above this multiple of its running mean; 0 is off.
      spike_warmup: steps before the running mean counts.
    """

    rollback_after: int = 10
    max_rollbacks: int = 3
    spike_factor: float = 0.0
    spike_warmup: str = "200 steps"


@dataclasses.dataclass(frozen=True)
class ObserveConfig:
    """What a run shows of itself, besides metrics.jsonl, events.jsonl, TensorBoard and pictures.

    Attributes:
      wandb_project: Weights & Biases project; empty is off.
      prometheus_file: a .prom file with the latest values for node_exporter, rewritten every 5 s; empty is off.
      profile_steps: "a-b" or "a": a profiler trace of these steps, on all hosts, in RUN/profile.
      layer_norms_every: duration between logs of every layer's parameter and gradient norm; "0 steps" is never.
    """

    wandb_project: str = ""
    prometheus_file: str = ""
    profile_steps: str = ""
    layer_norms_every: str = "0 steps"


@dataclasses.dataclass(frozen=True)
class EmbeddedConfig:
    """The embedded synthetic data set, made when `images` > 0: pretraining data, and a labelled set to probe with."""

    images: int = 0
    height: int = 256
    width: int = 320
    probe_images: int = 0


@dataclasses.dataclass(frozen=True)
class PretrainConfig:
    """Everything that defines a pretraining run.

    Attributes:
      seed: of initialisation; data have their own (`data.seed`).
      duration: of the whole run, e.g. "400 epochs".
      log_every, checkpoint_every, picture_every: durations; "0 steps" is never.
      keep_checkpoints: the latest n are kept.
      keep_best: the n checkpoints with the lowest loss (mean since the one before) are kept too.
      keep_every: duration; checkpoints at its multiples are kept for good; "0 steps": none.
      on_save_failure: "stop", or "continue" without the checkpoint (disk full, folder gone); earlier ones are intact.
      init_from: a run folder whose weights start this run; empty: random.
      colormap: of pictures, "inferno" or "gray".
      compilation_cache: folder for compiled programs, so that a restart need not compile again; empty is off.
    """

    seed: int = 0
    model: InfMAEConfig = variant("base")
    data: PipelineConfig = PipelineConfig()
    optimizer: OptimizerConfig = OptimizerConfig()
    mesh: MeshConfig = MeshConfig()
    duration: str = "400 epochs"
    log_every: str = "50 steps"
    checkpoint_every: str = "1 epochs"
    picture_every: str = "10 epochs"
    keep_checkpoints: int = 3
    keep_best: int = 0
    keep_every: str = "0 steps"
    on_save_failure: str = "stop"
    init_from: str = ""
    colormap: str = "inferno"
    compilation_cache: str = "~/.cache/infmae/compiled"
    distributed: DistributedConfig = DistributedConfig()
    guards: GuardConfig = GuardConfig()
    observe: ObserveConfig = ObserveConfig()
    embedded: EmbeddedConfig = EmbeddedConfig()

    def __post_init__(self):
        durations = (
            self.duration, self.optimizer.warmup, self.log_every, self.checkpoint_every, self.picture_every,
            self.keep_every, self.guards.spike_warmup, self.observe.layer_norms_every,
        )  # fmt: skip
        for duration in durations:
            in_steps(duration, batch_size=1, num_examples=1, total_steps=1)


# Keys that do not change what a run computes; all others must stay as they are when a run is resumed. Shard sets may
# move: their fingerprints are compared.
FREE_KEYS = (
    "data.shards", "data.workers", "data.threads", "data.prefetch", "data.cache", "data.max_corrupt", "mesh.",
    "log_every", "checkpoint_every", "picture_every", "keep_", "on_save_failure", "colormap", "compilation_cache",
    "distributed.", "observe.",
)  # fmt: skip


def to_config(value: Any) -> ConfigDict:
    """A dataclass as ConfigDict. Tuples of strings become comma-separated text, so that flags can set them."""
    out = ConfigDict()
    for field, hint in _fields(type(value)).items():
        item = getattr(value, field)
        if dataclasses.is_dataclass(item):
            item = to_config(item)
        elif hint == tuple[str, ...]:
            item = ",".join(item)
        out[field] = item
    return out


def from_config(cls: type[T], config: Mapping[str, Any], path: str = "") -> T:
    """A mapping (ConfigDict or parsed JSON) as dataclass `cls`; keys left out take their defaults.

    Raises:
      InputError: an unknown key (with the nearest known one), a value of the wrong type or out of range.
    """
    fields = _fields(cls)
    try:
        keys = list(config)
    except OSError as error:  # config_flags reports a file that it could not load on first use
        raise InputError(f"config file cannot be loaded: {str(error).splitlines()[-1].strip()}") from error
    for key in keys:
        if key not in fields:
            near = difflib.get_close_matches(key, fields, n=1)
            hint = f"did you mean {path}{near[0]}?" if near else f"known keys are {', '.join(fields)}"
            raise InputError(f"config key {path}{key} is unknown; {hint}")
    values = {key: _convert(fields[key], config[key], f"{path}{key}") for key in keys}
    try:
        return cls(**values)
    except InputError:
        raise
    except ValueError as error:
        raise InputError(f"config {path.rstrip('.') or cls.__name__}: {error}") from error


def flat(settings: Mapping[str, Any], path: str = "") -> dict[str, str]:
    """A nested config as dotted keys and text values."""
    found: dict[str, str] = {}
    for key, value in settings.items():
        nested = isinstance(value, (Mapping, ConfigDict))
        found |= flat(value, f"{path}{key}.") if nested else {f"{path}{key}": str(value)}
    return found


def _fields(cls: type) -> dict[str, Any]:
    hints = typing.get_type_hints(cls)
    return {field.name: hints[field.name] for field in dataclasses.fields(cls)}


def _convert(hint: Any, value: Any, path: str) -> Any:
    if dataclasses.is_dataclass(hint):
        return from_config(hint, value, f"{path}.")
    if typing.get_origin(hint) in (typing.Union, types.UnionType):
        if value is None:
            return None
        hint = next(a for a in typing.get_args(hint) if a is not type(None))
    if hint == tuple[str, ...] and isinstance(value, str):
        return tuple(part.strip() for part in value.split(",") if part.strip())
    if hint is tuple or typing.get_origin(hint) is tuple:
        if isinstance(value, (tuple, list)):
            return _as_tuple(value)
    elif hint is float and isinstance(value, (int, float)) and not isinstance(value, bool):
        return float(value)
    elif hint is int and isinstance(value, bool):
        pass
    elif isinstance(value, hint):
        return value
    raise InputError(f"config key {path} must be {getattr(hint, '__name__', hint)}, got {value!r}")


def _as_tuple(value: Any) -> Any:
    return tuple(_as_tuple(v) for v in value) if isinstance(value, (tuple, list)) else value


def differences(old: Mapping[str, Any], new: Mapping[str, Any], path: str = "") -> list[str]:
    """Readable lines of the keys whose values differ, `FREE_KEYS` left out."""
    lines = []
    for key in sorted(set(old) | set(new)):
        where = f"{path}{key}"
        if where.startswith(FREE_KEYS):
            continue
        a, b = old.get(key), new.get(key)
        if isinstance(a, Mapping) and isinstance(b, Mapping):
            lines += differences(a, b, f"{where}.")
        elif _as_tuple(a) != _as_tuple(b):
            lines.append(f"{where} was {a!r}, is {b!r}")
    return lines

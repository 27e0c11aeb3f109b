"""ConfigDict stops here: configs become nested frozen dataclasses, and every mistake names its key.

Config files build a dataclass and return `to_config` of it; commands turn the ConfigDict, with the overrides of the
command line, back with `from_config`. Ranges of numbers are annotations, in the notation of intervals:
`b1: Annotated[float, "[0, 1)"]`. Those of texts list what is allowed: `Annotated[str, "auto, duration"]`.
"""

import dataclasses
import difflib
import os
import re
import reprlib
import sys
import types
import typing
from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, TypeVar

import jax
from absl import flags
from ml_collections import ConfigDict, config_dict, config_flags

from data_pipelines.errors import InputError
from infmae_jax.models.config import within
from infmae_jax.training.duration import in_steps

T = TypeVar("T")
Count = Annotated[int, "[0, inf)"]
Seconds = Annotated[int, "[1, inf)"]
Duration = Annotated[str, "duration"]


@dataclasses.dataclass(frozen=True)
class OptimizerConfig:
    """Optimizer with per-step linear warm-up and decay to zero (AdamW and half a cosine in the recipe of InfMAE).

    Attributes:
      name: "adamw", or "lars" for linear probes: momentum b1, each kernel's step a thousandth of its own norm times the
        learning rate.
      base_learning_rate: for 256 images; the peak is base_learning_rate * batch_size / 256. With "lars", whose steps
        do not grow with the batch, the peak itself.
      warmup: duration of the linear warm-up.
      schedule: of the decay, "half_cosine" or "polynomial": (1 - share of it done) ** power.
      weight_decay: decoupled; not applied to biases and other one-dimensional parameters.
      b1, b2: AdamW's moment decays.
      clip_norm: clip gradients to this global norm; 0 is off.
      accumulate: micro-batches a step; the batch size stays the global one.
      mu_dtype: of AdamW's first moment, "float32" or "bfloat16" (a quarter of the training state less).
      ema: decay of an exponential moving average of the parameters, which is then what is evaluated, chosen as best,
        exported and used by others; 0 is off. After n updates the decay is at most (1 + n) / (10 + n).
    """

    name: Annotated[str, "adamw, lars"] = "adamw"
    base_learning_rate: Annotated[float, "[0, inf)"] = 1.5e-4
    warmup: Duration = "40 epochs"
    schedule: Annotated[str, "half_cosine, polynomial"] = "half_cosine"
    power: Annotated[float, "(0, inf)"] = 1.0
    weight_decay: Annotated[float, "[0, inf)"] = 0.05
    b1: Annotated[float, "[0, 1)"] = 0.9
    b2: Annotated[float, "[0, 1)"] = 0.95
    clip_norm: Annotated[float, "[0, inf)"] = 0.0
    accumulate: Annotated[int, "[1, inf)"] = 1
    mu_dtype: Annotated[str, "float32, bfloat16"] = "float32"
    ema: Annotated[float, "[0, 1)"] = 0.0


@dataclasses.dataclass(frozen=True)
class MeshConfig:
    """Devices along each mesh axis; one of them may be -1, "the rest".

    Attributes:
      data: replicates parameters; every device has its own part of the batch.
      fsdp: shards parameters and optimizer state too; gathered when used.
      tensor: shards the kernels of MLPs and what they compute.
      slices: groups of devices that only the slower network between slices joins; the `data` axis spans them.
    """

    data: Annotated[int, "[-1, inf)"] = -1
    fsdp: Annotated[int, "[-1, inf)"] = 1
    tensor: Annotated[int, "[-1, inf)"] = 1
    slices: Annotated[int, "[1, inf)"] = 1


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

    method: Annotated[str, "none, tpu, slurm, open_mpi, addresses"] = "none"
    coordinator: str = ""
    num_processes: Annotated[int, "[1, inf)"] = 1
    process_id: Count = 0
    timeout_seconds: Seconds = 300
    heartbeat_seconds: Seconds = 100
    stall_seconds: Count = 900
    notice_url: str = ""


@dataclasses.dataclass(frozen=True)
class GuardConfig:
    """What happens when numbers go wrong. An update with a non-finite loss or gradient is always skipped.

    Attributes:
      rollback_after: so many skipped updates in a row go back to the last checkpoint, with a new data order.
      max_rollbacks: after so many, over all restarts, the run stops.
      spike_factor: also skip updates whose loss is above this multiple of its running mean; 0 is off.
      spike_warmup: steps before the running mean counts.
    """

    rollback_after: Annotated[int, "[1, inf)"] = 10
    max_rollbacks: Count = 3
    spike_factor: Annotated[float, "[0, inf)"] = 0.0
    spike_warmup: Duration = "200 steps"


@dataclasses.dataclass(frozen=True)
class ObserveConfig:
    """What a run shows of itself, besides metrics.jsonl, events.jsonl, TensorBoard and pictures.

    Attributes:
      profile_steps: "a-b" or "a": a profiler trace of these steps, on all hosts, in RUN/profile.
    """

    profile_steps: str = ""


@dataclasses.dataclass(frozen=True)
class RunConfig:
    """What every run has, whatever its task; a task's config extends it.

    Attributes:
      seed: of initialisation; data have their own.
      duration: of the whole run, e.g. "400 epochs".
      log_every, checkpoint_every: durations; "0 steps" is never.
      keep_checkpoints: the latest n are kept.
      keep_best: the n best checkpoints are kept too.
      best_metric, best_mode: what is best: the name of an evaluator's result, or "loss", the mean training loss since
        the checkpoint before; "min" or "max".
      keep_every: duration; checkpoints at its multiples are kept for good; "0 steps": none.
      on_save_failure: "stop", or "continue" without the checkpoint (disk full, folder gone); earlier ones are intact.
      compilation_cache: folder for compiled programs, so that a restart need not compile again; empty is off.
    """

    seed: Annotated[int, "[0, 4294967295]"] = 0
    optimizer: OptimizerConfig = OptimizerConfig()
    mesh: MeshConfig = MeshConfig()
    duration: Duration = "400 epochs"
    log_every: Duration = "50 steps"
    checkpoint_every: Duration = "1 epochs"
    keep_checkpoints: Annotated[int, "[1, inf)"] = 3
    keep_best: Count = 0
    best_metric: str = "loss"
    best_mode: Annotated[str, "min, max"] = "min"
    keep_every: Duration = "0 steps"
    on_save_failure: Annotated[str, "stop, continue"] = "stop"
    compilation_cache: str = "~/.cache/infmae/compiled"
    distributed: DistributedConfig = DistributedConfig()
    guards: GuardConfig = GuardConfig()
    observe: ObserveConfig = ObserveConfig()

    # Beginnings of keys that do not change what a run computes; all others must stay as they are when it is resumed.
    FREE_KEYS: ClassVar[tuple[str, ...]] = (
        "mesh.", "log_every", "checkpoint_every", "keep_", "best_", "on_save_failure", "compilation_cache",
        "distributed.", "observe.",
    )  # fmt: skip


def use_compilation_cache(config: RunConfig) -> None:
    """Keeps compiled programs where the config says, unless the environment says where."""
    if config.compilation_cache and not os.environ.get("JAX_COMPILATION_CACHE_DIR"):
        jax.config.update("jax_compilation_cache_dir", os.path.expanduser(config.compilation_cache))
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)  # a restart meets many small programs


def define_config(default: os.PathLike, help_string: str) -> None:
    """The flag `--config=FILE.py`; the command line can override every key (`--config.optimizer.clip_norm=1.0`).

    Raises:
      InputError: a key of the command line that the config does not have; the message names the nearest one.
    """
    name = str(default)
    for argument, behind in zip(sys.argv[1:], [*sys.argv[2:], name]):
        if found := re.fullmatch(r"--?config(?:=(.*))?", argument):
            name = behind if found[1] is None else found[1]
    alone = flags.FlagValues()
    try:
        config_flags.DEFINE_config_file("config", name, flag_values=alone, sys_argv=[""])
        alone([""])
        known = flat(alone.config)
    except Exception as error:  # config files are code: whatever they raise is the user's to mend
        reason = (str(error).strip().splitlines() or [type(error).__name__])[-1].strip()
        raise InputError(f"config file {name} cannot be loaded: {reason}") from error
    for argument in sys.argv[1:]:
        if found := re.match(r"--?(?:no)?config\.([^=]*)", argument):
            _require_key(known, found[1])
    config_flags.DEFINE_config_file("config", str(default), help_string)


def _require_key(known: Mapping[str, Any], key: str, path: str = "") -> None:
    """InputError, with the nearest key, where `key` is not one of those that are known in the section `path`."""
    if key in known:
        return
    if inside := [name for name in known if name.startswith(f"{key}.")]:
        raise InputError(f"config key {key} is a section: set its keys one by one, for example {inside[0]}")
    last = key.rpartition(".")[2]
    same = [name for name in known if name.rpartition(".")[2] == last]
    near = difflib.get_close_matches(key, same or known, n=1, cutoff=0.0 if same else 0.6)
    names = ", ".join(dict.fromkeys(name.partition(".")[0] for name in known))
    hint = f"did you mean {path}{near[0]}?" if near else f"known are {names}"
    raise InputError(f"config key {path}{key} is unknown; {hint}")


def to_config(value: Any) -> ConfigDict:
    """A dataclass as ConfigDict. Tuples of strings become comma-separated text where it would be read as the same, and
    what is None a placeholder of its type, so that flags can set them."""
    out = ConfigDict()
    for field, hint in _fields(type(value)).items():
        item = getattr(value, field)
        if dataclasses.is_dataclass(item):
            item = to_config(item)
        elif hint == tuple[str, ...] and all(text and "," not in text and text == text.strip() for text in item):
            item = ",".join(item)
        elif item is None:
            kind = _without_none(hint)
            item = config_dict.placeholder(typing.get_origin(kind) or kind)
        out[field] = item
    return out


def from_config(cls: type[T], config: Mapping[str, Any], path: str = "") -> T:
    """A mapping (ConfigDict or parsed JSON) as dataclass `cls`; keys left out take their defaults.

    Raises:
      InputError: a config of fine-tuning for another `cls`, an unknown key (with the nearest known one), a value of the
        wrong type or out of range.
    """
    fields = _fields(cls)
    if not isinstance(config, (Mapping, ConfigDict)):
        name = path.rstrip(".") or cls.__name__
        raise InputError(f"config {name} must be a section of keys, got {reprlib.repr(config)}")
    if not path and "task" in config and "task" not in fields:
        raise InputError(f"config is of fine-tuning (task {reprlib.repr(config['task'])}): use infmae finetune for it")
    for key in config:
        _require_key(fields, key, path)
    values = {key: _convert(fields[key], config[key], f"{path}{key}") for key in config}
    try:
        return cls(**values)
    except InputError:
        raise
    except ValueError as error:
        raise InputError(f"config {path.rstrip('.') or cls.__name__}: {str(error)[:500]}") from error


def flat(settings: Mapping[str, Any], path: str = "") -> dict[str, str]:
    """A nested config as dotted keys and text values; lists count as tuples, as JSON has only those."""
    found: dict[str, str] = {}
    for key, value in settings.items():
        nested = isinstance(value, (Mapping, ConfigDict))
        found |= flat(value, f"{path}{key}.") if nested else {f"{path}{key}": str(_as_tuple(value))}
    return found


def binding(settings: Mapping[str, Any], free_keys: tuple[str, ...]) -> dict[str, str]:
    """`flat` without the keys that begin with one of `free_keys`: what defines a run."""
    return {key: value for key, value in flat(settings).items() if not key.startswith(free_keys)}


def differences(old: Mapping[str, Any], new: Mapping[str, Any], free_keys: tuple[str, ...]) -> list[str]:
    """Readable lines of the keys whose values differ, the free ones left out."""
    old, new = binding(old, free_keys), binding(new, free_keys)
    return [f"{key} was {old.get(key)}, is {new.get(key)}" for key in sorted(old | new) if old.get(key) != new.get(key)]


def _fields(cls: type) -> dict[str, Any]:
    hints = typing.get_type_hints(cls, include_extras=True)
    return {field.name: hints[field.name] for field in dataclasses.fields(cls)}


def _without_none(hint: Any) -> Any:
    """int of int | None; other types as they are."""
    if typing.get_origin(hint) in (typing.Union, types.UnionType):
        return next(kind for kind in typing.get_args(hint) if kind is not type(None))
    return hint


def _convert(hint: Any, value: Any, path: str) -> Any:
    if dataclasses.is_dataclass(hint):
        return from_config(hint, value, f"{path}.")
    if value is None and _without_none(hint) is not hint:
        return None
    hint = _without_none(hint)
    if typing.get_origin(hint) is Annotated:
        hint, allowed = typing.get_args(hint)
        value = _convert(hint, value, path)
        if value != "duration" and within(value, allowed):
            return value
        if "duration" not in allowed:
            relation = "one of" if hint is str else "in"
            raise InputError(f"config key {path}={reprlib.repr(value)} must be {relation} {allowed}")
        try:
            in_steps(value, batch_size=1, num_examples=1, total_steps=1)  # says what is wrong with it
        except InputError as error:
            raise InputError(f"config key {path}: {error}") from error
        return value
    if hint == tuple[str, ...] and isinstance(value, str):
        return tuple(part.strip() for part in value.split(",") if part.strip())
    if hint is tuple or typing.get_origin(hint) is tuple:
        return _convert_tuple(hint, value, path)
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if isinstance(value, hint) and (hint is bool or not isinstance(value, bool)):
        return value
    raise InputError(f"config key {path} must be {getattr(hint, '__name__', hint)}, got {reprlib.repr(value)}")


def _convert_tuple(hint: Any, value: Any, path: str) -> tuple:
    """A sequence, or a text such as 96x96, as a tuple of the length and kinds that `hint` says."""
    kinds = typing.get_args(hint)
    if kinds != (str, ...) and isinstance(value, (tuple, list)) and len(value) == 1 and isinstance(value[0], str):
        (value,) = value  # what a flag makes of 96x96
    if isinstance(value, str) and re.fullmatch(r"\d+(x\d+)+", value):
        value = [int(part) for part in value.split("x")]
    if not isinstance(value, (tuple, list)) or (... not in kinds and kinds and len(value) != len(kinds)):
        names = ", ".join("..." if kind is ... else getattr(kind, "__name__", str(kind)) for kind in kinds)
        raise InputError(f"config key {path} must be ({names or 'a tuple'}), got {reprlib.repr(value)}")
    if not kinds:
        return _as_tuple(value)
    return tuple(_convert(kinds[0 if ... in kinds else i], item, f"{path}[{i}]") for i, item in enumerate(value))


def _as_tuple(value: Any) -> Any:
    return tuple(_as_tuple(v) for v in value) if isinstance(value, (tuple, list)) else value

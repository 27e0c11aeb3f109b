"""What a run folder is, besides its checkpoints and logs: whose it is, what the run was asked to do, what exactly ran.

RUN/config.json     the config, whatever the source of the weights: sections `model` and `data`, and what the task adds
RUN/run_info.json   what exactly ran: parameters, devices, versions, data set
RUN/.lock           keeps other runs out while one works there
"""

import contextlib
import errno
import fcntl
import importlib.metadata
import json
import os
import platform
import re
import socket
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO

import jax
from absl import logging

from data_pipelines.errors import InputError, refusing
from data_pipelines.files import atomic_write, local_path, read_regular, require_writable, writing
from infmae_jax.training.config import differences, flat, to_config
from infmae_jax.training.program import Program
from infmae_jax.training.sharding import path_text

CONFIG_NAME, RUN_INFO_NAME, LOCK_NAME = "config.json", "run_info.json", ".lock"
_PACKAGES = ("infmae-jax", "jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain", "array-record", "numpy")
_LARGEST_JSON = 1 << 26  # bytes
_NAMES_OF_HOSTS = ("coordinator", "notice_url")  # keys of `distributed`


# ---- config.json ----------------------------------------------------------------------------------------------------


def read_config(run: str | Path) -> dict[str, Any]:
    """The config that a run folder was made with; InputError when `run` is not a run folder."""
    path = Path(run) / CONFIG_NAME
    if not path.is_file():
        why = f"it has no {CONFIG_NAME}" if Path(run).is_dir() else "there is no such folder"
        raise InputError(f"{run} is not a run folder: {why}; give the --workdir of a run")
    return read_object(path)


def read_object(path: Path) -> dict[str, Any]:
    """The object that a JSON file holds; InputError, in one line, when it holds none."""
    remedy = "restore it or start a new run"
    with refusing(f"{path} cannot be read as JSON", remedy, OSError, ValueError, RecursionError):
        found = json.loads(read_regular(path, _LARGEST_JSON))
        if not isinstance(found, dict):
            raise ValueError("it holds no object")
        return found


def run_path(given: str | os.PathLike, task: str) -> Path:
    """The absolute path of a run folder to make or to go on with, checked before any work.

    Raises:
      InputError: it is a URL, a file, not writable, or the folder of something else than a run of this task.
    """
    folder = Path(local_path(given, "--workdir"))
    if folder.exists() and not folder.is_dir():
        raise InputError(f"--workdir={folder} is a file: name a folder")
    require_writable(folder)
    if (folder / CONFIG_NAME).is_file():
        _require_task(folder, read_config(folder), task)
    return folder


def _require_task(folder: Path, config: Mapping[str, Any], task: str) -> None:
    if (found := config.get("task")) != task:
        what = f"a run of the task {found!r}" if isinstance(found, str) else "a checkpoint from elsewhere"
        raise InputError(f"{folder} holds {what}, not of {task!r}; use another --workdir")


def write_object(path: Path, value: Mapping[str, Any]) -> None:
    """Writes what `read_object` reads, whole or not at all."""
    with atomic_write(path) as partial:
        partial.write_text(json.dumps(value, indent=1) + "\n")


def claim(workdir: Path, config: Any, task: str, fingerprint: Mapping[str, Any], resuming: bool, primary: bool) -> None:
    """Writes the resolved config, the task's name and what identifies its data.

    Of a run that is resumed, checks that they are still the same; InputError names each difference.

    What is written can be published: paths are relative to the run, or to the home folder, where they can be, and no
    host is named. Of paths, the last part is compared: folders may move. Keys that an older run does not know have
    their defaults.
    """
    mine = {"task": task, **to_config(config).to_dict(), "data_set": dict(fingerprint)}
    if resuming:
        stored = read_config(workdir)
        _require_task(workdir, stored, task)
        default, theirs, ours = (
            flat(_with_texts(each, _last_part)) for each in (to_config(type(config)()).to_dict(), stored, mine)
        )
        changed = differences(default | theirs, ours, config.FREE_KEYS)
        if changed:
            raise InputError(
                f"{workdir} holds a run with another config, which cannot be resumed: {'; '.join(changed)}. "
                "Use the same values, or another --workdir"
            )
    elif primary:
        mine["distributed"] = {**mine["distributed"], **dict.fromkeys(_NAMES_OF_HOSTS, "")}
        with writing(workdir):
            write_object(workdir / CONFIG_NAME, _with_texts(mine, lambda text: _portable(text, workdir)))


def _with_texts(value: Any, change: Callable[[str], str]) -> Any:
    """A copy of nested JSON, every part of its texts between commas changed."""
    if isinstance(value, Mapping):
        return {key: _with_texts(item, change) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_with_texts(item, change) for item in value]
    return ",".join(map(change, value.split(","))) if isinstance(value, str) else value


def _last_part(text: str) -> str:
    return text if "://" in text else text.rstrip("/").rpartition("/")[2]


def _portable(text: str, workdir: Path) -> str:
    """An absolute path relative to the run, if they have a folder in common, or to the home folder, if it is there."""
    if not os.path.isabs(text):
        return text
    run, home = os.path.abspath(workdir), os.path.expanduser("~")
    if os.path.commonpath([run, text]) != "/":
        return os.path.relpath(text, run)
    return os.path.join("~", os.path.relpath(text, home)) if os.path.commonpath([home, text]) == home != "/" else text


# ---- run_info.json --------------------------------------------------------------------------------------------------


def package_versions() -> dict[str, str]:
    """Versions of the packages that decide what is computed, and of Python."""
    versions = {"python": platform.python_version()}
    for name in _PACKAGES:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            versions[name] = "not installed"
    return versions


def write_run_info(run: str | Path, program: Program) -> None:
    """Writes RUN/run_info.json: parameter table, GFLOP per image (XLA's count), mesh, versions, data."""
    params, mesh, memory = program.state_shapes.params, program.mesh, program.compiled.memory_analysis()
    table = [
        {"name": path_text(path), "shape": list(leaf.shape), "sharding": str(leaf.sharding.spec)}
        for path, leaf in jax.tree_util.tree_leaves_with_path(params)
    ]
    info = {
        "parameters": sum(leaf.size for leaf in jax.tree.leaves(params)),
        "gflop_per_image": program.flops / program.task.batch_size / 1e9,
        "device_memory_mib": memory and (memory.temp_size_in_bytes + memory.argument_size_in_bytes) / 2**20,
        "mesh": dict(mesh.shape),
        "devices": f"{mesh.size} x {mesh.devices.flat[0].device_kind}",
        "processes": jax.process_count(),
        "versions": package_versions(),
        "data": dict(program.task.fingerprint),
        "parameter_table": table,
    }
    with writing(run):
        write_object(Path(run) / RUN_INFO_NAME, info)


# ---- .lock ----------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def workdir_lock(run: str | Path) -> Iterator[None]:
    """Keeps other runs out of the folder `run` (made if need be) while the block runs; of a job, process 0 takes it.

    The kernel releases it however the process ends, and processes that this one starts do not hold it. A file system
    that has no locks is used without, with a warning.

    Raises:
      InputError: another process works in `run`, or it cannot be written to.
    """
    path = Path(local_path(run, "--workdir")) / LOCK_NAME
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        file = path.open("a+b", buffering=0)
    except OSError as error:
        raise InputError(
            f"{run} cannot be used as --workdir: {error.strerror or error}; make it writable or choose another"
        ) from error
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            now = time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime())
            _write(file, f"process {os.getpid()} on {socket.gethostname()} since {now}\n")
        except BlockingIOError as error:
            raise InputError(
                f"{run} is in use by {_holder(file)}; wait for it, end it, or choose another --workdir"
            ) from error
        except OSError as error:
            if error.errno not in (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL):
                raise
            logging.warning("%s is on a file system without locks: see to it that no second run uses it", run)
        yield
        _write(file, "")


def _write(file: BinaryIO, text: str) -> None:
    with contextlib.suppress(OSError):  # a full disk: the lock holds all the same
        file.truncate(0)
        file.write(text.encode())


def _holder(file: BinaryIO) -> str:
    """Who holds the lock, as far as its file says."""
    file.seek(0)
    text = file.read(400).decode(errors="replace")
    known = re.fullmatch(r"process \d+ on [\w.-]+ since [\d :-]+ UTC", text.strip(), re.ASCII)
    return known[0] if known else "another process"

"""Checkpoints on disk: files, their checksums, and the one place that knows Orbax.

RUN/checkpoints/S   the state before batch S: items `params`, `optimizer`, `guard` (a conversion has `params` alone),
                    record.json (step, metrics, metadata, layout of every array), checksums.json of all other files
RUN/damaged/S-n     a checkpoint S that was found damaged, set aside

Orbax writes a checkpoint under another name, its files get their checksums there, and it appears by a rename; it goes
by a rename before its removal. So a folder with a plain number for a name is whole unless it was damaged later, and
everything else is what a process that was stopped left behind. A verified checkpoint has all bits that were written:
Orbax never sees a damaged file, of which it would print hundreds of lines.
"""

import concurrent.futures
import contextlib
import errno
import hashlib
import json
import math
import os
import shutil
import stat
import types
from collections.abc import Callable, Collection, Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO

import jax
import jax.numpy as jnp
import numpy as np
from absl import logging
from flax import traverse_util
from orbax.checkpoint import v1 as ocp

from data_pipelines.commands import printable
from data_pipelines.errors import InputError
from data_pipelines.files import atomic_write
from infmae_jax.training.sharding import path_text

FOLDER, DAMAGED_FOLDER = "checkpoints", "damaged"
CHECKSUMS_NAME, RECORD_NAME = "checksums.json", "record.json"
_ORBAX_MARKER = "commit_success.txt"  # in which Orbax notes the absolute path, with names of folders and users
_UNSEALED, _LEAVING = ".unsealed", ".removed"
_LEFTOVERS = (_UNSEALED, _LEAVING, ".orbax-checkpoint-tmp")  # in names of what is not yet, or no longer, a checkpoint
_LONGEST_SAVE_SECONDS = 600  # after which a process gives up waiting for another whose part failed
_LONGEST_REASON = 240
_LARGEST_JSON = 1 << 26  # bytes
_MOST_ARRAYS, _DEEPEST = 5000, 32  # of a model
_MOST_UNPACKED, _ALWAYS_UNPACKED = 20, 1 << 26  # times the size of the files, and bytes: many zeros take little room
_HASHING_THREADS = 8  # they read and hash outside of Python's lock
_NOT_DAMAGE = (errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.EACCES, errno.EPERM)


def _is_told(record: Any) -> bool:
    """Orbax logs what its threads meet with a traceback, and raises it: it is told once, in one line. It also repeats
    whole files, which may be a stranger's."""
    if "orbax" in record.pathname:
        record.msg, record.args = printable(record.getMessage())[:_LONGEST_REASON], ()
    return not (record.exc_info and "orbax" in record.pathname)


logging.get_absl_logger().addFilter(_is_told)
_TROUBLE = {
    errno.ENOSPC: ("the disk is full", "make room, or keep fewer checkpoints (keep_checkpoints, keep_every)"),
    errno.EDQUOT: ("the disk quota is used up", "make room, or keep fewer checkpoints (keep_checkpoints, keep_every)"),
    errno.EFBIG: ("the file would be too large", "raise the limit on file sizes (ulimit -f)"),
    errno.EROFS: ("the file system is read-only", "make it writable"),
    errno.EACCES: ("permission is denied", "make the folder readable and writable"),
    errno.EMFILE: ("too many files are open", "raise the limit on open files (ulimit -n)"),
    errno.ENOENT: ("the folder is gone", "bring it back, or mount it again"),
    errno.ESTALE: ("the mount is stale", "mount it again"),
    errno.EIO: ("reading or writing fails", "check the disk or the mount"),
}


class Damaged(Exception):
    """A checkpoint is not what was saved; the message says in one line what is wrong with it."""


def checkpoint_path(run: str | Path, step: int) -> Path:
    return Path(run).absolute() / FOLDER / str(step)


def steps_of(run: str | Path) -> list[int]:
    """Steps of the run's checkpoints, ascending; none where there is no such folder."""
    try:
        names = [path.name for path in (Path(run) / FOLDER).iterdir()]
    except FileNotFoundError:
        return []
    return sorted(int(name) for name in names if name.isascii() and name.isdecimal())


def superfluous(
    metrics: Mapping[int, float | None], keep: int, keep_best: int, keep_every: int, best_is_low: bool
) -> list[int]:
    """Which checkpoints are no longer kept.

    Args:
      metrics: of every checkpoint, by step, what tells which is best; None where it is not known.
      keep, keep_best, keep_every: the latest so many, the best so many, the multiples of so many steps (0: none).
    """
    policies = ocp.training.preservation_policies
    rules = [
        policies.LatestN(keep),
        policies.BestN(n=keep_best, get_metric_fn=float, reverse=best_is_low, keep_checkpoints_without_metrics=False),
        *([policies.EveryNSteps(keep_every)] if keep_every else []),
    ]
    infos = [types.SimpleNamespace(step=step, metrics=metrics[step]) for step in sorted(metrics)]
    kept = policies.AnyPreservationPolicy(rules).should_preserve(infos, context=policies.PreservationContext())
    return [info.step for info, keeping in zip(infos, kept, strict=True) if not keeping]


def start_save(
    run: str | Path, step: int, items: Mapping[str, Any], metrics: Mapping[str, float], metadata: Mapping[str, Any]
) -> Callable[[], None]:
    """Starts to write a checkpoint into the folder RUN/checkpoints; to be called by all processes.

    Args:
      items: trees of arrays, which may be changed when this returns.
      metrics, metadata: JSON, kept in the record.

    Returns:
      A function that waits for the end, makes the checkpoint appear, and raises what went wrong.
    """
    path = checkpoint_path(run, step)
    unsealed = path.with_name(path.name + _UNSEALED)
    arrays = {path_text(key): layout(leaf) for key, leaf in jax.tree_util.tree_leaves_with_path(dict(items))}
    record = {"step": step, "metrics": dict(metrics), "metadata": dict(metadata), "arrays": arrays}
    context = ocp.Context()
    context.array.saving.use_replica_parallel = False  # it compiles programs that cut arrays up
    context.asynchronous.timeout_secs = _LONGEST_SAVE_SECONDS
    # Named processes meet through the coordinator. Orbax would otherwise let devices meet, from its own thread, in the
    # midst of the training step's collectives.
    context.multiprocessing.active_processes = set(range(jax.process_count()))
    with context:
        response = ocp.save_checkpointables_async(unsealed, dict(items))

    def finish() -> None:
        response.result()
        if jax.process_index() == 0:
            (unsealed / RECORD_NAME).write_text(json.dumps(record, indent=1))
            if (marker := unsealed / _ORBAX_MARKER).exists():
                marker.write_text("")
            seal(unsealed)
            unsealed.rename(path)

    return finish


def read_record(path: Path) -> dict[str, Any]:
    """What is stored beside the arrays of a checkpoint: step, metrics, metadata, and "arrays": path -> layout.

    Raises:
      Damaged: there is none, or it is not that of this checkpoint.
    """
    with _damage_if_unreadable():
        record = _read_json(path / RECORD_NAME)
        if str(record["step"]) != path.name:
            raise ValueError(f"it is the record of step {record['step']}")
        for name in ("metrics", "metadata", "arrays"):
            record[name] = dict(record[name])
    return record


def stored_metric(run: str | Path, step: int, metric: str) -> float | None:
    """A metric that a checkpoint was saved with; None where it has none or cannot be read."""
    try:
        return finite(read_record(checkpoint_path(run, step))["metrics"].get(metric))
    except (Damaged, OSError):
        return None


def finite(value: Any) -> float | None:
    """The value as a number, None where it is none or not finite."""
    return float(value) if isinstance(value, (int, float)) and math.isfinite(value) else None


def best_checkpoint(run: str | Path, metric: str, mode: str) -> int | None:
    """Step of the checkpoint whose metric is the lowest ("min") or highest ("max"); None where none has it."""
    known = {step: value for step in steps_of(run) if (value := stored_metric(run, step, metric)) is not None}
    return (min if mode == "min" else max)(sorted(known), key=known.__getitem__, default=None)


def load(path: Path, record: Mapping[str, Any], abstract: Mapping[str, Any]) -> dict[str, Any]:
    """Items of a verified checkpoint. Every process reads for itself, without waiting for another.

    Args:
      record: of this checkpoint.
      abstract: items or parts of them, with leaves that have shape and dtype: NumPy arrays to get such, or
        `jax.ShapeDtypeStruct` with a sharding.

    Raises:
      InputError: the checkpoint is of something else than `abstract`.
      Damaged: it cannot be read.
    """
    for key, leaf in jax.tree_util.tree_leaves_with_path(dict(abstract)):
        name = path_text(key)
        have, want = record["arrays"].get(name, "missing"), layout(leaf)
        if have != want:
            raise InputError(f"{path} is of another model or optimizer: {name} is {have} there, here {want}")
    context = ocp.Context()
    context.pytree.loading.partial_load = True
    # No barriers: a process that cannot read what others can must not leave them waiting.
    context.multiprocessing.active_processes = {jax.process_index()}
    context.multiprocessing.primary_host = jax.process_index()
    with _damage_if_unreadable(), context:
        items = ocp.load_checkpointables(path, dict(abstract))
    for key, leaf in jax.tree_util.tree_leaves_with_path(items):
        if isinstance(leaf, jax.ShapeDtypeStruct):  # which a partial load leaves where it finds nothing
            raise Damaged(f"{path_text(key)} is missing")
    return items


def layout(array: Any) -> str:
    """Data type and shape: "float32[3,4]"."""
    return f"{np.dtype(array.dtype)}[{','.join(map(str, array.shape))}]"


def empty_arrays(path: Path, record: Mapping[str, Any], item: str) -> dict[str, Any]:
    """NumPy arrays in nested dicts, of the layouts of a stored item, to be given to `load`.

    Raises:
      Damaged: the record of the checkpoint `path` describes no such arrays, or more than its files can hold.
    """
    found: dict[tuple[str, ...], np.ndarray] = {}
    spare = _MOST_UNPACKED * sum(_sizes(path).values()) + _ALWAYS_UNPACKED
    with _damage_if_unreadable():
        for path, text in record["arrays"].items():
            name, *keys = path.split("/")
            if name == item:
                dtype, shape = text.rstrip("]").split("[")
                shape, dtype = [int(size) for size in shape.split(",") if size], jnp.dtype(dtype)
                spare -= math.prod(shape) * dtype.itemsize
                if len(found) == _MOST_ARRAYS or spare < 0 or len(keys) > _DEEPEST:
                    raise ValueError("its record describes more than its files hold")
                found[tuple(keys)] = np.empty(shape, dtype)
        return traverse_util.unflatten_dict(found)


def set_aside(run: str | Path, step: int) -> None:
    """Moves a damaged checkpoint out of the way, into RUN/damaged."""
    folder = Path(run) / DAMAGED_FOLDER
    folder.mkdir(exist_ok=True)
    count = sum(path.name.startswith(f"{step}-") for path in folder.iterdir())
    checkpoint_path(run, step).rename(folder / f"{step}-{count}")


def remove(run: str | Path, step: int) -> None:
    path = checkpoint_path(run, step)
    leaving = path.with_name(path.name + _LEAVING)
    path.rename(leaving)
    shutil.rmtree(leaving)


def remove_leftovers(run: str | Path) -> None:
    """Removes what saves and removals that were cut short left behind; nobody may be saving."""
    folder = Path(run) / FOLDER
    with contextlib.suppress(FileNotFoundError):
        for path in folder.iterdir():
            if any(word in path.name for word in _LEFTOVERS):
                logging.info("removing %s, left by a process that was stopped", path)
                shutil.rmtree(path)


# ---- Checksums ------------------------------------------------------------------------------------------------------


def seal(folder: Path) -> None:
    """Writes FOLDER/checksums.json: size and SHA-256 of every other file in it and below it."""
    sizes = _sizes(folder)
    digests = _digests(folder, sizes)
    with atomic_write(folder / CHECKSUMS_NAME) as partial:
        partial.write_text(json.dumps({name: [sizes[name], digests[name]] for name in sorted(sizes)}, indent=1))


def verify(folder: Path, item: str | None = None) -> None:
    """Compares the files of a checkpoint with its checksums. Only plain files inside the folder are ever opened.

    Args:
      item: only the files of this item and of the checkpoint as a whole; None: of all items.

    Raises:
      Damaged: a file is missing or not what it was, or the folder holds a link or a device.
      OSError: the process cannot read now (too many open files, no permission), which says nothing about the files.
    """
    sizes = _sizes(folder)
    with _damage_if_unreadable():
        entries = _read_json(folder / CHECKSUMS_NAME).items()
        listed = {name: (int(size), str(digest)) for name, (size, digest) in entries}
    for name in listed.keys() | sizes.keys():
        there, saved = sizes.get(name), listed.get(name, (None,))[0]
        if there != saved:
            found = "missing" if there is None else f"{there} bytes, not {saved or 'saved at all'}"
            raise Damaged(f"it cannot be read: {name} is {found}")
    wanted = [name for name in listed if item in (None, name.split("/")[0]) or "/" not in name]
    digests = _digests(folder, wanted)
    wrong = [name for name in wanted if digests[name] != listed[name][1]]
    if wrong:
        more = f" and {len(wrong) - 1} more files" if len(wrong) > 1 else ""
        raise Damaged(f"{wrong[0]}{more} differ from what was saved")


def _read_json(path: Path) -> dict[str, Any]:
    with _open_file(path) as file:
        return dict(json.loads(file.read(_LARGEST_JSON)))


def _sizes(folder: Path) -> dict[str, int]:
    """Bytes of every file in a folder, by path with slashes; Damaged where there is anything but files and folders."""
    if folder.is_symlink():
        raise Damaged("it cannot be read: it is a link")
    found, folders = {}, [folder]
    while folders:
        with os.scandir(folders.pop()) as entries:
            for entry in entries:
                name = Path(entry.path).relative_to(folder).as_posix()
                if entry.is_dir(follow_symlinks=False):
                    folders.append(Path(entry.path))
                elif not entry.is_file(follow_symlinks=False):
                    raise Damaged(f"it cannot be read: {name} is a link or a device, not a plain file")
                elif name != CHECKSUMS_NAME and not entry.name.startswith("."):  # what file systems leave
                    found[name] = entry.stat(follow_symlinks=False).st_size
    return found


def _digests(folder: Path, names: Collection[str]) -> dict[str, str]:
    def digest(name: str) -> str:
        with _damage_if_unreadable(), _open_file(folder / name) as file:
            return hashlib.file_digest(file, "sha256").hexdigest()

    with concurrent.futures.ThreadPoolExecutor(_HASHING_THREADS) as pool:
        return dict(zip(names, pool.map(digest, names), strict=True))


def _open_file(path: Path) -> BinaryIO:
    """A plain file; a link or device that has taken its place meanwhile is neither followed nor waited for."""
    file = open(os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK), "rb")
    if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
        file.close()
        raise OSError(errno.EINVAL, "not a plain file", str(path))
    return file


# ---- Errors ---------------------------------------------------------------------------------------------------------


def reason(error: BaseException) -> str:
    """One line of what went wrong at first and what to do about it."""
    cause = root_cause(error)
    number = cause.errno if isinstance(cause, OSError) else None
    for code, (what, remedy) in _TROUBLE.items():
        if code == number or os.strerror(code) in str(cause):
            return f"{what}; {remedy}"
    return _first_line(error)


def _first_line(error: BaseException) -> str:
    cause = root_cause(error)
    lines = [line.strip() for line in str(cause).split("[tensorstore_spec")[0].splitlines() if line.strip()]
    return f"{type(cause).__name__}: {lines[0][:_LONGEST_REASON] if lines else 'no message'}"


def root_cause(error: BaseException) -> BaseException:
    """The error that Orbax wrapped in others of its own."""
    while error.__cause__ or error.__context__:
        error = error.__cause__ or error.__context__
    return error


@contextlib.contextmanager
def _damage_if_unreadable() -> Iterator[None]:
    """Whatever reading raises means damage, but for what the machine lacks: memory, open files, permission."""
    try:
        yield
    except Damaged:
        raise
    except Exception as error:
        cause = root_cause(error)
        if isinstance(cause, (MemoryError, jax.errors.JaxRuntimeError)):
            raise
        for code in _NOT_DAMAGE:
            if code == getattr(cause, "errno", None) or os.strerror(code) in str(cause):
                raise OSError(code, os.strerror(code)) from error
        raise Damaged(f"it cannot be read ({_first_line(error)})") from error

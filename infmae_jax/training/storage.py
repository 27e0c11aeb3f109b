"""Checkpoints on disk: the one place that knows Orbax.

RUN/checkpoints/S   the state before batch S: items `params`, `optimizer`, `guard` (a conversion has `params` alone),
                    and a record: metrics, metadata and a digest of every array (Orbax keeps no checksum of arrays)
RUN/damaged/S-n     a checkpoint S that was found damaged, set aside

A checkpoint appears by the rename of a finished folder and goes by a rename before its removal, so that a folder with a
plain number for a name is whole unless it was damaged later.
"""

from __future__ import annotations

import contextlib
import gc
import json
import logging as standard_logging
import os
import shutil
import sys
import warnings
import zlib
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
from absl import logging
from orbax.checkpoint import v1 as ocp

from data_pipelines.errors import InputError
from infmae_jax.training import digests
from infmae_jax.training.sharding import path_text

FOLDER, DAMAGED_FOLDER = "checkpoints", "damaged"
_UNFINISHED = ".orbax-checkpoint-tmp"
_LEAVING = ".removed"
_LONGEST_REASON = 240
_LONGEST_SAVE_SECONDS = 600  # after which a process gives up waiting for another whose part failed


class Damaged(Exception):
    """A checkpoint is not what was saved; the message says what is wrong with it."""


def checkpoint_path(run: str | Path, step: int) -> Path:
    return Path(run).absolute() / FOLDER / str(step)


def steps_of(run: str | Path) -> list[int]:
    """Steps of the run's checkpoints, ascending; none where there is no such folder."""
    try:
        return sorted(int(path.name) for path in (Path(run) / FOLDER).iterdir() if path.name.isdecimal())
    except FileNotFoundError:
        return []


def start_save(run: str | Path, step: int, items: Mapping[str, Any], record: Mapping[str, Any]) -> Callable[[], None]:
    """Starts to write a checkpoint into the folder RUN/checkpoints; to be called by all processes.

    Args:
      items: trees of arrays, which may be changed when this returns.
      record: JSON; see `make_record`.

    Returns:
      A function that waits for the end and raises what went wrong.
    """
    with _saving_context():
        response = ocp.save_checkpointables_async(checkpoint_path(run, step), dict(items), custom_metadata=dict(record))
    return response.result


def make_record(
    step: int, leaf_digests: Mapping[str, str], metrics: Mapping[str, float], metadata: Mapping[str, Any]
) -> dict[str, Any]:
    """What is stored beside the arrays, with a checksum of its own.

    Args:
      leaf_digests: digest of every array, by "item/path".
    """
    record = {"step": step, "metrics": dict(metrics), "metadata": dict(metadata), "digests": dict(leaf_digests)}
    return record | {"checksum": _checksum(record)}


def read_record(path: Path) -> dict[str, Any]:
    """The record of the checkpoint at `path`.

    Raises:
      Damaged: there is none, or it is not whole.
    """
    with _told_as_damage():
        record = ocp.checkpointables_metadata(path).custom_metadata
    if not record or "checksum" not in record:
        raise Damaged("its record is gone")
    record = dict(record)
    if record.pop("checksum") != _checksum(record) or str(record["step"]) != path.name:
        raise Damaged("its record is not what was saved")
    return record


def load(path: Path, record: Mapping[str, Any], abstract: Mapping[str, Any]) -> dict[str, Any]:
    """Items of the checkpoint at `path`, not yet compared with their digests.

    Every process reads for itself, without waiting for another.

    Args:
      record: of this checkpoint.
      abstract: items or parts of them, with leaves that have shape and dtype: NumPy arrays to get such, or
        `jax.ShapeDtypeStruct` with a sharding.

    Raises:
      InputError: the checkpoint is of something else than `abstract`.
      Damaged: it cannot be read.
    """
    _check_layout(path, record["digests"], abstract)
    with _told_as_damage(), _loading_context():
        items = ocp.load_checkpointables(path, dict(abstract))
    for key, leaf in jax.tree_util.tree_leaves_with_path(items):
        if isinstance(leaf, jax.ShapeDtypeStruct):  # which a partial load leaves where it finds nothing
            raise Damaged(f"{path_text(key)} is missing")
    return items


def empty_arrays(record: Mapping[str, Any], item: str) -> dict[str, Any]:
    """NumPy arrays in nested dicts, of the shapes and dtypes of a stored item, to be given to `load`."""
    tree: dict[str, Any] = {}
    for path, digest in record["digests"].items():
        name, *parents, last = path.split("/")
        if name == item:
            node = tree
            for key in parents:
                node = node.setdefault(key, {})
            node[last] = digests.empty_array(digest)
    return tree


def verify(items: Mapping[str, Any], expected: Mapping[str, str]) -> None:
    """Compares arrays (all NumPy or all JAX; the latter in all processes at once) with their digests; else Damaged."""
    if all(isinstance(leaf, np.ndarray) for leaf in jax.tree.leaves(items)):
        found = digests.Fingerprint(digests.host_digests(items), (), ())
    else:
        found = digests.fingerprint(items)
    wrong = digests.differing(found, expected)
    if wrong:
        more = f" and {len(wrong) - 1} more arrays" if len(wrong) > 1 else ""
        raise Damaged(f"{wrong[0]}{more} differ from what was saved")


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
            if _UNFINISHED in path.name or path.name.endswith(_LEAVING):
                logging.info("removing %s, left by a process that was stopped", path)
                shutil.rmtree(path)


def _checksum(record: Mapping[str, Any]) -> str:
    return f"{zlib.crc32(json.dumps(record, sort_keys=True).encode()):08x}"


def _check_layout(path: Path, expected: Mapping[str, str], abstract: Mapping[str, Any]) -> None:
    for key, leaf in jax.tree_util.tree_leaves_with_path(dict(abstract)):
        name = path_text(key)
        have, want = expected.get(name, "missing").split(" ")[0], digests.layout(leaf)
        if have != want:
            raise InputError(f"{path} is of another model or optimizer: {name} is {have} there, here {want}")


def first_line(error: BaseException) -> str:
    """What went wrong at first, in one line."""
    cause = root_cause(error)
    lines = [line.strip() for line in str(cause).split("[tensorstore_spec")[0].splitlines() if line.strip()]
    return f"{type(cause).__name__}: {lines[0][:_LONGEST_REASON] if lines else 'no message'}"


def root_cause(error: BaseException) -> BaseException:
    """The error that Orbax wrapped in others of its own."""
    while error.__cause__ or error.__context__:
        error = error.__cause__ or error.__context__
    return error


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Keeps back what Orbax prints of errors that it also raises: tracebacks in its log, and one for each reading that
    was under way when the first one failed (400 kB of them for one damaged file of the smallest run)."""
    loggers, hook = (logging.get_absl_logger(), standard_logging.getLogger("asyncio")), sys.unraisablehook

    def tell(unraisable: sys.UnraisableHookArgs) -> None:
        if not _is_echo(unraisable):
            hook(unraisable)

    for logger in loggers:
        logger.addFilter(_is_news)
    sys.unraisablehook = tell
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "coroutine '.*' was never awaited", RuntimeWarning)
            try:
                yield
            finally:
                gc.collect()  # the last of them speak up when they are collected
    finally:
        sys.unraisablehook = hook
        for logger in loggers:
            logger.removeFilter(_is_news)


def _is_news(record: standard_logging.LogRecord) -> bool:
    unretrieved = record.name == "asyncio" and "exception was never retrieved" in record.getMessage()
    return not unretrieved and f"{os.sep}orbax{os.sep}" not in record.pathname


def _is_echo(unraisable: sys.UnraisableHookArgs) -> bool:
    """Of a reading that ends after the one that waited for it: its event loop is gone, or nobody takes its error."""
    code = getattr(unraisable.object, "cr_code", None)
    if code is not None:
        return f"{os.sep}orbax{os.sep}" in code.co_filename
    return isinstance(unraisable.exc_value, RuntimeError) and "Event loop is closed" in str(unraisable.exc_value)


@contextlib.contextmanager
def _told_as_damage() -> Iterator[None]:
    """Whatever reading raises means damage, but for running out of memory."""
    try:
        yield
    except Exception as error:
        if isinstance(root_cause(error), (MemoryError, jax.errors.JaxRuntimeError)):
            raise
        raise Damaged(f"it cannot be read ({first_line(error)})") from error


def _saving_context() -> ocp.Context:
    context = ocp.Context()
    # Digests are of the first copy of an array, so that it is the one to be written, all of it.
    context.array.saving.use_replica_parallel = False
    context.asynchronous.timeout_secs = _LONGEST_SAVE_SECONDS
    # Named processes meet through the coordinator. Orbax would otherwise let devices meet, from its own thread, in the
    # midst of the training step's collectives.
    context.multiprocessing.active_processes = set(range(ocp.multihost.process_count()))
    return context


def _loading_context() -> ocp.Context:
    context = ocp.Context()
    context.pytree.loading.partial_load = True
    # No barriers: a process that finds damage where another does not must not leave it waiting.
    me = ocp.multihost.process_index()
    context.multiprocessing.active_processes = {me}
    context.multiprocessing.primary_host = me
    return context

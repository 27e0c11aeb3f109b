"""The checkpoints of a training run: saved in the background, kept by rule, restored only whole."""

import concurrent.futures
import contextlib
import dataclasses
import errno
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import logging
from jax.experimental import multihost_utils

from data_pipelines.errors import InputError
from infmae_jax.training import storage
from infmae_jax.training.run_folder import CONFIG_NAME, read_config, write_object
from infmae_jax.training.sharding import path_text
from infmae_jax.training.state import TrainState

_AVERAGE = "average"  # item of a checkpoint: that of the parameters, where `optimizer.ema` is on
_MESSAGE_BYTES = 400  # of a text that the processes exchange
_THERE, _UNREADABLE = "it is there", "!"  # the second begins what says nothing about a checkpoint


class SaveFailed(InputError):
    """A checkpoint could not be written; any earlier ones are intact, and later saves may work again.

    Attributes:
      step: of the checkpoint.
      reason: one line.
    """

    def __init__(self, path: Path, step: int, reason: str):
        super().__init__(f"checkpoint {path} could not be saved: {reason}; any earlier checkpoint is intact")
        self.step = step
        self.reason = reason


class NonFiniteState(InputError):
    """Parameters or optimizer state hold NaN or infinity; such a state is never saved."""

    exit_code = 3


@dataclasses.dataclass(frozen=True)
class Restored:
    """Weights of a run: `params` is a tree of NumPy arrays, `config` the run's config as it was written."""

    params: dict[str, Any]
    config: dict[str, Any]
    step: int


@dataclasses.dataclass(eq=False)
class Checkpointer(contextlib.AbstractContextManager):
    """Saves and restores the training state of one run.

    All processes of a job make one and call the same methods at the same steps. Every checkpoint has a checksum of each
    file; one that does not match is damaged, and the one before it is restored.

    Attributes:
      run: run folder, which must exist when saving, on a file system that all processes share.
      keep: the latest so many are kept.
      keep_best: the so many with the best metric are kept too.
      keep_every: steps; checkpoints at its multiples are kept for good; 0: none.
      on_damage: called with step and reason for each damaged checkpoint that `restore` finds.
      best: name of the metric that tells which checkpoint is best, and "min" or "max".
    """

    run: str | Path
    keep: int = 3
    keep_best: int = 0
    keep_every: int = 0
    on_damage: Callable[[int, str], None] = lambda step, reason: None
    best: tuple[str, str] = ("loss", "min")

    def __post_init__(self):
        self._metric, mode = self.best
        if mode not in ("min", "max"):
            raise ValueError(f"best={self.best!r}: the mode is neither 'min' nor 'max'")
        self._run, self._best_is_low = Path(self.run).absolute(), mode == "min"
        self._writer = concurrent.futures.ThreadPoolExecutor(1, "checkpoint")
        self._saving: tuple[int, concurrent.futures.Future] | None = None
        self._failure: SaveFailed | None = None
        self._primary = jax.process_index() == 0
        self._known: list[int] = []  # steps on disk, as last seen
        if self._primary:
            self._attempt_removal()
        self._metrics = {step: storage.stored_metric(self._run, step, self._metric) for step in self._steps()}

    def latest_step(self) -> int | None:
        """Of the newest checkpoint, one that is being saved included; None where there is none."""
        return max(self._steps(), default=None)

    def save(
        self,
        state: TrainState,
        step: int,
        metrics: Mapping[str, float] | None = None,
        metadata: Mapping[str, Any] | None = None,
    ) -> None:
        """Starts saving `state` as checkpoint `step`, if it is not there; returns when its arrays may be changed.

        Args:
          metrics: e.g. {"loss": mean loss since the checkpoint before}.
          metadata: JSON, given back by `restore`.

        Raises:
          SaveFailed: this save could not start, or the one before it failed; in the second case (`error.step` is not
            `step`) this one has been started all the same.
          NonFiniteState: nothing was saved.
        """
        self._settle()
        items = _items(state)
        reports = _exchange(self._obstacle(step) if self._primary else "", _not_finite(items))
        obstacle, not_finite = reports[0][0], next((name for _, name in reports if name), "")
        if obstacle and obstacle != _THERE:
            self._fail(step, obstacle)
        elif not obstacle and not_finite:
            raise NonFiniteState(
                f"{not_finite} is not finite before step {step}, which is not saved; checkpoints of {self._run} up to "
                f"step {self.latest_step() or 0} are intact: lower optimizer.base_learning_rate"
            )
        elif not obstacle:
            self._start(items, step, dict(metrics or {}), dict(metadata or {}))
        self._raise_failure()

    def wait(self) -> None:
        """Waits until what was saved is on disk; SaveFailed where that did not succeed."""
        self._settle()
        self._raise_failure()

    def restore(self, abstract: TrainState) -> tuple[TrainState, int, dict[str, Any]] | None:
        """The newest checkpoint that is whole: state, step and metadata; None where the run has no checkpoint.

        Damaged ones newer than it are set aside in RUN/damaged.

        Args:
          abstract: shapes, dtypes and shardings of the state, on whatever mesh.

        Raises:
          InputError: there are checkpoints but none is whole, or they are of something else than `abstract`.
        """
        self._settle()
        damaged: dict[int, str] = {}
        while newest := _exchange(self._examine_newest(damaged) if self._primary else "")[0][0]:
            step, _, reason = newest.partition(" ")
            restored, mine = (None, "") if reason else self._load(int(step), abstract)
            reason = reason or next((text for (text,) in _exchange(mine) if text), "")
            if reason.startswith(_UNREADABLE):
                raise InputError(f"{self._run / storage.FOLDER} cannot be read: {reason.removeprefix(_UNREADABLE)}")
            if not reason:
                for other in damaged:
                    self._set_aside(other)
                return restored
            logging.warning("checkpoint %s is damaged: %s", storage.checkpoint_path(self._run, step), reason)
            self.on_damage(int(step), reason)
            damaged[int(step)] = reason
        if damaged:
            listing = "; ".join(f"{step}: {reason}" for step, reason in damaged.items())
            raise InputError(
                f"no checkpoint in {self._run / storage.FOLDER} is whole ({listing}); bring one back from a copy, or "
                "start over with another --workdir"
            )
        return None

    def __exit__(self, kind: type[BaseException] | None, *unused) -> None:
        """Waits for the save in flight; reports its failure where the block did not fail already."""
        try:
            if kind is None:
                self.wait()
            elif self._saving is not None:  # Other processes may never get here: nothing to agree about.
                step, written = self._saving
                if written.exception() is not None:
                    logging.error("checkpoint %d could not be saved: %s", step, storage.reason(written.exception()))
        finally:
            self._writer.shutdown()

    def _steps(self) -> set[int]:
        with contextlib.suppress(OSError):
            self._known = storage.steps_of(self._run)
        return {*self._known, *([self._saving[0]] if self._saving else [])}

    def _obstacle(self, step: int) -> str:
        """Whether checkpoint `step` is there already, or why nothing can be written; empty: go on."""
        folder = self._run / storage.FOLDER
        try:
            if step in storage.steps_of(self._run):
                return _THERE
            if self._metrics and not folder.is_dir():  # never to be made anew, below the mount point of a lost mount
                raise FileNotFoundError(errno.ENOENT, "", str(folder))
            folder.mkdir(exist_ok=True)
            storage.remove_leftovers(self._run)
            probe = folder / f".probe-{os.getpid()}"
            try:
                probe.write_bytes(b"\0" * 4096)
            finally:
                probe.unlink(missing_ok=True)
        except OSError as error:
            return storage.reason(error)
        return ""

    def _start(self, items: Mapping[str, Any], step: int, metrics: dict[str, float], metadata: dict[str, Any]) -> None:
        self._metrics[step] = storage.finite(metrics.get(self._metric))
        try:
            with jax.transfer_guard("allow"):
                finish = storage.start_save(self._run, step, items, metrics, metadata)
            written = self._writer.submit(self._write, finish)
        except Exception as error:  # whatever the file system makes of it; the other processes learn of it in _settle
            written = concurrent.futures.Future()
            written.set_exception(error)
        self._saving = step, written

    def _write(self, finish: Callable[[], None]) -> None:
        """In the background: waits for the checkpoint, then removes those that are no longer kept."""
        finish()
        if not self._primary:
            return
        try:
            metrics = {step: self._metrics.get(step) for step in storage.steps_of(self._run)}
            rules = max(self.keep, 1), self.keep_best, self.keep_every, self._best_is_low
            for step in storage.superfluous(metrics, *rules):
                storage.remove(self._run, step)
        except OSError as error:
            logging.warning("old checkpoints of %s cannot be removed: %s", self._run, error)

    def _settle(self) -> None:
        """Waits for the save in flight, and agrees with the other processes on how it went."""
        if self._saving is None:
            return
        (step, written), self._saving = self._saving, None
        error = written.exception()
        reasons = [reason for (reason,) in _exchange("" if error is None else storage.reason(error)) if reason]
        if reasons:
            if self._primary:
                self._attempt_removal()
            # A process that failed by itself knows more than those that only waited for it.
            self._fail(step, min(reasons, key=lambda reason: "barrier" in reason.lower()))

    def _fail(self, step: int, reason: str) -> None:
        self._failure = SaveFailed(storage.checkpoint_path(self._run, step), step, reason)
        logging.error("%s", self._failure)

    def _raise_failure(self) -> None:
        failure, self._failure = self._failure, None
        if failure is not None:
            raise failure

    def _examine_newest(self, damaged: Mapping[int, str]) -> str:
        """The newest step that is not in `damaged` and, after a blank, what is wrong with it; empty: there is none."""
        step: int | str = "?"
        try:
            step = max(set(storage.steps_of(self._run)) - damaged.keys(), default="")
            if step != "":
                storage.verify(storage.checkpoint_path(self._run, step))
            return str(step)
        except (storage.Damaged, OSError) as error:
            return f"{step} {_what_is_wrong(error)}"

    def _load(self, step: int, abstract: TrainState) -> tuple[tuple[TrainState, int, dict[str, Any]] | None, str]:
        """What `restore` returns, of a verified checkpoint; or what is wrong with it."""
        path = storage.checkpoint_path(self._run, step)
        try:
            record = storage.read_record(path)
            items = storage.load(path, record, _items(abstract))
        except (storage.Damaged, OSError) as error:
            return None, _what_is_wrong(error)
        count = jax.device_put(np.int32(step), abstract.step.sharding)
        weights = {"params": items["params"], "average": items.get(_AVERAGE)}
        state = abstract.replace(step=count, opt_state=items["optimizer"], guard=items["guard"], **weights)
        return (state, step, record["metadata"]), ""

    def _set_aside(self, step: int) -> None:
        self._metrics.pop(step, None)
        if self._primary:
            try:
                storage.set_aside(self._run, step)
            except OSError as error:
                logging.warning("damaged checkpoint %d of %s cannot be set aside: %s", step, self._run, error)

    def _attempt_removal(self) -> None:
        try:
            storage.remove_leftovers(self._run)
        except OSError as error:
            logging.warning("leftovers in %s cannot be removed: %s", self._run / storage.FOLDER, error)


# ---- Weights for use on the host ------------------------------------------------------------------------------------


def restore_params(run: str | Path, subtree: str | None = None, step: int | None = None) -> Restored:
    """Weights of a run, on the host, whatever mesh or optimizer they were saved with, their files verified.

    Where the run keeps an average of its parameters (`optimizer.ema`), that.

    Args:
      run: run folder.
      subtree: restore only this part of the parameters, "encoder" or "decoder".
      step: checkpoint; by default the latest that is not damaged.

    Raises:
      InputError: no run, no checkpoint or only damaged ones.
    """
    config = read_config(run)
    steps = storage.steps_of(run)
    if not (Path(run) / storage.FOLDER).is_dir():
        raise InputError(f"{run} has no checkpoints: is it a run folder, and did the run reach its first checkpoint?")
    if not steps or (step is not None and step not in steps):
        raise InputError(f"{run} has no checkpoint{'' if step is None else f' {step}'}; it has {steps or 'none'}")
    damaged = []
    for number in steps[::-1] if step is None else [step]:
        path = storage.checkpoint_path(run, number)
        try:
            item = _AVERAGE if (path / _AVERAGE).is_dir() else "params"
            storage.verify(path, item)  # that nothing of the other items is missing, too
            record = storage.read_record(path)
            wanted = {k: tree for k, tree in storage.empty_arrays(path, record, item).items() if subtree in (None, k)}
            return Restored(storage.load(path, record, {item: wanted})[item], config, number)
        except storage.Damaged as error:
            logging.warning("checkpoint %s is damaged: %s", path, error)
            damaged.append(f"{number} ({error})")
        except OSError as error:
            raise InputError(f"{path} cannot be read: {storage.reason(error)}") from error
    raise InputError(f"{run} has only damaged checkpoints: {', '.join(damaged)}; restore one from a copy")


def write_run(run: str | Path, config: Mapping[str, Any], params: Mapping[str, Any]) -> None:
    """Makes a run folder of given weights (checkpoint 0), to be used like one of our own.

    Args:
      config: JSON, with the sections of a run's config that its readers need.
      params: tree of NumPy arrays.

    Raises:
      OSError: the disk is full or failing.
    """
    (Path(run) / storage.FOLDER).mkdir(parents=True, exist_ok=True)
    try:
        storage.start_save(run, 0, {"params": jax.tree.map(np.asarray, dict(params))}, {}, {})()
    except Exception as error:  # whatever Orbax makes of what the disk says
        raise OSError(errno.EIO, storage.reason(error)) from error
    write_object(Path(run) / CONFIG_NAME, config)


def _items(state: TrainState) -> dict[str, Any]:
    average = {} if state.average is None else {_AVERAGE: state.average}
    return {"params": state.params, "optimizer": state.opt_state, "guard": state.guard, **average}


def _not_finite(items: Mapping[str, Any]) -> str:
    """Name of an array, of parameters or optimizer, of which this process holds a number that is not finite; or "".

    Looks at the copy on the host that is written next, so that nothing is compiled and nothing is copied twice.
    """
    leaves = jax.tree_util.tree_leaves_with_path({name: items[name] for name in ("params", "optimizer")})
    with jax.transfer_guard("allow"), np.errstate(all="ignore"):
        shards = [
            (key, shard.data) for key, leaf in leaves for shard in leaf.addressable_shards if shard.replica_id == 0
        ]
        for _, data in shards:
            data.copy_to_host_async()
        for key, data in shards:
            if jnp.issubdtype(data.dtype, jnp.inexact):
                numbers = np.asarray(data).reshape(-1)
                # A sum of squares reads faster than it can be asked of each number; only a large one needs the asking.
                likely = numbers.dtype == np.float32 and np.isfinite(np.dot(numbers, numbers))
                if not likely and not np.isfinite(numbers).all():
                    return path_text(key)
    return ""


def _exchange(*mine: str) -> list[tuple[str, ...]]:
    """These texts of every process, in order of processes; to be called by all of them."""
    if jax.process_count() == 1:
        return [mine]
    padded = [text.encode()[:_MESSAGE_BYTES].ljust(_MESSAGE_BYTES, b"\0") for text in mine]
    with jax.transfer_guard("allow"):
        rows = multihost_utils.process_allgather(np.frombuffer(b"".join(padded), np.uint8).reshape(len(mine), -1))
    return [tuple(bytes(text).rstrip(b"\0").decode(errors="ignore") for text in row) for row in rows]


def _what_is_wrong(error: Exception) -> str:
    return str(error) if isinstance(error, storage.Damaged) else _UNREADABLE + storage.reason(error)

"""The checkpoints of a training run: saved in the background, kept by rule, restored only whole."""

from __future__ import annotations

import concurrent.futures
import contextlib
import errno
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
from absl import logging
from jax.experimental import multihost_utils

from data_pipelines.errors import InputError
from infmae_jax.training import digests, storage
from infmae_jax.training.run_folder import read_config, restore_params, write_config, write_run
from infmae_jax.training.state import TrainState

__all__ = ["Checkpointer", "NonFiniteState", "SaveFailed", "read_config", "restore_params",
           "write_config", "write_run"]  # fmt: skip

_THERE = "it is there"
_MESSAGE_BYTES = 400  # of what the processes tell each other
_TROUBLE = {
    errno.ENOSPC: ("the disk is full", "make room, or keep fewer checkpoints (keep_checkpoints, keep_every)"),
    errno.EDQUOT: ("the disk quota is used up", "make room, or keep fewer checkpoints (keep_checkpoints, keep_every)"),
    errno.EFBIG: ("the file would be too large", "raise the limit on file sizes (ulimit -f)"),
    errno.EROFS: ("the file system is read-only", "make it writable"),
    errno.EACCES: ("permission is denied", "make the folder writable"),
    errno.ENOENT: ("the folder is gone", "bring it back, or mount it again"),
    errno.ESTALE: ("the mount is stale", "mount it again"),
    errno.EIO: ("reading or writing fails", "check the disk or the mount"),
}


class SaveFailed(InputError):
    """A checkpoint could not be written; earlier ones are intact, and later saves may work again.

    Attributes:
      step: of the checkpoint.
      reason: one line.
    """

    def __init__(self, path: Path, step: int, reason: str):
        super().__init__(f"checkpoint {path} could not be saved: {reason}; earlier checkpoints are intact")
        self.step = step
        self.reason = reason


class NonFiniteState(InputError):
    """Parameters or optimizer state hold NaN or infinity; such a state is never saved."""

    exit_code = 3


class Checkpointer:
    """Saves and restores the training state of one run.

    All processes of a job make one and call the same methods at the same steps. Every checkpoint has a digest of each
    array; one that does not match is damaged, and the one before it is restored.

    Args:
      run: run folder, which must exist when saving, on a file system that all processes share.
      keep: the latest so many are kept.
      keep_best: the so many with the lowest metrics["loss"] are kept too.
      keep_every: steps; checkpoints at its multiples are kept for good; 0: none.
      on_damage: called with step and reason for each damaged checkpoint that `restore` finds.
    """

    def __init__(
        self,
        run: str | Path,
        keep: int = 3,
        keep_best: int = 0,
        keep_every: int = 0,
        on_damage: Callable[[int, str], None] | None = None,
    ):
        self._run = Path(run).absolute()
        self._keep, self._keep_best, self._keep_every = max(keep, 1), keep_best, keep_every
        self._on_damage = on_damage or (lambda step, reason: None)
        self._quiet = contextlib.ExitStack()
        self._quiet.enter_context(storage.quiet())
        self._writer = concurrent.futures.ThreadPoolExecutor(1, "checkpoint")
        self._saving: tuple[int, concurrent.futures.Future] | None = None
        self._failure: SaveFailed | None = None
        self._primary = jax.process_index() == 0
        self._known: list[int] = []  # steps on disk, as last seen
        if self._primary:
            self._attempt_removal()
        self._losses = {step: _stored_loss(self._run, step) for step in self._steps()}

    def latest_step(self) -> int | None:
        """Of the newest checkpoint, one that is being saved included; None where there is none."""
        return max(self._steps(), default=None)

    def best_step(self) -> int | None:
        """Of the checkpoint with the lowest loss; None where none has one."""
        known = {step: self._losses.get(step, np.inf) for step in self._steps()}
        best = min(known, key=lambda step: (known[step], step), default=None)
        return None if best is None or known[best] == np.inf else best

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
        verdict = self._agreed(self._verdict(step) if self._primary else "")
        if verdict and verdict != _THERE:
            self._fail(step, verdict)
        elif not verdict:
            self._start(state, step, dict(metrics or {}), dict(metadata or {}))
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
        while newest := self._agreed(self._newest(damaged) if self._primary else ""):
            if not newest.isdecimal():
                raise InputError(f"{self._run / storage.FOLDER} cannot be read: {newest}")
            step = int(newest)
            restored, reason = self._restore(step, abstract)
            if restored is not None:
                for other in damaged:
                    self._set_aside(other)
                return restored
            logging.warning("checkpoint %s is damaged: %s", storage.checkpoint_path(self._run, step), reason)
            self._on_damage(step, reason)
            damaged[step] = reason
        if damaged:
            found = "; ".join(f"{step}: {reason}" for step, reason in damaged.items())
            raise InputError(
                f"no checkpoint in {self._run / storage.FOLDER} is whole ({found}); bring one back from a copy, or "
                "start over with another --workdir"
            )
        return None

    def __enter__(self) -> Checkpointer:
        return self

    def __exit__(self, kind: type[BaseException] | None, *unused) -> None:
        """Waits for the save in flight; reports its failure where the block did not fail already."""
        try:
            if kind is None:
                self.wait()
            elif self._saving is not None:  # Other processes may never get here: nothing to agree about.
                step, written = self._saving
                if written.exception() is not None:
                    logging.error("checkpoint %d could not be saved: %s", step, _reason(written.exception()))
        finally:
            self._writer.shutdown()
            self._quiet.close()

    def _steps(self) -> set[int]:
        with contextlib.suppress(OSError):
            self._known = storage.steps_of(self._run)
        return {*self._known, *([self._saving[0]] if self._saving else [])}

    def _start(self, state: TrainState, step: int, metrics: dict[str, float], metadata: dict[str, Any]) -> None:
        items = _items(state)
        found = digests.fingerprint(items)
        bad = [name for name in found.not_finite if not name.startswith("guard/")]
        if bad:
            raise NonFiniteState(
                f"{bad[0]} is not finite before step {step}, which is not saved; checkpoints of {self._run} up to step "
                f"{self.latest_step() or 0} are intact: lower optimizer.base_learning_rate"
            )
        if found.unequal:
            logging.warning("step %d: devices hold different copies of %s", step, ", ".join(found.unequal))
        record = storage.make_record(step, found.digests, metrics, metadata)
        self._losses[step] = metrics.get("loss", np.inf)
        try:
            with jax.transfer_guard("allow"):
                finish = storage.start_save(self._run, step, items, record)
            written = self._writer.submit(self._write, finish)
        except Exception as error:  # whatever the file system makes of it; told to the other processes when settled
            written = concurrent.futures.Future()
            written.set_exception(error)
        self._saving = step, written

    def _write(self, finish: Callable[[], None]) -> None:
        """In the background: waits for the checkpoint, then removes those that are no longer kept."""
        finish()
        if not self._primary:
            return
        try:
            for step in self._superfluous():
                storage.remove(self._run, step)
        except OSError as error:
            logging.warning("old checkpoints of %s cannot be removed: %s", self._run, error)

    def _superfluous(self) -> list[int]:
        steps = storage.steps_of(self._run)
        best = sorted((s for s in steps if np.isfinite(self._losses.get(s, np.inf))), key=self._losses.__getitem__)
        kept = {*steps[-self._keep :], *best[: self._keep_best]}
        return [s for s in steps if s not in kept and not (self._keep_every and s % self._keep_every == 0)]

    def _settle(self) -> None:
        """Waits for the save in flight, and agrees with the other processes on how it went."""
        if self._saving is None:
            return
        (step, written), self._saving = self._saving, None
        error = written.exception()
        reasons = [reason for reason in _tell_all("" if error is None else _reason(error)) if reason]
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

    def _restore(self, step: int, abstract: TrainState) -> tuple[tuple[TrainState, int, dict] | None, str]:
        """The state of a checkpoint, or why it is damaged, as all processes see it."""
        path, items, record, reason = storage.checkpoint_path(self._run, step), None, {}, ""
        try:
            record = storage.read_record(path)
            items = storage.load(path, record, _items(abstract))
        except storage.Damaged as error:
            reason = str(error)
        reason = next(filter(None, _tell_all(reason)), "")
        if reason:
            return None, reason
        try:
            storage.verify(items, record["digests"])
        except storage.Damaged as error:
            reason = str(error)
        reason = next(filter(None, _tell_all(reason)), "")
        if reason:
            return None, reason
        count = jax.device_put(np.int32(step), abstract.step.sharding)
        state = TrainState(count, items["params"], items["optimizer"], items["guard"])
        return (state, step, record["metadata"]), ""

    def _set_aside(self, step: int) -> None:
        self._losses.pop(step, None)
        if self._primary:
            try:
                storage.set_aside(self._run, step)
            except OSError as error:
                logging.warning("damaged checkpoint %d of %s cannot be set aside: %s", step, self._run, error)

    def _verdict(self, step: int) -> str:
        """Whether checkpoint `step` is there already, or why nothing can be written; empty: go on."""
        folder = self._run / storage.FOLDER
        try:
            if step in storage.steps_of(self._run):
                return _THERE
            if self._losses and not folder.is_dir():  # never to be made anew, below the mount point of a lost mount
                raise FileNotFoundError(errno.ENOENT, "", str(folder))
            folder.mkdir(exist_ok=True)
            storage.remove_leftovers(self._run)
            probe = folder / f".probe-{os.getpid()}"
            try:
                probe.write_bytes(b"\0" * 4096)
            finally:
                probe.unlink(missing_ok=True)
        except OSError as error:
            return _reason(error)
        return ""

    def _newest(self, damaged: Mapping[int, str]) -> str:
        """The newest step not known as damaged, empty where there is none, or why that cannot be told."""
        try:
            steps = storage.steps_of(self._run)
        except OSError as error:
            return _reason(error)
        return str(max((step for step in steps if step not in damaged), default=""))

    def _attempt_removal(self) -> None:
        try:
            storage.remove_leftovers(self._run)
        except OSError as error:
            logging.warning("leftovers in %s cannot be removed: %s", self._run / storage.FOLDER, error)

    def _agreed(self, mine: str) -> str:
        """What process 0 says."""
        return _tell_all(mine)[0]


def _items(state: TrainState) -> dict[str, Any]:
    return {"params": state.params, "optimizer": state.opt_state, "guard": state.guard}


def _stored_loss(run: Path, step: int) -> float:
    try:
        return storage.read_record(storage.checkpoint_path(run, step))["metrics"].get("loss", np.inf)
    except storage.Damaged:
        return np.inf


def _tell_all(text: str) -> list[str]:
    """What every process says, in order of processes; to be called by all of them."""
    if jax.process_count() == 1:
        return [text]
    padded = np.frombuffer(text.encode()[:_MESSAGE_BYTES].ljust(_MESSAGE_BYTES, b"\0"), np.uint8)
    with jax.transfer_guard("allow"):
        rows = multihost_utils.process_allgather(padded)
    return [bytes(row).rstrip(b"\0").decode(errors="ignore") for row in rows]


def _reason(error: BaseException) -> str:
    """One line of what went wrong and what to do about it."""
    cause = storage.root_cause(error)
    number = cause.errno if isinstance(cause, OSError) else None
    for code, (what, remedy) in _TROUBLE.items():
        if code == number or os.strerror(code) in str(cause):
            return f"{what}; {remedy}"
    return storage.first_line(error)

"""One run in its folder: everything of training that is not training."""

import contextlib
import dataclasses
import hashlib
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Self

import jax
import numpy as np
from absl import logging
from jax.experimental import multihost_utils
from PIL import Image

from data_pipelines.commands import EXIT_INTERRUPTED
from data_pipelines.errors import InputError
from data_pipelines.files import atomic_write
from infmae_jax.training.checkpoint import Checkpointer, SaveFailed
from infmae_jax.training.config import RunConfig, binding, to_config
from infmae_jax.training.goodput import Goodput
from infmae_jax.training.hosts.peers import NoPeers, Peers
from infmae_jax.training.hosts.stop import StopRequest
from infmae_jax.training.monitor import Monitor
from infmae_jax.training.profiling import Profile
from infmae_jax.training.program import Program
from infmae_jax.training.run_folder import claim, workdir_lock, write_run_info
from infmae_jax.training.state import TrainState
from infmae_jax.training.task import Batches, Position
from infmae_jax.training.writers import EventLog, read_events

_NUMBERS = (int, float, np.number, jax.Array)


class NumbersDiverged(InputError):
    """Losses or gradients stay non-finite (or spike) whatever the data order."""

    exit_code = 3


@dataclasses.dataclass(frozen=True)
class Result:
    """State after the last step made, which step that left us before, and the exit code of who ended the run early."""

    state: TrainState
    step: int
    total_steps: int
    stop_code: int

    @property
    def interrupted(self) -> bool:
        return self.step < self.total_steps


@dataclasses.dataclass(eq=False)
class Run:
    """A run's folder, from its lock to its last checkpoint, with all that is written there. A context manager.

    All processes of a job call the same methods at the same steps.

    Attributes:
      program: what is trained.
      folder: run folder, made where it is missing.
      stop: who may ask this process to end.
      peers: the other processes.
      clock: counts where the time goes.
      at_end: called on process 0 with the folder when a run that was begun ends, whatever ends it.
    """

    program: Program
    folder: Path
    stop: StopRequest
    peers: Peers | NoPeers
    clock: Goodput
    at_end: Callable[[Path], None]

    def __post_init__(self):
        self._task, self._config, in_steps = self.program.task, self.program.config, self.program.in_steps
        self._primary = jax.process_index() == 0
        self._log_every, self._save_every = in_steps(self._config.log_every), in_steps(self._config.checkpoint_every)
        self._evaluators = {
            name: (in_steps(evaluator.every), evaluator.run) for name, evaluator in self._task.evaluators().items()
        }
        self._values: dict[str, float] = {}  # the latest of every evaluator
        self._metrics: dict[str, jax.Array] | None = None  # of the step before
        self._batches: Batches
        self._monitor: Monitor

    def __enter__(self) -> Self:
        """Takes the folder; InputError where it is in use, or holds another run. Mistakes leave it as it was."""
        config, folder = self._config, self.folder
        with contextlib.ExitStack() as stack:
            self._profile = stack.enter_context(contextlib.closing(Profile(folder, config.observe.profile_steps)))
            self._initial = self._task.initial(self.program.state_shapes.params)
            if self._primary:
                stack.enter_context(workdir_lock(folder))
            self._events = stack.enter_context(contextlib.closing(EventLog(folder, active=self._primary)))
            self._checkpoints = stack.enter_context(
                Checkpointer(
                    folder, config.keep_checkpoints, config.keep_best, self.program.in_steps(config.keep_every),
                    lambda step, reason: self._events.write("checkpoint_damaged", step, checkpoint=step, reason=reason),
                    (config.best_metric, config.best_mode),
                )
            )  # fmt: skip
            self._latest = self._checkpoints.latest_step() or 0
            claim(folder, config, self._task.name, self._task.fingerprint, self._latest > 0, self._primary)
            self._identity = _identity(config)
            self._rollbacks, self._order = _rolled_back(folder, self._identity)
            self._stack = stack.pop_all()
        return self

    def __exit__(self, *error: Any) -> bool | None:
        return self._stack.__exit__(*error)

    @property
    def stop_code(self) -> int:
        """The exit code of a stop request that reached all hosts, 0 without one."""
        return self._monitor.signs.stop

    def begin(self) -> tuple[TrainState, Position]:
        """State and position of the newest whole checkpoint, or those that a run starts with; then all is ready."""
        program, events = self.program, self._events
        self.peers.progress(self._latest, "restoring")
        state, at = self._restore_or_start()
        if at.step:
            logging.info("resuming %s at step %d of %d", self.folder, at.step, program.total_steps)
        self._first = at.step  # no checkpoint is due before steps were made
        self.peers.progress(at.step, "compiling")
        with self.clock.spend("compiling"):
            _ = program.compiled  # made now
        if self._primary and not at.step:
            write_run_info(self.folder, program)
        self._monitor = self._stack.enter_context(
            contextlib.closing(Monitor(self.folder, program, self.clock, events, at.step, self._primary))
        )
        events.write(
            "resume" if at.step else "start", at.step, processes=jax.process_count(), devices=program.mesh.size,
            total_steps=program.total_steps, config=self._identity,
        )  # fmt: skip
        events.write("compile", at.step, seconds=self.clock.seconds()["compiling"])
        if self._primary:
            self._stack.callback(self.at_end, self.folder)
        self._stack.callback(lambda: self._batches.close())  # whichever they are by then
        self._open_batches(at)
        self._stack.enter_context(jax.transfer_guard("disallow"))
        self.stop.looping = True
        return state, at

    def evaluate(self, state: TrainState, at: Position) -> None:
        """Runs the evaluators that are due: at multiples of their durations, and after the last step."""
        last = at.step == self.program.total_steps
        for name, (every, run) in self._evaluators.items():
            if not every or (at.step % every and not last):
                continue
            self._monitor.flush()  # rows grow by steps
            self.peers.progress(at.step, f"evaluating {name}")
            with self.clock.spend("evaluating"), jax.transfer_guard("allow"):
                self._keep(run(state.result), at.step)

    def save(self, state: TrainState, at: Position, last: bool = False) -> None:
        """Saves a checkpoint where one is due: the state before batch `at.step`.

        Not while updates are being skipped: what comes back from a roll-back should be sound."""
        if last:
            due = at.step > self._first or not self._latest
        else:
            due = self._save_every and at.step % self._save_every == 0 and at.step > self._first
        if not due or (self._monitor.flush().in_a_row and not last):
            return
        self.peers.progress(at.step, "saving")
        metrics = {"loss": self._monitor.mean_loss(), **self._values}
        try:
            with self.clock.spend("saving"):
                since = time.perf_counter()
                self._checkpoints.save(state, at.step, metrics, {"data_order": at.order})
                if last:
                    self._checkpoints.wait()
            self._events.write("save", at.step, seconds_blocked=time.perf_counter() - since)
        except SaveFailed as error:
            self._events.write("save_failed", error.step, reason=error.reason)
            if self._config.on_save_failure == "stop":
                raise
            logging.warning("%s; training goes on", error)

    def next_batch(self, at: Position) -> dict[str, jax.Array]:
        """The batch of this step on the devices."""
        self.peers.progress(at.step)
        with self.clock.spend("data_wait"):
            return self.program.place(next(self._batches))

    def step(self, state: TrainState, batch: dict[str, jax.Array], at: Position) -> TrainState:
        """Makes a step, and reads the metrics of the one before."""
        with self.clock.spend("stepping"), self._profile.step(at.step, self._metrics):
            state, self._metrics = self.program.step(state, batch, self.stop.code)
        last = at.step == self.program.total_steps - 1
        log = self._log_every and (at.step % self._log_every == 0 or last)
        self._monitor.step(at.step, self._metrics, bool(log))
        if last:
            self._monitor.flush()
        return state

    @property
    def diverged(self) -> bool:
        """Whether so many updates in a row were skipped that the run should go back; the same on all hosts."""
        return self._monitor.signs.in_a_row >= self._config.guards.rollback_after

    def roll_back(self, at: Position) -> tuple[TrainState, Position]:
        """The last checkpoint, and a data order that was not tried yet; NumbersDiverged where that was done too often.

        Count and order are in the events, so that they outlive this process."""
        if self._rollbacks >= self._config.guards.max_rollbacks:
            self._events.write("stopped", at.step, reason="numbers diverged")
            raise NumbersDiverged(
                f"{self._config.guards.rollback_after} updates in a row were skipped at step {at.step}, after "
                f"{self._rollbacks} rollbacks; {self.folder}/events.jsonl names the records: lower "
                "optimizer.base_learning_rate, set optimizer.clip_norm, or compute in float32"
            )
        self._rollbacks, self._order = self._rollbacks + 1, max(self._order, at.order) + 1
        with jax.transfer_guard("allow"):
            state, back = self._restore_or_start()
            none = jax.device_put(np.int32(0), self.program.shardings.guard.in_a_row)
        self._events.write("rollback", at.step, to_step=back.step, data_order=back.order)
        self._first = min(self._first, back.step)
        self._monitor.rewind(back.step)
        self._batches.close()
        self._open_batches(back)
        return state.replace(guard=state.guard.replace(in_a_row=none)), back

    def end(self, state: TrainState, at: Position) -> Result:
        """The last evaluation and checkpoint."""
        self._profile.close()
        stop = self.stop_code or self._monitor.flush().stop
        if at.step == self.program.total_steps:
            self.evaluate(state, at)
        self.save(state, at, last=True)
        finished = at.step == self.program.total_steps
        ending = "finished" if finished else "interrupted" if stop == EXIT_INTERRUPTED else "preempted"
        self._events.write(ending, at.step, code=stop, shares=self.clock.shares())
        return Result(state, at.step, self.program.total_steps, stop)

    def _restore_or_start(self) -> tuple[TrainState, Position]:
        with self.clock.spend("restoring"):
            if (found := self._checkpoints.restore(self.program.state_shapes)) is not None:
                state, step, metadata = found
                return state, Position(step, max(metadata["data_order"], self._order))
            return self.program.start(self._initial), Position(0, self._order)

    def _open_batches(self, at: Position) -> None:
        self._batches = self._task.train_batches(at)
        self._monitor.restart(self._batches, at)

    def _keep(self, results: dict[str, Any], step: int) -> None:
        """Logs numbers; writes pictures and tables on process 0. A full disk loses them, not the run."""
        numbers = {name: float(value) for name, value in results.items() if isinstance(value, _NUMBERS)}
        if numbers:
            self._values |= numbers
            self._monitor.results(step, numbers)
        for name in results.keys() - numbers.keys():
            value, picture = results[name], isinstance(results[name], np.ndarray)
            file = f"step_{step:08d}_{name.replace('/', '_')}.{'png' if picture else 'json'}"
            try:
                if self._primary:
                    with atomic_write(self.folder / ("pictures" if picture else "tables") / file) as path:
                        if picture:
                            Image.fromarray(value).save(path, format="PNG")
                        else:
                            path.write_text(json.dumps(value, indent=1) + "\n")
            except OSError as error:
                logging.warning("%s of step %d cannot be written (%s); training goes on", name, step, error)


def _identity(config: RunConfig) -> str:
    """What tells runs with different configs in one folder apart."""
    return hashlib.sha256(json.dumps(binding(to_config(config), config.FREE_KEYS)).encode()).hexdigest()[:16]


def _rolled_back(folder: Path, identity: str) -> tuple[int, int]:
    """How often this run went back so far, and the data order that it reached, by its events, the same on all hosts.

    A run that goes on has the config of the process before; another config is another run, which starts anew."""
    count = order = 0
    ours = False
    for event in read_events(folder):
        if event["event"] in ("start", "resume") and not (ours := event.get("config") == identity):
            count = order = 0
        elif event["event"] == "rollback" and ours:
            count, order = count + 1, max(order, event.get("data_order", 0))
    if jax.process_count() > 1:
        count, order = multihost_utils.broadcast_one_to_all(np.array([count, order], np.int32)).tolist()
    return count, order

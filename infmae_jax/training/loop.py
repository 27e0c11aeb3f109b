"""The training loop, read from top to bottom. Every task runs through it."""

from __future__ import annotations

import contextlib
import dataclasses
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
from absl import logging

from data_pipelines.commands import EXIT_INTERRUPTED
from data_pipelines.errors import InputError
from infmae_jax.training import sharding, workdir
from infmae_jax.training.checkpoint import Checkpointer, SaveFailed
from infmae_jax.training.config import PretrainConfig
from infmae_jax.training.duration import in_steps
from infmae_jax.training.goodput import Goodput
from infmae_jax.training.hosts.peers import NoPeers, Peers
from infmae_jax.training.hosts.stop import StopRequest
from infmae_jax.training.lock import workdir_lock
from infmae_jax.training.metrics import EventLog
from infmae_jax.training.monitor import Monitor, Signs, make_layer_norms
from infmae_jax.training.optimizer import make_optimizer, peak_learning_rate, warmup_half_cosine
from infmae_jax.training.profiling import Profile
from infmae_jax.training.record import write_record
from infmae_jax.training.state import TrainState
from infmae_jax.training.step import make_train_step, stop_flags
from infmae_jax.training.task import Task


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


def train(
    task: Task,
    config: PretrainConfig,
    run: str | Path,
    peers: Peers | NoPeers = NoPeers(),
    clock: Goodput | None = None,
    at_end: Callable[[Path], None] = lambda run: None,
) -> Result:
    """Trains until `config.duration`, resuming from the latest whole checkpoint of the folder `run` if there is one.

    Args:
      peers: the other processes of the job, see `distributed.joined`.
      clock: counts where the time goes, from its creation on.
      at_end: called on process 0 with the run folder when a run that was begun or resumed ends, whatever ends it.

    Raises:
      InputError: the config does not fit the devices, the data or the run found in the folder.
      NumbersDiverged: see there; the last checkpoint is from before.
      SaveFailed: a checkpoint could not be written and `config.on_save_failure` is "stop".
    """
    with contextlib.ExitStack() as stack:
        return _train(task, config, Path(run), peers, clock or Goodput(), at_end, stack)


def _train(
    task: Task,
    config: PretrainConfig,
    run: Path,
    peers: Peers | NoPeers,
    clock: Goodput,
    at_end: Callable[[Path], None],
    stack: contextlib.ExitStack,
) -> Result:
    primary = jax.process_index() == 0
    stop = stack.enter_context(StopRequest(config.distributed.notice_url))

    # ---- Devices and mesh -------------------------------------------------------------------------------------------
    mesh = sharding.make_mesh(config.mesh)
    parts = sharding.batch_parts(mesh)
    if task.batch_size % (parts * config.optimizer.accumulate):
        raise InputError(
            f"data.batch_size={task.batch_size} is not divisible by {parts} parts (devices along mesh.data, mesh.fsdp) "
            f"x optimizer.accumulate={config.optimizer.accumulate}"
        )

    # ---- Durations --------------------------------------------------------------------------------------------------
    epoch = {"batch_size": task.batch_size, "num_examples": task.num_examples}
    total = in_steps(config.duration, **epoch)
    warmup, log_every, checkpoint_every, picture_every, keep_every, spike_warmup, norms_every = (
        in_steps(duration, total_steps=total, **epoch)
        for duration in (
            config.optimizer.warmup, config.log_every, config.checkpoint_every, config.picture_every,
            config.keep_every, config.guards.spike_warmup, config.observe.layer_norms_every,
        )
    )  # fmt: skip

    # ---- Model and optimizer ----------------------------------------------------------------------------------------
    schedule = warmup_half_cosine(peak_learning_rate(config.optimizer, task.batch_size), warmup, total)
    optimizer = make_optimizer(config.optimizer)
    key = jax.random.key(config.seed)

    def create(key: jax.Array) -> TrainState:
        return TrainState.create(task.init(key), optimizer)

    shapes = jax.eval_shape(create, key)
    shardings = sharding.state_shardings(shapes, mesh)
    abstract = jax.tree.map(lambda s, n: jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=n), shapes, shardings)

    # ---- The run folder ---------------------------------------------------------------------------------------------
    profile = stack.enter_context(contextlib.closing(Profile(run, config.observe.profile_steps)))
    initial = workdir.initial_params(config, shardings.params) if config.init_from else None
    if primary:
        stack.enter_context(workdir_lock(run))
    events = stack.enter_context(contextlib.closing(EventLog(run, active=primary)))
    checkpointer = stack.enter_context(
        Checkpointer(
            run, config.keep_checkpoints, config.keep_best, keep_every,
            on_damage=lambda step, reason: events.write("checkpoint_damaged", step, checkpoint=step, reason=reason),
        )
    )  # fmt: skip
    latest = checkpointer.latest_step() or 0
    workdir.claim(run, config, task.data_record, resuming=latest > 0, primary=primary)

    # ---- Restore or start -------------------------------------------------------------------------------------------
    def restored() -> tuple[TrainState, int, int]:
        """State, step and data order of the newest whole checkpoint, or those that a run starts with."""
        with clock.spend("restoring"):
            if (found := checkpointer.restore(abstract)) is not None:
                state, step, metadata = found
                return state, step, metadata["data_order"]
            state = jax.jit(create, out_shardings=shardings)(key)
            return (state.replace(params=initial) if initial is not None else state), 0, 0

    peers.progress(latest, "restoring")
    state, done, order = restored()
    first = done
    if done:
        logging.info("resuming %s at step %d of %d", run, done, total)

    # ---- Step -------------------------------------------------------------------------------------------------------
    batch_spec = {
        name: jax.ShapeDtypeStruct(shape, dtype, sharding=sharding.batch_sharding(mesh))
        for name, (shape, dtype) in task.batch_spec.items()
    }
    train_step = make_train_step(
        task.loss, optimizer, schedule, mesh, shardings, config.seed, config.optimizer.accumulate,
        config.guards.spike_factor, spike_warmup,
    )  # fmt: skip
    flags = stop_flags(mesh)
    peers.progress(done, "compiling")
    began = time.perf_counter()
    with clock.spend("compiling"):
        compiled = train_step.lower(abstract, batch_spec, flags[0]).compile()
    compile_seconds = time.perf_counter() - began
    layer_norms = make_layer_norms(task, sharding.path_text) if norms_every else None
    if primary and not first:
        write_record(run, abstract, mesh, compiled, task.batch_size, task.data_record)

    # ---- Data and reports -------------------------------------------------------------------------------------------
    flops = compiled.cost_analysis().get("flops", 0.0) * mesh.size  # XLA counts the program of one device
    monitor = stack.enter_context(
        contextlib.closing(Monitor(run, task, config, clock, events, flops, first, total, primary))
    )
    events.write(
        "resume" if done else "start", done, processes=jax.process_count(), devices=mesh.size,
        last_row_time=monitor.last_row_time,
    )  # fmt: skip
    events.write("compile", done, seconds=compile_seconds)
    if primary:
        stack.callback(at_end, run)
    batches = task.batches(done, order)
    stack.callback(lambda: batches.close())  # whichever they are by then
    monitor.restart(batches, done, order)

    def save(step: int, last: bool = False) -> None:
        """Saves, unless updates are being skipped just now: what comes back from a rollback should be sound."""
        if monitor.settle().in_a_row and not last:
            return
        peers.progress(step, "saving")
        try:
            with clock.spend("saving"):
                since = time.perf_counter()
                checkpointer.save(state, step, {"loss": monitor.mean_loss()}, {"data_order": order})
                if last:
                    checkpointer.wait()
            events.write("save", step, seconds_blocked=time.perf_counter() - since)
        except SaveFailed as error:
            events.write("save_failed", error.step, reason=error.reason)
            if config.on_save_failure == "stop":
                raise
            logging.warning("%s; training goes on", error)

    def draw(step: int) -> None:
        """Every host computes the picture, one writes it."""
        path = run / "pictures" / f"step_{step:08d}.png" if primary else None
        peers.progress(step, "drawing")
        with clock.spend("picture"), jax.transfer_guard("allow"):
            monitor.picture(task.picture(state.params, path), step)

    def roll_back(rollbacks: int) -> tuple[TrainState, int, int]:
        """The last checkpoint, and a data order that was not tried yet."""
        if rollbacks > config.guards.max_rollbacks:
            events.write("stopped", done, reason="numbers diverged")
            raise NumbersDiverged(
                f"{config.guards.rollback_after} updates in a row were skipped at step {done}, after "
                f"{rollbacks - 1} rollbacks; {run}/events.jsonl names the records: lower "
                "optimizer.base_learning_rate, set optimizer.clip_norm, or use model.dtype=float32"
            )
        with jax.transfer_guard("allow"):
            state, step, before = restored()
            none = jax.device_put(np.int32(0), abstract.guard.in_a_row.sharding)
        return state.replace(guard=state.guard.replace(in_a_row=none)), step, max(before, order) + 1

    # ---- Loop -------------------------------------------------------------------------------------------------------
    # Order, never to be changed: save, then take the next batch, then step. Checkpoint s is the state before batch s.
    stack.enter_context(jax.transfer_guard("disallow"))
    signs, rollbacks, metrics = Signs(), 0, None
    stop.looping = True
    while done < total and not signs.stop:
        if checkpoint_every and done % checkpoint_every == 0 and done > first:
            save(done)
        if picture_every and done % picture_every == 0:
            draw(done)
        peers.progress(done)
        with clock.spend("data_wait"):
            batch = sharding.place_batch(next(batches), mesh)
        with clock.spend("stepping"), profile.step(done, metrics):
            log = bool(log_every) and (done % log_every == 0 or done == total - 1)
            norms = layer_norms(state.params, batch, key) if layer_norms and done % norms_every == 0 else {}
            state, metrics = compiled(state, batch, flags[stop.code])
        signs = monitor.step(done, metrics | norms, log or bool(norms))
        done += 1
        if done == total:
            signs = monitor.settle()
        if signs.in_a_row >= config.guards.rollback_after:
            rollbacks += 1
            failed = done
            state, done, order = roll_back(rollbacks)
            events.write("rollback", failed, to_step=done, data_order=order)
            monitor.rewind(done)
            batches.close()
            batches = task.batches(done, order)
            monitor.restart(batches, done, order)
            first = min(first, done)
    profile.close()
    signs = Signs(stop=signs.stop or monitor.settle().stop)
    if done > first or not latest:
        save(done, last=True)
    if done == total and picture_every:
        draw(done)
    ending = "finished" if done == total else "interrupted" if signs.stop == EXIT_INTERRUPTED else "preempted"
    events.write(ending, done, code=signs.stop, shares=clock.shares())
    return Result(state, done, total, signs.stop)

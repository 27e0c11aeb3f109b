"""The training loop, read from top to bottom. Every task runs through it."""

from __future__ import annotations

import contextlib
import dataclasses
import math
import signal
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from absl import logging

from data_pipelines.errors import InputError
from infmae_jax.training import checkpoint, sharding
from infmae_jax.training.config import PretrainConfig, differences, to_config
from infmae_jax.training.duration import in_steps
from infmae_jax.training.metrics import MetricsWriter, progress_bar
from infmae_jax.training.optimizer import make_optimizer, peak_learning_rate, warmup_half_cosine
from infmae_jax.training.record import write_record
from infmae_jax.training.state import TrainState
from infmae_jax.training.step import make_train_step


class Task(Protocol):
    """What the loop needs to know of a job."""

    batch_size: int  # images a step, over all hosts
    num_examples: int  # images an epoch
    batch_spec: dict[str, tuple[tuple[int, ...], Any]]  # shape and dtype of each array of a global batch
    data_record: dict[str, Any]  # what the step-0 record says of the data

    def init(self, key: jax.Array) -> Any:
        """Random parameters."""

    def loss(self, params: Any, batch: dict[str, jax.Array], key: jax.Array) -> tuple[jax.Array, dict[str, jax.Array]]:
        """Mean loss of a batch, and further scalar metrics."""

    def batches(self, start_step: int) -> Iterator[dict[str, np.ndarray]]:
        """This host's batches from `start_step` on, without end; has `close()` and `substituted`, the number of
        samples so far that stand in for damaged records."""

    def picture(self, params: Any, path: Path | None) -> np.ndarray | None:
        """Computes what the model does on fixed images; where `path` is given, draws it there (PNG) and returns the
        pixels, (H,W,3) uint8."""


class NonFiniteLoss(InputError):
    """The loss became NaN or infinite."""

    exit_code = 3


@dataclasses.dataclass(frozen=True)
class Result:
    """State after the last step made, which step that left us before, and whether a signal ended the run early."""

    state: TrainState
    step: int
    total_steps: int

    @property
    def interrupted(self) -> bool:
        return self.step < self.total_steps


class StopRequest:
    """SIGINT and SIGTERM ask the loop to save and end; a second SIGINT ends the process at once."""

    def __init__(self):
        self.requested = False
        self._previous: dict[int, Any] = {}

    def __enter__(self) -> StopRequest:
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                self._previous[number] = signal.signal(number, self._request)
        return self

    def __exit__(self, *unused) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _request(self, number: int, frame: Any) -> None:
        if self.requested and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.requested = True


def train(task: Task, config: PretrainConfig, workdir: str | Path) -> Result:
    """Trains until `config.duration`, resuming from the latest checkpoint of `workdir` if there is one.

    Raises:
      InputError: the config does not fit the devices, the data or the run found in `workdir`.
      NonFiniteLoss: the loss is NaN or infinite; nothing is saved after it.
    """
    with contextlib.ExitStack() as stack:
        return _train(task, config, Path(workdir), stack)


def _train(task: Task, config: PretrainConfig, workdir: Path, stack: contextlib.ExitStack) -> Result:
    primary = jax.process_index() == 0

    # ---- Devices and mesh -------------------------------------------------------------------------------------------
    mesh = sharding.make_mesh(config.mesh)
    if task.batch_size % (mesh.size * config.optimizer.accumulate):
        raise InputError(
            f"data.batch_size={task.batch_size} is not divisible by {mesh.size} devices x "
            f"optimizer.accumulate={config.optimizer.accumulate}"
        )

    # ---- Durations --------------------------------------------------------------------------------------------------
    epoch = {"batch_size": task.batch_size, "num_examples": task.num_examples}
    total = in_steps(config.duration, **epoch)
    warmup, log_every, checkpoint_every, picture_every = (
        in_steps(duration, total_steps=total, **epoch)
        for duration in (config.optimizer.warmup, config.log_every, config.checkpoint_every, config.picture_every)
    )

    # ---- Model and optimizer ----------------------------------------------------------------------------------------
    schedule = warmup_half_cosine(peak_learning_rate(config.optimizer, task.batch_size), warmup, total)
    optimizer = make_optimizer(config.optimizer, schedule)

    def create(key: jax.Array) -> TrainState:
        return TrainState.create(task.init(key), optimizer)

    key = jax.random.key(config.seed)
    shapes = jax.eval_shape(create, key)
    shardings = sharding.state_shardings(shapes, mesh)
    abstract = jax.tree.map(lambda s, n: jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=n), shapes, shardings)

    # ---- Restore or start -------------------------------------------------------------------------------------------
    initial = initial_params(config, shardings.params) if config.init_from else None
    checkpointer = stack.enter_context(checkpoint.Checkpointer(workdir, config.keep_checkpoints))
    first = checkpointer.latest_step() or 0
    claim_workdir(workdir, config, task.data_record, resuming=first > 0, primary=primary)
    if first:
        logging.info("resuming %s at step %d of %d", workdir, first, total)
        state = checkpointer.restore(abstract, first)
    else:
        state = jax.jit(create, out_shardings=shardings)(key)
        state = state.replace(params=initial) if initial is not None else state

    # ---- Step -------------------------------------------------------------------------------------------------------
    batch_spec = {
        name: jax.ShapeDtypeStruct(shape, dtype, sharding=sharding.batch_sharding(mesh))
        for name, (shape, dtype) in task.batch_spec.items()
    }
    train_step = make_train_step(
        task.loss, optimizer, schedule, mesh, shardings, config.seed, config.optimizer.accumulate
    )
    compiled = train_step.lower(abstract, batch_spec).compile()
    if primary and not first:
        write_record(workdir, abstract, mesh, compiled, task.batch_size, task.data_record)

    # ---- Data and reports -------------------------------------------------------------------------------------------
    batches = stack.enter_context(contextlib.closing(task.batches(first)))
    writer = stack.enter_context(contextlib.closing(MetricsWriter(workdir, first, active=primary)))
    bar = stack.enter_context(progress_bar("train", first, total, active=primary))
    window = Window(task.batch_size)
    pending: tuple[int, dict[str, jax.Array]] | None = None

    def report() -> None:
        """Reads and logs the metrics of an earlier step, while the device is busy with a later one."""
        nonlocal pending
        if pending is None:
            return
        at, values = pending[0], {name: float(value) for name, value in jax.device_get(pending[1]).items()}
        pending = None
        if not math.isfinite(values["loss"]):
            raise NonFiniteLoss(
                f"loss is {values['loss']} at step {at}; checkpoints up to step {checkpointer.latest_step() or 0} of "
                f"{workdir} are intact: lower optimizer.base_learning_rate or set optimizer.clip_norm"
            )
        rates = window.close()
        damaged = {"substituted_samples": batches.substituted}
        writer.write({"step": at, "epoch": at * task.batch_size / task.num_examples, **values, **rates, **damaged})
        bar.set_postfix_str(f"loss {values['loss']:.4f}, {rates['images_per_second']:.1f} images/s", refresh=False)

    def save(step: int) -> None:
        report()
        if not jax.device_get(all_finite(state.params)):
            raise NonFiniteLoss(
                f"parameters are not finite before step {step}, which is not saved; checkpoints of {workdir} up to "
                f"step {checkpointer.latest_step() or 0} are intact: lower optimizer.base_learning_rate"
            )
        checkpointer.save(state, step)

    def draw(step: int) -> None:
        """Every host computes the picture, one writes it."""
        path = workdir / "pictures" / f"step_{step:08d}.png" if primary else None
        with jax.transfer_guard("allow"):
            image = task.picture(state.params, path)
        if image is not None:
            writer.picture("reconstruction", image, step)

    # ---- Loop -------------------------------------------------------------------------------------------------------
    # Order, never to be changed: save, then take the next batch, then step. Checkpoint s is the state before batch s.
    done = first
    stop = stack.enter_context(StopRequest())
    stack.enter_context(jax.transfer_guard("disallow"))
    window.start()
    while done < total and not stop.requested:
        if checkpoint_every and done % checkpoint_every == 0 and done > first:
            save(done)
        if picture_every and done % picture_every == 0:
            draw(done)
        with window.waiting():
            batch = sharding.place_batch(next(batches), mesh)
        state, metrics = compiled(state, batch)
        report()
        window.steps += 1
        if log_every and (done % log_every == 0 or done == total - 1):
            pending = (done, metrics)
        done += 1
        bar.update()
    report()
    if done > first:
        save(done)
    if done == total:
        draw(done)
    return Result(state, done, total)


@jax.jit
def all_finite(tree: Any) -> jax.Array:
    """() bool: no NaN or infinity in any leaf."""
    return jnp.all(jnp.stack([jnp.isfinite(leaf).all() for leaf in jax.tree.leaves(tree)]))


class Window:
    """Counts steps and seconds between two logged steps."""

    def __init__(self, batch_size: int):
        self._batch_size = batch_size
        self.start()

    def start(self) -> None:
        self.steps, self._waited, self._since = 0, 0.0, time.perf_counter()

    def waiting(self) -> Window:
        return self

    def __enter__(self) -> None:
        self._waiting_since = time.perf_counter()

    def __exit__(self, *unused) -> None:
        self._waited += time.perf_counter() - self._waiting_since

    def close(self) -> dict[str, float]:
        """Rates since the last call: images_per_second and data_wait_seconds (time spent waiting for batches)."""
        elapsed = max(time.perf_counter() - self._since, 1e-9)
        rates = {"images_per_second": self.steps * self._batch_size / elapsed, "data_wait_seconds": self._waited}
        self.start()
        return rates


def claim_workdir(
    workdir: Path, config: PretrainConfig, data_record: dict[str, Any], resuming: bool, primary: bool
) -> None:
    """Writes the resolved config and data set; of a run that is resumed, checks that they are still the same."""
    mine = {**to_config(config).to_dict(), "data_set": data_record}
    if resuming:
        changed = differences(checkpoint.read_config(workdir), mine)
        if changed:
            raise InputError(
                f"{workdir} holds a run with another config, which cannot be resumed: {'; '.join(changed)}. "
                "Use the same values, or another --workdir"
            )
    elif primary:
        checkpoint.write_config(workdir, mine)


def initial_params(config: PretrainConfig, shardings: Any) -> Any:
    """Weights of the run `config.init_from`, which must have the same architecture."""
    restored = checkpoint.restore_params(config.init_from)
    changed = differences(dataclasses.asdict(restored.model), dataclasses.asdict(config.model), "model.")
    changed = [line for line in changed if not line.startswith(("model.dtype", "model.remat", "model.depthwise"))]
    if changed:
        raise InputError(f"init_from={config.init_from} is another model: {'; '.join(changed)}")
    return jax.tree.map(lambda x, s: jax.device_put(jnp.asarray(x), s), restored.params, shardings)

"""The one program of a task: schedule, shapes, layout and the compiled step, for whoever trains, measures or checks."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh

from data_pipelines.errors import InputError
from infmae_jax.training import optimizer, sharding, step
from infmae_jax.training.config import RunConfig
from infmae_jax.training.duration import in_steps
from infmae_jax.training.state import TrainState
from infmae_jax.training.task import Group, Task


@dataclasses.dataclass(frozen=True, eq=False)
class Program:
    """A task's training step on a mesh. `build` makes no arrays, reads no data and compiles nothing.

    The mesh may be of devices that are not there (`jax.experimental.topologies`): `lowered().compile()` then compiles
    ahead of time.

    Attributes:
      total_steps: of the whole run.
      schedule: step -> learning rate.
      state_shapes: the training state's shapes, dtypes and shardings.
      batch_shapes: those of a global batch.
    """

    task: Task
    config: RunConfig
    mesh: Mesh
    total_steps: int
    schedule: optax.Schedule
    state_shapes: TrainState
    batch_shapes: dict[str, jax.ShapeDtypeStruct]
    _optimizer: optax.GradientTransformation
    _groups: Any
    _flags: dict[int, jax.Array] = dataclasses.field(default_factory=dict)

    @classmethod
    def build(cls, task: Task, config: RunConfig, mesh: Mesh) -> Program:
        """InputError: batch, durations or parameters do not fit the mesh or each other."""
        parts = sharding.batch_parts(mesh)
        if task.batch_size % (parts * config.optimizer.accumulate):
            raise InputError(
                f"data.batch_size={task.batch_size} is not divisible by {parts} parts (devices along mesh.data, "
                f"mesh.fsdp) x optimizer.accumulate={config.optimizer.accumulate}"
            )
        total = _steps(task, config.duration)
        warmup = _steps(task, config.optimizer.warmup, total)
        if warmup > total:
            raise InputError(
                f"optimizer.warmup={config.optimizer.warmup} is {warmup} steps, longer than the run "
                f"(duration={config.duration}, {total} steps): use at most that, or a share such as 10 percent"
            )
        params = jax.eval_shape(task.init, jax.random.key(config.seed))
        groups = jax.tree_util.tree_map_with_path(lambda path, _: task.group(sharding.path_text(path)), params)
        adamw = optimizer.make_optimizer(config.optimizer, groups)
        shapes = jax.eval_shape(lambda: TrainState.create(jax.tree.map(_zeros, params), adamw))
        return cls(
            task,
            config,
            mesh,
            total,
            optimizer.make_schedule(config.optimizer, task.batch_size, warmup, total),
            jax.tree.map(_placed, shapes, sharding.state_shardings(shapes, mesh)),
            {
                name: jax.ShapeDtypeStruct(shape, dtype, sharding=sharding.batch_sharding(mesh))
                for name, (shape, dtype) in task.batch_spec.items()
            },
            adamw,
            groups,
        )

    def in_steps(self, duration: str) -> int:
        """A duration of this run in steps."""
        return _steps(self.task, duration, self.total_steps)

    @functools.cached_property
    def shardings(self) -> TrainState:
        return jax.tree.map(lambda shape: shape.sharding, self.state_shapes)

    def lowered(self) -> jax.stages.Lowered:
        """The step, traced for the mesh's devices."""
        guards = self.config.guards
        function = step.make_train_step(
            self.task.loss, self._optimizer, self.schedule, self.mesh, self.shardings, self.config.seed,
            self.config.optimizer.accumulate, guards.spike_factor, self.in_steps(guards.spike_warmup),
            self._frozen,
        )  # fmt: skip
        stop = jax.ShapeDtypeStruct((self.mesh.size,), np.int32, sharding=step.stop_sharding(self.mesh))
        return function.lower(self.state_shapes, self.batch_shapes, stop)

    @functools.cached_property
    def compiled(self) -> jax.stages.Compiled:
        """The compiled step, made when first asked for."""
        return self.lowered().compile()

    @property
    def flops(self) -> float:
        """Floating-point operations of a step over all devices, by XLA's count."""
        return self.compiled.cost_analysis().get("flops", 0.0) * self.mesh.size  # XLA counts the program of one device

    def start(self, initial: Any | None = None) -> TrainState:
        """The state before the first step, with these parameters or with random ones."""

        def create(key: jax.Array) -> TrainState:
            return TrainState.create(self.task.init(key), self._optimizer)

        state = jax.jit(create, out_shardings=self.shardings)(jax.random.key(self.config.seed))
        if initial is None:
            return state
        placed = jax.tree.map(lambda x, s: jax.device_put(jnp.asarray(x), s), initial, self.shardings.params)
        return state.replace(params=placed)

    def place(self, batch: dict[str, np.ndarray]) -> dict[str, jax.Array]:
        """This host's part of a batch as global arrays."""
        return sharding.place_batch(batch, self.mesh)

    def step(
        self, state: TrainState, batch: dict[str, jax.Array], stop: int = 0
    ) -> tuple[TrainState, dict[str, jax.Array]]:
        """One update, see `step.make_train_step`; the old state's buffers are given up.

        `stop` is the exit code that this host asks all to end with, 0 for none."""
        if stop not in self._flags:
            self._flags[stop] = step.stop_flag(self.mesh, stop)
        return self.compiled(state, batch, self._flags[stop])

    @functools.cached_property
    def layer_norms(self):
        """(state, batch) -> norm of every parameter and of its gradient; computed apart from the step."""
        seed, accumulate = self.config.seed, self.config.optimizer.accumulate
        return step.make_layer_norms(
            step.make_gradients(self.task.loss, self.shardings.params, seed, accumulate, self._frozen)
        )

    @property
    def _frozen(self) -> Any | None:
        """Tree of bools as the parameters, None where none is frozen."""
        frozen = jax.tree.map(lambda group: group.frozen, self._groups)
        return frozen if any(jax.tree.leaves(frozen)) else None


def _steps(task: Task, duration: str, total: int | None = None) -> int:
    """`duration` in steps; asks the task how many examples it has only where the unit is an epoch."""
    examples = task.num_examples if "epoch" in duration else 1
    return in_steps(duration, batch_size=task.batch_size, num_examples=examples, total_steps=total)


def _zeros(shape: jax.ShapeDtypeStruct) -> jax.Array:
    return jnp.zeros(shape.shape, shape.dtype)


def _placed(shape: jax.ShapeDtypeStruct, layout: jax.sharding.Sharding) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape.shape, shape.dtype, sharding=layout)

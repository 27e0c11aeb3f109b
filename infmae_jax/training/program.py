"""The one program of a task: schedule, shapes, layout and the compiled step, for whoever trains, measures or checks."""

import dataclasses
import functools
from typing import Any, Self

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh

from data_pipelines.errors import InputError
from infmae_jax.training import hardware, optimizer, sharding, step
from infmae_jax.training.config import RunConfig
from infmae_jax.training.duration import in_steps
from infmae_jax.training.state import TrainState
from infmae_jax.training.task import Task


@dataclasses.dataclass(frozen=True, eq=False)
class Program:
    """A task's training step on a mesh. `build` makes no arrays, reads no data and compiles nothing.

    The mesh may be of devices that are not there (`jax.experimental.topologies`): `lowered().compile()` then compiles
    ahead of time.
    """

    task: Task
    config: RunConfig
    mesh: Mesh
    _flags: dict[int, jax.Array] = dataclasses.field(default_factory=dict)

    @classmethod
    def build(cls, task: Task, config: RunConfig, mesh: Mesh) -> Self:
        """InputError: batch, durations or parameters do not fit the mesh or each other."""
        parts = sharding.batch_parts(mesh) * config.optimizer.accumulate
        if task.batch_size % parts:
            near = sorted({max(task.batch_size // parts, 1) * parts, (task.batch_size // parts + 1) * parts})
            raise InputError(
                f"data.batch_size={task.batch_size} is not divisible by {parts} parts (devices along mesh.data, "
                f"mesh.fsdp x optimizer.accumulate): use {' or '.join(map(str, near))}"
            )
        program = cls(task, config, mesh)
        total, warmup = program.total_steps, program.in_steps(config.optimizer.warmup)
        if warmup > total:
            raise InputError(
                f"optimizer.warmup={config.optimizer.warmup} is {warmup} steps, longer than the run "
                f"(duration={config.duration}, {total} steps): use at most that, or a share such as 10 percent"
            )
        _ = program.state_shapes  # found out now: that the parameters fit the mesh
        return program

    @functools.cached_property
    def total_steps(self) -> int:
        """Of the whole run."""
        return _steps(self.task, self.config.duration)

    @functools.cached_property
    def schedule(self) -> optax.Schedule:
        """Step -> learning rate."""
        config = self.config.optimizer
        return optimizer.make_schedule(config, self.task.batch_size, self.in_steps(config.warmup), self.total_steps)

    @functools.cached_property
    def state_shapes(self) -> TrainState:
        """The training state's shapes, dtypes and shardings."""
        shapes = jax.eval_shape(self._state_of, self._param_shapes)
        return jax.tree.map(
            lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s),
            shapes,
            sharding.state_shardings(shapes, self.mesh),
        )

    @functools.cached_property
    def batch_shapes(self) -> dict[str, jax.ShapeDtypeStruct]:
        """Those of a global batch."""
        layout, spec = sharding.batch_sharding(self.mesh), self.task.batch_spec
        return {name: jax.ShapeDtypeStruct(shape, dtype, sharding=layout) for name, (shape, dtype) in spec.items()}

    def in_steps(self, duration: str) -> int:
        """A duration of this run in steps."""
        return _steps(self.task, duration, self.total_steps)

    @functools.cached_property
    def shardings(self) -> TrainState:
        return jax.tree.map(lambda shape: shape.sharding, self.state_shapes)

    def lowered(self) -> jax.stages.Lowered:
        """The step, traced for the mesh's devices."""
        config, guards = self.config, self.config.guards
        gradients = step.make_gradients(
            self.task.loss, self.shardings.params, config.seed, config.optimizer.accumulate, self._groups
        )
        function = step.make_train_step(
            gradients, self._optimizer, self.schedule, self.mesh, self.shardings, guards.spike_factor,
            self.in_steps(guards.spike_warmup), config.optimizer.ema,
        )  # fmt: skip
        stop = jax.ShapeDtypeStruct((self.mesh.size,), np.int32, sharding=step.stop_sharding(self.mesh))
        with jax.sharding.use_abstract_mesh(self.mesh.abstract_mesh):  # tells layers how many devices share a batch
            return function.lower(self.state_shapes, self.batch_shapes, stop)

    @functools.cached_property
    def compiled(self) -> jax.stages.Compiled:
        """The compiled step, made when first asked for."""
        return self.lowered().compile()

    def mfu(self, seconds_per_step: float) -> float | None:
        """Model FLOPs utilisation at this speed, see `hardware.mfu`."""
        kind = self.mesh.devices.flat[0].device_kind
        return hardware.mfu(self.flops, seconds_per_step, kind, self.mesh.size, self.task.dtype)

    @functools.cached_property
    def flops(self) -> float:
        """Floating-point operations of a step over all devices, by XLA's count."""
        return self.compiled.cost_analysis().get("flops", 0.0) * self.mesh.size  # XLA counts the program of one device

    def start(self, initial: Any | None = None) -> TrainState:
        """The state before the first step, with these parameters or with random ones."""
        if initial is None:
            create = jax.jit(lambda key: self._state_of(self.task.init(key)), out_shardings=self.shardings)
            return create(jax.random.key(self.config.seed))
        params = jax.tree.map(lambda x, s: jax.device_put(jnp.asarray(x), s), initial, self.shardings.params)
        # In buffers of its own, as the step gives up those of the old state.
        create = jax.jit(lambda given: self._state_of(jax.tree.map(jnp.copy, given)), out_shardings=self.shardings)
        return create(params)

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

    def _state_of(self, params: Any) -> TrainState:
        return TrainState.create(params, self._optimizer, average=bool(self.config.optimizer.ema))

    @functools.cached_property
    def _param_shapes(self) -> Any:
        return jax.eval_shape(self.task.init, jax.random.key(self.config.seed))

    @functools.cached_property
    def _groups(self) -> Any:
        return jax.tree_util.tree_map_with_path(
            lambda path, _: self.task.group(sharding.path_text(path)), self._param_shapes
        )

    @functools.cached_property
    def _optimizer(self) -> optax.GradientTransformation:
        return optimizer.make_optimizer(self.config.optimizer, self._groups)


def _steps(task: Task, duration: str, total: int | None = None) -> int:
    """`duration` in steps; asks the task how many examples it has only where the unit is an epoch."""
    examples = task.num_examples if "epoch" in duration else 1
    return in_steps(duration, batch_size=task.batch_size, num_examples=examples, total_steps=total)

"""The one jitted training step."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from infmae_jax.training import sharding
from infmae_jax.training.state import GuardState, TrainState
from infmae_jax.training.task import Loss

Batch = dict[str, jax.Array]
LossFunction = Callable[[Any, Batch, jax.Array], Loss]
Gradients = Callable[[Any, Batch, jax.Array], tuple[Any, dict[str, jax.Array]]]
_SLOWEST_MEAN = 0.01  # weight of a new loss in the running mean, once there are many


def make_gradients(
    loss: LossFunction, shardings: Any, seed: int, accumulate: int = 1, groups: Any | None = None
) -> Gradients:
    """Builds (params, batch, step) -> (gradients of the loss, metrics, its value as "loss" among them).

    Sums and weights are added up over devices and micro-batches, and divided at the end.

    Args:
      loss: (params, batch, key) -> `task.Loss`.
      shardings: of the parameters.
      seed: the key of step s is fold_in(key(seed), s), so that randomness is a function of the step.
      accumulate: micro-batches whose gradients are added up, for batches that do not fit at once.
      groups: tree of `task.Group` as the parameters, of which frozen ones get a gradient of 0; None: none is.
    """
    whole = sharding.gathered(shardings)

    def totals(params: Any, batch: Batch, key: jax.Array) -> tuple[Any, Loss]:
        def total(params: Any) -> tuple[jax.Array, Loss]:
            if groups is not None:
                params = jax.tree.map(lambda p, g: jax.lax.stop_gradient(p) if g.frozen else p, params, groups)
            found = jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), loss(params, batch, key))
            return found.sum, found

        grads, found = jax.grad(total, has_aux=True)(params)
        return jax.lax.with_sharding_constraint(grads, shardings), found

    def accumulated(params: Any, batch: Batch, key: jax.Array) -> tuple[Any, Loss]:
        if accumulate == 1:
            return totals(params, batch, key)

        def micro(index, total):
            part = jax.tree.map(lambda x: x[index], split)
            return jax.tree.map(jnp.add, total, totals(params, part, jax.random.fold_in(key, index)))

        # Every micro-batch takes every n-th sample, so that each stays spread over all devices.
        split = jax.tree.map(lambda x: jnp.swapaxes(x.reshape(-1, accumulate, *x.shape[1:]), 0, 1), batch)
        first = totals(params, jax.tree.map(lambda x: x[0], split), jax.random.fold_in(key, 0))
        return jax.lax.fori_loop(1, accumulate, micro, first)

    def gradients(params: Any, batch: Batch, step: jax.Array) -> tuple[Any, dict[str, jax.Array]]:
        key = jax.random.fold_in(jax.random.key(seed), step)
        grads, found = accumulated(jax.lax.with_sharding_constraint(params, whole), batch, key)
        weight = jnp.where(found.weight > 0, found.weight, 1.0)
        metrics = {"loss": found.sum, **found.metrics}
        return jax.tree.map(lambda x: x / weight, (grads, metrics))

    return gradients


def make_train_step(
    gradients: Gradients,
    optimizer: optax.GradientTransformation,
    schedule: optax.Schedule,
    mesh: Mesh,
    shardings: TrainState,
    spike_factor: float = 0.0,
    spike_warmup: int = 0,
    ema: float = 0.0,
) -> jax.stages.Wrapped:
    """Builds the jitted step: (state, batch, stop) -> (state, metrics), the old state's buffers donated.

    An update with a non-finite loss or gradient norm, or with a loss spike, is not made: parameters and optimizer
    state stay bit for bit as they were, and the step counts all the same.

    Args:
      gradients: as from `make_gradients`.
      optimizer: gives the direction to go; its step length is the schedule's, a function of the step.
      shardings: of the state, as from `sharding.state_shardings`.
      spike_factor: a loss above this multiple of the running mean is a spike; 0 is off.
      spike_warmup: accepted updates before the running mean counts.
      ema: decay of the state's average of the parameters, see `OptimizerConfig`; 0: it has none.

    `stop` is (devices,) int32, this host's part of which is whatever it asks the others to end with, 0 for nothing.
    Metrics are replicated scalars: loss, learning_rate, grad_norm (before clipping) and those of the loss, float32;
    skipped (this update), skipped_updates, in_a_row and stop (the highest of any host), int32.
    """

    def accepted(guard: GuardState, step: jax.Array, loss: jax.Array, grad_norm: jax.Array) -> jax.Array:
        fine = jnp.isfinite(loss) & jnp.isfinite(grad_norm)
        if spike_factor:
            spike = (loss > spike_factor * guard.loss_mean) & (step - guard.skipped >= spike_warmup)
            fine &= ~spike
        return fine

    def step(state: TrainState, batch: Batch, stop: jax.Array) -> tuple[TrainState, dict[str, jax.Array]]:
        grads, metrics = gradients(state.params, batch, state.step)
        grad_norm, rate = optax.global_norm(grads), schedule(state.step)
        ok = accepted(state.guard, state.step, metrics["loss"], grad_norm)
        directions, opt_state = optimizer.update(grads, state.opt_state, state.params)
        params = jax.tree.map(lambda p, d: (p - rate * d).astype(p.dtype), state.params, directions)
        params, opt_state = jax.tree.map(
            lambda new, old: jnp.where(ok, new, old), (params, opt_state), (state.params, state.opt_state)
        )
        average = state.average
        if ema:
            made = (state.step - state.guard.skipped + 1).astype(jnp.float32)
            share = jnp.where(ok, 1 - jnp.minimum(ema, (1 + made) / (10 + made)), 0.0)
            average = jax.tree.map(lambda old, new: old + share * (new - old), average, params)
        guard = _remember(state.guard, state.step, metrics["loss"], ok)
        metrics |= {
            "learning_rate": rate,
            "grad_norm": grad_norm,
            "skipped": 1 - ok.astype(jnp.int32),
            "skipped_updates": guard.skipped,
            "in_a_row": guard.in_a_row,
            "stop": stop.max(),
        }
        return TrainState(state.step + 1, params, opt_state, guard, average), metrics

    replicated = NamedSharding(mesh, PartitionSpec())
    return jax.jit(
        step,
        in_shardings=(shardings, sharding.batch_sharding(mesh), stop_sharding(mesh)),
        out_shardings=(shardings, replicated),
        donate_argnums=0,
    )


def stop_sharding(mesh: Mesh) -> NamedSharding:
    """Of the stop codes: one a device."""
    return NamedSharding(mesh, PartitionSpec(mesh.axis_names))


def stop_flag(mesh: Mesh, code: int) -> jax.Array:
    """The step's `stop` argument for what this host asks for, 0 for nothing."""
    with jax.transfer_guard("allow"):  # with several processes JAX does not count it as explicit
        return jax.make_array_from_callback(
            (mesh.size,), stop_sharding(mesh), lambda index: np.full((mesh.size,), code, np.int32)[index]
        )


def _remember(guard: GuardState, step: jax.Array, loss: jax.Array, ok: jax.Array) -> GuardState:
    """The guards' memory after an update that was made (`ok`) or skipped."""
    weight = jnp.maximum(1.0 / (step - guard.skipped + 1), _SLOWEST_MEAN)  # a plain mean at first
    return GuardState(
        skipped=guard.skipped + 1 - ok.astype(jnp.int32),
        in_a_row=jnp.where(ok, 0, guard.in_a_row + 1),
        loss_mean=jnp.where(ok, guard.loss_mean + weight * (loss - guard.loss_mean), guard.loss_mean),
    )

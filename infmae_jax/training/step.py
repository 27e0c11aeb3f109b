"""The one jitted training step."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh

from infmae_jax.training import sharding
from infmae_jax.training.state import TrainState

Batch = dict[str, jax.Array]
LossFunction = Callable[[Any, Batch, jax.Array], tuple[jax.Array, dict[str, jax.Array]]]


def make_train_step(
    loss: LossFunction,
    optimizer: optax.GradientTransformation,
    schedule: optax.Schedule,
    mesh: Mesh,
    shardings: TrainState,
    seed: int,
    accumulate: int = 1,
) -> jax.stages.Wrapped:
    """Builds the jitted step: (state, batch) -> (state, metrics), the old state's buffers donated.

    Args:
      loss: (params, batch, key) -> (scalar, metrics), a mean over the samples of its batch.
      shardings: of the state, as from `sharding.state_shardings`.
      seed: the key of step s is fold_in(key(seed), s), so that randomness is a function of the step.
      accumulate: micro-batches whose gradients are averaged, for batches that do not fit at once.

    Metrics are replicated float32 scalars: loss, learning_rate, grad_norm (before clipping) and those of `loss`.
    """

    def gradients(params, batch, key):
        (value, metrics), grads = jax.value_and_grad(loss, has_aux=True)(params, batch, key)
        return grads, {"loss": value, **metrics}

    def accumulated(params, batch, key):
        if accumulate == 1:
            return gradients(params, batch, key)

        def micro(index, total):
            part = jax.tree.map(lambda x: x[index], split)
            return jax.tree.map(jnp.add, total, gradients(params, part, jax.random.fold_in(key, index)))

        # Every micro-batch takes every n-th sample, so that each stays spread over all devices.
        split = jax.tree.map(lambda x: jnp.swapaxes(x.reshape(-1, accumulate, *x.shape[1:]), 0, 1), batch)
        first = gradients(params, jax.tree.map(lambda x: x[0], split), jax.random.fold_in(key, 0))
        total = jax.lax.fori_loop(1, accumulate, micro, first)
        return jax.tree.map(lambda x: x / accumulate, total)

    def step(state: TrainState, batch: Batch) -> tuple[TrainState, dict[str, jax.Array]]:
        key = jax.random.fold_in(jax.random.key(seed), state.step)
        grads, metrics = accumulated(state.params, batch, key)
        updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
        params = optax.apply_updates(state.params, updates)
        metrics |= {"learning_rate": schedule(state.step), "grad_norm": optax.global_norm(grads)}
        return TrainState(step=state.step + 1, params=params, opt_state=opt_state), metrics

    replicated = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
    return jax.jit(
        step,
        in_shardings=(shardings, sharding.batch_sharding(mesh)),
        out_shardings=(shardings, replicated),
        donate_argnums=0,
    )

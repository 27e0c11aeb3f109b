"""AdamW and LARS by parameter groups, and learning-rate schedules."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import optax

from infmae_jax.training.config import OptimizerConfig
from infmae_jax.training.task import Group

_TRUST = 1e-3  # of LARS: how far a kernel moves, in units of its own norm, at learning rate 1


def make_schedule(config: OptimizerConfig, batch_size: int, warmup_steps: int, total_steps: int) -> optax.Schedule:
    """The learning rate as a function of the step: linear from 0 over the warm-up steps, then the decay
    `config.schedule` to 0 at `total_steps`."""
    peak = peak_learning_rate(config, batch_size)

    def schedule(step):
        step = jnp.asarray(step, jnp.float32)
        done = jnp.clip((step - warmup_steps) / max(total_steps - warmup_steps, 1), 0.0, 1.0)
        if config.schedule == "polynomial":
            falling = (1.0 - done) ** config.power
        else:
            falling = 0.5 * (1.0 + jnp.cos(jnp.pi * done))
        return jnp.where(step < warmup_steps, peak * step / max(warmup_steps, 1), peak * falling)

    return schedule


def peak_learning_rate(config: OptimizerConfig, batch_size: int) -> float:
    """The linear scaling rule: base_learning_rate * batch_size / 256; LARS needs none, its steps follow norms."""
    return config.base_learning_rate * (batch_size / 256 if config.name == "adamw" else 1.0)


def make_optimizer(config: OptimizerConfig, groups: Any | None = None) -> optax.GradientTransformation:
    """The configured optimizer, after clipping by global norm when asked for, without a learning rate.

    AdamW has decoupled weight decay. LARS (You et al. 2017, as MAE probes with it) accumulates, with momentum b1,
    gradients that are scaled to a thousandth of their kernel's norm; biases are left as they are.

    Its update is the direction d of the step `params - learning_rate * d`. The step multiplies by the schedule itself,
    so that a skipped update, which leaves the optimizer's state as it was, does not delay the schedule.

    Args:
      groups: tree of `Group` as the parameters; None: `Group()` for all. Frozen parameters, whose gradients must be
        zero, have direction 0 and no moments. Biases and other 1-D parameters are not decayed.
    """
    moments = optax.scale_by_adam(b1=config.b1, b2=config.b2, mu_dtype=jnp.dtype(config.mu_dtype))
    if config.name == "lars":
        kernels = functools.partial(jax.tree.map, lambda param: param.ndim > 1)
        trust = optax.masked(optax.scale_by_trust_ratio(trust_coefficient=_TRUST), kernels)
        moments = optax.chain(trust, optax.trace(config.b1))
    if any(group.frozen for group in jax.tree.leaves(groups)):
        moments = optax.masked(moments, jax.tree.map(lambda group: not group.frozen, groups))

    def direction(update: jax.Array, param: jax.Array, group: Group) -> jax.Array:
        decay = config.weight_decay * group.weight_decay
        if param.ndim > 1 and decay and not group.frozen:
            update = update + decay * param
        return update if group.learning_rate == 1.0 else group.learning_rate * update

    def directions(updates: Any, params: Any) -> Any:
        known = groups if groups is not None else jax.tree.map(lambda _: Group(), params)
        return jax.tree.map(direction, updates, params, known)

    clip = [optax.clip_by_global_norm(config.clip_norm)] if config.clip_norm > 0 else []
    return optax.chain(*clip, moments, optax.stateless(directions))

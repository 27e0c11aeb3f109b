"""AdamW and its learning-rate schedule."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import optax

from infmae_jax.training.config import OptimizerConfig


def warmup_half_cosine(peak: float, warmup_steps: int, total_steps: int) -> optax.Schedule:
    """Linear from 0 over the warm-up steps, then half a cosine to 0 at `total_steps`; a function of the step."""

    def schedule(step):
        step = jnp.asarray(step, jnp.float32)
        rising = peak * step / max(warmup_steps, 1)
        progress = (step - warmup_steps) / max(total_steps - warmup_steps, 1)
        falling = peak * 0.5 * (1.0 + jnp.cos(jnp.pi * jnp.clip(progress, 0.0, 1.0)))
        return jnp.where(step < warmup_steps, rising, falling)

    return schedule


def peak_learning_rate(config: OptimizerConfig, batch_size: int) -> float:
    """The linear scaling rule: base_learning_rate * batch_size / 256."""
    return config.base_learning_rate * batch_size / 256


def decayed(params: Any) -> Any:
    """Tree of bools: True where weight decay applies, that is to everything but biases and 1-D parameters."""
    return jax.tree.map(lambda p: p.ndim > 1, params)


def make_optimizer(config: OptimizerConfig) -> optax.GradientTransformation:
    """AdamW with decoupled weight decay, after clipping by global norm when configured, without a learning rate.

    Its update is the direction d of the step `params - learning_rate * d`. The step multiplies by the schedule itself,
    so that a skipped update, which leaves the optimizer's state as it was, does not delay the schedule.
    """
    transforms = [
        optax.scale_by_adam(b1=config.b1, b2=config.b2, mu_dtype=jnp.dtype(config.mu_dtype)),
        optax.add_decayed_weights(config.weight_decay, mask=decayed),
    ]
    clip = [optax.clip_by_global_norm(config.clip_norm)] if config.clip_norm > 0 else []
    return optax.chain(*clip, *transforms)

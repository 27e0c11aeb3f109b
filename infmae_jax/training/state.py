"""What a checkpoint holds: step, parameters, optimizer state, and what the guards remember."""

from typing import Any, Self

import flax.struct
import jax
import jax.numpy as jnp
import optax


@flax.struct.dataclass
class GuardState:
    """What the numeric guards remember, on the device.

    Attributes:
      skipped, in_a_row: () int32, updates skipped so far, and since the last one that was made.
      loss_mean: () float32, exponential running mean of accepted losses.
    """

    skipped: jax.Array
    in_a_row: jax.Array
    loss_mean: jax.Array

    @classmethod
    def create(cls) -> Self:
        return cls(skipped=jnp.zeros((), jnp.int32), in_a_row=jnp.zeros((), jnp.int32), loss_mean=jnp.zeros(()))


@flax.struct.dataclass
class TrainState:
    """State before batch `step`: everything else (data position, learning rate) is a function of the step.

    Attributes:
      average: of the parameters, where `optimizer.ema` asks for it; else None, which is nothing in a checkpoint.
    """

    step: jax.Array
    params: Any
    opt_state: optax.OptState
    guard: GuardState
    average: Any = None

    @classmethod
    def create(cls, params: Any, optimizer: optax.GradientTransformation, average: bool = False) -> Self:
        return cls(
            step=jnp.zeros((), jnp.int32),
            params=params,
            opt_state=optimizer.init(params),
            guard=GuardState.create(),
            average=jax.tree.map(jnp.copy, params) if average else None,
        )

    @property
    def result(self) -> Any:
        """The parameters to judge and to use: the average where there is one."""
        return self.params if self.average is None else self.average

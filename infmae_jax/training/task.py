"""The task contract: what the training loop needs to know of a job, whatever the job."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, Protocol, Self

import jax
import numpy as np


class Loss(NamedTuple):
    """A loss as a sum and what it is to be divided by, over the units of a batch (or micro-batch).

    Sums and weights of micro-batches and devices are added before one is divided by the other, so that every unit
    counts the same wherever it lies. A batch without weight has loss 0 and no gradient.

    Attributes:
      sum: () float32, of the losses of all units.
      weight: () float32, how many units there are: samples, labelled pixels, positives.
      metrics: further sums; what is logged is each of them divided by `weight`.
    """

    sum: jax.Array
    weight: jax.Array | float
    metrics: dict[str, jax.Array]


@dataclasses.dataclass(frozen=True)
class Group:
    """How a parameter is trained.

    Attributes:
      learning_rate: times the schedule (layer-wise decay is one factor per parameter).
      weight_decay: times `optimizer.weight_decay`; one-dimensional parameters are never decayed.
      frozen: never changed: no gradient, no optimizer state.
    """

    learning_rate: float = 1.0
    weight_decay: float = 1.0
    frozen: bool = False


class Position(NamedTuple):
    """Where a run is: before batch `step`, in data order `order` (0 until the first roll-back)."""

    step: int = 0
    order: int = 0

    def next(self) -> Self:
        return self._replace(step=self.step + 1)


class Batches(Protocol):
    """This host's part of the global batches, one after the other, without end."""

    substituted: int  # samples so far that stand in for damaged records

    def __next__(self) -> dict[str, np.ndarray]: ...

    def keys(self, step: int) -> list[str]:
        """Names of the records in the global batch of a step, in this data order."""

    def close(self) -> None: ...


class Evaluator(NamedTuple):
    """Something found out about the parameters every now and then: measures, pictures, tables.

    Attributes:
      every: a duration; "0 steps" is never. It also runs before the first step and after the last.
      run: parameters -> results by name: a float (logged, and may choose the best checkpoint), a picture (H,W,3) uint8
        (RUN/pictures), or anything else that JSON holds (RUN/tables). All hosts call it and get the same results.
    """

    every: str
    run: Callable[[Any], Mapping[str, float | np.ndarray | list | dict]]


class Task(Protocol):
    """A job: a model, a loss, data, and how it is judged. All hosts call the same methods in the same order.

    A task that derives from this class need not say what it starts with, which groups and which evaluators it has.

    Attributes:
      name: of the kind of task, e.g. "pretrain".
      batch_size: images per step, over all hosts.
      num_examples: images per epoch; read only where a duration needs it.
      batch_spec: shape and dtype of each array of a global batch; shapes are static. Needs no data.
      fingerprint: what identifies the data: hosts and resumed runs must agree on it.
      dtype: of matrix products, see `hardware.peak_flops`.
    """

    name: str
    batch_size: int
    num_examples: int
    batch_spec: Mapping[str, tuple[tuple[int, ...], Any]]
    fingerprint: Mapping[str, Any]
    dtype: str

    def init(self, key: jax.Array) -> Any:
        """Random parameters."""

    def initial(self, shapes: Any) -> Any | None:
        """The parameters that a new run starts with in place of random ones (of another run, say), or None.

        Called before the run folder is touched. `shapes` is the tree of their shapes and dtypes."""
        return None

    def loss(self, params: Any, batch: dict[str, jax.Array], key: jax.Array) -> Loss:
        """The loss of a batch; `key` is a function of seed, step and micro-batch."""

    def group(self, path: str) -> Group:
        """How the parameter at a path (encoder/norm/scale) is trained."""
        return Group()

    def train_batches(self, at: Position) -> Batches:
        """This host's batches from a position on: a function of the position alone."""

    def evaluators(self) -> Mapping[str, Evaluator]:
        """By name."""
        return {}

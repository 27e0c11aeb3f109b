"""What the training loop needs to know of a job."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any, Protocol

import jax
import numpy as np


class HostBatches(Protocol):
    """This host's batches, one after the other, without end."""

    substituted: int  # samples so far that stand in for damaged records

    def __next__(self) -> dict[str, np.ndarray]: ...

    def close(self) -> None: ...


class Task(Protocol):
    """A job: a model, a loss, data and a picture of what it does. All hosts call the same methods in the same order."""

    batch_size: int  # images a step, over all hosts
    num_examples: int  # images an epoch
    batch_spec: dict[str, tuple[tuple[int, ...], Any]]  # shape and dtype of each array of a global batch
    data_record: dict[str, Any]  # what the step-0 record says of the data, and all hosts must agree on

    def init(self, key: jax.Array) -> Any:
        """Random parameters."""

    def loss(self, params: Any, batch: dict[str, jax.Array], key: jax.Array) -> tuple[jax.Array, dict[str, jax.Array]]:
        """Mean loss of a batch, and further scalar metrics."""

    def batches(self, start_step: int, order: int) -> Iterator[dict[str, np.ndarray]] | HostBatches:
        """This host's batches from `start_step` on; `order` numbers the data orders of a run, 0 until a rollback."""

    def record_keys(self, step: int, order: int) -> list[str]:
        """Names of the records in the global batch of a step."""

    def picture(self, params: Any, path: Path | None) -> np.ndarray | None:
        """Computes what the model does on fixed images; where `path` is given, draws it there (PNG) and returns the
        pixels, (H,W,3) uint8."""

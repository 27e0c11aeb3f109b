"""Runs a function of the step ahead of time, in threads or worker processes, and says in one line why it stopped.

Grain's elements are batches because its bookkeeping (measured: 120 us per element for shuffle, repeat and random map)
would otherwise cost a tenth of the time that an image takes.
"""

import contextlib
import shutil
import signal
import sys
import weakref
from collections.abc import Iterator
from typing import Any

import grain
import numpy as np
from absl import flags, logging

from data_pipelines.commands import EXIT_LOST
from data_pipelines.errors import InputError
from data_pipelines.examples import CorruptExample
from data_pipelines.workers import follow_parent

_SHARED_MEMORY = "/dev/shm"  # where workers hand batches over


class WorkerDied(InputError):
    """A worker process ended by itself: killed, most often for memory, or crashed."""

    exit_code = EXIT_LOST


class DamagedShards(InputError):
    """More records are damaged than the config allows."""


class Batches(contextlib.AbstractContextManager, Iterator):
    """Iterator over one host's batches; `close()` it, or use it as a context manager.

    Attributes:
      samples: number of samples given out.
      damaged: how many of them should have been made of a damaged record.
    """

    def __init__(self, source: Any, start: int = 0):
        """Starts threads or workers.

        Args:
          source: picklable; `len(source)`, `source[step]` -> dict of arrays with a leading dimension b, of which
            `corrupt` holds the indices of damaged records, else -1; `batch_bytes`; `reader` of the records;
            `judged(samples)`, the number of samples of which `config.max_corrupt` is a share; `config`, a
            `pipeline.PipelineConfig`.
          start: first step.

        Raises:
          InputError: there is too little shared memory for the workers.
        """
        self._source, self._named = source, set()
        self._config, self._batch_bytes = settings, batch_bytes = source.config, source.batch_bytes
        self.samples = self.damaged = 0
        # A thread makes a whole batch, so a buffer below the number of threads would idle some.
        buffered = max(settings.prefetch, settings.threads)
        dataset = grain.MapDataset.source(source)[start:].to_iter_dataset(
            grain.ReadOptions(num_threads=settings.threads, prefetch_buffer_size=buffered)
        )
        if settings.workers:
            needed = settings.workers * (settings.prefetch + 1) * batch_bytes
            if needed > _free_shared_memory():
                raise self._no_shared_memory(f"is too small for {_megabytes(needed)}")
            if not flags.FLAGS.is_parsed():
                # Grain reads absl flags to start workers; outside absl's `app.run` none exist.
                flags.FLAGS.mark_as_parsed()
            dataset = dataset.mp_prefetch(
                grain.MultiprocessingOptions(settings.workers, per_worker_buffer_size=settings.prefetch), _start_worker
            )
        self._open = [iter(dataset)]
        # A program that ends without closing would otherwise tear workers down after the modules that they need.
        self._closed = weakref.finalize(self, _close, self._open)

    def __len__(self) -> int:
        """Number of batches from step 0 on, the same on all hosts."""
        return len(self._source)

    def __next__(self) -> dict[str, np.ndarray]:
        """The next batch: arrays with a leading dimension b.

        Raises:
          StopIteration: all have been given out.
          DamagedShards: too many damaged records; names one.
          WorkerDied: a reading process is gone.
          InputError: the shards cannot be read now, or an example lacks what the view asks for.
        """
        batch = self._read()
        corrupt = batch.pop("corrupt")
        self.samples += len(corrupt)
        for index in corrupt[corrupt >= 0].tolist():
            self._count_damage(index)
        return batch

    def _count_damage(self, index: int) -> None:
        self.damaged += 1
        if index not in self._named:
            self._named.add(index)
            logging.warning("damaged record replaced or left out: %s", self._source.reader.damage(index))
        if self.damaged > self._config.max_corrupt * self._source.judged(self.samples):
            raise DamagedShards(
                f"{self.damaged} of {self.samples} samples came from damaged records, more than "
                f"data.max_corrupt={self._config.max_corrupt:g} allows; the last is "
                f"{self._source.reader.damage(index)}; prepare the shards again"
            )

    def _read(self) -> dict[str, np.ndarray]:
        try:
            batch = next(self._open[0])
        except IndexError:
            raise ValueError("these batches are closed") from None
        except CorruptExample as error:
            raise DamagedShards(f"{error}; prepare the shards again") from error
        except (RuntimeError, OSError) as error:
            if self._config.workers:
                self._explain(error)
            raise
        if self._config.workers:
            # Arrays of workers live in shared memory that goes with the iterator; a batch must outlive it.
            batch = {name: np.array(value) for name, value in batch.items()}
        return batch

    def _explain(self, error: Exception) -> None:
        """Raises what lies behind an error of a worker process, if it is known."""
        died = "terminated unexpectedly" in str(error)
        if "No space left" in str(error) or (died and _free_shared_memory() < 2 * self._batch_bytes):
            raise self._no_shared_memory("is full") from error
        if died:
            raise WorkerDied(
                f"one of the {self._config.workers} data workers died ({error}); if memory ran out, lower "
                "data.workers, data.prefetch or data.batch_size"
            ) from error

    def _no_shared_memory(self, what: str) -> InputError:
        free = _megabytes(_free_shared_memory())
        return InputError(
            f"{_SHARED_MEMORY}, through which data workers hand batches over, {what} ({free} free, "
            f"{_megabytes(self._batch_bytes)} per batch): lower data.prefetch={self._config.prefetch} or "
            f"data.workers={self._config.workers}, or enlarge it"
        )

    def close(self) -> None:
        """Stops threads and worker processes; again is harmless."""
        self._closed()

    def __exit__(self, *_: object) -> None:
        self.close()


def _close(iterators: list[Any]) -> None:
    while iterators:
        iterators.pop().close()


def _start_worker(*_: int) -> None:
    """A cluster's scheduler signals all processes of a job; when to end is the parent's to decide."""
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    follow_parent()


def _free_shared_memory() -> int:
    try:
        return shutil.disk_usage(_SHARED_MEMORY).free
    except OSError:  # no such folder: the system keeps shared memory elsewhere
        return sys.maxsize


def _megabytes(count: int) -> str:
    return f"{count / 1e6:.3g} MB"

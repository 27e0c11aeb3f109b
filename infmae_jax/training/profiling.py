"""Profiler traces of chosen steps, on every host, to be opened with TensorBoard or XProf."""

import contextlib
import re
from pathlib import Path
from typing import Any

import jax
from absl import logging

from data_pipelines.errors import InputError

FOLDER = "profile"


class Profile:
    """Traces steps a to b into RUN/profile/host_<process index>; every host does the same, without talking to others.

    Each process traces once: a run resumed after a starts at the first step it makes; steps made again after a
    rollback are not traced again. A trace that cannot be written is a warning, not the end of the run.

    Args:
      run: run folder.
      steps: "a-b" with 0 <= a <= b, "a" for one step, or "" for none.

    Raises:
      InputError: `steps` has another form.
    """

    def __init__(self, run: str | Path, steps: str):
        self._steps = _parse(steps)
        self._folder = Path(run) / FOLDER / f"host_{jax.process_index()}"
        self._running = False

    def step(self, number: int, pending: Any = None) -> contextlib.AbstractContextManager:
        """To be entered around every step; starts and stops the trace where `number` says so.

        Args:
          number: of the step to be made.
          pending: arrays of the step before. They are waited for before the trace is closed, since the host runs ahead
            of the device and the last steps would be missing.
        """
        wanted = number in self._steps
        if self._running != wanted:
            self._switch(wanted, pending)
        return jax.profiler.StepTraceAnnotation("train", step_num=number)

    def close(self) -> None:
        """Closes a trace that is still open. Safe to call at any time, and twice."""
        if self._running:
            self._switch(False)

    def _switch(self, on: bool, pending: Any = None) -> None:
        """Starts the trace, or stops it for good."""
        try:
            if on:
                self._folder.mkdir(parents=True, exist_ok=True)
                jax.profiler.start_trace(str(self._folder))
            else:
                self._steps = range(0)
                jax.block_until_ready(pending)
                jax.profiler.stop_trace()
            self._running = on
        except (OSError, RuntimeError) as error:
            self._running, self._steps = False, range(0)
            logging.warning("no profile in %s, training goes on: %s", self._folder, str(error).splitlines()[0])


def _parse(steps: str) -> range:
    if not steps.strip():
        return range(0)
    match = re.fullmatch(r"(\d+)(?:\s*-\s*(\d+))?", steps.strip(), re.ASCII)
    first, last = (int(match[1]), int(match[2] or match[1])) if match else (0, -1)
    if last < first:
        raise InputError(f"observe.profile_steps={steps!r} is no range of steps: write, for example, 100-105")
    return range(first, last + 1)

"""What the commands that train have in common: one process or one of a job, begun, ended, or stopped on the way."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax

from data_pipelines.errors import InputError
from infmae_jax.report import write_report_if_possible
from infmae_jax.tasks.finetune import FineTuneConfig
from infmae_jax.tasks.pretrain import PretrainConfig
from infmae_jax.training import loop
from infmae_jax.training.config import to_config, use_compilation_cache
from infmae_jax.training.goodput import Goodput
from infmae_jax.training.hosts import distributed
from infmae_jax.training.task import Task

Config = PretrainConfig | FineTuneConfig


def begin(config: Config) -> None:
    """Before any data are made; InputError where they would be made by several processes at once."""
    use_compilation_cache(config)
    if config.distributed.method != "none" and config.embedded.images and not config.data.shards:
        raise InputError("the embedded data set is made for one process; give the shards of several: data.shards")


def train(
    config: Config,
    data: Mapping[str, Any],
    make: Callable[[], tuple[Task, Config]],
    workdir: Path,
    clock: Goodput,
    finish: Callable[[int], None],
) -> int:
    """Trains, and returns the command's exit code.

    Args:
      config: what the processes of a job must agree on before JAX may be used.
      data: what identifies the data set, for the same.
      make: gives the task and its whole config; may use JAX.
      workdir: run folder, which gets a report whatever ends the run.
      clock: made when the command began.
      finish: called on all processes with the last step of a run that is done.
    """
    with distributed.joined(config.distributed, to_config(config), data) as peers:
        task, config = make()
        result = loop.train(task, config, workdir, peers, clock, at_end=write_report_if_possible)
        if not result.interrupted:
            finish(result.step)
            return 0
    if jax.process_index() == 0:
        print(f"stopped and saved at step {result.step} of {result.total_steps}; run the same command to go on")
    return result.stop_code

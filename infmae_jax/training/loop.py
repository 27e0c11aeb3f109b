"""The training loop, read from top to bottom. Every task runs through it."""

from collections.abc import Callable
from pathlib import Path

from infmae_jax.training import sharding
from infmae_jax.training.config import RunConfig
from infmae_jax.training.goodput import Goodput
from infmae_jax.training.hosts.peers import NoPeers, Peers
from infmae_jax.training.hosts.stop import StopRequest
from infmae_jax.training.program import Program
from infmae_jax.training.run import Result, Run
from infmae_jax.training.task import Task


def train(
    task: Task,
    config: RunConfig,
    folder: str | Path,
    peers: Peers | NoPeers = NoPeers(),
    clock: Goodput | None = None,
    at_end: Callable[[Path], None] = lambda folder: None,
) -> Result:
    """Trains until `config.duration`, resuming from the latest whole checkpoint of the run folder if there is one.

    Args:
      peers: the other processes of the job, see `distributed.joined`.
      clock: counts where the time goes, from its creation on.
      at_end: called on process 0 with the run folder when a run that was begun or resumed ends, whatever ends it.

    Raises:
      InputError: the config does not fit the devices, the data or the run found in the folder.
      run.NumbersDiverged: see there; the last checkpoint is from before.
      SaveFailed: a checkpoint could not be written and `config.on_save_failure` is "stop".
    """
    with StopRequest(config.distributed.notice_url) as stop:
        program = Program.build(task, config, sharding.make_mesh(config.mesh))
        with Run(program, Path(folder), stop, peers, clock or Goodput(), at_end) as run:
            state, at = run.begin()
            while at.step < program.total_steps and not run.stop_code:
                run.evaluate(state, at)
                run.save(state, at)  # checkpoint s is the state before batch s
                batch = run.next_batch(at)
                state = run.step(state, batch, at)
                at = at.next()
                if run.diverged:  # known one step late, on all hosts at once
                    state, at = run.roll_back(at)
            return run.end(state, at)

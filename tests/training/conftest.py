"""A run with checkpoints, shared by the tests of saving and of damage."""

import pytest

from infmae_jax.training.checkpoint import Checkpointer
from tests.training.checkpoint_process import make_mesh, make_state


@pytest.fixture(scope="module")
def mesh():
    return make_mesh(2)


@pytest.fixture(scope="module")
def states(mesh):
    return {step: make_state(mesh, step) for step in range(1, 4)}


@pytest.fixture(scope="module")
def saved(states, tmp_path_factory):
    """A run with checkpoints 1 and 2, to be copied."""
    run = tmp_path_factory.mktemp("saved") / "run"
    run.mkdir()
    with Checkpointer(run) as checkpointer:
        for step in (1, 2):
            checkpointer.save(states[step], step, {"loss": 1.0 / step}, {"data_order": step})
    return run

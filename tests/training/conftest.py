"""A run with checkpoints, shared by the tests of saving and of damage; steps compiled once, shared by runs."""

import jax
import pytest

from infmae_jax.training.checkpoint import Checkpointer
from infmae_jax.training.program import Program
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


# Settings that do not change the compiled step.
_NOT_COMPILED = ("checkpoint_every", "log_every", "picture_every", "on_save_failure", "observe", "init_from")


@pytest.fixture(scope="module")
def steps_compiled_once():
    """Runs of this module with the same step share the compiled one; those with the same model, the first state."""
    build, start, steps, states = Program.compiled.func, Program.start, {}, {}

    def compiled(program):
        settings = {name: value for name, value in vars(program.config).items() if name not in _NOT_COMPILED}
        key = type(program.task), getattr(program.task, "what", ""), repr(settings), program.mesh
        if key not in steps:
            steps[key] = build(program)
        return steps[key]

    def first_state(program, initial=None):
        if initial is not None:
            return start(program, initial)
        key = repr(program.config.model), program.config.seed, program.mesh
        if key not in states:
            states[key] = jax.device_get(start(program))
        return jax.device_put(states[key], program.shardings)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Program, "compiled", property(compiled))
        patch.setattr(Program, "start", first_state)
        yield

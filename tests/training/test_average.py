"""The average of the parameters: against NumPy, through restarts, and in what is evaluated and given to others."""

import dataclasses
import json
import shutil

import jax
import numpy as np
import pytest

from infmae_jax.training import loop, sharding
from infmae_jax.training.checkpoint import restore_params
from infmae_jax.training.config import MeshConfig
from infmae_jax.training.program import Program
from infmae_jax.training.task import Position
from infmae_jax.training.writers import read_metrics
from tests.training.dummy_task import CONFIG, SCHEDULE, DummyTask

DECAY = 0.7
AVERAGED = dataclasses.replace(CONFIG, optimizer=dataclasses.replace(SCHEDULE, ema=DECAY))


def assert_equal(ours, theirs):
    jax.tree.map(np.testing.assert_array_equal, jax.device_get(ours), jax.device_get(theirs))


def test_the_average_is_that_of_all_updates_that_were_made():
    task = DummyTask(bad=[[5, 0]])
    program = Program.build(task, AVERAGED, sharding.make_mesh(MeshConfig(data=2, fsdp=2), jax.devices()[:4]))
    state = program.start(jax.device_get(task.init(jax.random.key(3))))
    batches = task.train_batches(Position())
    average = jax.tree.map(np.float64, jax.device_get(state.params))
    first, updates = jax.device_get(state.params), 0
    for step in range(12):
        state, metrics = program.step(state, program.place(next(batches)))
        if step == 5:
            assert metrics["skipped"] == 1
            continue
        updates += 1
        share = 1 - min(DECAY, (1 + updates) / (10 + updates))
        average = jax.tree.map(lambda a, p, s=share: (1 - s) * a + s * p, average, jax.device_get(state.params))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6), state.average, average)
    assert_equal(state.average["encoder"], first["encoder"])  # frozen: not even rounding changes it
    assert state.result is state.average


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("averaged")
    return folder, loop.train(DummyTask(), AVERAGED, folder).state


def test_the_average_is_what_is_evaluated_and_given_to_others(run):
    folder, state = run
    assert_equal(restore_params(folder).params, state.average)
    assert_equal(restore_params(folder, "head").params["head"], state.average["head"])
    error = DummyTask().validate(state.average)["val/error"]
    assert read_metrics(folder)[-1]["val/error"] == pytest.approx(float(error), rel=1e-6)
    assert np.abs(state.average["head"]["gate"] - state.params["head"]["gate"]).max() > 1e-3


def test_a_run_goes_on_with_its_average_bit_for_bit(run, tmp_path):
    folder, state = run
    shutil.copytree(folder, tmp_path / "run")
    shutil.rmtree(tmp_path / "run/checkpoints/12")
    again = loop.train(DummyTask(), AVERAGED, tmp_path / "run").state
    assert_equal(again, state)


def test_without_it_nothing_changes_and_older_runs_go_on(run, tmp_path):
    plain = loop.train(DummyTask(), CONFIG, tmp_path).state
    assert plain.average is None and plain.result is plain.params
    assert_equal(plain.params, run[1].params)
    assert sorted(path.name for path in (tmp_path / "checkpoints/12").iterdir() if path.is_dir()) == \
        ["guard", "optimizer", "params"]  # fmt: skip
    config = json.loads((tmp_path / "config.json").read_text())
    del config["optimizer"]["ema"]  # as it was before there was one
    (tmp_path / "config.json").write_text(json.dumps(config))
    shutil.rmtree(tmp_path / "checkpoints/12")
    assert_equal(loop.train(DummyTask(), CONFIG, tmp_path).state, plain)
    with pytest.raises(ValueError, match="optimizer.ema was 0.0, is 0.7"):
        loop.train(DummyTask(), AVERAGED, tmp_path)

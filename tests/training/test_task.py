"""The task contract, on a task that is not pretraining: it trains, evaluates, resumes, rolls back."""

import dataclasses
import json
import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from data_pipelines.errors import InputError
from infmae_jax.training import loop, sharding
from infmae_jax.training.checkpoint import Checkpointer
from infmae_jax.training.config import MeshConfig
from infmae_jax.training.program import Program
from infmae_jax.training.run import NumbersDiverged
from infmae_jax.training.storage import best_checkpoint
from infmae_jax.training.task import Position
from infmae_jax.training.writers import read_events, read_metrics
from tests.training.dummy_task import CONFIG, DummyTask
from tests.training.jobs import ROOT

BAD = [[6, 0], [7, 0]]


def killed(run, **task):
    """A process that trains the task and dies of SIGKILL."""
    code = f"""from infmae_jax.training import loop
from tests.training.dummy_task import CONFIG, DummyTask
loop.train(DummyTask(**{task!r}), CONFIG, {str(run)!r})"""
    command = [sys.executable, "-c", code]
    environment = {**os.environ, "JAX_NUM_CPU_DEVICES": str(jax.device_count())}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == -9, done.stderr


def outcome(run):
    """What must be the same bit for bit: what was logged, and the final state."""
    timed = ("time", "images_per_second", "data_wait_seconds", "goodput")
    rows = [{name: value for name, value in row.items() if name not in timed} for row in read_metrics(run)]
    program = Program.build(DummyTask(), CONFIG, sharding.make_mesh(MeshConfig()))
    with Checkpointer(run) as checkpoints:
        state, step, metadata = checkpoints.restore(program.state_shapes)
    return rows, [leaf.tolist() for leaf in jax.tree.leaves(jax.device_get(state))], step, metadata


def rollbacks(run):
    return [(event["to_step"], event["data_order"]) for event in read_events(run) if event["event"] == "rollback"]


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    run = tmp_path_factory.mktemp("dummy")
    return run, loop.train(DummyTask(), CONFIG, run)


def test_it_learns_with_its_frozen_part_as_it_was(undisturbed):
    run, result = undisturbed
    rows = read_metrics(run)
    errors = [row["val/error"] for row in rows if "val/error" in row]
    assert errors[-1] < 0.9 * errors[0] and sum(row.get("l1", 0) > 0 for row in rows) == 12
    begun = DummyTask().init(jax.random.key(CONFIG.seed))
    np.testing.assert_array_equal(result.state.params["encoder"]["still"], begun["encoder"]["still"])
    assert (result.state.params["head"]["gate"] != begun["head"]["gate"]).all()
    moments = [leaf.shape for leaf in jax.tree.leaves(result.state.opt_state) if leaf.ndim]
    assert sorted(moments) == [(1, 3), (1, 3), (4, 3), (4, 3)]


def test_evaluators_log_draw_and_choose_the_best_checkpoint(undisturbed):
    run, result = undisturbed
    found = {row["step"]: row["val/error"] for row in read_metrics(run) if "val/error" in row}
    assert list(found) == [0, 4, 8, 12] and found[12] == pytest.approx(
        float(DummyTask().validate(result.state.params)["val/error"])
    )
    names = [f"step_{step:08d}_val_{{}}" for step in found]
    assert sorted(path.name for path in (run / "pictures").iterdir()) == [f"{name.format('map')}.png" for name in names]
    assert np.asarray(Image.open(run / "pictures" / f"{names[0].format('map')}.png")).tolist() == [[[1] * 3] * 3] * 2
    assert json.loads((run / "tables" / f"{names[-1].format('table')}.json").read_text()) == [{"a": 1}]
    saved = {step: error for step, error in found.items() if step}
    for mode, best in (("min", min(saved, key=saved.get)), ("max", max(saved, key=saved.get))):
        assert best_checkpoint(run, "val/error", mode) == best


def test_a_killed_run_goes_on_bit_for_bit(undisturbed, tmp_path):
    killed(tmp_path, kill=[11, 0])
    loop.train(DummyTask(), CONFIG, tmp_path)
    (resumed,) = [event["step"] for event in read_events(tmp_path) if event["event"] == "resume"]
    assert resumed in (4, 8)  # the save of 8 may still have been under way
    assert outcome(tmp_path) == outcome(undisturbed[0])


def test_a_rollback_and_its_data_order_survive_a_kill(tmp_path):
    loop.train(DummyTask(bad=BAD), CONFIG, tmp_path / "whole")
    assert rollbacks(tmp_path / "whole") == [(4, 1)]
    killed(tmp_path / "cut", bad=BAD, kill=[6, 1])
    assert loop.train(DummyTask(bad=BAD), CONFIG, tmp_path / "cut").step == 12
    assert rollbacks(tmp_path / "cut") == [(4, 1)]
    assert outcome(tmp_path / "cut") == outcome(tmp_path / "whole")


@pytest.mark.parametrize("save_every", ["4 steps", "0 steps"])
def test_kills_do_not_make_a_run_forget_how_often_it_went_back(tmp_path, save_every):
    config = dataclasses.replace(CONFIG, checkpoint_every=save_every)
    again = [*BAD, [6, 1], [7, 1], [6, 2], [7, 2]]

    class Dying(DummyTask):
        def train_batches(self, at):
            if at.order:
                raise RuntimeError("killed")
            return super().train_batches(at)

    with pytest.raises(RuntimeError, match="killed"):
        loop.train(Dying(bad=again), config, tmp_path)
    with pytest.raises(NumbersDiverged, match="after 1 rollbacks"):
        loop.train(DummyTask(bad=again), config, tmp_path)
    if save_every == "0 steps":  # other settings in a folder without checkpoints are another run
        other = dataclasses.replace(config, seed=1)
        assert loop.train(DummyTask(bad=BAD), other, tmp_path).step == 12


def test_a_batch_without_weight_has_loss_0_and_no_gradient():
    program = Program.build(DummyTask(), CONFIG, sharding.make_mesh(MeshConfig()))
    batch = {name: np.zeros(shape, dtype) for name, (shape, dtype) in DummyTask().batch_spec.items()}
    _, metrics = program.step(program.start(), program.place(batch))
    assert metrics["loss"] == 0 and metrics["grad_norm"] == 0 and metrics["skipped"] == 0


@pytest.mark.parametrize("accumulate", [1, 2, 4])
@pytest.mark.parametrize("devices", [1, 4])
def test_unequal_weights_count_the_same_however_the_batch_is_cut(accumulate, devices):
    task = DummyTask(batch_size=16)
    config = dataclasses.replace(CONFIG, optimizer=dataclasses.replace(CONFIG.optimizer, accumulate=accumulate))
    program = Program.build(task, config, sharding.make_mesh(MeshConfig(), jax.devices()[:devices]))
    batch, state = next(task.train_batches(Position())), program.start()
    params = jax.device_get(state.params)

    def slow(head):  # sample by sample
        total = weight = 0.0
        for x, w in zip(batch["x"], batch["weight"], strict=True):
            one = task.loss({**params, "head": head}, {"x": x[None], "weight": w[None]}, None)
            total, weight = total + one.sum, weight + one.weight
        return total / weight

    value, grads = jax.value_and_grad(slow)(params["head"])
    _, metrics = program.step(state, program.place(batch))
    assert float(metrics["loss"]) == pytest.approx(float(value), rel=1e-6)
    norm = np.sqrt(sum(float(jnp.square(leaf).sum()) for leaf in jax.tree.leaves(grads)))
    assert float(metrics["grad_norm"]) == pytest.approx(norm, rel=1e-5)


def test_a_warm_up_longer_than_the_run_is_refused():
    config = dataclasses.replace(CONFIG, optimizer=dataclasses.replace(CONFIG.optimizer, warmup="40 steps"))
    with pytest.raises(InputError, match="optimizer.warmup=40 steps is 40 steps, longer than the run"):
        Program.build(DummyTask(), config, sharding.make_mesh(MeshConfig()))

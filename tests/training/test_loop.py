"""What the loop does when things go wrong, whatever the encoder: the smallest, a plain ViT, compiles fastest."""

import dataclasses
import os
import signal

import jax.numpy as jnp
import numpy as np
import pytest

from configs import common
from data_pipelines import pipeline
from data_pipelines.errors import InputError
from data_pipelines.pipeline import PipelineConfig
from infmae_jax.models.config import variant
from infmae_jax.report import write_report
from infmae_jax.tasks.pretrain import PretrainConfig, PretrainTask
from infmae_jax.training import loop
from infmae_jax.training.checkpoint import Checkpointer, SaveFailed, restore_params
from infmae_jax.training.config import GuardConfig, ObserveConfig, from_config
from infmae_jax.training.run import NumbersDiverged
from infmae_jax.training.writers import read_events, read_metrics
from tests.training.jobs import assert_same_run
from tests.training.test_guards import poisoned

pytestmark = pytest.mark.usefixtures("steps_compiled_once")


@pytest.fixture
def config(shards):
    smoke = common.pretrain(PretrainConfig(model=variant("tiny"), data=PipelineConfig(shards=(str(shards),))), "smoke")
    smoke.model.encoder.update(kind="vit", depths=(1, 1, 1))
    return dataclasses.replace(
        from_config(PretrainConfig, smoke), picture_every="0 steps", checkpoint_every="4 steps", duration="12 steps",
        guards=GuardConfig(rollback_after=2, max_rollbacks=2),
    )  # fmt: skip


class Harmed(PretrainTask):
    """Its batches are white at the steps `when` of data order 0; white pixels give `what`: a NaN "loss" or "gradient".

    `white`: how many images of a batch turn white. `stop_at`: SIGTERM when this step's batch is taken.
    """

    def __init__(self, config, when=(), what="loss", white=8, stop_at=None):
        super().__init__(config)
        self.when, self.what, self.white, self.stop_at = when, what, white, stop_at

    def loss(self, params, batch, key):
        harmed = (batch["image"].min(axis=(1, 2, 3)) == 255).any().astype(jnp.float32)
        if self.what == "gradient":
            bias = poisoned(params["decoder"]["pred"]["bias"], harmed)
            params = {**params, "decoder": {**params["decoder"], "pred": {**params["decoder"]["pred"], "bias": bias}}}
            return super().loss(params, batch, key)
        found = super().loss(params, batch, key)
        return found._replace(sum=jnp.where(harmed > 0, jnp.nan, found.sum))

    def train_batches(self, at):
        inner, task = super().train_batches(at), self

        class Batches:
            step, substituted, close, keys = at.step, 0, staticmethod(inner.close), staticmethod(inner.keys)

            def __next__(self):
                batch = next(inner)
                if at.order == 0 and self.step in task.when:
                    batch["image"][: task.white] = 255
                if self.step == task.stop_at:
                    os.kill(os.getpid(), signal.SIGTERM)
                self.step += 1
                return batch

        return Batches()


class Exploding(PretrainTask):
    """Its loss is NaN once it has learned a little, whatever the data."""

    def loss(self, params, batch, key):
        found = super().loss(params, batch, key)
        broken = jnp.abs(params["decoder"]["pred"]["bias"]).max() > 3e-2
        return found._replace(sum=jnp.where(broken, jnp.nan, found.sum))


def named(run, event):
    return [found for found in read_events(run) if found["event"] == event]


@pytest.mark.parametrize(
    "what, white, reason", [("loss", 8, "non-finite loss"), ("loss", 1, "non-finite loss"),
                            ("gradient", 8, "non-finite gradient")]
)  # fmt: skip
def test_nan_in_a_batch_an_image_or_a_gradient_is_skipped_and_told(config, tmp_path, what, white, reason):
    result = loop.train(Harmed(config, {5}, what, white), config, tmp_path)
    assert result.step == 12 and int(result.state.guard.skipped) == 1
    (skip,) = named(tmp_path, "skip")
    assert skip["step"] == 5 and skip["reason"] == reason
    assert skip["records"] == pipeline.record_keys(config.data, 5)
    rows = read_metrics(tmp_path)
    assert [row["step"] for row in rows] == [0, 1, 2, 3, 4, 6, 7, 8, 9, 10, 11]
    assert rows[-1]["skipped_updates"] == 1 and all(np.isfinite(row["loss"]) for row in rows)
    page = write_report(tmp_path, tmp_path / "report.html").read_text()
    assert reason in page and skip["records"][0] in page


def test_bad_updates_in_a_row_go_back_to_a_checkpoint_and_to_other_data(config, tmp_path):
    result = loop.train(Harmed(config, range(5, 12)), config, tmp_path)
    assert result.step == 12
    (rollback,) = named(tmp_path, "rollback")
    assert rollback["to_step"] == 4 and rollback["data_order"] == 1
    assert [skip["step"] for skip in named(tmp_path, "skip")] == [5, 6]
    assert [row["step"] for row in read_metrics(tmp_path)] == list(range(12))
    assert "rollback" in write_report(tmp_path, tmp_path / "report.html").read_text()


def test_a_run_that_went_back_resumes_in_its_new_data_order(config, tmp_path):
    loop.train(Harmed(config, range(5, 12)), config, tmp_path / "whole")
    stopped = loop.train(Harmed(config, range(5, 12), stop_at=8), config, tmp_path / "cut")
    assert stopped.interrupted and stopped.stop_code == 75
    loop.train(Harmed(config, range(5, 12)), config, tmp_path / "cut")
    assert_same_run(tmp_path / "cut", tmp_path / "whole")


class Preempted(PretrainTask):
    """Gets SIGTERM while its step is compiled."""

    def loss(self, params, batch, key):
        os.kill(os.getpid(), signal.SIGTERM)
        return super().loss(params, batch, key)


def test_a_stop_before_the_first_step_is_not_forgotten(config, tmp_path):
    result = loop.train(Preempted(config), config, tmp_path)
    assert result.stop_code == 75 and 1 <= result.step <= 2
    assert read_events(tmp_path)[-1]["event"] == "preempted" and restore_params(tmp_path).step == result.step


def test_going_back_before_the_first_checkpoint_starts_anew(config, tmp_path):
    config = dataclasses.replace(config, checkpoint_every="0 steps")
    assert loop.train(Harmed(config, range(2, 9)), config, tmp_path).step == 12
    assert named(tmp_path, "rollback")[0]["to_step"] == 0


def test_numbers_that_diverge_again_and_again_end_the_run(config, tmp_path):
    optimizer = dataclasses.replace(config.optimizer, base_learning_rate=0.3)
    config = dataclasses.replace(config, optimizer=optimizer, duration="80 steps", checkpoint_every="1 steps")
    with pytest.raises(NumbersDiverged, match="2 updates in a row.*after 2 rollbacks.*clip_norm") as caught:
        loop.train(Exploding(config), config, tmp_path)
    assert caught.value.exit_code == 3
    assert [event["data_order"] for event in named(tmp_path, "rollback")] == [1, 2]
    assert read_events(tmp_path)[-1]["event"] == "stopped"
    restored = restore_params(tmp_path)
    assert restored.step >= 1 and jnp.isfinite(restored.params["decoder"]["pred"]["bias"]).all()
    assert all(np.isfinite(row["loss"]) for row in read_metrics(tmp_path))


@pytest.mark.parametrize("choice", ["stop", "continue"])
def test_a_save_that_fails_stops_the_run_or_not(config, tmp_path, monkeypatch, choice):
    save = Checkpointer.save

    def failing(self, state, step, *rest):
        if step == 8:
            raise SaveFailed(tmp_path / "checkpoints" / "8", 8, "the disk is full; make room")
        save(self, state, step, *rest)

    monkeypatch.setattr(Checkpointer, "save", failing)
    config = dataclasses.replace(config, on_save_failure=choice)
    if choice == "stop":
        with pytest.raises(SaveFailed, match="disk is full"):
            loop.train(PretrainTask(config), config, tmp_path)
        monkeypatch.undo()
        assert restore_params(tmp_path).step == 4
    assert loop.train(PretrainTask(config), config, tmp_path).step == 12
    assert named(tmp_path, "save_failed")[0]["step"] == 8
    assert [row["step"] for row in read_metrics(tmp_path)] == list(range(12))


def test_a_damaged_checkpoint_is_told_and_the_one_before_used(config, tmp_path):
    loop.train(Harmed(config), config, tmp_path / "whole")
    loop.train(Harmed(config, stop_at=9), config, tmp_path / "cut")
    before, newest = sorted((tmp_path / "cut" / "checkpoints").iterdir(), key=lambda path: int(path.name))[-2:]
    data = max((path for path in newest.rglob("*") if path.is_file()), key=lambda path: path.stat().st_size)
    content = bytearray(data.read_bytes())
    content[len(content) // 2] ^= 4
    data.write_bytes(content)
    loop.train(Harmed(config), config, tmp_path / "cut")
    (damaged,) = named(tmp_path / "cut", "checkpoint_damaged")
    assert damaged["checkpoint"] == int(newest.name)
    assert named(tmp_path / "cut", "resume")[0]["step"] == int(before.name)
    assert_same_run(tmp_path / "cut", tmp_path / "whole")


def test_profiles_on_demand(config, tmp_path):
    config = dataclasses.replace(config, observe=ObserveConfig(profile_steps="2-3"), log_every="100 steps")
    loop.train(PretrainTask(config), config, tmp_path)
    assert [row["step"] for row in read_metrics(tmp_path)] == [0, 11]
    assert any(path.is_file() for path in (tmp_path / "profile" / "host_0").rglob("*"))


def test_batch_must_fit_the_devices(config, tmp_path):
    config = dataclasses.replace(config, data=dataclasses.replace(config.data, batch_size=6))
    with pytest.raises(InputError, match="batch_size=6 is not divisible by 4 parts"):
        loop.train(PretrainTask(config), config, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_init_from_takes_the_weights_of_another_run(config, tmp_path):
    loop.train(PretrainTask(config), config, tmp_path / "first")
    still = dataclasses.replace(config.optimizer, base_learning_rate=0.0, warmup="0 steps")
    second = dataclasses.replace(
        config, init_from=str(tmp_path / "first"), seed=7, optimizer=still, duration="1 steps"
    )
    loop.train(PretrainTask(second), second, tmp_path / "second")
    ours, theirs = (restore_params(tmp_path / name).params for name in ("first", "second"))
    assert (ours["encoder"]["patch_embed"]["kernel"] == theirs["encoder"]["patch_embed"]["kernel"]).all()
    other = dataclasses.replace(second, model=second.model.replace(widths=(16, 24, 48)))
    with pytest.raises(InputError, match="is another encoder.*16, 24, 32.*not.*16, 24, 48"):
        loop.train(PretrainTask(other), other, tmp_path / "third")
    assert not (tmp_path / "third").exists()

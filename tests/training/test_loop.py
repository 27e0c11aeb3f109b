"""What the loop does when things go wrong."""

import dataclasses

import jax.numpy as jnp
import pytest

from configs import common
from data_pipelines.errors import InputError
from data_pipelines.pipeline import PipelineConfig
from infmae_jax.models.infmae import variant
from infmae_jax.training import loop
from infmae_jax.training.checkpoint import restore_params
from infmae_jax.training.config import PretrainConfig, from_config
from infmae_jax.training.metrics import read_metrics
from infmae_jax.training.pretraining import PretrainTask


@pytest.fixture
def config(shards):
    smoke = common.pretrain(PretrainConfig(model=variant("tiny"), data=PipelineConfig(shards=(str(shards),))), "smoke")
    return dataclasses.replace(from_config(PretrainConfig, smoke), picture_every="0 steps")


class Exploding(PretrainTask):
    """Its loss becomes NaN when the learning rate has grown: at a step of its own choice."""

    def loss(self, params, batch, key):
        value, metrics = super().loss(params, batch, key)
        broken = jnp.abs(params["decoder"]["pred"]["bias"]).max() > 3e-2
        return jnp.where(broken, jnp.nan, value), metrics


def test_nan_stops_the_run_names_the_step_and_is_never_saved(config, tmp_path):
    optimizer = dataclasses.replace(config.optimizer, base_learning_rate=0.3)
    config = dataclasses.replace(config, optimizer=optimizer, duration="40 steps", checkpoint_every="1 steps")
    with pytest.raises(loop.NonFiniteLoss, match="step [1-9].*base_learning_rate") as caught:
        loop.train(Exploding(config), config, tmp_path)
    assert caught.value.exit_code == 3
    restored = restore_params(tmp_path)
    assert restored.step >= 1 and jnp.isfinite(restored.params["decoder"]["pred"]["bias"]).all()
    assert all(row["loss"] == row["loss"] for row in read_metrics(tmp_path))


def test_batch_must_fit_the_devices(config, tmp_path):
    config = dataclasses.replace(config, data=dataclasses.replace(config.data, batch_size=6))
    with pytest.raises(InputError, match="batch_size=6 is not divisible by 4 parts"):
        loop.train(PretrainTask(config), config, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_init_from_takes_the_weights_of_another_run(config, tmp_path):
    config = dataclasses.replace(config, duration="1 steps")
    loop.train(PretrainTask(config), config, tmp_path / "first")
    still = dataclasses.replace(config.optimizer, base_learning_rate=0.0)
    second = dataclasses.replace(config, init_from=str(tmp_path / "first"), seed=7, optimizer=still)
    loop.train(PretrainTask(second), second, tmp_path / "second")
    ours, theirs = (restore_params(tmp_path / name).params for name in ("first", "second"))
    assert (ours["encoder"]["patch_embed4"]["kernel"] == theirs["encoder"]["patch_embed4"]["kernel"]).all()
    other = dataclasses.replace(second, model=dataclasses.replace(second.model, widths=(16, 24, 48)))
    with pytest.raises(InputError, match="init_from.*model.widths was"):
        loop.train(PretrainTask(other), other, tmp_path / "third")
    assert not (tmp_path / "third").exists()

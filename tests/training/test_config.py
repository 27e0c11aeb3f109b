"""ConfigDict to dataclasses and back; every mistake names its key."""

import json

import pytest

from data_pipelines.errors import InputError
from data_pipelines.pipeline import PipelineConfig
from infmae_jax.models.config import variant
from infmae_jax.tasks.pretrain import PretrainConfig
from infmae_jax.training.config import MeshConfig, differences, from_config, to_config


def test_round_trip_through_json():
    config = PretrainConfig(model=variant("tiny"), data=PipelineConfig(shards=("a", "b"), image_size=(64, 96)))
    text = json.dumps(to_config(config).to_dict())
    assert from_config(PretrainConfig, json.loads(text)) == config


@pytest.mark.parametrize(
    "change, message",
    [
        ({"durration": "1 steps"}, "durration is unknown; did you mean duration"),
        ({"data": {"shard": "x"}}, r"data\.shard is unknown; did you mean data\.shards"),
        ({"seed": "zero"}, "seed must be int, got 'zero'"),
        ({"seed": True}, "seed must be int"),
        ({"model": {"dtype": "float8"}}, "float8"),
        ({"data": {"image_size": [100, 96]}}, "100x96 is not divisible"),
    ],
)
def test_mistakes_are_named(change, message):
    with pytest.raises(InputError, match=message) as caught:
        from_config(PretrainConfig, change)
    assert "\n" not in str(caught.value)


def test_values_are_converted():
    config = from_config(PretrainConfig, {"optimizer": {"clip_norm": 1}, "data": {"shards": "a, b,"}})
    assert config.optimizer.clip_norm == 1.0 and isinstance(config.optimizer.clip_norm, float)
    assert config.data.shards == ("a", "b")


def test_differences_leave_out_what_does_not_change_results():
    old = to_config(PretrainConfig()).to_dict()
    new = to_config(PretrainConfig(seed=1, log_every="7 steps", mesh=MeshConfig(fsdp=2))).to_dict()
    assert differences(old, json.loads(json.dumps(new)), PretrainConfig.FREE_KEYS) == ["seed was 0, is 1"]

"""ConfigDict to dataclasses and back; every mistake names its key."""

import json
import re
import sys

import pytest
from absl import flags
from ml_collections import config_flags

from configs.pretrain import demo
from configs.segment import masks_tiny_cpu
from data_pipelines.errors import InputError
from data_pipelines.pipeline import PipelineConfig
from infmae_jax.models.config import variant
from infmae_jax.tasks.pretrain import PretrainConfig
from infmae_jax.tasks.probe import ProbeConfig
from infmae_jax.tasks.segment import SegmentConfig
from infmae_jax.training.config import MeshConfig, define_config, differences, from_config, to_config
from tests import commands


@pytest.mark.parametrize("names", [(), ("car",), ("car", "person"), ("person, sitting", "car"), (" a",), ("",)])
def test_names_with_commas_and_spaces_stay_what_they_are(names):
    config = SegmentConfig(classes=names)
    assert from_config(SegmentConfig, json.loads(to_config(config).to_json_best_effort())) == config


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
        ({"model": {"encoder": {"dtype": "float8"}}}, "float8"),
        ({"data": {"image_size": [100, 96]}}, "100x96 is not divisible"),
        ({"optimizer": {"clip_norm": -1.0}}, r"optimizer\.clip_norm=-1.0 must be in \[0, inf\)"),
        ({"optimizer": {"b1": 1.5}}, r"optimizer\.b1=1.5 must be in \[0, 1\)"),
        ({"optimizer": {"b2": 1.0}}, r"optimizer\.b2=1.0 must be in \[0, 1\)"),
        ({"optimizer": {"base_learning_rate": float("nan")}}, r"optimizer\.base_learning_rate=nan must be in"),
        ({"optimizer": {"schedule": "linear"}}, r"optimizer\.schedule='linear' must be one of half_cosine, polynomial"),
        ({"best_mode": "least"}, "best_mode='least' must be one of min, max"),
        ({"keep_checkpoints": 0}, r"keep_checkpoints=0 must be in \[1, inf\)"),
        ({"data": {"image_size": (96.0, 96.0)}}, r"data\.image_size\[0\] must be int, got 96.0"),
        ({"data": {"image_size": (96,)}}, r"data\.image_size must be \(int, int\), got \(96,\)"),
        ({"data": {"scale": (0.2,)}}, r"data\.scale must be \(float, float\), got \(0.2,\)"),
        ({"data": {"ratio": 1}}, r"data\.ratio must be \(float, float\), got 1"),
        ({"model": {"encoder": {"widths": (48, 96)}}}, r"encoder\.widths must be \(int, int, int\), got \(48, 96\)"),
    ],
)
def test_mistakes_are_named(change, message):
    with pytest.raises(InputError, match=message) as caught:
        from_config(PretrainConfig, change)
    assert "\n" not in str(caught.value)


def test_a_config_of_another_command_is_refused_in_one_line():
    for kind in (PretrainConfig, ProbeConfig):
        with pytest.raises(InputError, match=r"of fine-tuning \(task 'segment'\): use infmae finetune for it"):
            from_config(kind, masks_tiny_cpu.get_config())
    done = commands.run("infmae_jax.finetune", f"--config={demo.__file__}", "--workdir=unused")
    assert done.returncode == 2 and "--config is not of fine-tuning: give one of configs/segment" in done.stderr


def test_values_are_converted():
    config = from_config(PretrainConfig, {"optimizer": {"clip_norm": 1}, "data": {"shards": "a, b,"}})
    assert config.optimizer.clip_norm == 1.0 and isinstance(config.optimizer.clip_norm, float)
    assert config.data.shards == ("a", "b")


def test_differences_leave_out_what_does_not_change_results():
    old = to_config(PretrainConfig()).to_dict()
    new = to_config(PretrainConfig(seed=1, log_every="7 steps", mesh=MeshConfig(fsdp=2))).to_dict()
    assert differences(old, json.loads(json.dumps(new)), PretrainConfig.FREE_KEYS) == ["seed was 0, is 1"]


@pytest.mark.parametrize("text, size", [("96x64", (96, 64)), ("(96, 64)", (96, 64)), ("96,64", (96, 64))])
def test_flags_set_tuples(monkeypatch, text, size):
    config = from_config(PretrainConfig, overridden(monkeypatch, f"--config.data.image_size={text}"))
    assert config.data.image_size == size


@pytest.mark.parametrize("value", ["290", "290.5"])
def test_flags_set_what_is_none(monkeypatch, value):
    config = from_config(
        PretrainConfig,
        overridden(
            monkeypatch, "--config.data.intensity.mapping=fixed", f"--config.data.intensity.low={value}",
            "--config.data.intensity.high=330",
        ),
    )  # fmt: skip
    assert config.data.intensity.low == float(value) and config.data.intensity.high == 330.0
    assert from_config(PretrainConfig, to_config(PretrainConfig())).data.intensity.low is None


@pytest.mark.parametrize("argument, message", [
    ("--config.optimiser.clip_norm=1", "optimiser.clip_norm is unknown; did you mean optimizer.clip_norm?"),
    ("--config.clip_norm=1", "did you mean optimizer.clip_norm?"),
    ("--config.model.encoder.dtype=float32", "did you mean encoder.dtype?"),  # where pretraining has it
    ("--noconfig.data.flipp", "did you mean data.flip?"), ("--config.data.shards.x=1", "did you mean data.shards?"),
    ("--config.data.image_size[0]=32", "did you mean data.image_size?"), ("--config.zzz=1", "is unknown; known are "),
    ("--config.keys=1", "config key keys is unknown"), ("--config..a=1", "unknown"), ("--config.=1", "unknown"),
    ("--config.optimizer={}", "optimizer is a section"), ("--config.data=3", "data is a section"),
    ("--config=nowhere.py", "config file nowhere.py cannot be loaded"),
])  # fmt: skip
def test_unknown_keys_of_the_command_line_are_named_with_the_nearest(monkeypatch, argument, message):
    monkeypatch.setattr(sys, "argv", ["test", f"--config={masks_tiny_cpu.__file__}:smoke", argument])
    with pytest.raises(InputError, match=re.escape(message)) as caught:
        define_config("unused.py", "")
    assert "\n" not in str(caught.value)


def overridden(monkeypatch, *arguments):
    """The default config as the command line leaves it."""
    values = flags.FlagValues()
    monkeypatch.setattr(sys, "argv", ["test", *arguments])  # where config_flags looks for overrides
    config_flags.DEFINE_config_dict("config", to_config(PretrainConfig()), flag_values=values)
    values(sys.argv)
    return values.config

"""Config files in their `:smoke` form: one trains, is interrupted, resumes and is probed; others train or are traced.

With --long all of them train.
"""

import dataclasses
import importlib.util
import json
import math
import os
import re
import signal
from pathlib import Path

import jax
import numpy as np
import pytest
from jax.sharding import AbstractMesh

from infmae_jax.interop.load import load_encoder
from infmae_jax.linear_probe import linear_probe
from infmae_jax.tasks.pretrain import PretrainConfig, PretrainTask
from infmae_jax.tasks.probe import ProbeConfig
from infmae_jax.training import loop, sharding
from infmae_jax.training.config import from_config
from infmae_jax.training.program import Program
from infmae_jax.training.run_folder import read_config
from infmae_jax.training.writers import read_metrics

CONFIGS = Path(__file__).resolve().parents[1] / "configs"
PRETRAIN = sorted(path.stem for path in (CONFIGS / "pretrain").glob("*.py") if path.stem != "__init__")
FINE_TUNING = ("detect", "segment", "small_target")  # trained in tests/tasks
PROBES = sorted(path.stem for path in (CONFIGS / "linear_probe").glob("*.py") if path.stem != "__init__")


def load(folder, name, arg="smoke"):
    spec = importlib.util.spec_from_file_location(name, CONFIGS / folder / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module, module.get_config(arg)


def test_no_folder_of_configs_is_left_out():
    with_files = {path.parent.name for path in CONFIGS.glob("*/*.py") if path.stem != "__init__"}
    assert with_files == {"pretrain", "linear_probe", *FINE_TUNING}


class Interrupted(PretrainTask):
    """A task that sends Ctrl-C to this process with the batch of step 3."""

    def train_batches(self, at):
        batches = super().train_batches(at)
        following = batches.__next__

        class Interrupting(type(batches)):
            def __next__(self):
                if self.step == 3:
                    os.kill(os.getpid(), signal.SIGINT)
                self.step += 1
                return following()

        batches.__class__, batches.step = Interrupting, at.step
        return batches


def smoke(name, shards):
    module, raw = load("pretrain", name)
    assert {"Command:", "Hardware:", "Hours:", "Result:"} <= {w for w in module.__doc__.split() if w.endswith(":")}
    config = from_config(PretrainConfig, raw)
    return dataclasses.replace(config, data=dataclasses.replace(config.data, shards=(str(shards),)))


@pytest.mark.usefixtures("steps_compiled_once")
def test_a_config_trains_is_interrupted_resumes_and_is_evaluated(scenes, shards, tmp_path):
    config = smoke("inf30_base", shards)
    run = tmp_path / "run"
    first = loop.train(Interrupted(config), config, run)
    # All hosts learn of the signal from the metrics of the step that it came in, one step late.
    assert first.interrupted and first.step == 5 and first.stop_code == 130
    second = loop.train(PretrainTask(config), config, run)
    assert not second.interrupted and second.step == 6
    rows = read_metrics(run)
    assert [row["step"] for row in rows] == list(range(6))
    assert all(np.isfinite(row["loss"]) and row["images_per_second"] > 0 for row in rows)
    assert set(rows[0]) == {
        "step", "time", "epoch", "loss", "learning_rate", "grad_norm", "images_per_second", "data_wait_seconds",
        "substituted_samples", "skipped_updates", "goodput",
    }  # fmt: skip
    assert read_config(run)["model"]["encoder"]["kind"] == config.model.encoder.kind
    record = json.loads((run / "run_info.json").read_text())
    assert record["gflop_per_image"] > 0 and record["data"]["images"] == 24
    names = {f"step_{step:08d}_reconstruction.png" for step in (0, 3, 6)}
    assert {path.name for path in (run / "pictures").iterdir()} == names
    for name in PROBES:
        probe_twice(load("linear_probe", name)[1], load_encoder(str(run)), scenes, tmp_path / name)


def probe_twice(raw, encoder, scenes, workdir):
    """Trained, and shown again where it is finished."""
    config = dataclasses.replace(from_config(ProbeConfig, raw), csv=str(scenes / "class_labels.csv"))
    first = linear_probe(encoder, config, workdir)
    before = (workdir / "results.json").read_bytes()
    again = linear_probe(encoder, config, workdir)
    assert again["label"] == json.loads(before) == json.loads(json.dumps(first["label"]))
    assert first["label"]["confusion"] and first["label"]["top1"]["mean"] > 0


@pytest.mark.parametrize("name", sorted(set(PRETRAIN) - {"inf30_base"}))
def test_the_other_configs_train(name, shards, tmp_path, pytestconfig):
    """Of encoders and decoders of their own; those that differ in numbers are traced, and trained with --long."""
    config = dataclasses.replace(smoke(name, shards), duration="2 steps", picture_every="0 steps")
    if name != "mae_base" and not pytestconfig.getoption("--long"):
        task = PretrainTask(config)
        batch = {key: jax.ShapeDtypeStruct(shape, dtype) for key, (shape, dtype) in task.batch_spec.items()}
        found = jax.eval_shape(task.loss, jax.eval_shape(task.init, jax.random.key(0)), batch, jax.random.key(0))
        assert found.sum.shape == () and found.sum.dtype == np.float32
        return
    assert loop.train(PretrainTask(config), config, tmp_path).step == 2
    assert [np.isfinite(row["loss"]) for row in read_metrics(tmp_path)] == [True, True]


@pytest.mark.parametrize("name", PRETRAIN)
def test_full_size_config_is_consistent(name):
    """The masks keep a quarter of the tokens, the batch can be cut over 8 devices, durations follow one another."""
    module, raw = load("pretrain", name, "")
    config = from_config(PretrainConfig, raw)
    height, width = config.data.image_size
    task = PretrainTask(config)
    task.num_examples = 305_241
    assert height % 16 == 0 == width % 16
    assert task.batch_spec["ids_keep"][0] == (config.data.batch_size, math.ceil(height // 16 * (width // 16) / 4))
    mesh = AbstractMesh((4, 2, 1), sharding.AXES)
    program = Program.build(task, config, mesh)
    assert program.batch_shapes["image"].sharding.shard_shape((config.data.batch_size, height, width, 1))[0] * 8 == (
        config.data.batch_size
    )
    assert 0 < program.in_steps(config.optimizer.warmup) < program.total_steps
    assert 0 < program.in_steps(config.log_every) <= program.in_steps(config.checkpoint_every) < program.total_steps
    hours = module.__doc__.split("Hours:")[1].split("Result:")[0]
    assert "not measured" in hours or re.search(r"\d", hours)


@pytest.mark.parametrize("folder, name", [("pretrain", PRETRAIN[0]), ("linear_probe", PROBES[0])])
def test_unknown_form_is_refused(folder, name):
    with pytest.raises(ValueError, match="smokey.*smoke"):
        load(folder, name, "smokey")

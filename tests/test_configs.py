"""Every config file runs in its `:smoke` form: train, be interrupted, resume, evaluate."""

import dataclasses
import importlib.util
import json
import os
import signal
from pathlib import Path

import numpy as np
import pytest

from data_pipelines import pipeline
from infmae_jax.interop.load import load_encoder
from infmae_jax.evaluation.probe import ProbeConfig, linear_probe
from infmae_jax.tasks.pretrain import PretrainConfig, PretrainTask
from infmae_jax.training import loop
from infmae_jax.training.run_folder import read_config
from infmae_jax.training.config import from_config
from infmae_jax.training.writers import read_metrics

CONFIGS = Path(__file__).resolve().parents[1] / "configs"
PRETRAIN = sorted(path.stem for path in (CONFIGS / "pretrain").glob("*.py") if path.stem != "__init__")
PROBES = sorted(path.stem for path in (CONFIGS / "linear_probe").glob("*.py") if path.stem != "__init__")


def load(folder, name, arg="smoke"):
    spec = importlib.util.spec_from_file_location(name, CONFIGS / folder / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module, module.get_config(arg)


def test_no_folder_of_configs_is_left_out():
    with_files = {path.parent.name for path in CONFIGS.glob("*/*.py") if path.stem != "__init__"}
    assert with_files == {"pretrain", "linear_probe"}


class Interrupted:
    """A task whose batches send Ctrl-C to this process after `after` of them."""

    def __init__(self, task, after):
        self._task, self._after = task, after

    def __getattr__(self, name):
        return getattr(self._task, name)

    def batches(self, start_step, order):
        self._inner, self._count = self._task.batches(start_step, order), 0
        self.close = self._inner.close
        return self

    def __next__(self):
        if self._count == self._after:
            os.kill(os.getpid(), signal.SIGINT)
        self._count += 1
        return next(self._inner)

    @property
    def substituted(self):
        return self._inner.substituted


@pytest.mark.parametrize("name", PRETRAIN)
def test_pretrain_config(name, scenes, shards, tmp_path):
    module, raw = load("pretrain", name)
    assert {"Command:", "Hardware:", "Hours:", "Result:"} <= {w for w in module.__doc__.split() if w.endswith(":")}
    config = from_config(PretrainConfig, raw)
    config = dataclasses.replace(config, data=dataclasses.replace(config.data, shards=(str(shards),)))
    run = tmp_path / "run"
    first = loop.train(Interrupted(PretrainTask(config), after=3), config, run)
    # All hosts learn of the signal from the metrics of the step that it came in, one step late.
    assert first.interrupted and first.step == 5 and first.stop_code == 130
    second = loop.train(PretrainTask(config), config, run)
    assert not second.interrupted and second.step == 6
    rows = read_metrics(run)
    assert [row["step"] for row in rows] == list(range(6))
    assert all(np.isfinite(row["loss"]) and row["images_per_second"] > 0 for row in rows)
    assert set(rows[0]) == {
        "step", "time", "epoch", "loss", "learning_rate", "grad_norm", "images_per_second", "data_wait_seconds",
        "substituted_samples", "skipped_updates", "goodput", "host_memory_gib",
    }  # fmt: skip
    assert read_config(run)["model"]["encoder"] == config.model.encoder
    record = json.loads((run / "run_info.json").read_text())
    assert record["gflop_per_image"] > 0 and record["data"]["images"] == 24
    assert {path.name for path in (run / "pictures").iterdir()} == {f"step_{s:08d}.png" for s in (0, 3, 6)}
    probe = ProbeConfig(csv=str(scenes / "class_labels.csv"), seeds=1, batch_size=8)
    result = linear_probe(load_encoder(str(run)), probe, tmp_path / "probe")
    assert 0 <= result["label"]["top1"]["mean"] <= 1


@pytest.mark.parametrize("name", PRETRAIN)
def test_full_size_config_is_consistent(name):
    config = from_config(PretrainConfig, load("pretrain", name, "")[1])
    height, width = config.data.image_size
    assert pipeline.num_visible(config.data.mask, height // 16 * (width // 16)) > 0


@pytest.mark.parametrize("name", PROBES)
def test_probe_config(name, scenes, tmp_path):
    _, raw = load("linear_probe", name)
    config = dataclasses.replace(from_config(ProbeConfig, raw), csv=str(scenes / "class_labels.csv"))
    encoder = load_encoder("random", "tiny", image_size=(64, 64))
    first = linear_probe(encoder, config, tmp_path)
    before = (tmp_path / "results.json").read_bytes()
    again = linear_probe(encoder, config, tmp_path)
    assert again["label"] == json.loads(before) == json.loads(json.dumps(first["label"]))


@pytest.mark.parametrize("folder, name", [("pretrain", PRETRAIN[0]), ("linear_probe", PROBES[0])])
def test_unknown_form_is_refused(folder, name):
    with pytest.raises(ValueError, match="smokey.*smoke"):
        load(folder, name, "smokey")

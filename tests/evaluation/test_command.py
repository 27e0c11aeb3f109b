"""The linear probe from labels to results, and its mistakes."""

import json
import os
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest

from data_pipelines.errors import InputError
from data_pipelines.prepare.labelled import prepare_table
from infmae_jax.interop.load import write
from infmae_jax.interop.trained_model import TrainedModel
from infmae_jax.linear_probe import linear_probe, table_text
from infmae_jax.tasks.probe import ProbeConfig
from infmae_jax.training.run_folder import read_config
from tests import commands
from tests.evaluation.conftest import SIZE

ROOT = Path(__file__).resolve().parents[2]
FAST = dict(least_steps=200, duration="1 epochs", batch_size=8, feature_batch=8, neighbors=5, log_every="50 steps")


@pytest.fixture
def config(labelled):
    return ProbeConfig(csv=str(labelled), **FAST)


def test_results_follow_from_the_saved_classifiers(small_encoder, config, tmp_path):
    out = tmp_path / "out"
    result = linear_probe(small_encoder, config, out)["label"]
    assert json.loads((out / "results.json").read_text()) == result
    saved, features = np.load(out / "probe.npz"), [np.load(path) for path in (out / "features").iterdir()]
    x, truth = next((f["values"], f["classes"]) for f in features if len(f["classes"]) == 10)
    standardised = (x - saved["mean"]) / np.sqrt(saved["variance"] + 1e-6)
    logits = [standardised @ kernel + bias for kernel, bias in zip(saved["kernel"], saved["bias"], strict=True)]
    assert list(saved["classes"]) == result["classes"] == ["cold", "hot"]
    assert result["top1"]["seeds"] == pytest.approx([np.mean(each.argmax(1) == truth) for each in logits])
    assert result["top1"]["mean"] == 1.0, "brightness separates these classes"
    assert np.sum(result["confusion"]) == 30 and result["knn"]["top1"] == 1.0
    assert result["majority_class"] == {"class": "cold", "top1": 0.5, "balanced_accuracy": 0.5}
    assert "100.0 ± 0.0" in table_text({"label": result})
    found = {path.name for path in out.iterdir()}
    assert {"config.json", "metrics.jsonl", "events.jsonl", "checkpoints", "pictures"} <= found


def test_a_finished_probe_is_shown_again_and_a_changed_image_is_noticed(small_encoder, config, labelled, tmp_path):
    first = linear_probe(small_encoder, config, tmp_path / "out")
    assert linear_probe(small_encoder, config, tmp_path / "out") == first
    image = labelled.parent / "images" / "03.png"
    image.write_bytes((labelled.parent / "images" / "05.png").read_bytes())
    with pytest.raises(InputError, match="another config.*shards"):
        linear_probe(small_encoder, config, tmp_path / "out")


def test_label_columns_share_features_and_have_a_folder_each(small_encoder, labelled, tmp_path):
    config = ProbeConfig(csv=str(labelled), label_column=("label", "angle"), heads=1, **FAST)
    results = linear_probe(small_encoder, config, tmp_path / "out")
    assert results["angle"]["classes"] == ["0", "10", "20"]
    for column in ("label", "angle"):
        assert json.loads((tmp_path / "out" / column / "results.json").read_text()) == results[column]
        assert read_config(tmp_path / "out" / column)["heads"] == 1


def test_names_of_columns_never_share_a_folder(small_encoder, labelled, tmp_path):
    text = labelled.read_text().replace("label,angle", "a/b,a b")
    labelled.write_text(text)
    config = ProbeConfig(csv=str(labelled), label_column=("a/b", "a b"), heads=1, **FAST)
    results = linear_probe(small_encoder, config, tmp_path / "out")
    found = {json.loads(path.read_text())["label_column"] for path in (tmp_path / "out").glob("*/results.json")}
    assert found == set(results) == {"a/b", "a b"}


def test_shards_with_labels_are_probed_as_they_are(small_encoder, labelled, tmp_path):
    prepare_table(labelled, ["label"], tmp_path / "shards")
    config = ProbeConfig(shards=(str(tmp_path / "shards"),), heads=1, **FAST)
    assert linear_probe(small_encoder, config, tmp_path / "out")["label"]["test_images"] == 10
    with pytest.raises(InputError, match="label 'colour' is not one of the labels of .*label"):
        linear_probe(small_encoder, ProbeConfig(shards=config.shards, label_column=("colour",)), tmp_path / "other")


def command(*arguments):
    line = [sys.executable, "-m", "infmae_jax.linear_probe", *map(str, arguments)]
    environment = {**os.environ, "JAX_PLATFORMS": "cpu"}
    return subprocess.run(line, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=400)


def test_the_command_on_a_run(labelled, small_model, small_encoder, tmp_path):
    write(tmp_path / "run", "run", TrainedModel(small_model, dict(small_encoder.params), image_size=SIZE), SIZE, {})
    keys = [f"--config.{key}={value}" for key, value in FAST.items()]
    arguments = (f"--checkpoint={tmp_path / 'run'}", f"--config.csv={labelled}", *keys)
    done = command(*arguments, f"--workdir={tmp_path / 'out'}")
    assert done.returncode == 0, done.stderr
    assert "linear probe" in done.stdout and str(tmp_path / "out") in done.stdout
    (labelled.parent / "images/07.png").write_bytes(b"no image")
    done = commands.run("infmae_jax.linear_probe", *arguments, f"--workdir={tmp_path / 'other'}")
    (line,) = [line for line in done.stderr.splitlines() if line.startswith("error:")]
    assert done.returncode == 2 and "Traceback" not in done.stderr and "07.png" in line


def test_devices_must_find_images(small_encoder, labelled, tmp_path):
    assert jax.device_count() == 4
    lines = labelled.read_text().splitlines()
    labelled.write_text("\n".join([*lines[:4], *lines[21:]]) + "\n")
    with pytest.raises(InputError, match="3 training images cannot be shared by 4 devices"):
        linear_probe(small_encoder, ProbeConfig(csv=str(labelled), **FAST), tmp_path / "out")

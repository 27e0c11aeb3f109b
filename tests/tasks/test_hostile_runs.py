"""Run folders and predictions from strangers: one line for each, whatever they say, and no program of theirs is run."""

import dataclasses
import json
import logging
import os
import shutil
import time

import jax
import numpy as np
import pytest
from PIL import Image

from configs.detect import boxes_tiny_cpu
from data_pipelines.errors import InputError
from infmae_jax.evaluate import evaluate
from infmae_jax.tasks.detect import DetectConfig, DetectionModel
from infmae_jax.tasks.finetune import without_data
from infmae_jax.tasks.finetuned import load_finetuned
from infmae_jax.training import storage
from infmae_jax.training.config import from_config
from tests.commands import run


@pytest.fixture
def image(tmp_path):
    path = tmp_path / "a.png"
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (32, 48), np.uint8)).save(path)
    return path


@pytest.mark.parametrize("section, change, message", [
    ("head", {"fcn_convs": 10**6, "kind": "fcn"}, "fcn_convs=1000000 must be in [1, 64]"),
    ("head", {"pool_scales": [10**9], "kind": "upernet"}, "pool_scales=(1000000000,)"),
    ("head", {"kind": "upernet"}, "does not fit its config: ['head']"),
    ("head", {"channels": 10**9}, "does not fit its config"),
    ("encoder", {"depths": [1000, 1000, 1000]}, "fewer than 3000 blocks"),
    ("encoder", {"widths": [32, 16, 16]}, "does not fit its config: ['encoder']"),
    ("windows", {"size": [512, 512], "stride": [1, 1]}, "a 16th of the size"),
    (None, {"classes": "sky,ground"}, "does not fit its config"),
    (None, {"classes": ""}, "does not fit its config"),
])  # fmt: skip
def test_configs_that_do_not_fit_their_weights(runs, tmp_path, section, change, message):
    folder = tmp_path / "run"
    shutil.copytree(runs("segment")[0], folder)
    config = json.loads((folder / "config.json").read_text())
    (config[section] if section else config).update(change)
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(InputError) as refused:
        load_finetuned(folder)
    assert message in str(refused.value) and "\n" not in str(refused.value)


def test_scores_of_no_images_are_none(runs, tmp_path):
    folder = tmp_path / "run"
    shutil.copytree(runs("segment")[0], folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "data": {**config["data"], "shards": ""}}))
    with pytest.raises(InputError, match="names no labelled shard set: give --shards"):
        evaluate(folder, tmp_path / "scores")
    assert not (tmp_path / "scores").exists()


@pytest.mark.parametrize("arrays", [
    {"params/a": "float32[100000000000]"}, {"params/a": "float32[1000000,1000000,1000000]"},
    {"params/a": "float32[-1000000,1000000,1000000]"}, {"params/" + "a/" * 20_000: "float32[3]"},
    {f"params/a/{number}": "float32[3]" for number in range(100_000)}, {"params/a": "int8[3]", "params/a/b": "int8[]"},
])  # fmt: skip
def test_records_of_more_than_there_is(runs, tmp_path, arrays):
    folder = tmp_path / "run"
    shutil.copytree(runs("segment")[0], folder)
    for path in (folder / "checkpoints").iterdir():
        record = json.loads((path / "record.json").read_text())
        (path / "record.json").write_text(json.dumps({**record, "arrays": {**record["arrays"], **arrays}}))
        (path / "checksums.json").unlink()
        storage.seal(path)
    start = time.process_time()
    with pytest.raises(InputError, match="only damaged checkpoints") as refused:
        load_finetuned(folder)
    assert "\n" not in str(refused.value) and time.process_time() - start < 5


def test_what_orbax_repeats_of_a_file_does_not_reach_the_terminal():
    record = logging.LogRecord("absl", logging.ERROR, "orbax/x.py", 1, "content: %s", ("\x1b[31m" * 1000,), None)
    assert storage._is_told(record)
    assert record.getMessage().isprintable() and len(record.getMessage()) < 1000


@pytest.mark.parametrize("ids", ["1", "a,b", "[1],2", "NaN,2", f"{'9' * 5000},2", "[" * 100_000])
def test_category_ids_are_numbers_or_texts(ids):
    config = without_data(from_config(DetectConfig, boxes_tiny_cpu.get_config("smoke")), classes=2)
    assert DetectionModel(config).category_ids == [1, 2]
    assert DetectionModel(dataclasses.replace(config, category_ids=("7", '"a', 'b"'))).category_ids == [7, "a,b"]
    with pytest.raises(InputError, match="for each of the 2 classes"):
        DetectionModel(dataclasses.replace(config, category_ids=tuple(ids.split(","))))


def test_compiled_programs_of_a_run_are_not_run(runs, image, tmp_path, monkeypatch):
    folder, theirs = tmp_path / "run", str(tmp_path / "theirs")
    shutil.copytree(runs("segment")[0], folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "compilation_cache": theirs}))
    monkeypatch.delenv("JAX_COMPILATION_CACHE_DIR")
    monkeypatch.setenv("HOME", str(tmp_path))
    before = jax.config.jax_compilation_cache_dir
    try:
        done = run("infmae_jax.predict", f"--checkpoint={folder}", f"--output={tmp_path / 'out'}", image)
        assert done.returncode == 0 and jax.config.jax_compilation_cache_dir != theirs, done.stderr
    finally:
        jax.config.update("jax_compilation_cache_dir", before)
    assert not os.path.exists(theirs)


def test_predictions_that_nobody_made(runs, image, tmp_path):
    command = "infmae_jax.predict", f"--checkpoint={runs('small_target')[0]}", f"--output={tmp_path / 'out'}", image
    assert run(*command).returncode == 0
    results = tmp_path / "out" / "predictions.jsonl"
    good = results.read_text()
    for row in (
        {"image": "b"}, {"image": 5, "targets": []}, {"image": ["b"]}, {"image": "b", "targets": 5}, [1],
        {"image": "b", "targets": [5]}, {"image": "b", "targets": [{}]},
    ):  # fmt: skip
        results.write_text(f"{good}{json.dumps(row)}\n")
        done = run(*command)
        errors = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
        assert done.returncode == 2 and len(errors) == 1 and "not of predictions" in errors[0], (row, done.stderr)
    results.unlink()
    results.symlink_to("/dev/zero")
    done = run(*command)
    assert done.returncode == 2 and "no regular file" in done.stderr

"""Weights for use: written and restored whole or in part, verified."""

import dataclasses
import os

import jax
import numpy as np
import pytest

from data_pipelines.errors import InputError
from infmae_jax.models.config import variant
from infmae_jax.models.infmae import abstract_params
from infmae_jax.tasks.pretrain import PretrainConfig
from infmae_jax.training import run_folder, storage
from infmae_jax.training.checkpoint import restore_params, write_run
from infmae_jax.training.run_folder import CONFIG_NAME, read_config, write_object
from tests.training.damage import checkpoints, flip_a_bit, largest_file


@pytest.fixture(scope="module")
def weights():
    rng = np.random.default_rng(0)
    model = variant("tiny")
    return jax.tree.map(lambda leaf: rng.normal(size=leaf.shape).astype(leaf.dtype), abstract_params(model))


def test_weights_are_verified_whole_or_in_part(weights, tmp_path):
    params = weights
    write_run(tmp_path, {"made": "by a test"}, params)
    whole = restore_params(tmp_path)
    jax.tree.map(np.testing.assert_array_equal, whole.params, params)
    assert (whole.config, whole.step) == ({"made": "by a test"}, 0)
    encoder = restore_params(tmp_path, subtree="encoder").params
    jax.tree.map(np.testing.assert_array_equal, encoder, {"encoder": params["encoder"]})
    flip_a_bit(largest_file(tmp_path / "checkpoints" / "0" / "params"))
    with pytest.raises(InputError, match=r"has only damaged checkpoints: 0 \(params/.* differ from what was saved\)"):
        restore_params(tmp_path)


def test_weights_of_the_checkpoint_before_a_damaged_one(weights, tmp_path, caplog):
    params = weights
    write_run(tmp_path, {}, params)
    later = {"params": jax.tree.map(lambda leaf: leaf + 1, params)}
    storage.start_save(tmp_path, 7, later, {}, {})()
    assert restore_params(tmp_path).step == 7
    flip_a_bit(largest_file(tmp_path / "checkpoints" / "7" / "params"))
    restored = restore_params(tmp_path)
    assert restored.step == 0 and "checkpoints/7 is damaged: params/" in caplog.text
    jax.tree.map(np.testing.assert_array_equal, restored.params, params)
    with pytest.raises(InputError, match=r"only damaged checkpoints: 7 \("):
        restore_params(tmp_path, step=7)
    assert checkpoints(tmp_path) == ["0", "7"]


# ---- config.json ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "text, message",
    [("[" * 100_000, "brackets within"), ("[1]", "holds no object"), ("3", "holds no object"), ("", "cannot be read")],
    ids=["brackets", "list", "number", "empty"],
)
def test_a_config_that_is_none_is_refused_in_one_line(tmp_path, text, message):
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(InputError, match=message) as caught:
        read_config(tmp_path)
    assert "\n" not in str(caught.value) and str(tmp_path) in str(caught.value)


def test_folders_that_are_no_runs_are_named(tmp_path):
    with pytest.raises(InputError, match="is not a run folder"):
        read_config(tmp_path)
    (tmp_path / "config.json").symlink_to("/dev/zero")
    with pytest.raises(InputError, match="is not a run folder"):
        read_config(tmp_path)
    (tmp_path / "config.json").unlink()
    write_object(tmp_path / CONFIG_NAME, {"architectures": ["ViTMAEForPreTraining"]})
    with pytest.raises(InputError, match="has no checkpoints: is it a run folder"):
        restore_params(tmp_path)


def test_a_config_holds_no_host_and_only_paths_that_must_be(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", "/elsewhere/somebody")
    run = tmp_path / "run"
    config = PretrainConfig()
    config = dataclasses.replace(
        config,
        data=dataclasses.replace(config.data, shards=(str(tmp_path / "a"), "relative/b", "/elsewhere/somebody/c")),
        init_from="/mnt/shared/first",
        distributed=dataclasses.replace(config.distributed, coordinator="node-17.cluster:1234"),
    )
    run_folder.claim(run, config, "pretrain", {"images": 3}, resuming=False, primary=True)
    written = read_config(run)
    assert written["data"]["shards"] == "../a,relative/b,~/c" and written["init_from"] == "/mnt/shared/first"
    text = (run / "config.json").read_text()
    assert "node-17" not in text and "somebody" not in text and str(tmp_path) not in text

    moved = run.rename(tmp_path / "moved")
    run_folder.claim(moved, config, "pretrain", {"images": 3}, resuming=True, primary=True)
    with pytest.raises(InputError, match="seed was 0, is 1"):
        other = dataclasses.replace(config, seed=1)
        run_folder.claim(moved, other, "pretrain", {"images": 3}, resuming=True, primary=True)
    with pytest.raises(InputError, match="init_from was first, is second"):
        other = dataclasses.replace(config, init_from="/mnt/shared/second")
        run_folder.claim(moved, other, "pretrain", {"images": 3}, resuming=True, primary=True)


def test_run_folders_are_folders(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    for url in ("gs://bucket/run", "s3://bucket/run", "file:///run"):
        with pytest.raises(InputError, match="is not supported here, name a local path"), run_folder.workdir_lock(url):
            pass
    with run_folder.workdir_lock("~/run"):
        assert os.listdir(tmp_path) == ["run"]


def test_a_folder_of_another_task_is_refused_in_one_short_line_before_any_work(tmp_path):
    config = PretrainConfig()
    run_folder.claim(tmp_path / "run", config, "pretrain", {}, resuming=False, primary=True)
    write_object(tmp_path / "converted" / CONFIG_NAME, {"model": {}})
    (tmp_path / "file").write_text("")
    assert run_folder.run_path(tmp_path / "run", "pretrain") == tmp_path / "run"
    assert run_folder.run_path(tmp_path / "new" / "run", "pretrain") == tmp_path / "new" / "run"
    for folder, task, message in (
        ("run", "segment", "run holds a run of the task 'pretrain', not of 'segment'; use another --workdir"),
        ("converted", "pretrain", "converted holds a checkpoint from elsewhere"),
        ("file", "pretrain", "file is a file"), ("file/run", "pretrain", "file is a file: name a folder"),
    ):  # fmt: skip
        with pytest.raises(InputError, match=message):
            run_folder.run_path(tmp_path / folder, task)
    with pytest.raises(InputError, match="run holds a run of the task 'pretrain'"):
        run_folder.claim(tmp_path / "run", config, "segment", {}, resuming=True, primary=True)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["converted", "file", "run"]

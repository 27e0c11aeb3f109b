"""A run that is interrupted, by Ctrl-C or without warning, goes on as if nothing had happened."""

import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np
import pytest

from data_pipelines.errors import InputError
from infmae_jax.training.checkpoint import restore_params

ROOT = Path(__file__).resolve().parents[2]
STEPS = 40


def start(run, shards, *flags):
    command = [
        sys.executable, "-m", "infmae_jax.pretrain", f"--config={ROOT}/configs/pretrain/tiny_cpu.py:smoke",
        f"--workdir={run}", f"--config.data.shards={shards}", f"--config.duration={STEPS} steps",
        "--config.checkpoint_every=7 steps", "--config.picture_every=0 steps",
        "--config.optimizer.base_learning_rate=0.1", *flags,
    ]  # fmt: skip
    return subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def rows_of(run):
    path = Path(run) / "metrics.jsonl"
    text = path.read_text() if path.is_file() else ""
    return [json.loads(line) for line in text.splitlines(keepends=True) if line.endswith("\n")]


def wait_for_row(process, run, step):
    deadline = time.monotonic() + 240
    while not any(row["step"] >= step for row in rows_of(run)):
        assert process.poll() is None, process.stderr.read()
        assert time.monotonic() < deadline, "the run did not get there"
        time.sleep(0.02)


@pytest.fixture(scope="module")
def undisturbed(shards, tmp_path_factory):
    run = tmp_path_factory.mktemp("undisturbed")
    process = start(run, shards)
    _, errors = process.communicate(timeout=300)
    assert process.returncode == 0, errors
    return run


def assert_same_run(run, other):
    keys = ("step", "epoch", "loss", "learning_rate", "grad_norm")
    assert [[row[k] for k in keys] for row in rows_of(run)] == [[row[k] for k in keys] for row in rows_of(other)]
    ours, theirs = (restore_params(folder).params for folder in (run, other))
    jax.tree.map(np.testing.assert_array_equal, ours, theirs)


def test_losses_fall_and_are_all_there(undisturbed):
    losses = [row["loss"] for row in rows_of(undisturbed)]
    assert len(losses) == STEPS and np.mean(losses[-5:]) < 0.9 * np.mean(losses[:5])


@pytest.mark.parametrize("number, code", [(signal.SIGINT, 130), (signal.SIGTERM, 130), (signal.SIGKILL, -9)])
def test_interrupted_run_continues_bit_for_bit(undisturbed, shards, tmp_path, number, code):
    process = start(tmp_path, shards)
    wait_for_row(process, tmp_path, 10)
    process.send_signal(number)
    output, errors = process.communicate(timeout=120)
    if process.returncode != 0:  # 0: it was faster than the signal
        assert process.returncode == code, errors
        assert "Traceback" not in errors
        if code == 130:
            assert "run the same command to go on" in output
    process = start(tmp_path, shards)
    _, errors = process.communicate(timeout=300)
    assert process.returncode == 0, errors
    assert_same_run(tmp_path, undisturbed)


def test_changed_config_cannot_resume_and_says_why(undisturbed, shards):
    before = {p: p.read_bytes() for p in undisturbed.rglob("*") if p.is_file()}
    process = start(undisturbed, shards, "--config.optimizer.weight_decay=0.1")
    _, errors = process.communicate(timeout=120)
    assert process.returncode == 2
    lines = [line for line in errors.splitlines() if line.startswith("error:")]
    assert len(lines) == 1 and "optimizer.weight_decay was 0.05, is 0.1" in lines[0] and "--workdir" in lines[0]
    assert {p: p.read_bytes() for p in undisturbed.rglob("*") if p.is_file()} == before


def test_encoder_alone_can_be_restored(undisturbed):
    whole, encoder = restore_params(undisturbed), restore_params(undisturbed, subtree="encoder")
    assert set(encoder.params) == {"encoder"} and encoder.step == STEPS
    np.testing.assert_array_equal(encoder.params["encoder"]["norm"]["scale"], whole.params["encoder"]["norm"]["scale"])
    with pytest.raises(InputError, match="has no checkpoint 39"):
        restore_params(undisturbed, step=39)


def test_checkpoint_of_another_variant_is_named(undisturbed, tmp_path):
    (tmp_path / "checkpoints").symlink_to(undisturbed / "checkpoints")
    config = json.loads((undisturbed / "config.json").read_text())
    config["model"]["widths"] = [16, 24, 48]
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(InputError, match="does not fit its config.*same variant"):
        restore_params(tmp_path)

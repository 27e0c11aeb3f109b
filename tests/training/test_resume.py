"""A run that is interrupted, by Ctrl-C or without warning, goes on as if nothing had happened."""

import json
import signal

import numpy as np
import pytest

from data_pipelines.errors import InputError
from infmae_jax.interop.runs import read_run
from infmae_jax.training.checkpoint import restore_params
from tests.training.jobs import Job, assert_same_run, rows_of

STEPS = 40


def start(run, shards, *flags):
    return Job(
        run, shards, f"--config.duration={STEPS} steps", "--config.checkpoint_every=7 steps",
        "--config.optimizer.base_learning_rate=0.1", *flags,
    )  # fmt: skip


@pytest.fixture(scope="module")
def undisturbed(shards, tmp_path_factory):
    run = tmp_path_factory.mktemp("undisturbed")
    with start(run, shards) as job:
        job.succeeded()
    return run


def test_losses_fall_and_are_all_there(undisturbed):
    losses = [row["loss"] for row in rows_of(undisturbed)]
    assert len(losses) == STEPS and np.mean(losses[-5:]) < 0.9 * np.mean(losses[:5])


@pytest.mark.parametrize("number, code", [(signal.SIGINT, 130), (signal.SIGTERM, 75), (signal.SIGKILL, -9)])
def test_interrupted_run_continues_bit_for_bit(undisturbed, shards, tmp_path, number, code):
    with start(tmp_path, shards) as job:
        job.wait_for_row(10)
        job.processes[0].send_signal(number)
        returned, output, errors = job.ended()[0]
    if returned != 0:  # 0: it was faster than the signal
        assert returned == code, errors
        assert "Traceback" not in errors
        if code != -9:
            assert "run the same command to go on" in output
    with start(tmp_path, shards) as job:
        job.succeeded()
    assert_same_run(tmp_path, undisturbed)


def test_changed_config_cannot_resume_and_says_why(undisturbed, shards):
    def content():
        return {p: p.read_bytes() for p in undisturbed.rglob("*") if p.is_file() and p.name != ".lock"}

    before = content()
    with start(undisturbed, shards, "--config.optimizer.weight_decay=0.1") as job:
        code, _, errors = job.ended()[0]
    assert code == 2
    lines = [line for line in errors.splitlines() if line.startswith("error:")]
    assert len(lines) == 1 and "optimizer.weight_decay was 0.05, is 0.1" in lines[0] and "--workdir" in lines[0]
    assert content() == before


def test_a_second_run_in_the_same_folder_is_refused(shards, tmp_path):
    with start(tmp_path, shards, "--config.duration=4000 steps") as first:
        assert first.wait_for_row(1)
        with start(tmp_path, shards) as second:
            code, _, errors = second.ended()[0]
        assert code == 2 and f"in use by process {first.processes[0].pid} on" in errors and "Traceback" not in errors
        assert first.running


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
        read_run(tmp_path)

"""A run that is interrupted, by Ctrl-C or without warning, goes on as if nothing had happened."""

import json
import signal

import jax
import numpy as np
import pytest

from data_pipelines.errors import InputError
from infmae_jax import pretrain
from infmae_jax.interop.load import load
from infmae_jax.training.checkpoint import restore_params
from tests import commands
from tests.training.host_process import EndingEarly
from tests.training.jobs import SMALLEST, SMOKE, Job, assert_same_run, rows_of

STEPS = 40


RECIPE = (
    *SMALLEST, f"--config.duration={STEPS} steps", "--config.checkpoint_every=7 steps",
    "--config.optimizer.base_learning_rate=0.1",
)  # fmt: skip


def start(run, shards):
    return Job(run, shards, *RECIPE, devices=jax.device_count())


def command(run, shards, *flags):
    """The same in this process."""
    data = (f"--workdir={run}", f"--config.data.shards={shards}", "--config.picture_every=0 steps")
    return commands.run("infmae_jax.pretrain", SMOKE, *data, *RECIPE, *flags)


@pytest.fixture(scope="module")
def undisturbed(shards, tmp_path_factory, steps_compiled_once):
    run = tmp_path_factory.mktemp("undisturbed")
    result = command(run, shards)
    assert result.returncode == 0, result.stderr
    return run


def test_losses_fall_and_are_all_there(undisturbed):
    losses = [row["loss"] for row in rows_of(undisturbed)]
    assert len(losses) == STEPS and np.mean(losses[-5:]) < 0.9 * np.mean(losses[:5])


class Terminated(EndingEarly):
    """Gets SIGTERM with the batch of step 4."""

    def __init__(self, config):
        super().__init__(config, 4)


def test_a_run_that_is_interrupted_again_and_again_continues_bit_for_bit(undisturbed, shards, tmp_path, monkeypatch):
    """By SIGTERM in this process, by Ctrl-C and SIGKILL in others; while one runs, nobody else gets its folder."""
    monkeypatch.setattr(pretrain, "PretrainTask", Terminated)
    result = command(tmp_path, shards)
    assert result.returncode == 75 and "run the same command to go on" in result.stdout, result.stderr
    monkeypatch.undo()
    for row, number, code in ((14, signal.SIGINT, 130), (24, signal.SIGKILL, -9)):
        with start(tmp_path, shards) as job:
            assert job.wait_for_row(row)
            if code == 130:
                assert_in_use(job, shards)
            job.processes[0].send_signal(number)
            returned, output, errors = job.ended()[0]
        if returned == 0:  # it was faster than the signal
            break
        assert returned == code, errors
        assert "Traceback" not in errors
        if code != -9:
            assert "run the same command to go on" in output
    result = command(tmp_path, shards)
    assert result.returncode == 0, result.stderr
    assert_same_run(tmp_path, undisturbed)


def assert_in_use(job, shards):
    """A second process is refused the job's folder; the job is held meanwhile, not to end before."""
    process = job.processes[0]
    process.send_signal(signal.SIGSTOP)
    result = command(job.run, shards)
    assert result.returncode == 2 and f"in use by process {process.pid} on" in result.stderr, result.stderr
    assert job.running
    process.send_signal(signal.SIGCONT)


def test_changed_config_cannot_resume_and_says_why(undisturbed, shards):
    def content():
        return {p: p.read_bytes() for p in undisturbed.rglob("*") if p.is_file() and p.name != ".lock"}

    before = content()
    result = command(undisturbed, shards, "--config.optimizer.weight_decay=0.1")
    assert result.returncode == 2
    lines = [line for line in result.stderr.splitlines() if line.startswith("error:")]
    assert len(lines) == 1 and "optimizer.weight_decay was 0.05, is 0.1" in lines[0] and "--workdir" in lines[0]
    assert content() == before


def test_encoder_alone_can_be_restored(undisturbed):
    whole, encoder = restore_params(undisturbed), restore_params(undisturbed, subtree="encoder")
    assert set(encoder.params) == {"encoder"} and encoder.step == STEPS
    np.testing.assert_array_equal(encoder.params["encoder"]["norm"]["scale"], whole.params["encoder"]["norm"]["scale"])
    with pytest.raises(InputError, match="has no checkpoint 39"):
        restore_params(undisturbed, step=39)


def test_checkpoint_of_another_variant_is_named(undisturbed, tmp_path):
    (tmp_path / "checkpoints").symlink_to(undisturbed / "checkpoints")
    config = json.loads((undisturbed / "config.json").read_text())
    config["model"]["encoder"]["widths"] = [16, 24, 48]
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(InputError, match="does not fit its config.*same variant"):
        load(tmp_path)

"""With --long: fine-tuning as real processes, killed in the middle, and two of them together.

In short runs `test_a_stopped_run_goes_on_bit_for_bit` stands for it, and pretraining for the loop that all tasks share.
"""

import json
import signal

import jax
import numpy as np
import pytest

from configs.segment import masks_tiny_cpu
from infmae_jax.training.checkpoint import restore_params
from tests.training.jobs import COMPARED, Job, beginnings, checkpoints, rows_of

SHORT = (
    "--config.duration=9 steps", "--config.log_every=1 steps", "--config.head.kind=fcn", "--config.optimizer.ema=0.9",
)  # fmt: skip


def start(run, encoder, labelled, **processes):
    command = "infmae_jax.finetune", f"--config={masks_tiny_cpu.__file__}:smoke", f"--checkpoint={encoder}"
    return Job(run, labelled / "surfaces", *SHORT, command=command, **processes)


@pytest.fixture(scope="module")
def undisturbed(encoder, labelled, tmp_path_factory, request):
    if not request.config.getoption("--long"):
        pytest.skip("takes minutes: --long")
    run = tmp_path_factory.mktemp("undisturbed")
    with start(run, encoder, labelled) as job:
        job.succeeded()
    return run


def test_a_killed_run_goes_on_bit_for_bit(undisturbed, encoder, labelled, tmp_path):
    with start(tmp_path, encoder, labelled) as job:
        assert job.wait_until(lambda: checkpoints(tmp_path) and rows_of(tmp_path)[-1]["step"] >= 4)
        job.processes[0].send_signal(signal.SIGKILL)
        assert job.ended()[0][0] == -signal.SIGKILL
    with start(tmp_path, encoder, labelled) as job:
        job.succeeded()
    assert 0 < beginnings(tmp_path)[-1] < 9
    keys = (*COMPARED, "val_miou", "val_aacc")
    rows = [[[row.get(key) for key in keys] for row in rows_of(run)] for run in (tmp_path, undisturbed)]
    assert rows[0] == rows[1] and len(rows[0]) >= 9
    jax.tree.map(np.testing.assert_array_equal, *(restore_params(run).params for run in (tmp_path, undisturbed)))
    ours, theirs = (json.loads((run / "evaluation/scores.json").read_text()) for run in (tmp_path, undisturbed))
    assert ours["confusion"] == theirs["confusion"] and ours["step"] == theirs["step"]


def test_two_processes_equal_one(undisturbed, encoder, labelled, tmp_path):
    with start(tmp_path, encoder, labelled, processes=2) as job:
        job.succeeded()
    for key in ("loss", "val_miou", "val_aacc"):
        ours, theirs = ([row[key] for row in rows_of(run) if key in row] for run in (tmp_path, undisturbed))
        np.testing.assert_allclose(ours, theirs, rtol=1e-6, atol=1e-6, err_msg=key)
        assert len(ours) >= 4
    ours, theirs = (json.loads((run / "evaluation/scores.json").read_text()) for run in (tmp_path, undisturbed))
    assert ours["images"] == theirs["images"] == 6
    np.testing.assert_allclose(ours["confusion"], theirs["confusion"], atol=2)  # pixels on the edge between two classes

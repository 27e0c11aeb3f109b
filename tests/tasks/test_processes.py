"""With --long: fine-tuning as real processes, killed in the middle, and two of them together.

In short runs `test_a_stopped_run_goes_on_bit_for_bit` stands for it, and pretraining for the loop that all tasks share.
"""

import json
import signal

import jax
import numpy as np
import pytest

from configs.detect import boxes_tiny_cpu
from configs.segment import masks_tiny_cpu
from infmae_jax.training.checkpoint import restore_params
from tests.training.jobs import COMPARED, Job, beginnings, checkpoints, rows_of

STEPS = "--config.duration=9 steps", "--config.log_every=1 steps"
KINDS = {  # config, flags, measures
    "segment": (masks_tiny_cpu, ("--config.head.kind=fcn", "--config.optimizer.ema=0.9"), ("val_miou", "val_aacc")),
    "detect": (boxes_tiny_cpu, ("--config.head.score_threshold=0.01",), ("val_ap", "val_ap50")),
}


def start(kind, run, encoder, labelled, **processes):
    module, flags, _ = KINDS[kind]
    command = "infmae_jax.finetune", f"--config={module.__file__}:smoke", f"--checkpoint={encoder}"
    return Job(run, labelled / "surfaces", *STEPS, *flags, command=command, **processes)


@pytest.fixture(scope="module", params=KINDS)
def undisturbed(encoder, labelled, tmp_path_factory, request):
    """(kind, run folder)"""
    if not request.config.getoption("--long"):
        pytest.skip("takes minutes: --long")
    run = tmp_path_factory.mktemp("undisturbed")
    with start(request.param, run, encoder, labelled) as job:
        job.succeeded()
    return request.param, run


def test_a_killed_run_goes_on_bit_for_bit(undisturbed, encoder, labelled, tmp_path):
    kind, whole = undisturbed
    with start(kind, tmp_path, encoder, labelled) as job:
        assert job.wait_until(lambda: checkpoints(tmp_path) and rows_of(tmp_path)[-1]["step"] >= 4)
        job.processes[0].send_signal(signal.SIGKILL)
        assert job.ended()[0][0] == -signal.SIGKILL
    with start(kind, tmp_path, encoder, labelled) as job:
        job.succeeded()
    assert 0 < beginnings(tmp_path)[-1] < 9
    keys = (*COMPARED, *KINDS[kind][2])
    rows = [[[row.get(key) for key in keys] for row in rows_of(run)] for run in (tmp_path, whole)]
    assert rows[0] == rows[1] and len(rows[0]) >= 9
    jax.tree.map(np.testing.assert_array_equal, *(restore_params(run).params for run in (tmp_path, whole)))
    ours, theirs = (json.loads((run / "evaluation/scores.json").read_text()) for run in (tmp_path, whole))
    assert ours | {"run": ""} == theirs | {"run": ""}


def test_two_processes_equal_one(undisturbed, encoder, labelled, tmp_path):
    kind, whole = undisturbed
    with start(kind, tmp_path, encoder, labelled, processes=2) as job:
        job.succeeded()
    for key in ("loss", *KINDS[kind][2]):
        ours, theirs = ([row[key] for row in rows_of(run) if key in row] for run in (tmp_path, whole))
        np.testing.assert_allclose(ours, theirs, rtol=1e-6, atol=1e-6, err_msg=key)
        assert len(ours) >= 4
    ours, theirs = (json.loads((run / "evaluation/scores.json").read_text()) for run in (tmp_path, whole))
    assert ours["images"] == theirs["images"] == 6
    if kind == "segment":
        np.testing.assert_allclose(ours["confusion"], theirs["confusion"], atol=2)  # pixels between two classes
    else:
        found, wanted = (json.loads((run / "evaluation/detections.json").read_text()) for run in (tmp_path, whole))
        assert len(found) == len(wanted) > 6 and len({each["image_id"] for each in found}) == 6

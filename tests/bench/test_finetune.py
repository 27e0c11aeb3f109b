"""Fine-tuning tasks are measured by what trains, predicts and evaluates; shares of time are those of a whole run."""

import dataclasses

import numpy as np
import pytest

from configs.segment import masks_tiny_cpu
from configs.small_target import targets_tiny_cpu
from infmae_jax.bench import finetune
from infmae_jax.models.config import InfMAEConfig
from infmae_jax.tasks.finetuned import KINDS
from infmae_jax.tasks.segment import SegmentConfig
from infmae_jax.training.config import from_config
from tests.commands import run

CONFIGS = {"segment": masks_tiny_cpu, "small_target": targets_tiny_cpu}


@pytest.mark.parametrize("task", CONFIGS)
def test_a_task_without_data(task, monkeypatch, request):
    if task != "segment" and not request.config.getoption("--long"):
        pytest.skip("one task stands for all: --long")
    smallest = InfMAEConfig().replace(widths=(16, 16, 16), depths=(1, 1, 1), heads=2)
    monkeypatch.setattr("infmae_jax.tasks.finetune.variant", lambda name: smallest)
    settings = CONFIGS[task].get_config("smoke")
    if task == "segment":
        settings.head.update(kind="fcn", fcn_convs=1)  # the one that compiles fastest
    result = finetune.finetune(KINDS[task], from_config(KINDS[task].config, settings), batch=2, rounds=1)
    assert [row["name"] for row in result["rows"]] == ["train", "predict", "evaluate"] and result["subject"] == task
    assert all(row["images_per_second"] > 0 for row in result["rows"])
    assert result["rows"][2]["share_of_training"].split()[1] == "%"


def test_share_of_evaluations_in_a_run():
    """90 images of 2 ms, 40 steps of 10, evaluated on 30 of 1 ms after every 15 steps, at first and at last."""
    config = dataclasses.replace(from_config(SegmentConfig, masks_tiny_cpu.get_config("smoke")), duration="40 steps",
                                 evaluate_every="15 steps")  # fmt: skip
    share = finetune._share(config, 10, 90, 30, np.array([0.002]), np.array([0.001]))
    assert share == pytest.approx(4 * 30 * 0.001 / (40 * 10 * 0.002))
    auto = dataclasses.replace(config, duration="auto", evaluate_every="10 percent")
    share = finetune._share(auto, 10, 1000, 300, np.array([0.002]), np.array([0.001]))
    assert share == pytest.approx(11 * 300 * 0.001 / (100 * 1000 * 0.002))


def test_a_config_of_another_task_is_refused():
    done = run("infmae_jax.bench.__main__", "small_target", f"--config={masks_tiny_cpu.__file__}:smoke")
    assert done.returncode == 2 and "--config is not of the task small_target" in done.stderr

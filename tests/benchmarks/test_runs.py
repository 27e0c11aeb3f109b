"""Measurements that drive the real training loop on shards."""

import dataclasses
import os
import signal

import pytest

from data_pipelines.pipeline import TrainBatches
from infmae_jax.benchmarks.end_to_end import end_to_end
from infmae_jax.benchmarks.features import features
from infmae_jax.benchmarks.overhead import overhead


@pytest.fixture(scope="module")
def config(smoke, shards):
    return dataclasses.replace(smoke, data=dataclasses.replace(smoke.data, shards=(str(shards),)))


def test_end_to_end(config):
    result = end_to_end(config, batch=4, rounds=2, steps=3)
    (row,) = result["rows"]
    assert 0 < row["low"] <= row["images_per_second"] <= row["high"]
    assert 0 <= row["host_waits"] < 1 and 0 <= row["device_idle_at_most"] < 1
    assert row["hours_for_published_schedule"] == pytest.approx(400 * 305_241 / row["images_per_second"] / 3600)
    assert config.data.shards[0] in result["settings"]["shards"]


def test_ending_a_benchmark_ends_it(config, monkeypatch):
    """The training loop takes SIGTERM for its own end only."""
    following = TrainBatches.__next__

    def terminated(batches):
        os.kill(os.getpid(), signal.SIGTERM)
        return following(batches)

    monkeypatch.setattr(TrainBatches, "__next__", terminated)
    with pytest.raises(SystemExit) as caught:
        overhead(config, batch=4, rounds=1, steps=6, log_every=2)
    assert caught.value.code == 75


def test_overhead(config):
    result = overhead(config, batch=4, rounds=1, steps=6, log_every=2)
    assert [row["form"] for row in result["rows"]] == ["bare", "checkpoints", "observed", "both"]
    for row in result["rows"]:
        assert row["low"] == row["step_ms"] == row["high"] > 0
        bare = result["rows"][0]["step_ms"]
        assert row.get("added_percent", 0) == pytest.approx(100 * (row["step_ms"] / bare - 1))
    rows = {row["form"]: row for row in result["rows"]}
    # Two steps between saves; a save every 10 minutes takes its seconds of 600.
    a_save = 2 * (rows["both"]["step_ms"] - rows["observed"]["step_ms"]) / 1e3
    assert rows["both"]["seconds_a_save"] == pytest.approx(a_save)
    assert rows["both"]["long_run_percent"] == pytest.approx(rows["observed"]["added_percent"] + a_save / 6)
    # Steps 2, 4, 6 and 8 of nine, in both saving forms; the save at the end of a run is not in its time.
    assert "median of 8" in result["notes"][0]


def test_features(smoke):
    (row,) = features(smoke, batch=2, rounds=2, against_torch=False)["rows"]
    assert 0 < row["low"] <= row["images_per_second"] <= row["high"]

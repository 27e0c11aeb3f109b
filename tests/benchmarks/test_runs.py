"""Measurements that drive the real training loop on shards."""

import dataclasses

import pytest

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


def test_overhead(config):
    result = overhead(config, batch=4, rounds=1, steps=6, log_every=2)
    assert [row["form"] for row in result["rows"]] == ["bare", "checkpoints", "observed", "both"]
    for row in result["rows"]:
        assert row["low"] == row["step_ms"] == row["high"] > 0
        bare = result["rows"][0]["step_ms"]
        assert row.get("added_percent", 0) == pytest.approx(100 * (row["step_ms"] / bare - 1))
    # Steps 2, 4, 6 and 8 of nine, in both saving forms; the save at the end of a run is not in its time.
    assert "median of 8" in result["notes"][0]


def test_features(smoke):
    (row,) = features(smoke, batch=2, rounds=2, against_torch=False)["rows"]
    assert 0 < row["low"] <= row["images_per_second"] <= row["high"]

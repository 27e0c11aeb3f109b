"""The benchmark's rows, and that what it compares with is what it says."""

import io
import os

import numpy as np
import pytest
from PIL import Image

from data_pipelines import scaling, throughput
from data_pipelines.transforms import MEAN, STD, draw_crop
from data_pipelines.errors import InputError
from tests.data_pipelines.shard_sets import make_image, make_example, make_set, write_set


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    shards = make_set(tmp_path_factory.mktemp("data") / "set", 12, height=256, width=320)
    return {row["name"]: row for row in throughput.run([shards], seconds=1.0, batch_size=4, rounds=2)}


def test_every_promised_row_is_there_with_plausible_rates(rows):
    promised = {"pipeline", "pipeline fast", "pipeline cached", "classic", "decode", "decode fast", "crop", "mask"}
    assert promised <= set(rows)
    for row in (rows[name] for name in promised):
        assert 0 < row["low"] <= row["images_per_second"] <= row["high"] and row["per"] == "core"
    # Parts are faster than the whole that holds them.
    for part in ("decode", "crop", "mask"):
        assert rows[part]["high"] > rows["pipeline"]["low"]
    assert rows["pipeline"]["versus_row"] == "classic" and rows["pipeline"]["versus"] > 1
    if len(os.sched_getaffinity(0)) > 1:
        ways = [name for name, row in rows.items() if row.get("versus_row") == scaling.ONE]
        assert ways == [scaling.THREADS, scaling.WORKERS, scaling.APART]
        assert all(rows[name]["versus"] > 0 and rows[name]["per"] == "machine" for name in ways)


def test_differences_are_those_of_the_same_crops(rows):
    exact = rows["pipeline against Pillow"]
    fast, cached = (rows[f"pipeline {mode} against exact"] for mode in ("fast", "cached"))
    assert exact["max_difference"] <= 1 and exact["mean_difference"] < 0.3
    assert 0 < fast["mean_difference"] < 20 and 0 <= fast["kept_tokens_changed"] <= 1
    assert cached["max_difference"] == cached["pixels_changed"] == cached["kept_tokens_changed"] == 0


def test_the_process_keeps_its_cores(rows):
    del rows
    assert len(os.sched_getaffinity(0)) == len(scaling.cores())


def test_classic_batch_is_torchvisions_recipe():
    image = make_image(0, 200, 240)
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, "png")
    batch = throughput.classic_batch([buffer.getvalue()] * 3, np.random.default_rng(0), (96, 64))
    assert batch.shape == (3, 3, 96, 64) and batch.dtype == np.float32
    rng = np.random.default_rng(0)
    for sample in batch:
        crop = Image.fromarray(draw_crop(rng, 200, 240).of(image)).resize((64, 96), Image.Resampling.BICUBIC)
        expected = (np.asarray(crop, np.float64) / 255 - MEAN) / STD
        if rng.random() < 0.5:
            expected = expected[:, ::-1]
        np.testing.assert_allclose(sample, np.stack([expected] * 3), atol=1e-5)


def test_sets_too_small_to_measure_are_refused(tmp_path):
    shards = write_set(tmp_path / "one", [make_example("only", make_image(0))], shards=1)
    with pytest.raises(InputError, match="too few"):
        throughput.run([shards])

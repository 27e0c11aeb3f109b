"""The benchmark of the input pipeline: what it compares with is what it says."""

import io

import numpy as np
import pytest
from PIL import Image

from data_pipelines.errors import InputError
from data_pipelines.transforms import MEAN, STD, draw_crop
from infmae_jax.bench.data import classic_batch, measure
from tests.data_pipelines.shard_sets import make_example, make_image, make_set, write_set


def test_every_promised_row_is_there(tmp_path):
    shards = make_set(tmp_path / "set", 12, height=256, width=320)
    rows = measure([shards], workers=2, seconds=1.0, batch_size=4, rounds=1)
    names = ["pipeline", "classic", "decode", "mask", "2 workers"]
    assert [row["name"] for row in rows] == names


def test_classic_batch_is_torchvisions_recipe():
    image = make_image(0, 200, 240)
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, "png")
    batch = classic_batch([buffer.getvalue()] * 3, np.random.default_rng(0), (96, 64))
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
        measure([shards], 0, 1.0)

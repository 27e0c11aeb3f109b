"""A very small model and a folder of labelled images."""

import csv

import numpy as np
import pytest
from PIL import Image

from infmae_jax.interop.load import untrained
from infmae_jax.models.config import InfMAEConfig

SIZE = (32, 48)


@pytest.fixture(scope="session")
def small_model() -> InfMAEConfig:
    return InfMAEConfig().replace(
        widths=(4, 8, 16), depths=(1, 1, 1), heads=2, decoder_width=8, decoder_depth=1, decoder_heads=2
    )


@pytest.fixture(scope="session")
def small_encoder(small_model):
    return untrained(small_model, SIZE)


@pytest.fixture(scope="session")
def other_encoder(small_model):
    """The same architecture with other weights."""
    return untrained(small_model, SIZE, seed=1)


@pytest.fixture
def labelled(tmp_path):
    """CSV of 30 images of two classes, cold (dark) and hot (bright), whose sizes differ."""
    rng = np.random.default_rng(0)
    (tmp_path / "images").mkdir()
    rows = []
    for i in range(30):
        label = ("cold", "hot")[i % 2]
        pixels = rng.normal(60 if label == "cold" else 180, 20, (40 + i, 64)).clip(0, 255).astype(np.uint8)
        Image.fromarray(pixels).save(tmp_path / "images" / f"{i:02d}.png")
        rows.append((f"images/{i:02d}.png", "train" if i < 20 else "val", label, str(i % 3 * 10)))
    path = tmp_path / "labels.csv"
    write_csv(path, rows)
    return path


def write_csv(path, rows, header=("file", "split", "label", "angle")):
    with path.open("w", newline="") as stream:
        csv.writer(stream).writerows([header, *rows])

"""Points of the axes, and the plot."""

import numpy as np
from PIL import Image

from infmae_jax.benchmarks import flops, growth
from infmae_jax.benchmarks.training import visible_tokens


def test_one_axis_varies_at_a_time():
    points = list(growth.Range((8, 2), (32, 64), (4, 2)).points())
    assert [(axis, value) for axis, value, _ in points] == [
        ("batch size", 2), ("batch size", 8), ("image size", 32), ("image size", 64),
        ("masking stride", 2), ("masking stride", 4),
    ]  # fmt: skip
    usual = {"batch size": 8, "image size": 32, "masking stride": 4}
    assert all(point == usual | {axis: value} for axis, value, point in points)


def test_rates_against_operations_and_plot(smoke, tmp_path, monkeypatch):
    """A step that costs its operations and nothing else is as fast as predicted everywhere."""

    class Program:
        def __init__(self, config, batch):
            size, keep = config.data.image_size, visible_tokens(config)
            self.seconds = batch * flops.useful_gflop(config.model, size, keep)

        def start(self):
            pass

        stop = start

    monkeypatch.setattr(growth, "TrainingProgram", Program)
    turns = lambda calls, rounds: {"step": np.full(rounds, calls["step"].seconds)}  # noqa: E731
    monkeypatch.setattr(growth.timing, "take_turns", turns)
    plot = tmp_path / "growth.png"
    rows = growth.growth(smoke, growth.Range((2, 8), (64, 96), (4, 2)), rounds=2, plot=plot)["rows"]
    assert len(rows) == 6 and len({row["gflop_per_image"] for row in rows}) == 3
    for row in rows:
        np.testing.assert_allclose([row["predicted"], row["low"]], row["images_per_second"])
        np.testing.assert_allclose(row["gflop_per_second"], 1)
    with Image.open(plot) as image:
        assert image.format == "PNG" and min(image.size) > 300
    assert list(tmp_path.iterdir()) == [plot]

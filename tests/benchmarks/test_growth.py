"""Points of the axes, and the plot."""

import numpy as np
from PIL import Image

from infmae_jax.benchmarks import growth


def test_one_axis_varies_at_a_time():
    points = list(growth.Range((8, 2), (32, 64), (4, 2)).points())
    assert [(axis, value) for axis, value, _ in points] == [
        ("batch size", 2), ("batch size", 8), ("image size", 32), ("image size", 64),
        ("masking stride", 2), ("masking stride", 4),
    ]  # fmt: skip
    usual = {"batch size": 8, "image size": 32, "masking stride": 4}
    assert all(point == usual | {axis: value} for axis, value, point in points)


def test_rates_and_plot(smoke, tmp_path):
    plot = tmp_path / "growth.png"
    ranges = growth.Range((2,), (64, 96), (4,))
    rows = growth.growth(smoke, ranges, rounds=1, plot=plot)["rows"]
    small, large = (next(row for row in rows if row["axis"] == "image size" and row["value"] == v) for v in (64, 96))
    assert large["gflop_per_image"] > 2 * small["gflop_per_image"]
    assert small["predicted"] == small["images_per_second"]
    np.testing.assert_allclose(
        large["predicted"] * large["gflop_per_image"], small["images_per_second"] * small["gflop_per_image"]
    )
    with Image.open(plot) as image:
        assert image.format == "PNG" and min(image.size) > 300
    assert list(tmp_path.iterdir()) == [plot]

"""How the cost of a training step grows with batch size, image size and masking stride, against its operations."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from infmae_jax.benchmarks import flops, timing
from infmae_jax.benchmarks.report import Row, report
from infmae_jax.benchmarks.training import TrainingProgram, visible_tokens
from infmae_jax.training.config import PretrainConfig

AXES = ("batch size", "image size", "masking stride")


@dataclasses.dataclass(frozen=True)
class Range:
    """The values of each axis; where one varies, the others have their first value."""

    batch_sizes: tuple[int, ...]
    image_sizes: tuple[int, ...] = (224, 320, 448)
    strides: tuple[int, ...] = (4, 2, 7)

    def points(self) -> Iterator[tuple[str, int, dict[str, int]]]:
        """Axis, its value, and all three values."""
        values = dict(zip(AXES, (self.batch_sizes, self.image_sizes, self.strides), strict=True))
        for axis, along in values.items():
            for value in sorted(along):
                yield axis, value, {name: first[0] for name, first in values.items()} | {axis: value}


def growth(config: PretrainConfig, ranges: Range, rounds: int, plot: Path | None) -> dict[str, Any]:
    """Images a second along each axis, and the rate that the operations alone would predict from the first values.

    Args:
      plot: a PNG is drawn here.
    """
    measured: dict[tuple[int, ...], dict[str, float]] = {}
    rows: list[Row] = []
    for axis, value, point in ranges.points():
        key = tuple(point.values())
        if key not in measured:
            measured[key] = _measure(config, point, rounds)
        rows.append({"axis": axis, "value": value, **measured[key]})
    reference = measured[tuple(first[0] for first in (ranges.batch_sizes, ranges.image_sizes, ranges.strides))]
    for row in rows:
        row["predicted"] = reference["images_per_second"] * reference["gflop_per_image"] / row["gflop_per_image"]
    if plot:
        draw(rows, plot)
    settings = {"dtype": config.model.encoder.dtype, "widths": list(config.model.encoder.widths), "rounds": rounds, "plot": str(plot)}
    return report("growth", settings, rows, ["predicted: from the useful operations alone, from the first values"])


def _measure(config: PretrainConfig, point: dict[str, int], rounds: int) -> dict[str, float]:
    size, batch = point["image size"], point["batch size"]
    mask = dataclasses.replace(config.data.mask, stride=point["masking stride"])
    config = dataclasses.replace(config, data=dataclasses.replace(config.data, image_size=(size, size), mask=mask))
    program = TrainingProgram(config, batch)
    program.start()
    seconds = timing.take_turns({"step": program}, rounds)["step"]
    program.stop()
    useful = flops.useful_gflop(config.model, (size, size), visible_tokens(config))
    rates = timing.rate_row(seconds, batch)
    return rates | {"gflop_per_image": useful, "gflop_per_second": useful * rates["images_per_second"]}


def draw(rows: list[Row], path: Path) -> None:
    """One panel an axis: measured rates with their spread, and what the operations predict."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(12, 3.6), layout="constrained")
    for panel, axis in zip(figure.subplots(1, len(AXES)), AXES, strict=True):
        along = [row for row in rows if row["axis"] == axis]
        values, rates = [row["value"] for row in along], [row["images_per_second"] for row in along]
        low, high = ([abs(row[end] - row["images_per_second"]) for row in along] for end in ("low", "high"))
        panel.plot(values, [row["predicted"] for row in along], "--", color="gray", label="by operations alone")
        panel.errorbar(values, rates, yerr=[low, high], fmt="o-", capsize=3, label="measured")
        panel.set(xlabel=axis, xticks=values, ylim=(0, None))
        panel.grid(alpha=0.3)
        if axis == AXES[0]:
            panel.set_xscale("log", base=2)
            panel.set_xticks(values, [str(value) for value in values])
            panel.set_ylabel("images/s")
            panel.legend()
    temporary = path.with_suffix(".tmp")
    figure.savefig(temporary, format="png", dpi=120)
    temporary.replace(path)

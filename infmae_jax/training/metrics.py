"""What a run writes down while it trains: metrics.jsonl, TensorBoard events, a progress line."""

from __future__ import annotations

import json
import logging
import sys
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import tqdm

METRICS_NAME = "metrics.jsonl"
_PLAIN_INTERVAL_S = 15.0  # between progress lines where there is no terminal


def read_metrics(run: str | Path) -> list[dict[str, float]]:
    """All logged steps of a run, in order; a last line cut off by a crash is left out."""
    path = Path(run) / METRICS_NAME
    rows = []
    for line in path.read_text().splitlines() if path.is_file() else []:
        try:
            rows.append(json.loads(line))
        except ValueError:
            break
    return rows


class MetricsWriter:
    """Appends logged steps to RUN/metrics.jsonl and RUN/tensorboard; does nothing where `active` is False.

    Opening for a run resumed at `first_step` drops the rows of that step and later ones: they will be made again.
    """

    def __init__(self, run: str | Path, first_step: int, active: bool = True):
        self._active = active
        if not active:
            return
        logging.getLogger("tensorboardX").setLevel(logging.ERROR)
        from tensorboardX import SummaryWriter

        path = Path(run) / METRICS_NAME
        kept = [row for row in read_metrics(run) if row["step"] < first_step]
        temporary = path.with_suffix(".tmp")
        temporary.write_text("".join(json.dumps(row) + "\n" for row in kept))
        temporary.replace(path)
        self._file = path.open("a")
        self._tensorboard = SummaryWriter(str(Path(run) / "tensorboard"), purge_step=first_step)

    def write(self, row: Mapping[str, float]) -> None:
        """One object a logged step; `row` has the key "step"."""
        if self._active:
            self._file.write(json.dumps(row) + "\n")
            self._file.flush()
            for key, value in row.items():
                if key != "step":
                    self._tensorboard.add_scalar(key, value, int(row["step"]))

    def picture(self, name: str, image: np.ndarray, step: int) -> None:
        """image: (H,W,3) uint8."""
        if self._active:
            self._tensorboard.add_image(name, image, step, dataformats="HWC")

    def close(self) -> None:
        if self._active:
            self._file.close()
            self._tensorboard.close()


def progress_bar(description: str, first: int, total: int, active: bool = True) -> tqdm.tqdm:
    """A progress line with rate and time left: live on a terminal, one line every 15 s elsewhere."""
    terminal = sys.stderr.isatty()
    return tqdm.tqdm(
        desc=description,
        initial=first,
        total=total,
        unit="step",
        disable=not active,
        dynamic_ncols=terminal,
        mininterval=0.5 if terminal else _PLAIN_INTERVAL_S,
        maxinterval=_PLAIN_INTERVAL_S,
    )

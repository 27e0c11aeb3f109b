"""Line charts as inline SVG: thinned, with events marked, readable in light and dark and at any width."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

import numpy as np

MAX_POINTS = 2000
_WIDTH, _HEIGHT = 480, 250
_LEFT, _RIGHT, _TOP, _BOTTOM = 58, 10, 16, 30
_LOG_RANGE = 30.0  # largest / smallest value from which on a logarithmic axis reads better
_SMOOTHED_FROM = 40  # points
_MARK_PIXELS = 4.0  # marks of one kind that are closer are drawn as one


@dataclasses.dataclass(frozen=True)
class MarkKind:
    """How an event is drawn: a class of the style sheet, what people call it, and its shape at the top edge."""

    css: str
    title: str
    shape: str  # SVG path around (0, 0), about 9 x 9


MARKS: dict[str, MarkKind] = {
    "restart": MarkKind("restart", "restart", "M-4 -4 L5 0 L-4 5 Z"),
    "skip": MarkKind("skip", "skipped update", "M0 -5 A5 5 0 1 0 0.01 -5 Z"),
    "rollback": MarkKind("rollback", "rollback", "M4 -4 L-5 0 L4 5 Z"),
    "damage": MarkKind("damage", "checkpoint damaged or not saved", "M0 -5 L5 0 L0 5 L-5 0 Z"),
}
_KIND_OF_EVENT = {
    "resume": "restart",
    "skip": "skip",
    "spike": "skip",
    "rollback": "rollback",
    "checkpoint_damaged": "damage",
    "save_failed": "damage",
}


@dataclasses.dataclass(frozen=True)
class Mark:
    """An event on the step axis. `kind` is a key of `MARKS`."""

    step: float
    kind: str


def mark_kinds(events: Sequence[Mapping[str, Any]]) -> list[str | None]:
    """For each event of a run the key of `MARKS` it is drawn as, or None: any but the first start is a restart."""
    kinds = [_KIND_OF_EVENT.get(event["event"]) for event in events]
    return ["restart" if event["event"] == "start" and i else kinds[i] for i, event in enumerate(events)]


def marks_of(events: Sequence[Mapping[str, Any]]) -> list[Mark]:
    return [Mark(float(event["step"]), kind) for event, kind in zip(events, mark_kinds(events)) if kind]


def thin(steps: np.ndarray, values: np.ndarray, limit: int = MAX_POINTS) -> tuple[np.ndarray, np.ndarray]:
    """At most `limit` points of a curve that looks the same: every stretch keeps its first and last point, its
    extremes, and a gap (NaN) if it has one."""
    if len(steps) <= limit:
        return steps, values
    kept = []
    for part in np.array_split(np.arange(len(steps)), limit // 5):
        inside = values[part]
        chosen = {part[0], part[-1]}
        if np.isfinite(inside).any():
            chosen |= {part[np.nanargmin(inside)], part[np.nanargmax(inside)]}
        if not np.isfinite(inside).all():
            chosen.add(part[np.argmin(np.isfinite(inside))])
        kept += sorted(chosen)
    return steps[kept], values[kept]


def smooth(values: np.ndarray) -> np.ndarray:
    """Running mean over a twentieth of the curve; gaps are left out of it."""
    reach = max(1, len(values) // 40)
    known = np.isfinite(values)
    sums = np.concatenate([[0.0], np.cumsum(np.where(known, values, 0.0))])
    counts = np.concatenate([[0], np.cumsum(known)])
    low = np.maximum(np.arange(len(values)) - reach, 0)
    high = np.minimum(np.arange(len(values)) + reach + 1, len(values))
    with np.errstate(invalid="ignore", divide="ignore"):
        return (sums[high] - sums[low]) / (counts[high] - counts[low])


class Axis:
    """Maps data to pixels, linear or logarithmic."""

    def __init__(self, low: float, high: float, pixels: tuple[float, float], log: bool = False):
        self.log, self._pixels = log, pixels
        if log:
            low, high = math.log10(low), math.log10(high)
        if high - low <= 1e-9 * max(abs(low), abs(high)):  # a constant: put it in the middle
            pad = 0.5 if log else (abs(low) * 0.1 or 1.0)
            low, high = low - pad, high + pad
        self.low, self.high = low, high

    def __call__(self, values: np.ndarray | float) -> np.ndarray:
        values = np.asarray(values, np.float64)
        place = (np.log10(values) if self.log else values) - self.low
        start, end = self._pixels
        return start + place / (self.high - self.low) * (end - start)

    def ticks(self, wanted: int = 5) -> list[float]:
        """Round numbers within the range."""
        if self.log and self.high - self.low >= 1:
            every = max(1, round((self.high - self.low) / wanted))
            return [10.0**e for e in range(math.ceil(self.low - 1e-9), math.floor(self.high + 1e-9) + 1, every)]
        low, high = (10**self.low, 10**self.high) if self.log else (self.low, self.high)
        raw = (high - low) / wanted
        unit = 10.0 ** math.floor(math.log10(raw))
        step = min((m * unit for m in (1, 2, 5, 10)), key=lambda s: abs(s - raw))
        first = math.ceil(low / step - 1e-9)
        return [round(i * step, 12) for i in range(first, math.floor(high / step + 1e-9) + 1)]


@dataclasses.dataclass(frozen=True)
class Curve:
    """How a logged value is drawn.

    Attributes:
      title: plain text.
      noisy: with a running mean over it.
      log: on a logarithmic axis if the values, all positive, span a wide range.
      from_zero: the axis begins at zero.
    """

    title: str
    noisy: bool = False
    log: bool = False
    from_zero: bool = False


def line_chart(
    curve: Curve, steps: np.ndarray, values: np.ndarray, marks: Sequence[Mark], shown: tuple[float, float]
) -> str:
    """A chart as HTML: heading with the value under the pointer, and an SVG. Empty text without a finite value.

    Args:
      steps, values: (n,) float; non-finite values are gaps.
      marks: drawn where they lie within `shown`.
      shown: first and last step of the axis, the same in all charts of a page.
    """
    values = np.where(np.isfinite(values), values, np.nan)
    finite = values[np.isfinite(values)]
    if not len(finite):
        return ""
    low, high = float(finite.min()), float(finite.max())
    low = min(low, 0.0) if curve.from_zero else low
    across = Axis(*shown, (_LEFT, _WIDTH - _RIGHT))
    up = Axis(low, high, (_HEIGHT - _BOTTOM, _TOP), log=curve.log and low > 0 and high / low > _LOG_RANGE)
    thinned = thin(steps, values)
    noisy = curve.noisy and len(values) >= _SMOOTHED_FROM
    lines = [_path(across, up, *thinned, "raw" if noisy else "line")]
    if noisy:
        lines.append(_path(across, up, *thin(steps, smooth(values), MAX_POINTS // 4), "line"))
    points = [[int(s), float(f"{v:.5g}")] for s, v in zip(*thinned) if math.isfinite(v)]
    scale = [across.low, across.high, up.low, up.high, int(up.log), _LEFT, _WIDTH - _RIGHT, _TOP, _HEIGHT - _BOTTOM]
    name = escape(curve.title)
    return (
        f'<figure class="chart" data-scale="{json.dumps(scale)}" data-points="{json.dumps(points)}">'
        f"<figcaption><b>{name}</b> <output>{number_text(points[-1][1])}</output></figcaption>"
        f'<svg viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img" aria-label="{name} over steps">'
        f"{_grid(across, up)}{_marks(across, marks)}{''.join(lines)}"
        f'<g class="cross" visibility="hidden"><path d="M0 {_TOP}V{_HEIGHT - _BOTTOM}"/><circle r="4"/></g>'
        "</svg></figure>"
    )


def number_text(value: float) -> str:
    """A number for people: 1,234 or 0.01235 or 3.5e-07."""
    if not math.isfinite(value):
        return str(value)
    if value == int(value) and abs(value) < 1e15:
        return f"{int(value):,}"
    return f"{value:,.4g}" if abs(value) < 1000 else f"{value:,.0f}"


def _tick_text(value: float, of_steps: bool = False) -> str:
    for size, letter in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= size * (10 if of_steps and size == 1e3 else 1):
            return f"{value / size:g}{letter}"
    text = f"{value:g}"
    return text if len(text) <= 6 else f"{value:.0e}".replace("e-0", "e-")


def _path(across: Axis, up: Axis, steps: np.ndarray, values: np.ndarray, css: str) -> str:
    pieces, pen_down = [], False
    for x, y in zip(across(steps), up(values)):
        if math.isnan(y):
            pen_down = False
            continue
        # A lone point between gaps would be invisible: a line of no length has round ends.
        pieces.append(f"{'L' if pen_down else 'M'}{x:.1f} {y:.1f}" + ("" if pen_down else "h0"))
        pen_down = True
    return f'<path class="{css}" d="{"".join(pieces)}"/>'


def _grid(across: Axis, up: Axis) -> str:
    out = []
    for tick in up.ticks():
        y = float(up(tick))
        out.append(f'<path class="grid" d="M{_LEFT} {y:.1f}H{_WIDTH - _RIGHT}"/>')
        out.append(f'<text class="y" x="{_LEFT - 6}" y="{y + 4:.1f}">{_tick_text(tick)}</text>')
    for tick in across.ticks(4):
        x = min(float(across(tick)), _WIDTH - _RIGHT - 12.0)
        out.append(f'<text class="x" x="{x:.1f}" y="{_HEIGHT - 10}">{_tick_text(tick, of_steps=True)}</text>')
    return "".join(out)


def _marks(across: Axis, marks: Sequence[Mark]) -> str:
    out = []
    for kind, drawn in MARKS.items():
        groups: list[list[Mark]] = []
        for mark in sorted((m for m in marks if m.kind == kind), key=lambda m: m.step):
            if not across.low <= mark.step <= across.high:
                continue
            if groups and across(mark.step) - across(groups[-1][0].step) < _MARK_PIXELS:
                groups[-1].append(mark)
            else:
                groups.append([mark])
        for group in groups:
            x = float(across(group[0].step))
            more = f" and {len(group) - 1} more" if len(group) > 1 else ""
            out.append(
                f'<g class="mark {drawn.css}"><title>{drawn.title} at step {int(group[0].step):,}{more}</title>'
                f'<path class="rule" d="M{x:.1f} {_TOP}V{_HEIGHT - _BOTTOM}"/>'
                f'<path d="{drawn.shape}" transform="translate({x:.1f} {_TOP - 8})"/></g>'
            )
    return "".join(out)

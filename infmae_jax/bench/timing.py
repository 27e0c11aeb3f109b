"""Seconds of things that are to be compared: measured in turns, so that whatever else the machine does hits all alike.

Ratios are those of the same round; medians and first and last decile of the rounds are reported. The first round does
not count: it compiles, fills caches and finds out how many calls make a slice that a clock can resolve.
"""

import time
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

_LONG = 20  # slices; a call that takes so long the first time, compiling included, is not tried again before the rounds
Call = Callable[[int], Any]  # does the work so many times and returns when the device has finished it


def take_turns(
    calls: Mapping[str, Call],
    rounds: int,
    slice_seconds: float = 0.5,
    clock: Callable[[], float] = time.perf_counter,
) -> dict[str, np.ndarray]:
    """Seconds of one call of each contender in each round, (rounds,) float64.

    Args:
      calls: contenders by name. Every other round takes them in reverse, so that none always follows the same one.
      rounds: that count.
      slice_seconds: how long a contender works in a round, at least; one call if that takes longer.
      clock: seconds; `time.process_time` counts what this process computes.
    """

    def seconds_of(call: Call, times: int) -> float:
        start = clock()
        call(times)
        return clock() - start

    repeats = {}
    for name, call in calls.items():
        first = seconds_of(call, 1)
        again = seconds_of(call, 1) if first < _LONG * slice_seconds else first
        repeats[name] = max(1, round(slice_seconds / max(again, 1e-9)))
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    for number in range(rounds):
        for name in list(calls) if number % 2 == 0 else reversed(calls):
            seconds[name].append(seconds_of(calls[name], repeats[name]) / repeats[name])
    return {name: np.asarray(values) for name, values in seconds.items()}


def spread(values: np.ndarray) -> tuple[float, float, float]:
    """First decile, median and last decile."""
    low, median, high = np.quantile(values, [0.1, 0.5, 0.9])
    return float(low), float(median), float(high)


def rate_row(seconds: np.ndarray, items: int) -> dict[str, float]:
    """images_per_second with its low and high, and step_ms (median), of calls that each do `items` images."""
    low, median, high = spread(items / seconds)
    return {"images_per_second": median, "low": low, "high": high, "step_ms": float(np.median(seconds)) * 1e3}


def ratio(baseline: np.ndarray, seconds: np.ndarray) -> str:
    """How many times faster than the baseline, over the rounds: "median (low-high)"."""
    low, median, high = spread(baseline / seconds)
    return f"{median:.3g} ({low:.3g}-{high:.3g})"

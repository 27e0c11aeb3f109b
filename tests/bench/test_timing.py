"""Contenders are timed in turns and compared round by round."""

import numpy as np
import pytest

from infmae_jax.bench import timing


class Clock:
    """Contenders move it."""

    def __init__(self):
        self.now, self.log = 100.0, []

    def contender(self, name, seconds):
        """Takes 50 times as long on its first call, and the listed seconds a call in turn afterwards."""
        calls = 0

        def call(times):
            nonlocal calls
            self.log.append((name, times))
            for _ in range(times):
                self.now += seconds[calls % len(seconds)] * (50 if calls == 0 else 1)
                calls += 1

        return call


def test_seconds_a_call_without_the_first_one():
    clock = Clock()
    calls = {"slow": clock.contender("slow", [2.0]), "fast": clock.contender("fast", [0.125])}
    seconds = timing.take_turns(calls, rounds=3, slice_seconds=0.5, clock=lambda: clock.now)
    np.testing.assert_allclose(seconds["slow"], [2.0] * 3)
    np.testing.assert_allclose(seconds["fast"], [0.125] * 3)
    # A long first call is not repeated; then three rounds, the second in reverse; the fast one fills its slice.
    rounds = [("slow", 1), ("fast", 4), ("fast", 4), ("slow", 1), ("slow", 1), ("fast", 4)]
    assert clock.log == [("slow", 1), ("fast", 1), ("fast", 1), *rounds]


def test_ratios_are_paired():
    """A machine that slows down tenfold meanwhile does not change who is how much faster."""
    ours = np.array([1.0, 2.0, 10.0])
    assert timing.ratio(3 * ours, ours) == "3 (3-3)"
    assert timing.ratio(ours, ours * [1, 2, 4]) == "0.5 (0.3-0.9)"


def test_rates():
    row = timing.rate_row(np.array([0.5, 0.25, 1.0]), items=8)
    assert row["images_per_second"] == 16 and row["step_ms"] == 500
    assert row["low"] == pytest.approx(9.6) and row["high"] == pytest.approx(28.8)  # first and last decile

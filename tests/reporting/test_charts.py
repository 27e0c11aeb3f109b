"""Thinning, running means, axes and marks, against slow references."""

import math

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from infmae_jax.reporting.charts import Axis, Mark, marks_of, smooth, thin
from tests.reporting.run_folders import event


@settings(max_examples=60)
@given(st.integers(1, 20_000), st.integers(0, 2**32 - 1), st.floats(0, 1))
def test_thinned_curves_keep_extremes_ends_and_gaps(count, seed, holes):
    rng = np.random.default_rng(seed)
    steps, values = np.cumsum(rng.integers(1, 9, count)).astype(float), rng.standard_cauchy(count)
    values[rng.random(count) < holes * 0.1] = np.nan
    few_steps, few = thin(steps, values, 200)
    assert len(few) <= 200 or count <= 200
    assert few_steps[0] == steps[0] and few_steps[-1] == steps[-1] and (np.diff(few_steps) > 0).all()
    where = dict(zip(steps, values))
    np.testing.assert_array_equal(few, [where[s] for s in few_steps])
    if np.isfinite(values).any():
        assert np.nanmax(few) == np.nanmax(values) and np.nanmin(few) == np.nanmin(values)
    assert np.isnan(few).any() == np.isnan(values).any()


@given(st.lists(st.floats(-1e6, 1e6) | st.just(math.nan), min_size=1, max_size=200))
def test_running_mean_against_a_slow_one(values):
    values = np.array(values)
    reach = max(1, len(values) // 40)
    expected = []
    for i in range(len(values)):
        near = [v for v in values[max(0, i - reach) : i + reach + 1] if not math.isnan(v)]
        expected.append(math.fsum(near) / len(near) if near else math.nan)
    np.testing.assert_allclose(smooth(values), expected, rtol=1e-9, atol=1e-6)


@given(st.floats(-1e9, 1e9), st.floats(1e-6, 1e9), st.booleans())
def test_axes_map_ends_to_ends_and_ticks_are_round(low, span, log):
    low = abs(low) + 1e-9 if log else low
    high = low + span
    axis = Axis(low, high, (0.0, 100.0), log)
    places = axis(np.array([low, high]))
    assert places[0] >= -1e-6 and places[1] <= 100 + 1e-6
    for tick in axis.ticks():
        assert -0.1 <= float(axis(tick)) <= 100.1
        assert len(f"{tick:.10g}".strip("-0.").replace(".", "").split("e")[0].rstrip("0")) <= 11
    assert len(axis.ticks()) <= 12


def test_marks():
    events = [event(0, name, step) for step, name in enumerate(("start", "save", "start", "skip", "resume", "stopped"))]
    assert marks_of(events) == [Mark(2.0, "restart"), Mark(3.0, "skip"), Mark(4.0, "restart")]

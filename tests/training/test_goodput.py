"""Where the wall time goes, against a slow reference and histories worked out by hand."""

import os
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from infmae_jax.training.goodput import SHARES, Goodput, LostTime, lost_time


class Clock:
    def __init__(self):
        self.now = 100.0

    def __call__(self):
        return self.now


# A program is a list of (whole seconds before it, share, program inside, it raises), in any nesting.
programs = st.recursive(
    st.just([]),
    lambda inner: st.lists(
        st.tuples(st.integers(0, 50), st.sampled_from(sorted(SHARES)), inner, st.booleans()), max_size=4
    ),
    max_leaves=12,
)


@given(programs, st.integers(0, 1000))
def test_every_second_belongs_to_the_innermost_span(program, start_up):
    clock = Clock()
    goodput = Goodput(clock, started=clock.now - start_up)
    expected = dict.fromkeys(SHARES, 0.0) | {"other": start_up}

    def run(steps, inside):
        for seconds, share, nested, fails in steps:
            clock.now += seconds
            expected[inside] += seconds
            try:
                with goodput.spend(share):
                    run(nested, share)
                    clock.now += 3.0
                    expected[share] += 3.0
                    if fails:
                        raise OSError
            except OSError:
                pass

    run(program, "other")
    assert goodput.seconds() == pytest.approx(expected)
    total = sum(expected.values())
    if total:
        assert sum(goodput.shares().values()) == pytest.approx(1)
        assert goodput.goodput == pytest.approx(expected["stepping"] / total)


def test_an_open_span_counts_until_now():
    clock = Clock()
    goodput = Goodput(clock, started=100.0)
    with goodput.spend("saving"):
        clock.now = 104.0
        assert goodput.seconds()["saving"] == 4.0
        clock.now = 105.0
    assert goodput.shares() == dict.fromkeys(SHARES, 0.0) | {"saving": 1.0}


def test_an_unknown_share_is_an_error():
    with pytest.raises(KeyError):
        Goodput().spend("coffee")


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="the reference reads Linux's /proc")
def test_time_counts_from_the_start_of_the_process():
    started = float(Path("/proc/self/stat").read_text().rpartition(")")[2].split()[19]) / os.sysconf("SC_CLK_TCK")
    age = float(Path("/proc/uptime").read_text().split()[0]) - started
    assert sum(Goodput().seconds().values()) == pytest.approx(age, abs=2)


def event(time, name, step, **details):
    return {"time": time, "event": name, "step": step, **details}


def test_a_run_without_accidents_lost_nothing():
    events = [event(0, "start", 0), event(50, "save", 10), event(90, "save", 20), event(91, "finished", 20)]
    assert lost_time(events) == LostTime(0, 0, 0.0, 0.0)
    assert lost_time([]) == LostTime(0, 0, 0.0, 0.0)


def test_killed_twice_with_and_without_a_checkpoint():
    events = [
        event(0, "start", 0),
        event(30, "skip", 7),
        # killed; its last row was written at 40: 40 s of work for nothing, 20 s of nothing
        event(60, "start", 0, last_row_time=40.0),
        event(100, "save", 10),
        # killed; the last row is older than the save: only what came after the save counts, and nothing is known of it
        event(130, "resume", 10, last_row_time=98.0),
        event(170, "save", 20),
        # killed at 190 or later
        event(200, "resume", 20, last_row_time=190.0),
        event(250, "finished", 30),
    ]
    assert lost_time(events) == LostTime(restarts=3, rollbacks=0, redone_seconds=60.0, down_seconds=60.0)


def test_a_damaged_checkpoint_costs_the_work_since_the_one_before():
    events = [
        event(0, "start", 0),
        event(100, "save", 10),
        event(200, "save", 20),
        event(260, "checkpoint_damaged", 20),
        event(270, "resume", 10, last_row_time=250.0),
    ]
    assert lost_time(events) == LostTime(restarts=1, rollbacks=0, redone_seconds=160.0, down_seconds=10.0)


def test_preempted_runs_lose_only_the_gap():
    events = [event(0, "start", 0), event(9, "save", 5), event(10, "preempted", 5), event(70, "resume", 5)]
    assert lost_time(events) == LostTime(restarts=1, rollbacks=0, redone_seconds=1.0, down_seconds=60.0)


def test_rollbacks_lose_what_came_after_the_checkpoint():
    events = [
        event(0, "start", 0),
        event(10, "save", 4),
        event(16, "rollback", 7, to_step=4),
        event(30, "rollback", 6, to_step=4),
    ]
    assert lost_time(events) == LostTime(restarts=0, rollbacks=2, redone_seconds=6.0 + 14.0, down_seconds=0.0)


def test_clocks_that_disagree_never_give_negative_times():
    events = [event(100, "start", 0), event(110, "save", 3), event(105, "resume", 3, last_row_time=120.0)]
    lost = lost_time(events)
    assert lost.restarts == 1 and lost.down_seconds >= 0 and lost.redone_seconds >= 0

"""Where the wall time goes, against a slow reference."""

import os
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from infmae_jax.training.goodput import SHARES, Goodput


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
        assert goodput.shares()["stepping"] == pytest.approx(expected["stepping"] / total)


def test_an_open_span_counts_until_now():
    clock = Clock()
    goodput = Goodput(clock, started=100.0)
    with goodput.spend("saving"):
        clock.now = 104.0
        assert goodput.seconds()["saving"] == 4.0
        clock.now = 105.0
    assert goodput.shares() == dict.fromkeys(SHARES, 0.0) | {"saving": 1.0}


def test_an_unknown_share_is_an_error():
    with pytest.raises(KeyError), Goodput().spend("coffee"):
        pass


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="the reference reads Linux's /proc")
def test_time_counts_from_the_start_of_the_process():
    started = float(Path("/proc/self/stat").read_text().rpartition(")")[2].split()[19]) / os.sysconf("SC_CLK_TCK")
    age = float(Path("/proc/uptime").read_text().split()[0]) - started
    assert sum(Goodput().seconds().values()) == pytest.approx(age, abs=2)

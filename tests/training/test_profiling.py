"""Profiler traces hold the steps asked for, are always closed, and never end a run."""

import contextlib

import jax
import jax.numpy as jnp
import pytest

from data_pipelines.errors import InputError
from infmae_jax.training.profiling import Profile


@pytest.fixture(autouse=True)
def no_trace_left_open():
    yield
    with pytest.raises(RuntimeError):  # says that no trace is running
        jax.profiler.stop_trace()


@jax.jit
def work(x):
    return jnp.sin(x) @ x


def make_steps(profile, numbers):
    values = jnp.ones((8, 8))
    for number in numbers:
        with profile.step(number, values):
            values = work(values)


def traced_steps(folder):
    """Numbers of the steps in every trace below a folder."""
    found = []
    for path in sorted(folder.rglob("*.xplane.pb")):
        for plane in jax.profiler.ProfileData.from_file(str(path)).planes:
            for line in plane.lines:
                found += [dict(e.stats)["step_num"] for e in line.events if e.name == "train"]
    return sorted(set(found))


@pytest.mark.parametrize(
    "steps, made, traced",
    [
        ("2-4", range(8), [2, 3, 4]),
        ("3", range(8), [3]),
        (" 1 - 2 ", range(8), [1, 2]),
        ("2-4", range(3, 8), [3, 4]),  # resumed in the middle
        ("2-4", range(6, 8), []),  # resumed after it
        ("5-90", range(8), [5, 6, 7]),  # the run ends first
        ("2-4", [0, 1, 2, 3, 1, 2, 3, 4, 5], [2, 3]),  # a rollback; steps made again are not traced again
    ],
)
def test_the_steps_asked_for_are_in_the_trace_of_this_host(tmp_path, steps, made, traced):
    with contextlib.closing(Profile(tmp_path, steps)) as profile:
        make_steps(profile, made)
    assert traced_steps(tmp_path / "profile" / "host_0") == traced
    profile.close()


def test_an_error_in_a_step_closes_the_trace(tmp_path):
    with pytest.raises(ZeroDivisionError), contextlib.closing(Profile(tmp_path, "0-9")) as profile:
        make_steps(profile, range(2))
        with profile.step(2):
            1 / 0
    assert traced_steps(tmp_path / "profile") == [0, 1, 2]


def test_without_steps_nothing_is_made(tmp_path):
    with contextlib.closing(Profile(tmp_path, "")) as profile:
        make_steps(profile, range(3))
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("steps", ["5-2", "a-b", "-3", "1-2-3", "1.5", "steps", "١-٢"])
def test_other_texts_are_refused(tmp_path, steps):
    with pytest.raises(InputError, match="observe.profile_steps="):
        Profile(tmp_path, steps)


def test_a_trace_that_cannot_be_written_does_not_end_the_run(tmp_path, caplog):
    (tmp_path / "profile").write_text("in the way")
    with contextlib.closing(Profile(tmp_path, "1-2")) as profile:
        make_steps(profile, range(4))
    assert [r for r in caplog.records if "no profile" in r.message]


def test_somebody_elses_trace_is_left_alone(tmp_path, caplog):
    jax.profiler.start_trace(str(tmp_path / "theirs"))
    with contextlib.closing(Profile(tmp_path, "1-2")) as profile:
        make_steps(profile, range(4))
    jax.profiler.stop_trace()
    assert 0 in traced_steps(tmp_path / "theirs") and traced_steps(tmp_path / "profile") == []
    assert [r for r in caplog.records if "no profile" in r.message]

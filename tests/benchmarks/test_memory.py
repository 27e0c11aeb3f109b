"""The largest batch is found, and a batch is tried in a process of its own."""

import subprocess

import pytest
from hypothesis import given
from hypothesis import strategies as st

from infmae_jax.benchmarks import memory


@given(st.integers(0, 10**6), st.sampled_from([1, 16, 1000]))
def test_largest_batch(limit, precision):
    tried = []

    def fits(batch):
        tried.append(batch)
        return batch <= limit

    found = memory.largest_batch(fits, precision)
    assert found <= limit and limit - found <= max(1, found // precision) - 1
    assert len(tried) <= 45 and 0 not in tried


def test_a_child_process_says_whether_a_batch_fits(smoke):
    assert memory.fits_in_child(smoke, 2)


@pytest.mark.parametrize("code, fits", [(0, True), (17, False)])
def test_only_a_lack_of_memory_means_that_it_does_not_fit(smoke, monkeypatch, code, fits):
    ended = subprocess.CompletedProcess([], code, stderr="")
    monkeypatch.setattr(memory.subprocess, "run", lambda *args, **kwargs: ended)
    assert memory.fits_in_child(smoke, 2) == fits
    ended.returncode, ended.stderr = 1, "Traceback\nValueError: broken\n"
    with pytest.raises(RuntimeError, match="batch 2.*broken"):
        memory.fits_in_child(smoke, 2)


def test_what_fits_a_budget_follows_from_two_programs(smoke, monkeypatch):
    class Program:
        """1 GiB and what the images need: an eighth of it each, or a quarter as published."""

        def __init__(self, config, batch):
            self.memory_gib = 1 + batch / (8 if config.model.encoder.visible_only else 4)

    monkeypatch.setattr(memory, "TrainingProgram", Program)
    published, visible, largest_published, largest_visible = memory.memory(smoke, 64, budget_gib=3.0)["rows"]
    assert (published["gib"], visible["gib"], visible["against_published"]) == (17, 9, 9 / 17)
    assert (largest_published["images"], largest_visible["images"]) == (8, 16)

"""The largest batch is found, and a batch is tried in a process of its own."""

import dataclasses

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


def test_a_child_process_says_whether_a_batch_fits(smoke, monkeypatch):
    assert memory.fits_in_child(smoke, 2)
    unusable = dataclasses.replace(smoke, optimizer=dataclasses.replace(smoke.optimizer, mu_dtype="float3"))
    with pytest.raises(RuntimeError, match="batch 2.*float3"):
        memory.fits_in_child(unusable, 2)


def test_visible_patches_need_less(smoke):
    rows = memory.memory(smoke, batch=64, budget_gib=0.1)["rows"]
    published, visible, largest_published, largest_visible = rows
    assert visible["gib"] < published["gib"] and visible["against_published"] < 0.7
    assert 0 < largest_published["images"] < largest_visible["images"]

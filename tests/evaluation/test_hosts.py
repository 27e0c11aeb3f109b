"""What hosts bring together, with threads in place of hosts; as real processes: tests/tasks/test_processes.py."""

import concurrent.futures
import threading

import jax
import numpy as np
import pytest
from jax.experimental import multihost_utils

from infmae_jax.evaluation import hosts


@pytest.fixture
def on_hosts(monkeypatch):
    """(function, an argument for each host) -> what it returns on each."""

    def run(function, arguments):
        place, barrier = threading.local(), threading.Barrier(len(arguments), timeout=60)
        shown = [None] * len(arguments)

        def allgather(values):
            shown[place.index] = np.asarray(values)
            barrier.wait()
            together = np.stack(shown)
            barrier.wait()
            return together

        def host(index, argument):
            place.index = index
            return function(argument)

        monkeypatch.setattr(multihost_utils, "process_allgather", allgather)
        monkeypatch.setattr(jax, "process_count", lambda: len(arguments))
        with concurrent.futures.ThreadPoolExecutor(len(arguments)) as pool:
            return list(pool.map(host, range(len(arguments)), arguments))

    return run


def test_rows_of_different_numbers_come_in_the_order_of_hosts(on_hosts):
    rng = np.random.default_rng(0)
    rows = [rng.standard_normal((count, 3)) for count in (2, 0, 5)]
    for found in on_hosts(hosts.gathered, rows):
        np.testing.assert_array_equal(found, np.concatenate(rows))
    assert [len(found) for found in on_hosts(hosts.gathered, [rows[1]] * 3)] == [0, 0, 0]


def test_counts_are_summed_exactly(on_hosts):
    counts = [np.array([[2**40 + 1, 0], [3, 4]]), np.array([[1, 1], [0, 2**52]])]
    for found in on_hosts(hosts.summed, counts):
        np.testing.assert_array_equal(found, counts[0] + counts[1])
        assert found.dtype == np.int64


@pytest.mark.parametrize("texts", [("abc, ", "", "déf"), ("", "", ""), ("x" * 8, "y" * 9, "{}")])
def test_texts_come_in_the_order_of_hosts(on_hosts, texts):
    for found in on_hosts(hosts.concatenated, texts):
        assert found.replace(" ", "") == "".join(texts).replace(" ", "")


def test_hosts_learn_whether_they_have_the_same_text(on_hosts):
    assert on_hosts(hosts.same_everywhere, ["digest"] * 3) == [True] * 3
    assert on_hosts(hosts.same_everywhere, ["digest", "digest", "Digest"]) == [False] * 3


def test_a_single_host_has_only_its_own():
    assert hosts.same_everywhere("alone") and hosts.concatenated("alone").strip() == "alone"

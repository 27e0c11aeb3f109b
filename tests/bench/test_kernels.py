"""Ways to compute a kernel are compared before they are timed."""

import dataclasses

import jax.numpy as jnp
import pytest

from infmae_jax.bench import kernels, results


def test_every_way_is_measured_or_says_what_it_needs(smoke):
    config = dataclasses.replace(smoke, model=dataclasses.replace(smoke.model, dtype="bfloat16"))
    rows = kernels.kernels(config, batch=2, rounds=1)["rows"]
    groups = {}
    for row in rows:
        groups.setdefault(row["kernel"], []).append(row)
    assert len(groups) == 8
    for ways in groups.values():
        assert len(ways) >= 2 and ways[0]["faster_by"] == "1 (1-1)"
        assert all(row["way"].endswith("cuDNN") or row["ms"] > 0 for row in ways)
    cudnn = [row for row in rows if row["way"].endswith("cuDNN")]
    assert cudnn and all(row["note"] == results.NEEDS_ACCELERATOR and "ms" not in row for row in cudnn)


def test_another_computation_is_not_compared():
    calls = {"sine": lambda times: jnp.sin(jnp.ones(3)), "cosine": lambda times: jnp.cos(jnp.ones(3))}
    with pytest.raises(ArithmeticError, match="cosine computes something else"):
        kernels._check_same("waves", calls, "float32")

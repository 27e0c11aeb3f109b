"""Where the time goes: operations of a compiled program, and their times in a profile."""

from types import SimpleNamespace

import jax
import jax.numpy as jnp
import pytest

from infmae_jax.bench.flops import STAGES
from infmae_jax.bench.profile import profile, seconds_of, sources


def test_every_instruction_of_a_real_program_is_found():
    def f(x, w):
        with jax.named_scope("InfMAE"):
            return jax.nn.softmax(jnp.tanh(x @ w), axis=-1).sum()

    x, w = jax.ShapeDtypeStruct((64, 32), jnp.float32), jax.ShapeDtypeStruct((32, 32), jnp.float32)
    text = jax.jit(jax.grad(f)).lower(x, w).compile().as_text()
    found = sources(text)
    holders = sum(f" {opcode}(" in line for line in text.splitlines() for opcode in ("while", "conditional", "call"))
    assert len(found) == sum(" = " in line for line in text.splitlines()) - holders
    assert any("InfMAE" in source for source in found.values())


def event(name, start, duration, **stats):
    return SimpleNamespace(name=name, start_ns=start, duration_ns=duration, stats=stats.items())


def test_times_of_each_backend():
    cpu = [event("dot.1", 0, 100, hlo_op="dot.1"), event("end: dot.1", 700, 0), event("add.2", 150, 50, hlo_op="add.2")]
    gpu = [event("ampere_sgemm_128x64_nn", 1000, 300, hlo_op="dot.1")]
    tpu = [event("%add.2 = f32[8]{0} add(f32[8]{0} %a)", 1500, 10), event("python function", 0, 9000)]
    lines = [SimpleNamespace(events=events) for events in (cpu, gpu, tpu)]
    data = SimpleNamespace(planes=[SimpleNamespace(lines=lines[:1]), SimpleNamespace(lines=lines[1:])])
    assert seconds_of(data, {"dot.1": "", "add.2": ""}) == pytest.approx({"dot.1": 400e-9, "add.2": 60e-9})


def test_profile_of_the_step(smoke):
    rows = profile(smoke, batch=2, steps=2)["rows"]
    parts = {row["what"]: row for row in rows if row["by"] == "part"}
    assert parts.keys() == {*STAGES, "input, loss", "optimizer, guards, not named"}
    assert sum(row["percent"] for row in parts.values()) == pytest.approx(100)
    slowest = [row["ms"] for row in rows if row["by"] == "operation"]
    assert 5 < len(slowest) and sorted(slowest, reverse=True) == slowest
    assert sum(slowest) < sum(row["ms"] for row in parts.values())

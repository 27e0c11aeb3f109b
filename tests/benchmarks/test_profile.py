"""Where the time goes: operations of a compiled program, and their times in a profile."""

from types import SimpleNamespace

import jax
import jax.numpy as jnp
import pytest

from infmae_jax.benchmarks.flops import STAGES
from infmae_jax.benchmarks.profile import KINDS, idle_seconds, operation_times, operations, profile

PROGRAM = """HloModule jit_step, is_scheduled=true

%fused_computation (param_0.1: f32[8,4], param_1: f32[4,4]) -> f32[8,4] {
  %param_0.1 = f32[8,4]{1,0} parameter(0)
  %param_1 = f32[4,4]{1,0} parameter(1)
  %dot.1 = f32[8,4]{1,0} dot(%param_0.1, %param_1), lhs_contracting_dims={1}, rhs_contracting_dims={0}
  ROOT %add.1 = f32[8,4]{1,0} add(%dot.1, %param_0.1)
}

%moves (param_0.2: f32[8,4]) -> f32[4,8] {
  %param_0.2 = f32[8,4]{1,0} parameter(0)
  ROOT %transpose.1 = f32[4,8]{1,0} transpose(%param_0.2), dimensions={1,0}
}

ENTRY %main.9 (mu.1: f32[8,4], w.1: f32[4,4]) -> (f32[8,4], f32[4,8]) {
  %mu.1 = f32[8,4]{1,0} parameter(0), metadata={op_name="state.opt_state[0].mu['encoder']['blocks1_0']['fc1']['bias']"}
  %w.1 = f32[4,4]{1,0} parameter(1), metadata={op_name="state.params['encoder']['fc1']['kernel']"}
  %fusion.3 = f32[8,4]{1,0} fusion(%mu.1, %w.1), kind=kOutput, calls=%fused_computation, metadata={op_name="jvp(InfMAE)/encoder/blocks3_1/mlp/fc1/add"}
  %copy.7 = f32[8,4]{1,0} copy(%mu.1)
  %gemm.2 = (f32[8,4]{1,0}, s8[64]{0}) custom-call(%mu.1, %w.1), custom_call_target="__cublas$gemm", metadata={op_name="InfMAE/InfMAE._predict/dot"}
  %conv.5 = f32[8,4]{1,0} convolution(%mu.1, %w.1), metadata={op_name="jvp(InfMAE)/encoder/blocks2_0/dwconv/conv"}
  %multiply.4 = f32[8,4]{1,0} multiply(%mu.1, %copy.7), metadata={op_name="jit(step)/square"}
  %moved = f32[4,8]{1,0} fusion(%conv.5), kind=kLoop, calls=%moves
  ROOT %tuple.1 = (f32[8,4]{1,0}, f32[4,8]{1,0}) tuple(%fusion.3, %moved)
}
"""


@pytest.mark.parametrize(
    "name, kind, part",
    [
        ("fusion.3", KINDS[0], STAGES[2]),
        ("gemm.2", KINDS[0], STAGES[4]),
        ("conv.5", KINDS[1], STAGES[1]),
        ("copy.7", KINDS[3], "optimizer, guards"),
        ("moved", KINDS[3], STAGES[1]),
        ("multiply.4", KINDS[4], "optimizer, guards"),
    ],
)
def test_operations_know_their_kind_and_layer(name, kind, part):
    operation = operations(PROGRAM)[name]
    assert (operation.kind, operation.part) == (kind, part)


def test_every_instruction_of_a_real_program_is_found():
    def f(x, w):
        return jax.nn.softmax(jnp.tanh(x @ w), axis=-1).sum()

    x = jax.ShapeDtypeStruct((64, 32), jnp.float32)
    w = jax.ShapeDtypeStruct((32, 32), jnp.float32)
    text = jax.jit(jax.grad(f)).lower(x, w).compile().as_text()
    assert len(operations(text)) == sum(" = " in line for line in text.splitlines())
    assert sum(operation.kind == KINDS[0] for operation in operations(text).values()) >= 2


def event(name, start, duration, **stats):
    return SimpleNamespace(name=name, start_ns=start, duration_ns=duration, stats=stats.items())


def test_times_of_each_backend():
    cpu = [event("dot.1", 0, 100, hlo_op="dot.1"), event("end: dot.1", 700, 0), event("add.2", 150, 50, hlo_op="add.2")]
    gpu = [event("ampere_sgemm_128x64_nn", 1000, 300, hlo_op="dot.1")]
    tpu = [event("%add.2 = f32[8]{0} add(f32[8]{0} %a)", 1500, 10), event("python function", 0, 9000)]
    lines = [SimpleNamespace(events=events) for events in (cpu, gpu, tpu)]
    data = SimpleNamespace(planes=[SimpleNamespace(lines=lines[:1]), SimpleNamespace(lines=lines[1:])])
    times = operation_times(data, {"dot.1", "add.2"})
    times = [(name, round(start * 1e9), round(end * 1e9)) for name, start, end in times]
    assert sorted(times) == [("add.2", 150, 200), ("add.2", 1500, 1510), ("dot.1", 0, 100), ("dot.1", 1000, 1300)]


def test_idle_is_what_no_operation_covers():
    assert idle_seconds([("a", 0, 4), ("b", 1, 2), ("c", 6, 7), ("d", 6.5, 9), ("e", 10, 11)]) == pytest.approx(3)


def test_profile_of_the_step(smoke):
    rows = profile(smoke, batch=2, steps=2, slowest=5)["rows"]
    assert {row["what"] for row in rows if row["by"] == "part"} == {*STAGES, "input, loss", "optimizer, guards"}
    assert {row["what"] for row in rows if row["by"] == "kind"} == set(KINDS)
    sums = {by: sum(row["ms"] for row in rows if row["by"] == by) for by in ("kind", "part", "operation")}
    assert sums["kind"] == pytest.approx(sums["part"]) and 0 < sums["operation"] < sums["part"]
    for by in ("kind", "part"):
        assert sum(row["percent"] for row in rows if row["by"] == by) == pytest.approx(100)
    step, idle = (row for row in rows if row["by"] == "clock")
    assert step["percent"] == pytest.approx(100) and 0 <= idle["ms"] < step["ms"]

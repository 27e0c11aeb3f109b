"""What is made of a compiler's account: kinds of work, memory, the largest batch, estimated time."""

import math
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from infmae_jax.ahead import account, targets
from infmae_jax.ahead.hlo import Program

PROGRAM = Program("""HloModule m

%product (a: bf16[8,16], b: bf16[16,16]) -> bf16[8,16] {
  %a = bf16[8,16] parameter(0)
  %b = bf16[16,16] parameter(1)
  ROOT %d = bf16[8,16] convolution(%a, %b), dim_labels=bf_io->bf
}

ENTRY %main (x: bf16[8,16], w: bf16[16,16]) -> bf16[8,16] {
  %x = bf16[8,16] parameter(0)
  %w = bf16[16,16] parameter(1)
  %zero = bf16[] constant(0)
  %fill = bf16[8,16] broadcast(%zero), dimensions={}, backend_config={"estimated_cycles":"1"}
  %turned = bf16[8,16] copy(%x), backend_config={"estimated_cycles":"10"}
  %p = bf16[8,16] fusion(%turned, %w), kind=kOutput, calls=%product, metadata={op_name="jit(s)/jvp(InfMAE)/encoder/blocks3_1/mlp"}, backend_config={"estimated_cycles":"100"}
  %t = bf16[8,16] add(%p, %fill), metadata={op_name="jit(s)/jvp(InfMAE)/encoder/blocks1_0/dwconv/add"}, backend_config={"estimated_cycles":"1000"}
  %s = bf16[8,16] scatter(%fill, %zero, %t), to_apply=%product
  %r = bf16[8,16] all-reduce(%s), replica_groups={{0,1}}, to_apply=%product
  ROOT %o = bf16[8,16] exponential(%r), backend_config={"estimated_cycles":"10000"}
}
""")  # fmt: skip  # noqa: E501


@pytest.mark.parametrize("source, part", [
    ("jit(step)/jvp(Detector.losses)/Detector._pooled/cond/dot_general", "decoder or head"),
    ("jit(step)/transpose(jvp(Detector.losses))/encoder/blocks3_4/mlp/fc1", "transformer"),
    ("jit(step)/jvp(Segmenter)/head/laterals_0/conv", "decoder or head"),
    ("jit(step)/jvp(TargetDetector)/sub", "input, loss"),
    ("jit(step)/adam/mul", "optimizer, guards, not named"),
])  # fmt: skip
def test_parts_by_the_names_that_xla_gives(source, part):
    assert account.part_of(source) == part


def test_cycles_by_kind_and_part():
    found = account.cycles(PROGRAM)
    assert found["by_kind"] == {"copies": 10, "zero fills": 1, "depthwise": 1000, "products": 100, "other": 10000}
    assert found["total"] == 11111
    assert found["by_part"]["transformer"] == 110  # the copy is read by its product
    assert found["operations_without_estimate"] == 1  # the scatter; an exchange is counted as such
    assert found["bytes_without_estimate"] == 3 * 8 * 16 * 2 + 2 - 8 * 16 * 2 + 8 * 16 * 2 - 8 * 16 * 2 + 8 * 16 * 2


def test_the_most_expensive_operations_come_first():
    rows = account.most_expensive(PROGRAM, by_cycles=True)
    assert [row["operation"] for row in rows] == ["o", "t", "p", "turned", "fill"]
    assert account.most_expensive(PROGRAM, by_cycles=False)[0]["operation"] == "p"


def test_estimated_time_adds_up():
    target = targets.target("v5e-4")
    told = {"cycles": {"total": 1.5e9, "bytes_without_estimate": 819e9}, "bytes_sent": 100e9, "gflop_useful": 197e3}
    found = account.estimate(told, target, "bfloat16")
    assert found["computing_seconds"] == pytest.approx(1.0, rel=0.01)  # 1.5 GHz
    assert (found["moving_seconds"], found["exchanging_seconds"]) == pytest.approx((1.0, 0.5))
    assert found["step_seconds"] == pytest.approx(2.5, rel=0.01) and found["mfu"] == pytest.approx(0.4, rel=0.01)
    assert found["step_seconds_hidden"] == pytest.approx(2.0, rel=0.01)


@pytest.mark.parametrize(
    ("text", "needed", "capacity"),
    [
        ("RESOURCE_EXHAUSTED: Ran out of memory in memory space hbm. Used 20.50G of 15.75G hbm. Exceeded", 20.5, 15.75),
        ("RESOURCE_EXHAUSTED: Ran out of memory on HBM, the total memory required for HLO temporaries (56.95G) exceeds "
         "available HBM (15.75G).", 56.95, 15.75),
        ("RESOURCE_EXHAUSTED: Ran out of memory in memory space vmem. Used 17.00M of 16.00M vmem.", None, None),
        ("RESOURCE_EXHAUSTED: something else", None, None),
    ],
)  # fmt: skip
def test_a_compilers_refusal_says_by_how_much(text, needed, capacity):
    error = account.DoesNotFit(text)
    assert error.needed == (needed and int(needed * 2**30)) and error.capacity == (capacity and capacity * 2**30)


@settings(deadline=None)
@given(
    fixed=st.floats(0, 90), each=st.floats(0.01, 30), start=st.integers(1, 40), granule=st.sampled_from([1, 8]),
    bend=st.floats(1, 1.5), silent=st.booleans(),
)  # fmt: skip
def test_the_largest_batch_is_found(fixed, each, start, granule, bend, silent):
    """Whatever the memory grows like, and whether or not a refusing compiler says what it would need."""
    asked = []

    def needed(batch):
        asked.append(batch)
        size = fixed + each * batch**bend
        return math.inf if silent and size > 100 else size

    found = account.largest_batch(needed, 100, start * granule, granule)
    assert found % granule == 0 and len(asked) == len(set(asked)) <= 60
    assert found == 0 or fixed + each * found**bend <= 100
    assert fixed + each * (found + granule) ** bend > 100


def test_memory_is_what_the_step_keeps_once(monkeypatch):
    analysis = SimpleNamespace(argument_size_in_bytes=110, temp_size_in_bytes=50, output_size_in_bytes=102,
                               alias_size_in_bytes=100, generated_code_size_in_bytes=5)  # fmt: skip
    compiled = SimpleNamespace(memory_analysis=lambda: analysis, cost_analysis=lambda: None, as_text=lambda: "")
    lowered = SimpleNamespace(compile=lambda compiler_options: compiled)
    mesh = SimpleNamespace(devices=np.array([SimpleNamespace(platform="tpu")]))
    _, found = account.compile_step(account.Traced(lowered, mesh, {}))
    assert found["memory_bytes"] == {"state": 110, "batch": 0, "temporaries": 50, "program": 5, "needed": 167}
    assert found["gflop_counted"] is None and found["gigabytes_counted"] is None

"""Operations, loops and cycles read from the text of compiled programs."""

import jax
import jax.numpy as jnp
import pytest

from infmae_jax.ahead.hlo import Program, array_bytes


def loop(limit="constant(5)", first="constant(0)", step="constant(1)", condition="", attributes=""):
    """A program as the TPU compiler writes it: a loop whose counter is the first value that it carries."""
    test = condition or "ROOT %lt = pred[]{:T(512)} compare(%i, %limit), direction=LT"
    return f"""HloModule jit_step, is_scheduled=true

%fused (p: f32[8,128], q: f32[8]) -> f32[8,128] {{
  %p = f32[8,128]{{1,0:T(8,128)}} parameter(0)
  ROOT %inner = f32[8,128]{{1,0:T(8,128)}} negate(%p), backend_config={{"estimated_cycles":"999"}}
}}

%body (arg: (s32[], f32[8,128])) -> (s32[], f32[8,128]) {{
  %arg = (s32[]{{:T(128)}}, f32[8,128]{{1,0:T(8,128)(2,1)S(1)}}) parameter(0)
  %at = s32[]{{:T(128)}} get-tuple-element(%arg), index=0
  %x = f32[8,128]{{1,0:T(8,128)}} get-tuple-element(%arg), index=1
  %one = s32[]{{:T(128)}} {step}
  %next = s32[]{{:T(128)}} add(%at, %one)
  %y = f32[8,128]{{1,0:T(8,128)}} fusion(%x), kind=kLoop, calls=%fused, backend_config={{"estimated_cycles":"100"}}
  ROOT %out = (s32[]{{:T(128)}}, f32[8,128]{{1,0:T(8,128)}}) tuple(%next, %y)
}}

%condition (arg.1: (s32[], f32[8,128])) -> pred[] {{
  %arg.1 = (s32[]{{:T(128)}}, f32[8,128]{{1,0:T(8,128)}}) parameter(0)
  %limit = s32[]{{:T(128)}} {limit}
  %i = s32[]{{:T(128)}} get-tuple-element(%arg.1), index=0
  {test}
}}

ENTRY %main (x: f32[8,128]) -> f32[8,128] {{
  %x.1 = f32[8,128]{{1,0:T(8,128)}} parameter(0)
  %zero = s32[]{{:T(128)}} {first}
  %start = s32[]{{:T(128)}} copy(%zero)
  %state = (s32[]{{:T(128)}}, /*index=1*/f32[8,128]{{1,0:T(8,128)}}) tuple(%start, %x.1)
  %while = (s32[], f32[8,128]) while(%state), condition=%condition, body=%body{attributes}
  %last = f32[8,128] get-tuple-element(%while), index=1
  ROOT %c = f32[8,128] copy(%last), metadata={{op_name="jit(step)/norm/add"}}, backend_config={{"estimated_cycles":"7"}}
}}
"""


@pytest.mark.parametrize(
    ("changes", "turns"),
    [
        ({}, 5),
        ({"first": "constant(1)"}, 4),
        ({"step": "constant(2)"}, 3),
        ({"attributes": ', backend_config={"known_trip_count":{"n":"9"}}'}, 9),
        ({"condition": "ROOT %lt = pred[] compare(%i, %limit), direction=NE"}, 1),  # not understood: once
        ({"limit": "get-tuple-element(%arg.1), index=0", "first": "constant(0)"}, 0),
    ],
)
def test_turns_of_a_loop(changes, turns):
    program = Program(loop(**changes))
    assert program.entry == "main"
    assert program.runs.get("body", 0) == turns
    cycles = sum(times * (operation.cycles or 0) for operation, times in program.operations)
    assert cycles == 100 * turns + 7  # what is inside the fusion is part of it


def test_an_operation_is_known_by_what_reads_it():
    program = Program(loop())
    (last,) = [operation for operation, _ in program.operations if operation.name == "last"]
    assert last.source == "" and program.source(last) == "jit(step)/norm/add"
    assert program.touched(program.computations["main"]["c"]) == 2 * 8 * 128 * 4
    assert [each.opcode for each in program.fused(program.computations["body"]["y"])] == ["parameter", "negate"]


def test_types_without_a_known_width_are_refused():
    assert array_bytes("(f32[2,3]{1,0:T(8,128)(2,1)}, bf16[4], pred[8], f8e4m3fn[3])") == 24 + 8 + 8 + 3
    assert array_bytes("(token[], u32[]{:S(2)})") == 4
    with pytest.raises(ValueError, match="unknown HLO type q"):
        array_bytes("q[2]")


def test_loops_of_a_program_that_jax_compiled():
    def function(x):
        outer = jax.lax.fori_loop(0, 3, lambda _, x: jax.lax.fori_loop(0, 4, lambda _, y: jnp.sin(y) @ y, x), x)
        return outer.sum()

    text = jax.jit(function).lower(jax.ShapeDtypeStruct((128, 128), jnp.float32)).compile().as_text()
    program = Program(text)
    sines = [times for operation, times in program.operations if "sin" in operation.source]
    assert max(sines) == 12

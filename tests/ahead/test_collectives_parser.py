"""Collectives read from the text of compiled programs."""

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from infmae_jax.ahead.hlo import Collective, Program, by_kind


def program(line):
    return f"""HloModule m

%body.1 (p.1: f32[4]) -> f32[4] {{
  {line}
}}

%condition.1 (p.2: f32[4]) -> pred[] {{
  %c = pred[] constant(true)
}}

ENTRY %main.2 (p.3: f32[4]) -> f32[4] {{
  ROOT %w = f32[4] while(%p.3), condition=%condition.1, body=%body.1, config={{"known_trip_count":{{"n":"5"}}}}
}}
"""


def exchanged(line):
    return Program(program(line)).collectives()


@pytest.mark.parametrize(
    ("line", "kind", "size"),
    [
        ("%s = (f32[2], f32[4]) all-gather-start(%p.1), replica_groups={{0,1}}, dimensions={0}", "all-gather", 16),
        ("%s = (f32[4], f32[4], u32[], u32[]) collective-permute-start(%p.1), source_target_pairs={{0,1}}",
         "collective-permute", 16),
        ("%s = f32[4] all-reduce-start(%p.1), replica_groups={{0,1}}, to_apply=%add", "all-reduce", 16),
        ("%s = f32[2] reduce-scatter(%p.1), replica_groups={{0,1}}, to_apply=%add", "reduce-scatter", 16),
    ],
)  # fmt: skip
def test_asynchronous_exchanges_and_reduce_scatters_are_measured_by_their_whole_array(line, kind, size):
    assert [(each.kind, each.bytes) for each in exchanged(line)] == [(kind, size)]


@pytest.mark.parametrize(
    ("notation", "groups"),
    [
        ("{{0,2},{1,3}}", ((0, 2), (1, 3))),
        ("[2,2]<=[4]", ((0, 1), (2, 3))),
        ("[2,2]<=[2,2]T(1,0)", ((0, 2), (1, 3))),
        ("mesh['a'=2,'b'=2] {'a'}", ((0, 2), (1, 3))),
        ("mesh['a'=2,'b'=2] {'b'}", ((0, 1), (2, 3))),
        ("mesh['a'=2,'b'=2] {'a','b'}", ((0, 1, 2, 3),)),
        ("mesh['a'=2,'b'=2], device_ids=([2,2]T(1,0)) {'a'}", ((0, 1), (2, 3))),
    ],
)
def test_every_notation_of_groups_is_read(notation, groups):
    line = f"%r.1 = (f32[2,3]{{1,0}}, bf16[4]) all-reduce(%p.1), channel_id=1, replica_groups={notation}, to_apply=%add"
    (found,) = Program(program(line)).collectives()
    assert found.groups == groups and found.bytes == 32
    assert found.times == 5  # the loop's turns
    assert by_kind([found]) == {"all-reduce": (5, 160)}


def test_unknown_notations_are_refused_and_single_devices_left_out():
    with pytest.raises(ValueError, match="notation of replica groups: mesh"):
        exchanged("%r = f32[2] all-gather(%p.1), replica_groups=mesh['a'=4] {'a':(1)2}, dimensions={0}")
    assert exchanged("%r = f32[2] all-reduce(%p.1), replica_groups={{0},{1}}, to_apply=%add") == []


def test_a_program_that_jax_compiled_is_counted():
    mesh = jax.make_mesh((2, 2), ("a", "b"), axis_types=(AxisType.Auto,) * 2)
    x = jax.ShapeDtypeStruct((8, 6), jnp.float32, sharding=NamedSharding(mesh, PartitionSpec("a", "b")))
    columns = NamedSharding(mesh, PartitionSpec(None, "b"))
    found = Program(jax.jit(lambda x: x, out_shardings=columns).lower(x).compile().as_text()).collectives()
    assert [(each.kind, each.bytes, each.groups) for each in found] == [("all-gather", 8 * 3 * 4, ((0, 2), (1, 3)))]


def test_rings_send_what_the_formulas_say():
    eight = (tuple(range(8)),)
    assert Collective("all-reduce", 800, eight, 1).sent == pytest.approx(1400)  # 2 (n-1) / n
    assert Collective("all-gather", 800, eight, 3).sent == pytest.approx(2100)  # (n-1) / n, three times
    assert Collective("collective-permute", 800, ((0, 1), (1, 0)), 1).sent == 800

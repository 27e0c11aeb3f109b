"""Collectives read from HLO, networks by hand, and the step compiled for more devices than there are."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from data_pipelines.errors import InputError
from data_pipelines.pipeline import PipelineConfig
from infmae_jax.benchmarks.collectives import Collective, by_kind, collectives
from infmae_jax.benchmarks.scaling import Network, parse_meshes, scaling, seconds
from infmae_jax.models.config import InfMAEConfig
from infmae_jax.training.config import MeshConfig, PretrainConfig

CONFIG = PretrainConfig(
    model=InfMAEConfig().replace(
        in_channels=1, widths=(8, 12, 16), depths=(1, 1, 1), heads=2, decoder_width=16, decoder_depth=1, decoder_heads=2
    ),
    data=PipelineConfig(image_size=(32, 32)),
)


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
    (found,) = collectives(program(line))
    assert found.groups == groups and found.bytes == 32
    assert found.times == 5  # the loop's turns
    assert by_kind([found]) == {"all-reduce": (5, 160)}


def test_unknown_notations_are_refused_and_single_devices_left_out():
    with pytest.raises(ValueError, match="notation of replica groups: mesh"):
        collectives(program("%r = f32[2] all-gather(%p.1), replica_groups=mesh['a'=4] {'a':(1)2}, dimensions={0}"))
    with pytest.raises(ValueError, match="asynchronous"):
        collectives(program("%r = f32[2] all-gather-start(%p.1), replica_groups={{0,1}}, dimensions={0}"))
    assert collectives(program("%r = f32[2] all-reduce(%p.1), replica_groups={{0},{1}}, to_apply=%add")) == []


def test_a_program_that_jax_compiled_is_counted():
    mesh = jax.make_mesh((2, 2), ("a", "b"), axis_types=(AxisType.Auto,) * 2)
    x = jax.ShapeDtypeStruct((8, 6), jnp.float32, sharding=NamedSharding(mesh, PartitionSpec("a", "b")))
    columns = NamedSharding(mesh, PartitionSpec(None, "b"))
    found = collectives(jax.jit(lambda x: x, out_shardings=columns).lower(x).compile().as_text())
    assert [(each.kind, each.bytes, each.groups) for each in found] == [("all-gather", 8 * 3 * 4, ((0, 2), (1, 3)))]


def test_rings_send_what_the_formulas_say():
    eight = (tuple(range(8)),)
    assert Collective("all-reduce", 800, eight, 1, "").sent == pytest.approx(1400)  # 2 (n-1) / n
    assert Collective("all-gather", 800, eight, 3, "").sent == pytest.approx(2100)  # (n-1) / n, three times
    assert Collective("collective-permute", 800, ((0, 1), (1, 0)), 1, "").sent == 800


def test_a_ring_is_as_slow_as_its_slowest_part():
    network = Network("", "TPU v5e", node=4, inside=100.0, between=10.0)

    def time(*groups):
        return seconds(Collective("all-gather", 800, groups, 1, ""), network) * 0.7  # the assumed share of bandwidth

    assert time((0, 1, 2, 3)) == pytest.approx(600 / 100)
    assert time((0, 4)) == pytest.approx(400 / 10)  # one member a node: its own link alone
    assert time(tuple(range(8))) == pytest.approx(700 / 40)  # four links out of each node


def test_meshes_are_written_with_x():
    assert parse_meshes(["32", "8x4", "2x1x2"]) == (MeshConfig(32), MeshConfig(8, 4), MeshConfig(2, 1, 2))
    for text in ("", "2x", "0x2", "-1", "1x1x1x1"):
        with pytest.raises(InputError, match="is not of the form"):
            parse_meshes([text])


def test_the_step_is_counted_for_more_devices_than_there_are():
    result = scaling(CONFIG, [MeshConfig(2, 3)], batch=2)
    (row,) = result["rows"]
    assert row["devices"] == 6 > jax.device_count()
    assert row["all_gather_mib"] > 0 and row["all_to_all_mib"] == 0
    assert row["all_reduce_mib"] > row["all_gather_mib"]
    assert row["temporaries_mib"] > 0
    for prediction in result["predictions"]:
        whole = prediction["compute_ms"] + prediction["exchange_ms"]
        np.testing.assert_allclose(prediction["efficiency"], prediction["compute_ms"] / whole)
        assert prediction["efficiency"] <= prediction["efficiency_hidden"] <= 1


def test_a_mesh_that_does_not_fit_the_model_is_one_line():
    config = dataclasses.replace(CONFIG, model=dataclasses.replace(CONFIG.model, mlp_ratio=1))
    with pytest.raises(InputError, match="^mesh.tensor=3 does not divide the .* units of params/.*fc1"):
        scaling(config, [MeshConfig(1, 1, 3)], batch=1)

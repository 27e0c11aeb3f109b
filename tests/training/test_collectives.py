"""What the devices of a compiled training step tell each other: gradients and weights, never activations.

The parser of HLO is tested in tests/ahead. With --long also that what is exchanged does not depend on the batch, or in
proportion to it.
"""

import dataclasses
import functools

import jax
import pytest

from data_pipelines.pipeline import PipelineConfig
from infmae_jax.ahead import hlo
from infmae_jax.ahead.hlo import by_kind
from infmae_jax.models.config import InfMAEConfig
from infmae_jax.models.infmae import InfMAE
from infmae_jax.tasks.pretrain import PretrainConfig, PretrainTask
from infmae_jax.training import sharding
from infmae_jax.training.config import MeshConfig, OptimizerConfig
from infmae_jax.training.program import Program

CONFIG = PretrainConfig(
    model=InfMAEConfig().replace(
        in_channels=1, widths=(16, 24, 32), depths=(1, 1, 1), heads=2,
        decoder_width=32, decoder_depth=1, decoder_heads=2,
    ),  # fmt: skip
    data=PipelineConfig(image_size=(64, 64)),
    optimizer=OptimizerConfig(clip_norm=1.0, warmup="0 steps"),
    duration="9 steps",
)
SCALARS = 1024  # bytes: loss, gradient norms, stop codes


@pytest.fixture
def long(pytestconfig):
    return pytestconfig.getoption("--long")


@functools.cache
def exchanged(mesh: MeshConfig, images: int, config: PretrainConfig = CONFIG):
    """The collectives of the program that trains, for global batches of so many images."""
    config = dataclasses.replace(config, data=dataclasses.replace(config.data, batch_size=images))
    program = Program.build(PretrainTask(config), config, sharding.make_mesh(mesh))
    return hlo.Program(program.compiled.as_text()).collectives()


@functools.cache
def parameter_bytes(cut_only=False, config: PretrainConfig = CONFIG):
    """Bytes of all parameters, or of those that four devices along fsdp cut."""
    images, ids_keep = jax.ShapeDtypeStruct((1, 64, 64, 1), "float32"), jax.ShapeDtypeStruct((1, 4), "int32")
    shapes = jax.eval_shape(InfMAE(config.model).init, jax.random.key(0), images, ids_keep)["params"]
    specs = sharding.state_shardings(shapes, sharding.make_mesh(MeshConfig(1, 4)))
    pairs = zip(jax.tree.leaves(shapes), jax.tree.leaves(specs), strict=True)
    return sum(4 * leaf.size for leaf, s in pairs if not cut_only or s.shard_shape(leaf.shape) != leaf.shape)


def test_data_parallel_devices_sum_gradients_and_nothing_else(long):
    if not long:
        pytest.skip("what data and fsdp together do contains it: --long")
    kinds = by_kind(exchanged(MeshConfig(4), 8))
    assert set(kinds) == {"all-reduce"}
    assert parameter_bytes() <= kinds["all-reduce"][1] <= parameter_bytes() + SCALARS


def test_fsdp_devices_gather_every_cut_parameter_once_and_sum_gradients(long):
    """On CPU, XLA sums whole gradients and slices them (no reduce-scatter)."""
    if not long:
        pytest.skip("what data and fsdp together do contains it: --long")
    found = exchanged(MeshConfig(1, 4), 8)
    kinds = by_kind(found)
    assert set(kinds) == {"all-reduce", "all-gather"}
    assert kinds["all-gather"][1] == parameter_bytes(cut_only=True)
    assert parameter_bytes() <= kinds["all-reduce"][1] <= parameter_bytes() + SCALARS


def test_data_and_fsdp_together_keep_gathers_and_sums_within_their_groups(long):
    found = exchanged(MeshConfig(2, 2), 8)
    if long:
        assert by_kind(found) == by_kind(exchanged(MeshConfig(2, 2), 16))  # whatever the batch
    assert set(by_kind(found)) == {"all-reduce", "all-gather"}
    gathers = [each for each in found if each.kind == "all-gather"]
    assert {each.groups for each in gathers} == {((0, 1), (2, 3))}  # along fsdp
    assert sum(each.bytes for each in gathers) == parameter_bytes(cut_only=True)
    # Whole gradients are summed along fsdp, then only each device's part along data; but those of the depthwise
    # kernels, and of what is not cut, over all devices at once.
    along_data = [each for each in found if each.groups == ((0, 2), (1, 3))]
    assert {each.kind for each in along_data} == {"all-reduce"}
    depthwise = 4 * 25 * sum(CONFIG.model.encoder.widths[:2])
    part = (parameter_bytes(cut_only=True) - depthwise) / 2
    assert part <= sum(each.bytes for each in along_data) <= part + SCALARS
    assert sum(each.bytes for each in found if each.kind == "all-reduce") <= parameter_bytes() + part + SCALARS


def test_tensor_devices_sum_what_mlps_add_to_the_residual_stream_and_its_gradient(long):
    few = exchanged(MeshConfig(2, 1, 2), 8)
    assert set(by_kind(few)) == {"all-reduce"}

    def activations(found):
        """KiB of the all-reduces along tensor, without the scalars that XLA may put in with them."""
        along = [each for each in found if each.groups == ((0, 1), (2, 3))]
        return sorted(each.bytes // 1024 for each in along if each.bytes > SCALARS)

    # One a block forward, one backward; of 4 images a device: 4 visible tokens of 4x4, 2x2 and 1 cells in the encoder.
    widths = CONFIG.model.encoder.widths
    stages = [4 * 4 * 4 * cells * width // 1024 for cells, width in zip((16, 4, 1), widths, strict=True)]
    sizes = activations(few)
    assert len(sizes) == 2 * (3 + 1)
    assert all(sizes.count(size) >= 2 for size in stages)
    if long:
        many = exchanged(MeshConfig(2, 1, 2), 16)
        assert set(by_kind(many)) == {"all-reduce"} and activations(many) == [2 * size for size in sizes]
        assert by_kind(many)["all-reduce"][1] - by_kind(few)["all-reduce"][1] == 1024 * sum(sizes)


def test_micro_batches_gather_the_weights_once(long):
    """Of the encoder that compiles fastest; with --long of the hybrid one."""
    config = dataclasses.replace(
        CONFIG, model=CONFIG.model.replace(kind="hybrid" if long else "vit"),
        optimizer=dataclasses.replace(CONFIG.optimizer, accumulate=2),
    )  # fmt: skip
    found = exchanged(MeshConfig(1, 4), 16, config)
    assert by_kind(found)["all-gather"][1] == parameter_bytes(cut_only=True, config=config)

"""Mesh and sharding rules."""

import dataclasses
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec

from data_pipelines.errors import InputError
from infmae_jax.models.config import InfMAEConfig, variant
from infmae_jax.models.infmae import InfMAE
from infmae_jax.training import sharding
from infmae_jax.training.config import MeshConfig, OptimizerConfig
from infmae_jax.training.optimizer import make_optimizer
from infmae_jax.training.state import TrainState
from infmae_jax.training.step import make_gradients, make_train_step, stop_flag
from infmae_jax.training.task import Loss
from tests.models.random_params import random_params

SMALL = InfMAEConfig().replace(
    widths=(8, 12, 16), depths=(1, 1, 1), heads=2, decoder_width=16, decoder_depth=1, decoder_heads=2
)


@dataclasses.dataclass(frozen=True)
class Device:
    """What `arrange` asks of a device."""

    id: int
    process_index: int = 0
    platform: str = "gpu"


@dataclasses.dataclass(frozen=True)
class SliceDevice(Device):
    slice_index: int = 0


def devices(processes, each):
    return [Device(process * each + i, process) for process in range(processes) for i in range(each)]


def ids(array):
    return np.vectorize(lambda device: device.id)(array).tolist()


def state_shapes(config, keep=49, size=224):
    def create(key):
        ids_keep = jnp.zeros((1, keep), jnp.int32)
        params = InfMAE(config).init(key, jnp.zeros((1, size, size, 1)), ids_keep)["params"]
        return TrainState.create(params, make_optimizer(OptimizerConfig(clip_norm=1.0)))

    return create, jax.eval_shape(create, jax.random.key(0))


@pytest.mark.parametrize(("name", "encoder"), [("base", "hybrid"), ("large", "hybrid"), ("base", "vit")])
def test_every_parameter_matches_exactly_one_rule_and_moments_follow(name, encoder):
    _, shapes = state_shapes(variant(name, kind=encoder))
    mesh = sharding.make_mesh(MeshConfig(data=1, fsdp=2, tensor=2))
    specs = sharding.state_shardings(shapes, mesh)
    adam = next(s for s in jax.tree.leaves(specs.opt_state, is_leaf=lambda s: hasattr(s, "mu")) if hasattr(s, "mu"))
    assert jax.tree.leaves(adam.mu) == jax.tree.leaves(specs.params) == jax.tree.leaves(adam.nu)
    assert {s.spec for s in jax.tree.leaves((specs.step, specs.guard, adam.count))} == {PartitionSpec()}

    paths = jax.tree_util.tree_leaves_with_path(specs.params)
    flat = {sharding.path_text(path): s.spec for path, s in paths}
    for path in flat:
        assert sum(bool(re.search(pattern, f"/{path}")) for pattern, *_ in sharding.PARAMETER_RULES) == 1, path
    first = [path for path in flat if path.endswith("fc1/kernel")]
    for path in first:  # the two layers of an MLP are cut by the same units
        assert flat[path] == PartitionSpec(None, ("tensor", "fsdp"))
        assert flat[path.replace("fc1", "fc2")] == PartitionSpec(("tensor", "fsdp"), None)
        assert flat[path.replace("kernel", "bias")] == PartitionSpec("tensor")

    def numbers_on_a_device(shardings):
        local = jax.tree.map(lambda leaf, s: math.prod(s.shard_shape(leaf.shape)), shapes.params, shardings)
        return sum(jax.tree.leaves(local))

    sizes = {sharding.path_text(p): leaf.size for p, leaf in jax.tree_util.tree_leaves_with_path(shapes.params)}
    total = sum(sizes.values())
    mlps = 2 * sum(sizes[path] for path in first)
    kept = mlps / 4 + (total - mlps) / 2  # and a little more, for biases and norms
    assert kept <= numbers_on_a_device(specs.params) < kept + 0.01 * total
    read = mlps / 2 + (total - mlps)  # fsdp is undone, tensor stays
    assert read - 0.001 * total < numbers_on_a_device(sharding.gathered(specs.params)) <= read


@pytest.mark.parametrize(
    "shape, spec", [((6, 4), ("fsdp", None)), ((3, 4, 4), (None, None, "fsdp")), ((9, 4), (None, "fsdp")),
                    ((3, 5), ()), ((7,), ()), ((), ())]
)  # fmt: skip
def test_a_parameter_without_a_rule_is_cut_along_its_largest_dimension_that_divides(shape, spec):
    mesh = sharding.make_mesh(MeshConfig(data=-1, fsdp=2))
    leaf = jax.ShapeDtypeStruct(shape, jnp.float32)
    (found,) = jax.tree.leaves(sharding.state_shardings({"head": {"gate": leaf}}, mesh))
    assert found.spec == PartitionSpec(*spec)


@pytest.mark.parametrize("sizes", [(3, 1), (-1, -1), (0, 4), (2, 4), (1, 1, 3), (-1, 3), (-1, 1, -1)])
def test_impossible_meshes_are_refused(sizes):
    with pytest.raises(InputError, match="mesh.data=.*mesh.fsdp=.*mesh.tensor="):
        sharding.make_mesh(MeshConfig(*sizes))


def test_a_tensor_axis_that_does_not_divide_the_units_is_refused():
    _, shapes = state_shapes(SMALL.replace(widths=(7, 12, 16), mlp_ratio=1), keep=2, size=32)
    with pytest.raises(InputError, match="mesh.tensor=2 does not divide the 7 units of params/encoder/blocks1_0/mlp"):
        sharding.state_shardings(shapes, sharding.make_mesh(MeshConfig(-1, 1, 2)))


def test_axes_are_auto_and_fill_the_devices():
    mesh = sharding.make_mesh(MeshConfig(data=-1, fsdp=2))
    assert dict(mesh.shape) == {"data": jax.device_count() // 2, "fsdp": 2, "tensor": 1}
    assert set(mesh.axis_types) == {jax.sharding.AxisType.Auto}
    assert sharding.batch_parts(mesh) == 4
    assert sharding.batch_parts(sharding.make_mesh(MeshConfig(-1, 1, 2))) == 2


def test_data_is_the_outermost_axis_and_tensor_the_innermost():
    assert ids(sharding.arrange(MeshConfig(2, 2, 2), devices(2, 4))) == [[[0, 1], [2, 3]], [[4, 5], [6, 7]]]


def test_slices_are_blocks_along_the_data_axis():
    shuffled = [SliceDevice(id, id // 4, slice_index=id % 2) for id in range(8)]  # even ids in one slice, odd in other
    array = sharding.arrange(MeshConfig(4, 2, 1, slices=2), shuffled)
    assert ids(array[:, :, 0]) == [[0, 2], [4, 6], [1, 3], [5, 7]]


def test_without_reported_slices_neighbouring_processes_form_them():
    array = sharding.arrange(MeshConfig(-1, 4, 1, slices=2), devices(4, 2)[::-1])
    assert ids(array[:, :, 0]) == [[0, 1, 2, 3], [4, 5, 6, 7]]


@pytest.mark.parametrize("config", [MeshConfig(1, 8, slices=2), MeshConfig(2, 4, slices=0), MeshConfig(4, 2, slices=3)])
def test_fsdp_and_tensor_must_lie_within_a_slice(config):
    with pytest.raises(InputError, match="mesh.slices=.* does not divide mesh.data="):
        sharding.arrange(config, devices(4, 2))


def test_slices_must_be_those_of_the_platform():
    pods = [SliceDevice(id, id // 4, "tpu", id // 4) for id in range(8)]
    with pytest.raises(InputError, match="mesh.slices=1, but the devices form 2: set mesh.slices=2"):
        sharding.arrange(MeshConfig(), pods)
    uneven = [SliceDevice(id, 0, slice_index=int(id > 2)) for id in range(8)]
    with pytest.raises(InputError, match="mesh.slices=2: the slices have 3, 5 devices"):
        sharding.arrange(MeshConfig(slices=2), uneven)


def test_a_tensor_group_must_lie_within_a_process():
    sharding.arrange(MeshConfig(-1, 1, 2), devices(2, 2))
    with pytest.raises(InputError, match="mesh.tensor=4 spans several processes"):
        sharding.arrange(MeshConfig(-1, 1, 4), devices(2, 2))


def test_sharded_and_accumulated_steps_equal_the_plain_one(pytestconfig):
    """Sharded and accumulated at once; with --long also each with less of the other."""
    model, schedule = InfMAE(SMALL), lambda step: 1e-2
    optimizer = make_optimizer(OptimizerConfig(clip_norm=1.0))
    rng = np.random.default_rng(0)
    batch = {
        "image": rng.standard_normal((8, 32, 32, 1)).astype(np.float32),
        "ids_keep": np.stack([rng.permutation(4)[:2] for _ in range(8)]).astype(np.int32),
    }

    def loss(params, batch, key):
        return Loss(model.apply({"params": params}, batch["image"], batch["ids_keep"]).loss * 8, 8, {})

    def run(mesh_config, devices, accumulate):
        mesh = sharding.make_mesh(mesh_config, devices)
        _, shapes = state_shapes(SMALL, keep=2, size=32)
        specs = sharding.state_shardings(shapes, mesh)
        state = jax.jit(lambda params: TrainState.create(params, optimizer), out_shardings=specs)(params)
        gradients = make_gradients(loss, specs.params, 0, accumulate)
        step = make_train_step(gradients, optimizer, schedule, mesh, specs)
        losses = []
        for _ in range(3):
            state, metrics = step(state, sharding.place_batch(batch, mesh), stop_flag(mesh, 0))
            losses.append(float(metrics["loss"]))
        return losses, jax.device_get(state.params), float(metrics["grad_norm"])

    params = random_params(model, batch["image"], batch["ids_keep"], noise=0.0)
    plain = run(MeshConfig(1), jax.devices()[:1], 1)
    assert plain[0][2] < plain[0][0]
    apart = ((MeshConfig(-1, 2, 2), None, 2), (MeshConfig(1), jax.devices()[:1], 4))
    for setup in ((MeshConfig(-1, 2, 2), None, 4), *(apart if pytestconfig.getoption("--long") else ())):
        other = run(*setup)
        np.testing.assert_allclose(other[0], plain[0], rtol=1e-5)
        np.testing.assert_allclose(other[2], plain[2], rtol=1e-4)
        # Adam divides by the gradient's own size, so rounding in tiny gradients shows as a share of the step length.
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=3e-3), other[1], plain[1])

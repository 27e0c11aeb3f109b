"""Mesh and sharding rules."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec

from data_pipelines.errors import InputError
from infmae_jax.models.infmae import InfMAE, InfMAEConfig, variant
from infmae_jax.training import sharding
from infmae_jax.training.config import MeshConfig, OptimizerConfig
from infmae_jax.training.optimizer import make_optimizer
from infmae_jax.training.state import TrainState
from infmae_jax.training.step import make_train_step


def state_shapes(config, keep=49, size=224):
    def create(key):
        ids_keep = jnp.zeros((1, keep), jnp.int32)
        params = InfMAE(config).init(key, jnp.zeros((1, size, size, 1)), ids_keep)["params"]
        return TrainState.create(params, make_optimizer(OptimizerConfig(), lambda step: 1e-3))

    return create, jax.eval_shape(create, jax.random.key(0))


@pytest.mark.parametrize("encoder", ["hybrid", "vit"])
def test_every_parameter_matches_exactly_one_rule_and_moments_follow(encoder):
    _, shapes = state_shapes(variant("base", encoder=encoder))
    mesh = sharding.make_mesh(MeshConfig(data=1, fsdp=-1))
    specs = sharding.state_shardings(shapes, mesh)
    moments = specs.opt_state[0]
    assert jax.tree.leaves(moments.mu) == jax.tree.leaves(specs.params) == jax.tree.leaves(moments.nu)
    sizes = jax.tree.map(lambda s, n: (s.size, n.spec != PartitionSpec()), shapes.params, specs.params)
    pairs = jax.tree.leaves(sizes, is_leaf=lambda x: isinstance(x, tuple))
    cut = sum(size for size, is_cut in pairs if is_cut)
    assert cut > 0.99 * sum(size for size, _ in pairs)


def test_a_parameter_without_a_rule_is_an_error():
    with pytest.raises(KeyError, match="encoder/gate/kernel matches 0"):
        sharding.parameter_rule("encoder/gate/kernel")


@pytest.mark.parametrize("sizes", [(3, 1), (-1, -1), (0, 4), (2, 4)])
def test_impossible_meshes_are_refused(sizes):
    with pytest.raises(InputError, match="mesh.data"):
        sharding.make_mesh(MeshConfig(*sizes))


def test_axes_are_auto_and_fill_the_devices():
    mesh = sharding.make_mesh(MeshConfig(data=-1, fsdp=2))
    assert dict(mesh.shape) == {"data": jax.device_count() // 2, "fsdp": 2}
    assert set(mesh.axis_types) == {jax.sharding.AxisType.Auto}


def test_sharded_and_accumulated_steps_equal_the_plain_one():
    config = InfMAEConfig(
        widths=(8, 12, 16), depths=(1, 1, 1), heads=2, decoder_width=16, decoder_depth=1, decoder_heads=2
    )
    model, schedule = InfMAE(config), lambda step: 1e-2
    optimizer = make_optimizer(OptimizerConfig(), schedule)
    rng = np.random.default_rng(0)
    batch = {
        "image": rng.standard_normal((8, 32, 32, 1)).astype(np.float32),
        "ids_keep": np.stack([rng.permutation(4)[:2] for _ in range(8)]).astype(np.int32),
    }

    def loss(params, batch, key):
        return model.apply({"params": params}, batch["image"], batch["ids_keep"]).loss, {}

    def run(mesh_config, devices, accumulate):
        mesh = sharding.make_mesh(mesh_config, devices)
        create, shapes = state_shapes(config, keep=2, size=32)
        specs = sharding.state_shardings(shapes, mesh)
        state = jax.jit(create, out_shardings=specs)(jax.random.key(0))
        step = make_train_step(loss, optimizer, schedule, mesh, specs, 0, accumulate)
        losses = []
        for _ in range(3):
            state, metrics = step(state, sharding.place_batch(batch, mesh))
            losses.append(float(metrics["loss"]))
        return losses, jax.device_get(state.params), float(metrics["grad_norm"])

    plain = run(MeshConfig(1, 1), jax.devices()[:1], 1)
    assert plain[0][2] < plain[0][0]
    one = jax.devices()[:1]
    for setup in ((MeshConfig(-1, 2), None, 2), (MeshConfig(1, 1), one, 4)):
        other = run(*setup)
        np.testing.assert_allclose(other[0], plain[0], rtol=1e-5)
        np.testing.assert_allclose(other[2], plain[2], rtol=1e-4)
        # Adam divides by the gradient's own size, so rounding in tiny gradients shows as a share of the step length.
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=3e-3), other[1], plain[1])

"""Updates that must not be made are not made: on the device, bit for bit, counted, without shifting the schedule."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from infmae_jax.training import sharding
from infmae_jax.training.config import MeshConfig, OptimizerConfig
from infmae_jax.training.optimizer import make_optimizer
from infmae_jax.training.state import TrainState
from infmae_jax.training.step import make_gradients, make_train_step, stop_flag
from infmae_jax.training.task import Loss


@jax.custom_vjp
def poisoned(x, poison):
    """x, with a gradient of NaN where `poison` is set: what a division by zero in a backward pass does."""
    del poison
    return x


poisoned.defvjp(lambda x, poison: (x, poison), lambda poison, g: (jnp.where(poison > 0, jnp.nan, g), jnp.zeros(())))


def loss(params, batch, key):
    del key
    kernel = poisoned(params["encoder"]["conv1"]["kernel"], batch["poison"].max())
    error = batch["x"] @ kernel - 1.0
    return Loss(jnp.square(error).sum(), error.size, {})


def schedule(step):
    return 0.01 * (1.0 + jnp.asarray(step, jnp.float32))


class Run:
    """A linear model on the devices of this process, step by step."""

    def __init__(self, **guards):
        self.mesh = sharding.make_mesh(MeshConfig())
        optimizer = make_optimizer(OptimizerConfig())

        def create(key):
            return TrainState.create({"encoder": {"conv1": {"kernel": jax.random.normal(key, (6, 4))}}}, optimizer)

        shapes = jax.eval_shape(create, jax.random.key(0))
        shardings = sharding.state_shardings(shapes, self.mesh)
        self.state = jax.jit(create, out_shardings=shardings)(jax.random.key(0))
        self._step = make_train_step(
            make_gradients(loss, shardings.params, 0), optimizer, schedule, self.mesh, shardings, **guards
        )

    def step(self, scale=1.0, poison=0.0, stop=0, seed=None):
        number = int(self.state.step) if seed is None else seed
        x = np.random.default_rng(number).standard_normal((8, 6)).astype(np.float32) * np.float32(scale)
        batch = sharding.place_batch({"x": x, "poison": np.full(8, poison, np.float32)}, self.mesh)
        self.state, metrics = self._step(self.state, batch, stop_flag(self.mesh, stop))
        return {name: value.item() for name, value in metrics.items()}

    def kept(self):
        """What a skipped update must leave alone."""
        return jax.device_get((self.state.params, self.state.opt_state, self.state.guard.loss_mean))


def kernel(kept):
    return kept[0]["encoder"]["conv1"]["kernel"].tolist()


@pytest.mark.parametrize("harm", [{"scale": np.nan}, {"scale": np.inf}, {"poison": 1.0}, {"scale": 1e30}])
def test_a_non_finite_update_is_skipped_bit_for_bit(harm):
    run = Run()
    run.step()
    before = run.kept()
    metrics = run.step(**harm)
    jax.tree.map(np.testing.assert_array_equal, run.kept(), before)
    assert metrics["skipped"] == 1 and metrics["skipped_updates"] == 1 and metrics["in_a_row"] == 1
    assert int(run.state.step) == 2
    assert run.step()["in_a_row"] == 0 and kernel(run.kept()) != kernel(before)


def test_skipping_shifts_neither_schedule_nor_optimizer():
    skipping, plain = Run(), Run()
    seeds = [0, 1, 2, 3]
    for seed in seeds:
        skipping.step(seed=seed)
        if seed == 1:
            assert skipping.step(scale=np.nan)["learning_rate"] == pytest.approx(0.01 * 3)
    for seed in seeds:
        plain.step(seed=seed)
        if seed == 1:  # the plain run passes the skipped step's number without a batch
            plain.state = plain.state.replace(step=plain.state.step + 1)
    ours, theirs = skipping.kept(), plain.kept()
    jax.tree.map(np.testing.assert_array_equal, ours[:2], theirs[:2])


def test_skips_in_a_row_are_counted():
    run = Run()
    counts = [run.step(scale=scale)["in_a_row"] for scale in (np.nan, np.nan, 1.0, np.nan, np.nan, np.nan)]
    assert counts == [1, 2, 0, 1, 2, 3] and int(run.state.guard.skipped) == 5


def test_spikes_are_skipped_only_when_asked_for_and_after_the_warm_up():
    losses, spiked = [], None
    for factor, warmup, expected in ((0.0, 0, 0), (3.0, 4, 1), (3.0, 50, 0)):
        run = Run(spike_factor=factor, spike_warmup=warmup)
        losses = [run.step()["loss"] for _ in range(5)]
        mean = run.state.guard.loss_mean.item()
        assert mean == pytest.approx(np.mean(losses), rel=1e-5)
        spiked = run.step(scale=20.0)
        assert spiked["loss"] > 3 * mean and spiked["skipped"] == expected
        if expected:
            assert run.state.guard.loss_mean.item() == mean
            assert run.step()["skipped"] == 0


def test_the_highest_stop_code_of_any_device_reaches_all():
    run = Run()
    assert run.step()["stop"] == 0 and run.step(stop=75)["stop"] == 75

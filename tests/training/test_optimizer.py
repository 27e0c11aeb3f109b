"""Schedule and AdamW against formulas written out here."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from infmae_jax.training.config import OptimizerConfig
from infmae_jax.training.optimizer import make_optimizer, make_schedule, peak_learning_rate
from infmae_jax.training.task import Group


def test_schedule_is_linear_then_half_cosine():
    schedule = make_schedule(OptimizerConfig(base_learning_rate=0.5), 256, 4, 20)
    for step in range(24):
        if step < 4:
            expected = 0.5 * step / 4
        else:
            expected = 0.25 * (1 + math.cos(math.pi * min(1, (step - 4) / 16)))
        assert float(schedule(step)) == pytest.approx(expected, abs=1e-7)


def test_polynomial_decay_follows_its_power():
    config = OptimizerConfig(base_learning_rate=0.5, schedule="polynomial", power=0.9)
    schedule = make_schedule(config, 256, 4, 20)
    for step in range(24):
        expected = 0.5 * step / 4 if step < 4 else 0.5 * (1 - min(1, (step - 4) / 16)) ** 0.9
        assert float(schedule(step)) == pytest.approx(expected, abs=1e-7)


def test_learning_rate_scales_with_the_batch():
    assert peak_learning_rate(OptimizerConfig(base_learning_rate=1.5e-4), 1024) == pytest.approx(6e-4)


GROUPS = {"kernel": Group(0.5, 2.0), "bias": Group(), "still": Group(frozen=True)}


@pytest.mark.parametrize("clip", [0.0, 0.1])
@pytest.mark.parametrize("groups", [None, GROUPS])
def test_two_steps_of_adamw_against_numpy(clip, groups):
    config = OptimizerConfig(weight_decay=0.05, clip_norm=clip)
    optimizer = make_optimizer(config, groups)
    rng = np.random.default_rng(0)
    params = {name: rng.standard_normal(2 if name == "bias" else (3, 2)) for name in GROUPS}
    expected = {k: v.copy() for k, v in params.items()}
    moments = {k: [np.zeros_like(v), np.zeros_like(v)] for k, v in params.items()}
    ours = {k: jnp.asarray(v, jnp.float32) for k, v in params.items()}
    state = optimizer.init(ours)
    still = groups is not None
    assert len(jax.tree.leaves(state)) == 1 + 2 * (len(params) - still)
    for step in (1, 2):
        grads = {k: rng.standard_normal(v.shape) * (k != "still" or not still) for k, v in params.items()}
        direction, state = optimizer.update({k: jnp.asarray(g, jnp.float32) for k, g in grads.items()}, state, ours)
        ours = {k: v - 0.01 * direction[k] for k, v in ours.items()}
        norm = math.sqrt(sum((g**2).sum() for g in grads.values()))
        for k, g in grads.items():
            group = groups[k] if groups else Group()
            g = g * min(1.0, clip / norm) if clip else g
            m, v = moments[k] = [0.9 * moments[k][0] + 0.1 * g, 0.95 * moments[k][1] + 0.05 * g**2]
            decay = 0.05 * group.weight_decay * expected[k] if k != "bias" else 0.0
            adam = m / (1 - 0.9**step) / (np.sqrt(v / (1 - 0.95**step)) + 1e-8)
            expected[k] = expected[k] - (0 if group.frozen else 0.01 * group.learning_rate * (adam + decay))
    for k in params:
        np.testing.assert_allclose(ours[k], expected[k], rtol=1e-5, atol=1e-6)
    if still:
        np.testing.assert_array_equal(ours["still"], params["still"].astype(np.float32))


def test_first_moment_in_bfloat16_steps_like_float32_with_three_quarters_of_the_state():
    """A moment rounded to 8 bits moves an update by at most 2^-8 of it, plus what that leaves in the next ones."""
    rng = np.random.default_rng(0)
    params = {"kernel": jnp.asarray(rng.standard_normal((32, 16)), jnp.float32)}
    size, direction = {}, {}
    for dtype in ("float32", "bfloat16"):
        optimizer = make_optimizer(OptimizerConfig(mu_dtype=dtype))
        state, draws = optimizer.init(params), np.random.default_rng(1)
        for _ in range(5):
            grads = {"kernel": jnp.asarray(0.5 + draws.random((32, 16)), jnp.float32)}
            direction[dtype], state = optimizer.update(grads, state, params)
        assert direction[dtype]["kernel"].dtype == jnp.float32
        size[dtype] = sum(leaf.nbytes for leaf in jax.tree.leaves(state) if leaf.ndim)
    np.testing.assert_allclose(direction["bfloat16"]["kernel"], direction["float32"]["kernel"], rtol=0.02, atol=1e-3)
    assert np.abs(direction["bfloat16"]["kernel"] - direction["float32"]["kernel"]).max() > 0
    assert size["bfloat16"] == 0.75 * size["float32"]

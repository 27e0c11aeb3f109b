"""Losses and turns of small-target training against NumPy."""

import functools
import math

import hypothesis
import hypothesis.extra.numpy as hnp
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from infmae_jax.models.config import EncoderConfig, SmallTargetHeadConfig
from infmae_jax.models.heads.small_targets import TargetDetector
from infmae_jax.tasks import small_target

SHAPE = (2, 6, 7)
logits = hnp.arrays(np.float32, SHAPE, elements=st.floats(-8, 8, width=32))
masks = hnp.arrays(np.uint8, SHAPE, elements=st.sampled_from([0, 1, 255]))


@hypothesis.given(logits, masks)
@hypothesis.settings(deadline=None)
def test_losses_equal_numpy_and_ignored_pixels_do_not_count(x, mask):
    valid, target = mask != 255, (mask == 1).astype(np.float32)
    for place in range(len(x)):
        p = 1 / (1 + np.exp(-x[place].astype(np.float64)))[valid[place]]
        t = target[place][valid[place]]
        empty = 0 if t.any() else 1
        iou = ((p * t).sum() + empty) / ((p + t - p * t).sum() + empty)
        entropy = -(t * np.log(p) + (1 - t) * np.log(1 - p))
        share = np.where(t == 1, p, 1 - p)
        focal = np.where(t == 1, 0.75, 0.25) * (1 - share) ** 2 * entropy
        truths = {
            "soft_iou_bce": -np.log(iou + 1e-6) + (entropy.mean() if t.size else 0),
            "focal": focal.sum() / max(t.sum(), 1),
        }
        for name, truth in truths.items():
            found = small_target._LOSSES[name](jnp.asarray(x), jnp.asarray(target), jnp.asarray(valid))[place]
            np.testing.assert_allclose(found, truth, rtol=2e-4, atol=2e-5, err_msg=name)
    other = np.where(valid, x, 8 - x)
    for name, measure in small_target._LOSSES.items():
        np.testing.assert_array_equal(measure(x, target, valid), measure(other, target, valid), err_msg=name)


def test_a_small_target_pulls_as_hard_as_all_that_is_none():
    """At the prior, 4 pixels among 128 x 128: where the many pull harder, predicting nothing is what is learned."""
    target = np.zeros((1, 128, 128), np.float32)
    target[0, 60:62, 60:62] = 1
    logits = jnp.full(target.shape, math.log(0.01 / 0.99))
    pull = jax.grad(lambda x: small_target.soft_iou(x, target, np.ones_like(target, bool)).sum())(logits)
    up, down = (pull * target).sum(), -(pull * (1 - target)).sum()
    assert up > 0.9 * down > 0


def test_a_target_pulls_where_nothing_is_found_any_more():
    """As beside many images without target, which teach "nothing" at once."""
    target = np.zeros((1, 128, 128), np.float32)
    target[0, 60:62, 60:62] = 1
    loss = small_target._LOSSES["soft_iou_bce"]
    x = jnp.full(target.shape, -9.0)  # fewer than 3 pixels in all
    pull = jax.grad(lambda x: -loss(x, target, np.ones_like(target, bool)).sum())(x)
    up, down = (pull * target).sum(), -(pull * (1 - target)).sum()
    assert up > 0.5 > down > 0


def test_sls_is_least_on_the_target_and_grows_with_the_distance():
    target = np.zeros((1, 24, 24), np.float32)
    target[0, 5:8, 5:8] = 1
    valid = np.ones_like(target, bool)

    def loss(shift, size=3):
        x = np.full((1, 24, 24), -12.0, np.float32)
        x[0, 5 + shift : 5 + shift + size, 5:8] = 12
        return float(small_target._LOSSES["sls"](x, target, valid)[0])

    values = [loss(shift) for shift in (0, 1, 4, 9)]
    assert values == sorted(values) and values[0] < 0.01
    assert loss(0, size=5) > values[0]
    gradient = jax.grad(lambda x: small_target._LOSSES["sls"](x, 0 * target, valid).sum())(jnp.zeros((1, 24, 24)))
    assert np.isfinite(gradient).all() and (gradient > 0).all()  # an image without target still says "less"


def test_turns_move_image_and_mask_together():
    images = np.random.default_rng(0).integers(0, 255, (64, 8, 8), np.uint8)
    found, masks = small_target.turned(jax.random.key(0), jnp.asarray(images), jnp.asarray(images) // 2)
    np.testing.assert_array_equal(masks, found // 2)
    ways = {"as it was": 0, "down": 0, "across": 0, "both": 0}
    for image, turned in zip(images, np.asarray(found), strict=True):
        options = [image, image[::-1], image.T, image[::-1].T]
        ways[list(ways)[next(n for n, option in enumerate(options) if np.array_equal(option, turned))]] += 1
    assert all(count > 4 for count in ways.values())


def test_every_pixel_begins_at_the_prior_and_all_parameters_get_gradients():
    encoder = EncoderConfig(widths=(16, 16, 16), depths=(1, 1, 1), heads=2, fuse_stages=False)
    module = TargetDetector(encoder, SmallTargetHeadConfig(widths=(16, 8, 8, 8, 8), prior=0.01))
    images = jax.random.normal(jax.random.key(0), (2, 32, 48, 1))
    params = jax.jit(module.init)(jax.random.key(1), images)
    whole, half, quarter = jax.jit(module.apply)(params, images)
    assert whole.shape == (2, 32, 48) and half.shape == (2, 16, 24) and quarter.shape == (2, 8, 12)
    assert np.allclose(jax.nn.sigmoid(whole), 0.01, atol=0.005)
    assert len(jax.eval_shape(functools.partial(module.apply, deep=False), params, images)) == 1
    weights = jax.random.normal(jax.random.key(2), whole.shape)

    def measure(p):
        outputs = module.apply(p, images)
        return (weights * outputs[0]).sum() + sum((x**2).mean() for x in outputs)

    grads = jax.jit(jax.grad(measure))(params)
    still = [jax.tree_util.keystr(path) for path, g in jax.tree_util.tree_leaves_with_path(grads) if not np.any(g)]
    assert all("['norm']" in path and "encoder" in path for path in still), still


def test_a_vit_encoder_is_refused():
    encoder = EncoderConfig(kind="vit", widths=(16, 16, 16), depths=(1, 1, 1), heads=2, fuse_stages=False)
    with pytest.raises(ValueError, match="vit encoder lacks"):
        TargetDetector(encoder, SmallTargetHeadConfig()).init(jax.random.key(0), jnp.zeros((1, 32, 32, 1)))

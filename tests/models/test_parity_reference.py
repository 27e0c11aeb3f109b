"""The model computes what the slow NumPy reference computes, on random weights and non-square images."""

import functools

import jax
import numpy as np
import pytest

from infmae_jax.models.config import InfMAEConfig
from infmae_jax.models.infmae import InfMAE
from tests.models import reference

HYBRID = InfMAEConfig().replace(
    widths=(8, 12, 16), depths=(2, 1, 1), heads=4, mlp_ratio=2, decoder_width=8, decoder_depth=1, decoder_heads=2
)
CONFIGS = {
    "hybrid": HYBRID,
    "hybrid one channel": HYBRID.replace(in_channels=1, norm_pix_loss=True),
    "hybrid all patches": HYBRID.replace(visible_only=False, depthwise="conv"),
    "vit": HYBRID.replace(kind="vit", norm_pix_loss=True),
}
HEIGHT, WIDTH, KEPT = 48, 64, 3


all_configs = pytest.mark.parametrize("case", CONFIGS, indirect=True)


@pytest.fixture
def case(request):
    """Config, weights with nothing left at zero or one, images and kept tokens in no particular order."""
    config = CONFIGS[request.param]
    rng = np.random.default_rng(3)
    images = rng.normal(size=(2, HEIGHT, WIDTH, config.encoder.in_channels)).astype(np.float32)
    tokens = HEIGHT * WIDTH // 16**2
    ids_keep = np.stack([rng.permutation(tokens)[:KEPT] for _ in images]).astype(np.int32)
    return config, random_params(config, images, ids_keep, rng), images, ids_keep


def random_params(config, images, ids_keep, rng):
    shapes = jax.eval_shape(InfMAE(config).init, jax.random.key(0), images, ids_keep)["params"]
    return jax.tree.map(lambda leaf: rng.normal(size=leaf.shape, scale=0.3).astype(np.float32), shapes)


def dense_features(config, params, images, **options):
    features = functools.partial(InfMAE(config).apply, method="features", **options)
    return jax.jit(features)({"params": params}, images)


@all_configs
def test_pretraining_pass(case):
    config, params, images, ids_keep = case
    out = jax.jit(InfMAE(config).apply)({"params": params}, images, ids_keep)
    latent, pred, loss = reference.forward(params, config, images, ids_keep)
    np.testing.assert_allclose(out.latent, latent, atol=2e-5)
    np.testing.assert_allclose(out.pred, pred, atol=2e-5)
    np.testing.assert_allclose(out.loss, loss, rtol=1e-5)
    expected_mask = np.ones((len(images), pred.shape[1]))
    for row, kept in zip(expected_mask, ids_keep, strict=True):
        row[kept] = 0
    np.testing.assert_array_equal(out.mask, expected_mask)


@all_configs
def test_features(case):
    config, params, images, _ = case
    feats = dense_features(config, {"encoder": params["encoder"]}, images)
    expected = reference.features(params, config, images)
    assert feats.keys() == expected.keys()
    for name, array in expected.items():
        assert feats[name].shape == array.shape
        # rtol: some features are as large as 25, where one float32 digit is 2e-6
        np.testing.assert_allclose(feats[name], array, atol=2e-5, rtol=2e-6, err_msg=name)


def test_features_with_fused_stages():
    rng = np.random.default_rng(6)
    images = rng.normal(size=(1, 32, 48, 3)).astype(np.float32)
    params = random_params(HYBRID, images, np.array([[0, 4]], np.int32), rng)
    feats = dense_features(HYBRID, params, images, fuse_stages=True)
    for name, array in reference.features(params, HYBRID, images, fuse=True).items():
        # rtol: some features are as large as 25, where one float32 digit is 2e-6
        np.testing.assert_allclose(feats[name], array, atol=2e-5, rtol=2e-6, err_msg=name)


@pytest.mark.parametrize("case", ["hybrid", "vit"], indirect=True)
def test_gradient_along_a_direction(case):
    """d loss / d t at params + t * direction, by central difference of the reference."""
    config, params, images, ids_keep = case
    rng = np.random.default_rng(4)
    direction = jax.tree.map(lambda leaf: rng.normal(size=leaf.shape), params)

    def shifted(t):
        moved = jax.tree.map(lambda leaf, step: leaf.astype(np.float64) + t * step, params, direction)
        return reference.forward(moved, config, images, ids_keep)[2]

    expected = (shifted(1e-5) - shifted(-1e-5)) / 2e-5
    gradient = jax.jit(jax.grad(lambda p: InfMAE(config).apply({"params": p}, images, ids_keep).loss))
    grads = gradient(params)
    got = sum(float(np.vdot(g, d)) for g, d in zip(jax.tree.leaves(grads), jax.tree.leaves(direction), strict=True))
    np.testing.assert_allclose(got, expected, rtol=1e-3)


def test_one_channel_is_repeated_which_equals_a_summed_kernel():
    rng = np.random.default_rng(5)
    gray = rng.normal(size=(1, 32, 32, 1)).astype(np.float32)
    params = random_params(HYBRID, gray, np.array([[0, 3]], np.int32), rng)
    single = HYBRID.replace(in_channels=1)
    kernel = params["encoder"]["patch_embed1"]["proj"]["kernel"].sum(axis=2, keepdims=True)
    embed = params["encoder"]["patch_embed1"]
    summed_encoder = params["encoder"] | {"patch_embed1": embed | {"proj": embed["proj"] | {"kernel": kernel}}}
    repeated = dense_features(HYBRID, params, gray)
    explicit = dense_features(HYBRID, params, np.repeat(gray, 3, axis=-1))
    summed = dense_features(single, {"encoder": summed_encoder}, gray)
    for name in repeated:
        np.testing.assert_allclose(repeated[name], explicit[name], atol=1e-6)
        np.testing.assert_allclose(repeated[name], summed[name], atol=1e-5)

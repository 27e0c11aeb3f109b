"""The visible-only path computes what the published, dense computation does, at a quarter of the convolution work.

With --long also every single way to compute that the short form has combined with others.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from infmae_jax.models import depthwise
from infmae_jax.models.config import InfMAEConfig
from infmae_jax.models.infmae import InfMAE
from tests.models.random_params import random_params

SMALL = InfMAEConfig().replace(
    widths=(8, 12, 16), depths=(2, 1, 1), heads=2, decoder_width=16, decoder_depth=1, decoder_heads=2, dtype="float64"
)


@pytest.fixture
def float64():
    with jax.enable_x64(True):
        yield


def random_batch(height=64, width=96, keep=6, batch=2, seed=0):
    rng = np.random.default_rng(seed)
    images = rng.standard_normal((batch, height, width, 3))
    tokens = height // 16 * (width // 16)
    ids_keep = np.stack([rng.permutation(tokens)[:keep] for _ in range(batch)]).astype(np.int32)
    return images, ids_keep


@functools.cache
def default_way(norm_pix):
    """The random batch, its parameters, and what the default way to compute makes of them."""
    images, ids_keep = random_batch()
    config = SMALL.replace(norm_pix_loss=norm_pix)
    params = random_params(InfMAE(config), images, ids_keep)
    return config, (params, images, ids_keep), evaluate(config, params, images, ids_keep)


def program(config):
    """Jitted: params, images, ids_keep -> (loss, all outputs), gradients."""

    def loss(params, images, ids_keep):
        out = InfMAE(config).apply({"params": params}, images, ids_keep)
        return out.loss, out

    return jax.jit(jax.value_and_grad(loss, has_aux=True))


compiled_once = functools.cache(program)


def evaluate(config, params, images, ids_keep):
    (_, out), grads = compiled_once(config)(params, images, ids_keep)
    return out, grads


@functools.cache
def forward(config):
    return jax.jit(InfMAE(config).apply)


def pytest_generate_tests(metafunc):
    if "norm_pix" in metafunc.fixturenames:
        metafunc.parametrize("change, norm_pix", WAYS + (ALONE if metafunc.config.getoption("--long") else []))


PUBLISHED = {"predict_masked_only": False, "visible_only": False}
WAYS = [
    (PUBLISHED, False), ({"visible_only": False, "depthwise": "conv"}, True), ({"depthwise": "conv"}, False),
    ({"predict_masked_only": False, "remat": True}, True),
]  # fmt: skip
ALONE = [
    ({"visible_only": False}, False), ({"visible_only": False}, True), ({"remat": True}, False),
    ({"visible_only": False, "depthwise": "conv"}, False), ({"predict_masked_only": False}, False),
]  # fmt: skip


def test_every_way_to_compute_gives_the_same_latent_loss_and_gradients(float64, change, norm_pix):
    config, inputs, ours = default_way(norm_pix)
    assert_same(ours, evaluate(config.replace(**change), *inputs))


def test_the_way_of_tpus_gives_the_same_latent_loss_and_gradients(float64):
    config, inputs, ours = default_way(False)
    assert depthwise._BEST["tpu"] == "windows"
    assert_same(ours, evaluate(config.replace(depthwise="windows", attention="heads"), *inputs))


def assert_same(ours, theirs):
    (out, grads), (other, other_grads) = ours, theirs
    assert out.latent.dtype == jnp.float64
    for name in ("latent", "loss", "pred"):
        np.testing.assert_allclose(getattr(out, name), getattr(other, name), rtol=0, atol=1e-10, err_msg=name)
    flat, other_flat = jax.tree_util.tree_leaves_with_path(grads), jax.tree.leaves(other_grads)
    for (path, grad), other_grad in zip(flat, other_flat, strict=True):
        np.testing.assert_allclose(grad, other_grad, rtol=0, atol=1e-10, err_msg=jax.tree_util.keystr(path))
        assert np.abs(grad).max() > 0, f"{jax.tree_util.keystr(path)} has no gradient: the comparison shows nothing"


@pytest.mark.parametrize("change", [{"norm_pix_loss": True}, PUBLISHED, {"kind": "vit"}])
def test_one_channel_computes_what_three_equal_ones_do(float64, change):
    images, ids_keep = random_batch()
    config = SMALL.replace(**change)
    params = random_params(InfMAE(config), images, ids_keep)
    one, one_grads = evaluate(config, params, images[..., :1], ids_keep)
    three, three_grads = evaluate(config, params, np.repeat(images[..., :1], 3, axis=-1), ids_keep)
    for name in ("latent", "loss", "pred"):
        np.testing.assert_allclose(getattr(one, name), getattr(three, name), rtol=0, atol=1e-10, err_msg=name)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=0, atol=1e-10), one_grads, three_grads)


@pytest.mark.parametrize("visible_only", [True, False])
def test_masked_pixels_do_not_reach_the_latent(visible_only):
    images, ids_keep = random_batch()
    config = SMALL.replace(dtype="float32", visible_only=visible_only)
    images = images.astype(np.float32)
    params = random_params(InfMAE(config), images, ids_keep)
    noisy = images.copy()
    rng = np.random.default_rng(5)
    for sample, keep in enumerate(ids_keep):
        for token in set(range(24)) - set(keep.tolist()):
            row, column = divmod(token, 6)
            noise = 100 * rng.standard_normal((16, 16, 3))
            noisy[sample, row * 16 : row * 16 + 16, column * 16 : column * 16 + 16] = noise

    def encode(pixels):
        return forward(config)({"params": params}, pixels, ids_keep).latent

    clean, changed = encode(images), encode(noisy)
    assert np.abs(clean - changed).max() == 0
    visible = noisy.copy()
    row, column = divmod(int(ids_keep[0, 0]), 6)
    visible[0, row * 16, column * 16] += 1
    assert np.abs(encode(visible) - changed).max() > 0


def test_dense_features_are_the_pretraining_path_with_every_token_visible(float64):
    images, _ = random_batch()
    everything = np.tile(np.arange(24, dtype=np.int32), (2, 1))
    params = random_params(InfMAE(SMALL), images, everything)
    model = InfMAE(SMALL)

    @functools.partial(jax.jit, static_argnames="fuse_stages")
    def dense(params, fuse_stages):
        return model.apply({"params": params}, images, fuse_stages=fuse_stages, method="features")

    latent = jax.jit(model.apply)({"params": params}, images, everything[:, ::-1]).latent
    features = dense(params, fuse_stages=True)
    np.testing.assert_allclose(features["pooled"], latent.mean(axis=1), atol=1e-10)
    assert {k: v.shape for k, v in features.items()} == {
        "stage1": (2, 16, 24, 8), "stage2": (2, 8, 12, 12), "stage3": (2, 4, 6, 16), "pooled": (2, 16),
    }  # fmt: skip
    plain = dense({"encoder": params["encoder"]}, fuse_stages=False)
    assert np.abs(plain["stage3"] - features["stage3"]).max() > 1e-3


def test_latent_follows_the_order_of_the_kept_tokens():
    images, ids_keep = random_batch()
    config = SMALL.replace(dtype="float32")
    images = images.astype(np.float32)
    params = random_params(InfMAE(config), images, ids_keep)
    out, turned = (forward(config)({"params": params}, images, ids) for ids in (ids_keep, ids_keep[:, ::-1]))
    np.testing.assert_allclose(out.latent[:, ::-1], turned.latent, atol=2e-5)
    np.testing.assert_allclose(out.loss, turned.loss, rtol=1e-5)
    np.testing.assert_array_equal(out.mask, turned.mask)
    assert (out.mask.sum(axis=1) == 24 - 6).all()

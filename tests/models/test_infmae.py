"""Shapes, precision, variants and refusals of the model."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from infmae_jax.models import patches
from infmae_jax.models.config import InfMAEConfig, variant
from infmae_jax.models.infmae import InfMAE, masked_loss
from tests.models.random_params import random_params

TINY = dict(widths=(8, 12, 16), depths=(1, 1, 1), heads=2, decoder_width=16, decoder_depth=1, decoder_heads=2)


def shapes_of(config, size=(224, 224), keep=49):
    images = jax.ShapeDtypeStruct((1, *size, 1), jnp.float32)
    ids_keep = jax.ShapeDtypeStruct((1, keep), jnp.int32)
    return jax.eval_shape(InfMAE(config).init, jax.random.key(0), images, ids_keep)["params"]


def count(tree):
    return sum(leaf.size for leaf in jax.tree.leaves(tree))


def test_base_has_the_published_number_of_parameters():
    # 96,717,696 in the release, which counts two fixed position tables and the convolution that only scores tokens.
    fixed = 196 * 768 + 196 * 512 + (16 * 16 * 3 * 768 + 768)
    assert count(shapes_of(variant("base"))["encoder"]) + count(shapes_of(variant("base"))["decoder"]) == (
        96_717_696 - fixed
    )


@pytest.mark.parametrize("name, encoder", [("base", 85_798_656), ("large", 303_301_632), ("huge", 630_434_560)])
def test_vit_variants_have_the_encoders_of_mae(name, encoder):
    """Parameters of ViT-B, -L and -H without their classification head, position table and final pooling."""
    depth = {"base": 12, "large": 24, "huge": 32}[name]
    config = variant(name, kind="vit", depths=(0, 0, depth))
    width = config.encoder.widths[-1]
    patch = (16 * 16 * 3 + 1) * width
    block = 4 * width + 3 * width * (width + 1) + width * (width + 1) + 8 * width * width + 5 * width
    assert count(shapes_of(config)["encoder"]) == patch + width + depth * block + 2 * width


@pytest.mark.parametrize("encoder, size, in_channels", [
    ("hybrid", (32, 80), 1), ("hybrid", (64, 48), 3), ("vit", (64, 48), 1), ("vit", (32, 80), 3),
])  # fmt: skip
def test_sizes_and_channels(encoder, size, in_channels):
    config = InfMAEConfig().replace(kind=encoder, in_channels=in_channels, **TINY)
    n = size[0] // 16 * (size[1] // 16)
    rng = np.random.default_rng(0)
    images = rng.standard_normal((2, *size, 1)).astype(np.float32)
    ids_keep = np.stack([rng.permutation(n)[:4] for _ in range(2)]).astype(np.int32)
    model = InfMAE(config)
    apply = jax.jit(model.apply)
    params = random_params(model, images, ids_keep)
    out = apply({"params": params}, images, ids_keep)
    assert out.pred.shape == (2, n, 256 * in_channels)
    assert out.latent.shape == (2, 4 + (encoder == "vit"), 16)
    assert out.loss.shape == () and np.isfinite(out.loss)
    if in_channels == 3:
        repeated = apply({"params": params}, np.repeat(images, 3, axis=-1), ids_keep)
        np.testing.assert_allclose(out.pred, repeated.pred, atol=1e-5)
    with pytest.raises(ValueError, match="channels"):
        jax.eval_shape(model.apply, {"params": params}, np.zeros((2, *size, 2), np.float32), ids_keep)


def test_sizes_that_do_not_divide_are_refused():
    with pytest.raises(ValueError, match="100x64 is not divisible by the patch side 16"):
        shapes_of(InfMAEConfig().replace(**TINY), size=(100, 64), keep=4)


@pytest.mark.parametrize("encoder", ["hybrid", "vit"])
def test_bfloat16_keeps_parameters_norms_and_loss_in_float32(encoder):
    config = InfMAEConfig().replace(kind=encoder, dtype="bfloat16", **TINY)
    rng = np.random.default_rng(0)
    images = rng.standard_normal((2, 64, 64, 1)).astype(np.float32)
    ids_keep = np.stack([rng.permutation(16)[:4] for _ in range(2)]).astype(np.int32)
    params = random_params(InfMAE(config), images, ids_keep)
    assert {leaf.dtype.name for leaf in jax.tree.leaves(params)} == {"float32"}
    grads = jax.jit(jax.grad(lambda p: InfMAE(config).apply({"params": p}, images, ids_keep).loss))(params)
    assert {leaf.dtype.name for leaf in jax.tree.leaves(grads)} == {"float32"}
    out = jax.jit(InfMAE(config).apply)({"params": params}, images, ids_keep)
    assert (out.latent.dtype, out.pred.dtype, out.loss.dtype) == (jnp.bfloat16, jnp.float32, jnp.float32)
    exact = jax.jit(InfMAE(config.replace(dtype="float32")).apply)({"params": params}, images, ids_keep)
    np.testing.assert_allclose(out.loss, exact.loss, rtol=0.01)


def test_loss_counts_masked_patches_only():
    rng = np.random.default_rng(0)
    pred, target = rng.standard_normal((2, 3, 5, 8)).astype(np.float32)
    mask = np.array([[0, 1, 1, 0, 0], [1, 0, 0, 0, 0], [0, 0, 0, 1, 1]], np.float32)
    terms, normal = [], []
    for b, t in zip(*np.nonzero(mask)):
        patch = target[b, t].astype(np.float64)
        terms.append(((pred[b, t] - patch) ** 2).mean())
        variance = ((patch - patch.mean()) ** 2).sum() / 7
        normal.append(((pred[b, t] - (patch - patch.mean()) / (variance + 1e-6) ** 0.5) ** 2).mean())
    np.testing.assert_allclose(masked_loss(pred, target, mask, False), np.mean(terms), rtol=1e-6)
    np.testing.assert_allclose(masked_loss(pred, target, mask, True), np.mean(normal), rtol=1e-6)


def test_position_embedding_encodes_columns_first():
    table = patches.position_embedding((2, 3), 8)
    for token in range(6):
        row, column = divmod(token, 3)
        expected = [f(v * o) for v in (column, row) for f in (np.sin, np.cos) for o in (1.0, 0.01)]
        np.testing.assert_allclose(table[token], expected, atol=1e-6)


@pytest.mark.parametrize("change, message", [
    (dict(kind="cnn"), "kind='cnn'"), (dict(heads=5), "768"), (dict(dtype="int8"), "int8"),
    (dict(attention="flash"), "attention='flash' must be one of auto, xla, heads, cudnn"),
    (dict(decoder_depth=0), "decoder.depth=0"),
])  # fmt: skip
def test_impossible_architectures_are_refused(change, message):
    with pytest.raises(ValueError, match=message):
        InfMAEConfig().replace(**change)


def test_unknown_variant_is_named():
    with pytest.raises(ValueError, match="'gigantic' is not one of tiny, small, base"):
        variant("gigantic")


def test_an_override_goes_to_the_part_that_has_it():
    config = variant("tiny", dtype="bfloat16", decoder_depth=3, norm_pix_loss=True, predict_masked_only=False)
    assert (config.encoder.dtype, config.encoder.depths) == ("bfloat16", (2, 2, 4))
    assert (config.decoder.depth, config.decoder.width, config.decoder.predict_masked_only) == (3, 128, False)
    assert config.norm_pix_loss
    with pytest.raises(TypeError, match="widhts"):
        variant("tiny", widhts=(1, 2, 3))


@pytest.mark.parametrize("ids, message", [
    ([[0, 16]], "names token 16, the images have tokens 0 to 15"), ([[-1, 2]], "names token -1"),
    ([0, 1], "must be"), ([[0.0, 1.0]], "integers"), ([[0], [1]], "must be"), ([[]], "must be"),
])  # fmt: skip
def test_visible_tokens_outside_the_image_are_refused(ids, message):
    model = InfMAE(InfMAEConfig().replace(**TINY))
    params = jax.tree.map(lambda leaf: np.zeros(leaf.shape, leaf.dtype), shapes_of(model.config))
    with pytest.raises(ValueError, match=message):
        model.apply({"params": params}, np.zeros((1, 64, 64, 1), np.float32), np.array(ids))

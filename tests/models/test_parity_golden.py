"""The numbers that the published code computes, from weights in the published format.

`golden/` is kept outside the repository: these tests skip where it is absent; the slow reference next door stands in.
"""

import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import traverse_util

from data_pipelines.masking import mask_from_ids, select_visible, token_scores
from infmae_jax.interop import names
from infmae_jax.interop.load import load
from infmae_jax.models.infmae import InfMAE, masked_loss
from infmae_jax.models.patches import normalize, patchify
from infmae_jax.training.config import OptimizerConfig
from infmae_jax.training.optimizer import make_optimizer, make_schedule
from tests.interop import published_format

ACTIVATION_TOLERANCE = 2e-5  # absolute
LOSS_TOLERANCE = 1e-5  # relative
GRADIENT_TOLERANCE = 1e-4  # relative
TRAJECTORY_TOLERANCE = 1e-4  # relative

both_paths = pytest.mark.parametrize("visible_only", [True, False], ids=["visible_only", "all_patches"])


@pytest.fixture(scope="module")
def infmae(shared_folder):
    return load_golden(shared_folder / "golden" / "infmae_tiny")


@pytest.fixture(scope="module")
def mae(shared_folder):
    return load_golden(shared_folder / "golden" / "mae_tiny")


def load_golden(folder):
    """The imported checkpoint, what the published code computed with it, and its settings."""
    meta = json.loads((folder / "meta.json").read_text())
    heads = {"heads": meta["config"]["num_heads"], "decoder_heads": meta["config"]["decoder_num_heads"]}
    checkpoint = load(folder / "checkpoint.pth", **heads)
    with np.load(folder / "activations.npz") as arrays:
        return checkpoint, dict(arrays), meta


def network_input(images):
    return normalize(jnp.asarray(images)[..., None])


def forward(config, params, images, ids_keep):
    return jax.jit(InfMAE(config).apply)({"params": params}, network_input(images), jnp.asarray(ids_keep, jnp.int32))


def dense_features(checkpoint, images):
    features = functools.partial(InfMAE(checkpoint.config).apply, method="features")
    return jax.jit(features)({"params": checkpoint.params}, network_input(images))


def assert_close(name, got, expected, absolute=0.0, relative=0.0):
    got, expected = np.asarray(got, np.float64), np.asarray(expected, np.float64)
    error = np.abs(got - expected).max() if absolute else np.abs(got / expected - 1).max()
    print(f"{name}: max {'absolute' if absolute else 'relative'} error {error:.2e}")
    assert got.shape == expected.shape and error <= (absolute or relative), name


def test_golden_checkpoint_has_the_published_names(infmae, mae):
    for (checkpoint, _, _), shapes in ((infmae, published_format.infmae_shapes), (mae, published_format.mae_shapes)):
        model = checkpoint.config
        expected = shapes(model.encoder.widths, model.encoder.depths, model.decoder.width, model.decoder.depth)
        entries = names.table(model)
        scoring = set() if model.encoder.kind == "vit" else {"patch_embed.proj.weight", "patch_embed.proj.bias"}
        assert {entry.name for entry in entries} | scoring == set(expected)


def test_scores_and_masks(infmae):
    checkpoint, golden, _ = infmae
    scores = token_scores(golden["images_u8"][:4], checkpoint.mask)
    ids_keep = select_visible(scores, checkpoint.mask)
    assert_close("score", scores, golden["score"], absolute=1e-5)
    np.testing.assert_array_equal(ids_keep, golden["ids_keep"])
    np.testing.assert_array_equal(mask_from_ids(ids_keep, 196), golden["mask"])


@both_paths
def test_forward(infmae, visible_only):
    checkpoint, golden, _ = infmae
    config = checkpoint.config.replace(visible_only=visible_only)
    out = forward(config, checkpoint.params, golden["images_u8"][:4], golden["ids_keep"])
    np.testing.assert_array_equal(out.mask, golden["mask"])
    assert_close("latent", out.latent, golden["latent"], absolute=ACTIVATION_TOLERANCE)
    assert_close("pred", out.pred, golden["pred"], absolute=ACTIVATION_TOLERANCE)
    assert_close("loss", out.loss, golden["loss"], relative=LOSS_TOLERANCE)
    target = patchify(jnp.repeat(network_input(golden["images_u8"][:4]), 3, axis=-1))
    normalised = masked_loss(out.pred, target, out.mask, norm_pix=True)
    assert_close("loss_norm_pix", normalised, golden["loss_norm_pix"], relative=LOSS_TOLERANCE)


def test_features(infmae):
    checkpoint, golden, _ = infmae
    feats = dense_features(checkpoint, golden["images_u8"][:4])
    for stage in ("stage1", "stage2"):
        channels_first = np.asarray(feats[stage]).transpose(0, 3, 1, 2)
        assert_close(stage, channels_first, golden[stage], absolute=ACTIVATION_TOLERANCE)
    stage3 = np.asarray(feats["stage3"]).reshape(golden["stage3"].shape)
    assert_close("stage3", stage3, golden["stage3"], absolute=ACTIVATION_TOLERANCE)
    assert_close("pooled", feats["pooled"], golden["pooled"], absolute=ACTIVATION_TOLERANCE)


@both_paths
def test_gradients_and_training(infmae, visible_only):
    """Twelve steps with this project's optimizer and schedule: images 0-3 on even steps, 4-7 on odd ones."""
    checkpoint, golden, meta = infmae
    settings = meta["optimizer"]
    model = InfMAE(checkpoint.config.replace(visible_only=visible_only))
    b1, b2 = settings["betas"]
    config = OptimizerConfig(
        base_learning_rate=settings["base_lr"], b1=b1, b2=b2, weight_decay=settings["weight_decay"]
    )
    schedule = make_schedule(config, 256, settings["warmup_steps"], settings["total_steps"])
    optimizer = make_optimizer(config)
    images = golden["images_u8"]
    ids_keep = select_visible(token_scores(images, checkpoint.mask), checkpoint.mask)

    @jax.jit
    def step(params, state, rate, images, ids_keep):
        loss, grads = jax.value_and_grad(lambda p: model.apply({"params": p}, images, ids_keep).loss)(params)
        direction, state = optimizer.update(grads, state, params)
        return jax.tree.map(lambda p, d: p - rate * d, params, direction), state, loss, grads

    params, state, losses = checkpoint.params, optimizer.init(checkpoint.params), []
    for index in range(settings["steps_run"]):
        part = slice(0, 4) if index % 2 == 0 else slice(4, 8)
        params, state, loss, grads = step(params, state, schedule(index), network_input(images[part]), ids_keep[part])
        losses.append(float(loss))
        if index == 0:
            check_gradient_norms(model.config, grads, golden, meta)
    rates = [float(schedule(index)) for index in range(settings["steps_run"])]
    np.testing.assert_allclose(rates, golden["train_lrs"], rtol=1e-6, atol=1e-12)
    assert_close("train_losses", losses, golden["train_losses"], relative=TRAJECTORY_TOLERANCE)


def check_gradient_norms(config, grads, golden, meta):
    grads = traverse_util.flatten_dict(grads)
    norms = {entry.name: np.linalg.norm(np.asarray(grads[entry.path], np.float64)) for entry in names.table(config)}
    expected = {name: norm for name, norm in meta["grad_norms"].items() if norm is not None}
    assert norms.keys() == expected.keys()
    got, want = [norms[name] for name in expected], list(expected.values())
    assert_close("gradient norms", got, want, relative=GRADIENT_TOLERANCE)
    whole = np.sqrt(sum(norm**2 for norm in norms.values()))
    assert_close("global gradient norm", whole, golden["grad_norm/_global"], relative=GRADIENT_TOLERANCE)


def test_mae_forward(mae):
    checkpoint, golden, _ = mae
    ids_keep = np.argsort(golden["noise"], axis=1, kind="stable")[:, : golden["ids_keep"].shape[1]]
    np.testing.assert_array_equal(ids_keep, golden["ids_keep"])
    out = forward(checkpoint.config, checkpoint.params, golden["images_u8"], ids_keep)
    np.testing.assert_array_equal(out.mask, golden["mask"])
    assert_close("MAE latent", out.latent, golden["latent"], absolute=ACTIVATION_TOLERANCE)
    assert_close("MAE pred", out.pred, golden["pred"], absolute=ACTIVATION_TOLERANCE)
    assert_close("MAE loss", out.loss, golden["loss"], relative=LOSS_TOLERANCE)
    feats = dense_features(checkpoint, golden["images_u8"])
    assert_close("MAE features", feats["tokens"], golden["features"], absolute=ACTIVATION_TOLERANCE)
    assert_close("MAE pooled", feats["pooled"], golden["features"][:, 1:].mean(axis=1), absolute=ACTIVATION_TOLERANCE)

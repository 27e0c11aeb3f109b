"""bfloat16 computation on real crops: the loss of float32, and training that stays finite."""

import dataclasses

import jax
import numpy as np
import optax
import pytest
from PIL import Image

from data_pipelines.masking import MaskConfig, select_visible, token_scores
from infmae_jax.models.infmae import InfMAE, variant
from infmae_jax.models.patches import normalize
from infmae_jax.training.config import OptimizerConfig
from infmae_jax.training.optimizer import make_optimizer, peak_learning_rate, warmup_half_cosine

PUBLISHED_BATCH = 256
STEPS, WARMUP = 200, 20


def real_crops(shared_folder, count, size):
    """(count, size, size) uint8 random crops of real images."""
    files = sorted((shared_folder / "data" / "hit_uav" / "images" / "val").glob("*.jpg"))
    rng = np.random.default_rng(0)
    crops = []
    for index in range(count):
        image = np.asarray(Image.open(files[index * 7 % len(files)]).convert("L"))
        top, left = (rng.integers(0, extent - size + 1) for extent in image.shape)
        crops.append(image[top : top + size, left : left + size])
    return np.stack(crops)


def batch_of(crops):
    mask = MaskConfig()
    return normalize(crops[..., None]), select_visible(token_scores(crops, mask), mask)


@pytest.mark.parametrize("norm_pix_loss", [False, True])
def test_loss_of_base_is_that_of_float32(shared_folder, norm_pix_loss):
    images, ids_keep = batch_of(real_crops(shared_folder, 2, 224))
    single = variant("base", norm_pix_loss=norm_pix_loss)
    half = dataclasses.replace(single, dtype="bfloat16")
    params = jax.jit(InfMAE(single).init)(jax.random.key(0), images, ids_keep)["params"]
    losses = [float(jax.jit(InfMAE(c).apply)({"params": params}, images, ids_keep).loss) for c in (single, half)]
    print(f"Base loss float32 {losses[0]:.6f}, bfloat16 {losses[1]:.6f}: {abs(losses[1] / losses[0] - 1):.2e} relative")
    np.testing.assert_allclose(losses[1], losses[0], rtol=0.01)


def test_training_at_the_published_rate_stays_finite(shared_folder):
    """Tiny variant on small crops, so that a CPU does 200 steps in seconds."""
    model = InfMAE(variant("tiny", dtype="bfloat16", depths=(1, 1, 2)))
    config = OptimizerConfig()
    schedule = warmup_half_cosine(peak_learning_rate(config, PUBLISHED_BATCH), WARMUP, STEPS)
    optimizer = make_optimizer(config)
    images, ids_keep = batch_of(real_crops(shared_folder, 64, 64))
    params = jax.jit(model.init)(jax.random.key(0), images[:1], ids_keep[:1])["params"]

    @jax.jit
    def step(params, state, rate, images, ids_keep):
        loss, grads = jax.value_and_grad(lambda p: model.apply({"params": p}, images, ids_keep).loss)(params)
        direction, state = optimizer.update(grads, state, params)
        params = jax.tree.map(lambda p, d: p - rate * d, params, direction)
        return params, state, loss, optax.global_norm(grads)

    state, losses = optimizer.init(params), []
    for index in range(STEPS):
        part = slice(index * 16 % 64, index * 16 % 64 + 16)
        params, state, loss, norm = step(params, state, schedule(index), images[part], ids_keep[part])
        assert np.isfinite(loss) and np.isfinite(norm), f"step {index}: loss {loss}, gradient norm {norm}"
        losses.append(float(loss))
    print(f"loss of the first four batches {np.mean(losses[:4]):.4f}, of the last four {np.mean(losses[-4:]):.4f}")
    assert np.mean(losses[-4:]) < 0.8 * np.mean(losses[:4])
    assert {leaf.dtype for leaf in jax.tree.leaves(params)} == {np.dtype(np.float32)}

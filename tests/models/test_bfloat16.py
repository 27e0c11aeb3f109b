"""bfloat16 computation on real crops: the loss of float32, and training that stays finite."""

import functools

import jax
import numpy as np
import optax
from PIL import Image

from data_pipelines.masking import MaskConfig, select_visible, token_scores
from infmae_jax.models.config import variant
from infmae_jax.models.infmae import InfMAE
from infmae_jax.models.patches import normalize
from infmae_jax.training.config import OptimizerConfig
from infmae_jax.training.optimizer import make_optimizer, make_schedule
from tests.models.random_params import random_params

PUBLISHED_BATCH = 256
STEPS, WARMUP, BATCH = 100, 10, 8


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


def test_loss_is_that_of_float32(shared_folder, request):
    """Of Base with --long, else of the tiny variant."""
    long = request.config.getoption("--long")
    images, ids_keep = batch_of(real_crops(shared_folder, 2, 224 if long else 112))
    single = variant("base") if long else variant("tiny", depths=(1, 1, 2))
    params = random_params(InfMAE(single), images, ids_keep, noise=0.0)

    @functools.partial(jax.jit, static_argnums=0)
    def losses(dtype, params, images, ids_keep):
        both = (single.replace(dtype=dtype, norm_pix_loss=norm) for norm in (False, True))
        return [InfMAE(config).apply({"params": params}, images, ids_keep).loss for config in both]

    exact, half = (np.array(losses(dtype, params, images, ids_keep)) for dtype in ("float32", "bfloat16"))
    print(f"loss, also of normalised pixels: float32 {exact}, bfloat16 off by {half / exact - 1}")
    np.testing.assert_allclose(half, exact, rtol=0.01)


def test_training_at_the_published_rate_stays_finite(shared_folder):
    """Tiny variant on small crops, so that a CPU does the steps in seconds."""
    model = InfMAE(variant("tiny", dtype="bfloat16", depths=(1, 1, 2)))
    config = OptimizerConfig()
    schedule = make_schedule(config, PUBLISHED_BATCH, WARMUP, STEPS)
    optimizer = make_optimizer(config)
    images, ids_keep = batch_of(real_crops(shared_folder, 4 * BATCH, 64))
    params = random_params(model, images[:1], ids_keep[:1], noise=0.0)

    @jax.jit
    def step(params, state, rate, images, ids_keep):
        loss, grads = jax.value_and_grad(lambda p: model.apply({"params": p}, images, ids_keep).loss)(params)
        direction, state = optimizer.update(grads, state, params)
        params = jax.tree.map(lambda p, d: p - rate * d, params, direction)
        return params, state, loss, optax.global_norm(grads)

    state, losses = optimizer.init(params), []
    for index in range(STEPS):
        part = slice(index % 4 * BATCH, (index % 4 + 1) * BATCH)
        params, state, loss, norm = step(params, state, schedule(index), images[part], ids_keep[part])
        assert np.isfinite(loss) and np.isfinite(norm), f"step {index}: loss {loss}, gradient norm {norm}"
        losses.append(float(loss))
    print(f"loss of the first four batches {np.mean(losses[:4]):.4f}, of the last four {np.mean(losses[-4:]):.4f}")
    assert np.mean(losses[-4:]) < 0.8 * np.mean(losses[:4])
    assert {leaf.dtype for leaf in jax.tree.leaves(params)} == {np.dtype(np.float32)}

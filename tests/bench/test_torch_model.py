"""The PyTorch model that benchmarks compare with computes what ours computes: loss, features, training."""

import functools
import sys

import jax
import numpy as np
import optax
import pytest

from data_pipelines.errors import InputError
from infmae_jax.models.config import InfMAEConfig
from infmae_jax.models.infmae import InfMAE
from infmae_jax.models.patches import normalize
from infmae_jax.training.config import OptimizerConfig
from infmae_jax.training.optimizer import make_optimizer

SMALL = InfMAEConfig().replace(
    widths=(8, 12, 16), depths=(2, 1, 2), heads=2, mlp_ratio=2, decoder_width=16, decoder_depth=1, decoder_heads=4
)
SIZE = (64, 96)


@pytest.fixture(scope="module")
def torch_model():
    pytest.importorskip("torch", reason="PyTorch is not installed; it is needed only to compare with it")
    from infmae_jax.bench import torch_model

    return torch_model


@pytest.fixture(scope="module")
def batch():
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (3, *SIZE, 1), dtype=np.uint8)
    ids_keep = np.stack([rng.permutation(24)[:6] for _ in images]).astype(np.int32)
    return images, ids_keep


def random_params(config, images, ids_keep):
    """Nothing left at zero or one, so that a parameter in the wrong place shows."""
    shapes = jax.eval_shape(InfMAE(config).init, jax.random.key(0), normalize(images), ids_keep)["params"]
    rng = np.random.default_rng(1)
    return jax.tree.map(lambda leaf: rng.normal(size=leaf.shape, scale=0.2).astype(np.float32), shapes)


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("change", [{}, {"norm_pix_loss": True, "fuse_stages": False}])
def test_same_loss_and_gradient_norm(torch_model, batch, fused, change):
    images, ids_keep = batch
    config = SMALL.replace(**change)
    params = random_params(config, images, ids_keep)
    model = torch_model.from_params(config, params, SIZE, fused)
    value = model(*torch_model.batch(images, ids_keep, config.encoder.in_channels))
    value.backward()
    norm = np.sqrt(sum(float(p.grad.square().sum()) for p in model.parameters()))
    ours = jax.jit(jax.value_and_grad(lambda p: InfMAE(config).apply({"params": p}, normalize(images), ids_keep).loss))
    loss, grads = ours(params)
    np.testing.assert_allclose(value.item(), loss, rtol=1e-5)
    np.testing.assert_allclose(norm, optax.global_norm(grads), rtol=1e-4)


def test_same_features(torch_model, batch):
    images, ids_keep = batch
    params = random_params(SMALL, images, ids_keep)
    model = torch_model.from_params(SMALL, params, SIZE)
    theirs = model.features(torch_model.batch(images, ids_keep, SMALL.encoder.in_channels)[0])
    features = jax.jit(functools.partial(InfMAE(SMALL).apply, method="features"))
    ours = features({"params": {"encoder": params["encoder"]}}, normalize(images))
    for stage in ("stage1", "stage2"):
        np.testing.assert_allclose(theirs[stage].permute(0, 2, 3, 1).detach(), ours[stage], atol=1e-5)
    np.testing.assert_allclose(theirs["stage3"].detach(), ours["stage3"].reshape(3, 24, 16), atol=1e-5)
    np.testing.assert_allclose(theirs["pooled"].detach(), ours["pooled"], atol=1e-5)


def test_same_losses_in_training(torch_model, batch):
    """Five AdamW updates: decay on the same parameters, the same moments."""
    images, ids_keep = batch
    config = OptimizerConfig(weight_decay=0.5)
    params = random_params(SMALL, images, ids_keep)
    inputs, rate = torch_model.batch(images, ids_keep, SMALL.encoder.in_channels), 2e-3
    call = torch_model.train_call(torch_model.from_params(SMALL, params, SIZE), config, rate, inputs)
    theirs = [call(1) for _ in range(5)]
    optimizer = make_optimizer(config)

    @jax.jit
    def ours(params, state):
        loss = lambda p: InfMAE(SMALL).apply({"params": p}, normalize(images), ids_keep).loss  # noqa: E731
        value, grads = jax.value_and_grad(loss)(params)
        direction, state = optimizer.update(grads, state, params)
        return jax.tree.map(lambda p, d: p - rate * d, params, direction), state, value

    state, losses = optimizer.init(params), []
    for _ in theirs:
        params, state, value = ours(params, state)
        losses.append(float(value))
    assert losses[0] > 1.001 * losses[-1]
    np.testing.assert_allclose(theirs, losses, rtol=2e-5)


def test_without_pytorch_the_remedy_is_named(monkeypatch):
    monkeypatch.delitem(sys.modules, "infmae_jax.bench.torch_model", raising=False)
    monkeypatch.setitem(sys.modules, "torch", None)
    with pytest.raises(InputError, match="pip install torch"):
        import infmae_jax.bench.torch_model  # noqa: F401

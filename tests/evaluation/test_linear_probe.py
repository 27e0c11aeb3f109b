import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest

from data_pipelines.errors import InputError
from infmae_jax.evaluation.linear_probe import Recipe, optimizer, standardise, train_heads


def blobs(seed=0, n=120, width=12, classes=3, spread=0.3):
    """Classes around far corners of a space whose axes have very different means and scales."""
    rng = np.random.default_rng(seed)
    labels = (np.arange(n) % classes).astype(np.int32)
    points = rng.normal(size=(classes, width))[labels] * 3 + spread * rng.normal(size=(n, width))
    return (points * 10.0 ** rng.uniform(-3, 3, width) + 100 * rng.normal(size=width)).astype(np.float32), labels


def accuracy(heads, features, labels):
    return (heads.logits(features).argmax(-1) == labels).mean(axis=1)


def test_separable_classes_are_separated():
    features, labels = blobs()
    heads = train_heads(features[:90, None], labels[:90], 3, Recipe(batch_size=32), seeds=range(3))
    np.testing.assert_array_equal(accuracy(heads, features[90:], labels[90:]), [1, 1, 1])


def test_labels_without_relation_are_not_predicted():
    features, _ = blobs()
    labels = np.random.default_rng(1).integers(0, 3, 120).astype(np.int32)
    heads = train_heads(features[:60, None], labels[:60], 3, Recipe(batch_size=32), seeds=[0])
    assert accuracy(heads, features[60:], labels[60:])[0] < 0.6


def test_normalisation_equals_numpy():
    features, labels = blobs()
    heads = train_heads(features[:, None], labels, 3, Recipe(epochs=1, warmup_epochs=0), seeds=[0])
    exact = features.astype(np.float64)
    np.testing.assert_allclose(heads.mean, exact.mean(0), rtol=1e-6)
    np.testing.assert_allclose(heads.variance, exact.var(0), rtol=1e-6)
    x = np.random.default_rng(0).normal(3, 2, (17, 5))
    want = (x - x.mean(0)) / np.sqrt(x.var(0) + 1e-6)
    np.testing.assert_allclose(standardise(jnp.asarray(x, jnp.float32)), want, atol=2e-6)


def test_first_step_of_lars_equals_hand_computation():
    # No warm-up: the first rate is the peak. The kernel moves 0.001 * rate of its own norm, along the gradient; the
    # bias by the plain rate.
    recipe = Recipe(epochs=10, warmup_epochs=0, base_learning_rate=0.1, reference_batch=16384)
    assert recipe.peak_learning_rate == pytest.approx(6.4)
    params = {"kernel": jnp.array([[3.0, 0.0], [0.0, 4.0]]), "bias": jnp.zeros(2)}
    gradient = {"kernel": jnp.array([[0.0, 2.0], [0.0, 0.0]]), "bias": jnp.array([0.5, -1.0])}
    tx = optimizer(recipe, steps=70)
    updates, _ = tx.update(gradient, tx.init(params), params)
    np.testing.assert_allclose(updates["kernel"], [[0, -6.4 * 0.001 * 5.0], [0, 0]], rtol=1e-6)
    np.testing.assert_allclose(updates["bias"], [-3.2, 6.4], rtol=1e-6)


def test_rate_without_reference_batch_follows_the_batch():
    assert Recipe(batch_size=512, reference_batch=0).peak_learning_rate == pytest.approx(0.2)


def reference_training(features, labels, classes, recipe, kernel):
    """Full-batch training in float64: cosine schedule with warm-up, LARS with momentum 0.9 of rated updates."""
    bias, moments = np.zeros(classes), [0.0, 0.0]
    x = (features - features.mean(0)) / np.sqrt(features.var(0) + 1e-6)
    target = np.eye(classes)[labels]
    for step in range(recipe.epochs):
        if step < recipe.warmup_epochs:
            rate = recipe.peak_learning_rate * step / recipe.warmup_epochs
        else:
            done = (step - recipe.warmup_epochs) / (recipe.epochs - recipe.warmup_epochs)
            rate = recipe.peak_learning_rate * (1 + np.cos(np.pi * done)) / 2
        logits = x @ kernel + bias
        odds = np.exp(logits - logits.max(1, keepdims=True))
        error = (odds / odds.sum(1, keepdims=True) - target) / len(x)
        grad = x.T @ error
        trust = 0.001 * np.linalg.norm(kernel) / np.linalg.norm(grad)
        moments = [0.9 * moments[0] + rate * trust * grad, 0.9 * moments[1] + rate * error.sum(0)]
        kernel, bias = kernel - moments[0], bias - moments[1]
    return kernel, bias


def test_training_equals_a_slow_reference():
    # All images are a single batch, so their order does not matter.
    features, labels = blobs(n=16, width=6, spread=3.0)
    recipe = Recipe(epochs=25, warmup_epochs=5, least_steps=0)
    start = train_heads(features[:, None], labels, 3, dataclasses.replace(recipe, base_learning_rate=0.0), [4])
    heads = train_heads(features[:, None], labels, 3, recipe, [4])
    exact, kernel = features.astype(np.float64), start.kernel[0].astype(np.float64)
    kernel, bias = reference_training(exact, labels, 3, recipe, kernel)
    assert np.abs(heads.kernel - start.kernel).max() > 1e-3
    np.testing.assert_allclose(heads.kernel[0], kernel, rtol=1e-3, atol=1e-5)
    np.testing.assert_allclose(heads.bias[0], bias, rtol=1e-3, atol=1e-5)


def test_seeds_are_independent_and_repeatable():
    features, labels = blobs()
    recipe = Recipe(epochs=3, warmup_epochs=1, batch_size=32, least_steps=0)
    together = train_heads(features[:, None], labels, 3, recipe, [0, 1])
    alone = train_heads(features[:, None], labels, 3, recipe, [1])
    np.testing.assert_allclose(together.kernel[1], alone.kernel[0], rtol=1e-4, atol=1e-6)
    assert np.abs(together.kernel[0] - together.kernel[1]).max() > 1e-3


def test_warmup_must_end_before_training():
    with pytest.raises(InputError, match="warmup_epochs=10 must be less than recipe.epochs=5"):
        Recipe(epochs=5)


def test_every_view_of_an_image_is_used():
    # View 0 carries no information: only a probe that also draws view 1 can learn from it.
    features, labels = blobs()
    views = np.stack([np.random.default_rng(0).permutation(features), features], axis=1)
    heads = train_heads(views, labels, 3, Recipe(), [0])
    assert accuracy(heads, views[:, 1], labels)[0] > 0.95


@pytest.mark.parametrize(
    "images, least_steps, want",
    [
        (20, 720, (20, 1, 720)),
        (300, 720, (256, 1, 720)),
        (1928, 720, (256, 7, 103)),
        (5000, 720, (256, 19, 90)),
        (1928, 0, (256, 7, 90)),
    ],
)
def test_small_sets_are_passed_over_more_often(images, least_steps, want):
    assert Recipe(least_steps=least_steps).schedule(images) == want

"""The linear probe as a task: trained through the loop, judged by slow twins."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from data_pipelines.errors import InputError
from infmae_jax.tasks.probe import LabelledFeatures, ProbeConfig, ProbeTask, standardise
from infmae_jax.training import loop
from infmae_jax.training.config import OptimizerConfig
from infmae_jax.training.optimizer import make_optimizer, peak_learning_rate

CLASSES = ("cold", "warm", "hot")
CONFIG = ProbeConfig(batch_size=32, heads=1, log_every="0 steps", checkpoint_every="0 steps")


def blobs(seed=0, n=120, width=12, classes=3, spread=0.3):
    """Classes around far corners of a space whose axes have very different means and scales."""
    rng = np.random.default_rng(seed)
    labels = (np.arange(n) % classes).astype(np.int32)
    points = rng.normal(size=(classes, width))[labels] * 3 + spread * rng.normal(size=(n, width))
    return (points * 10.0 ** rng.uniform(-3, 3, width) + 100 * rng.normal(size=width)).astype(np.float32), labels


def split(features, labels):
    features = features[:, None] if features.ndim == 2 else features
    return LabelledFeatures(features, labels, "{}.png".format)


def trained(config, folder, train, test=None):
    """Task and host parameters after a run."""
    task = ProbeTask(config, train, test or train, CLASSES, {})
    config = dataclasses.replace(config, duration=f"{task.steps()} steps")
    return task, jax.device_get(loop.train(task, config, folder).state.params)


def test_separable_classes_are_separated_and_all_is_reported(tmp_path):
    features, labels = blobs()
    config = dataclasses.replace(CONFIG, heads=3, least_steps=200, duration="1 epochs")
    task, params = trained(config, tmp_path, split(features[:90], labels[:90]), split(features[90:], labels[90:]))
    results = task.results(params)
    assert results["top1"] == {"mean": 1.0, "std": 0.0, "seeds": [1.0, 1.0, 1.0]}
    assert results["confusion"] == (np.eye(3, dtype=int) * 30).tolist()
    assert results["knn"]["top1"] == 1.0 and results["majority_class"]["top1"] == pytest.approx(1 / 3)
    assert {path.name for path in (tmp_path / "pictures").iterdir()} >= {"step_00000200_confusion_matrix.png"}


def test_labels_without_relation_are_not_predicted(tmp_path):
    features, _ = blobs()
    labels = np.random.default_rng(1).integers(0, 3, 120).astype(np.int32)
    train, test = split(features[:60], labels[:60]), split(features[60:], labels[60:])
    task, params = trained(dataclasses.replace(CONFIG, least_steps=200), tmp_path, train, test)
    assert task.results(params)["top1"]["mean"] < 0.6


def test_normalisation_equals_numpy():
    x = np.random.default_rng(0).normal(3, 2, (17, 5))
    want = (x - x.mean(0)) / np.sqrt(x.var(0) + 1e-6)
    np.testing.assert_allclose(standardise(jnp.asarray(x, jnp.float32)), want, atol=2e-6)


def test_direction_of_lars_equals_hand_computation():
    config = OptimizerConfig(name="lars", base_learning_rate=6.4, weight_decay=0.0)
    assert peak_learning_rate(config, 32) == peak_learning_rate(config, 512) == 6.4
    params = {"kernel": jnp.array([[3.0, 0.0], [0.0, 4.0]]), "bias": jnp.zeros(2)}
    gradient = {"kernel": jnp.array([[0.0, 2.0], [0.0, 0.0]]), "bias": jnp.array([0.5, -1.0])}
    optimizer = make_optimizer(config)
    direction, state = optimizer.update(gradient, optimizer.init(params), params)
    np.testing.assert_allclose(direction["kernel"], [[0, 0.001 * 5.0], [0, 0]], rtol=1e-6)
    np.testing.assert_allclose(direction["bias"], [0.5, -1.0], rtol=1e-6)
    again, _ = optimizer.update(gradient, state, params)
    np.testing.assert_allclose(again["bias"], [0.95, -1.9], rtol=1e-6)


def reference_training(features, labels, kernel, steps, warmup):
    """Full-batch training in float64: warm-up and half a cosine, LARS with momentum 0.9, the rate outside of it."""
    bias, moments = np.zeros(3), [0.0, 0.0]
    x = (features - features.mean(0)) / np.sqrt(features.var(0) + 1e-6)
    target = np.eye(3)[labels]
    for step in range(steps):
        done = (step - warmup) / (steps - warmup)
        rate = 6.4 * (step / warmup if step < warmup else (1 + np.cos(np.pi * done)) / 2)
        logits = x @ kernel + bias
        odds = np.exp(logits - logits.max(1, keepdims=True))
        error = (odds / odds.sum(1, keepdims=True) - target) / len(x)
        grad = x.T @ error
        trust = 0.001 * np.linalg.norm(kernel) / np.linalg.norm(grad)
        moments = [0.9 * moments[0] + trust * grad, 0.9 * moments[1] + error.sum(0)]
        kernel, bias = kernel - rate * moments[0], bias - rate * moments[1]
    return kernel, bias


def test_training_equals_a_slow_reference(tmp_path):
    # All images are a single batch, so their order does not matter.
    features, labels = blobs(n=16, width=6, spread=3.0)
    optimizer = dataclasses.replace(CONFIG.optimizer, warmup="5 steps")
    config = dataclasses.replace(CONFIG, duration="25 steps", least_steps=0, optimizer=optimizer, seed=4)
    task, params = trained(config, tmp_path, split(features, labels))
    start = np.asarray(task.init(jax.random.key(4))["head_0"]["kernel"], np.float64)
    kernel, bias = reference_training(features.astype(np.float64), labels, start, 25, 5)
    assert np.abs(kernel - start).max() > 1e-3
    np.testing.assert_allclose(params["head_0"]["kernel"], kernel, rtol=1e-3, atol=1e-5)
    np.testing.assert_allclose(params["head_0"]["bias"], bias, rtol=1e-3, atol=1e-5)


def test_classifiers_are_independent_and_repeatable(tmp_path):
    train = split(*blobs())
    config = dataclasses.replace(CONFIG, duration="9 steps", least_steps=0, crops=1)
    _, together = trained(dataclasses.replace(config, heads=2), tmp_path / "two", train)
    _, alone = trained(dataclasses.replace(config, seed=1), tmp_path / "one", train)
    np.testing.assert_allclose(together["head_1"]["kernel"], alone["head_0"]["kernel"], rtol=1e-4, atol=1e-6)
    assert np.abs(together["head_0"]["kernel"] - together["head_1"]["kernel"]).max() > 1e-3


def test_every_view_of_an_image_is_used(tmp_path):
    # View 0 carries no information: only a probe that also draws view 1 can learn from it.
    features, labels = blobs()
    views = np.stack([np.random.default_rng(0).permutation(features), features], axis=1)
    task, params = trained(CONFIG, tmp_path, split(views, labels))
    assert (task.logits(params, views[:, 1]).argmax(-1) == labels).mean() > 0.95


@pytest.mark.parametrize(
    "images, least_steps, want",
    [(20, 720, (20, 720)), (300, 720, (256, 720)), (5000, 720, (256, 1758)), (1928, 0, (256, 678))],
)
def test_small_sets_are_passed_over_more_often(images, least_steps, want):
    train = split(np.zeros((images, 4), np.float32), np.arange(images) % 3)
    task = ProbeTask(ProbeConfig(least_steps=least_steps), train, train, CLASSES, {})
    assert (task.batch_size, task.steps()) == want


def test_one_class_cannot_be_probed():
    train = split(np.zeros((20, 4), np.float32), np.zeros(20, np.int32))
    with pytest.raises(InputError, match="one class"):
        ProbeTask(ProbeConfig(), train, train, CLASSES, {})


def test_hosts_share_a_batch(monkeypatch):
    features, labels = blobs()
    train = split(features, labels)
    task = ProbeTask(dataclasses.replace(CONFIG, heads=2), train, train, CLASSES, {})
    from infmae_jax.training.task import Position

    whole = next(task.train_batches(Position(3)))
    parts = []
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    for host in range(2):
        monkeypatch.setattr(jax, "process_index", lambda: host)
        parts.append(next(task.train_batches(Position(3))))
    for name, values in whole.items():
        np.testing.assert_array_equal(np.concatenate([part[name] for part in parts]), values)


def test_config_mistakes_are_named():
    from infmae_jax.training.config import from_config

    for key, value in (("heads", 0), ("crops", -1), ("view", "zoom"), ("optimizer", {"name": "sgd"})):
        with pytest.raises(InputError, match=f"config key {key}"):
            from_config(ProbeConfig, {key: value})

"""A linear classifier on frozen features: batch normalisation without affine, then one layer, trained with LARS.

The recipe is MAE's (He et al. 2022, appendix A: LARS, base rate 0.1, 90 epochs of which 10 warm up, cosine decay, no
weight decay), run on features that were computed once.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
import optax

from data_pipelines.errors import InputError

NORM_EPS = 1e-6
INITIAL_STD = 0.01


@dataclasses.dataclass(frozen=True)
class Recipe:
    """How the classifier is trained.

    Attributes:
      epochs, warmup_epochs: length of training and of the linear warm-up; then half a cosine to 0.
      batch_size: images a step (all of them, if there are fewer); an incomplete last batch is left out.
      base_learning_rate: peak learning rate for a batch of 256.
      reference_batch: the batch that the base rate is scaled to; 0 for `batch_size`. LARS moves a layer by a fraction
        (0.001 times the rate) of its own norm at each step, whatever the batch. MAE's batch of 16384 gives a rate of
        6.4; a rate scaled down to the small batch of a small data set leaves the classifier near its random start.
      least_steps: a data set too small for this many steps in `epochs` is passed over more often, warm-up in
        proportion, for the same reason; 0 keeps to `epochs`.
    """

    epochs: int = 90
    warmup_epochs: int = 10
    batch_size: int = 256
    base_learning_rate: float = 0.1
    reference_batch: int = 16384
    least_steps: int = 720

    def __post_init__(self):
        if not 0 <= self.warmup_epochs < self.epochs:
            raise InputError(f"recipe.warmup_epochs={self.warmup_epochs} must be less than recipe.epochs={self.epochs}")
        if self.batch_size < 1:
            raise InputError(f"recipe.batch_size={self.batch_size} must be at least 1")

    def schedule(self, images: int) -> tuple[int, int, int]:
        """Batch size, steps of one pass and passes over a data set of `images`."""
        batch = min(self.batch_size, images)
        steps = images // batch
        return batch, steps, max(self.epochs, -(-self.least_steps // steps))

    @property
    def peak_learning_rate(self) -> float:
        return self.base_learning_rate * (self.reference_batch or self.batch_size) / 256


@dataclasses.dataclass(frozen=True)
class Heads:
    """Trained classifiers, one a seed: logits = (x - mean) / sqrt(variance + NORM_EPS) @ kernel + bias.

    kernel (S,D,classes), bias (S,classes), mean (D,), variance (D,), all float32; S seeds. Mean and variance are those
    of all training features, the value that a running average would settle at.
    """

    kernel: np.ndarray
    bias: np.ndarray
    mean: np.ndarray
    variance: np.ndarray

    def logits(self, features: np.ndarray) -> np.ndarray:
        """(m,D) float32 features -> (S,m,classes) float32."""
        standardised = (features - self.mean) / np.sqrt(self.variance + NORM_EPS)
        return np.einsum("md,sdc->smc", standardised, self.kernel) + self.bias[:, None, :]


def train_heads(
    features: np.ndarray, labels: np.ndarray, num_classes: int, recipe: Recipe, seeds: Sequence[int]
) -> Heads:
    """Trains one linear classifier a seed, all at once.

    Args:
      features: (n,V,D) float32: V views of each training image; every pass uses one view of each, drawn at random.
      labels: (n,) int32 classes.
      seeds: of the initial weights, the order of the images and the views.
    """
    keys = jnp.stack([jax.random.key(seed) for seed in seeds])
    params = _train_all(keys, jnp.asarray(features), jnp.asarray(labels), num_classes, recipe)
    flat = features.reshape(-1, features.shape[-1]).astype(np.float64)
    return Heads(
        kernel=np.asarray(params["kernel"]),
        bias=np.asarray(params["bias"]),
        mean=flat.mean(axis=0).astype(np.float32),
        variance=flat.var(axis=0).astype(np.float32),
    )


def standardise(batch: jax.Array) -> jax.Array:
    """Batch normalisation without affine parameters, (b,D) -> (b,D): the batch's own mean and (biased) variance."""
    return (batch - batch.mean(axis=0, keepdims=True)) / jnp.sqrt(batch.var(axis=0, keepdims=True) + NORM_EPS)


def optimizer(recipe: Recipe, steps: int) -> optax.GradientTransformation:
    """LARS with MAE's schedule over `steps`; the bias is left out of the layer-wise scaling, as usual."""
    rate = optax.warmup_cosine_decay_schedule(
        init_value=0.0,
        peak_value=recipe.peak_learning_rate,
        warmup_steps=steps * recipe.warmup_epochs // recipe.epochs,
        decay_steps=steps,
    )
    return optax.lars(rate, weight_decay=0.0, momentum=0.9, trust_ratio_mask={"kernel": True, "bias": False})


@functools.partial(jax.jit, static_argnums=(3, 4))
def _train_all(
    keys: jax.Array, features: jax.Array, labels: jax.Array, num_classes: int, recipe: Recipe
) -> dict[str, jax.Array]:
    return jax.vmap(lambda key: _train_head(key, features, labels, num_classes, recipe))(keys)


def _train_head(
    key: jax.Array, features: jax.Array, labels: jax.Array, num_classes: int, recipe: Recipe
) -> dict[str, jax.Array]:
    images, views, width = features.shape
    batch, steps, passes = recipe.schedule(images)
    tx = optimizer(recipe, steps * passes)
    init_key, order_key = jax.random.split(key)
    params = {
        "kernel": INITIAL_STD * jax.random.truncated_normal(init_key, -2.0, 2.0, (width, num_classes)),
        "bias": jnp.zeros(num_classes),
    }

    def loss(params, x, y):
        logits = standardise(x) @ params["kernel"] + params["bias"][None, :]
        return optax.softmax_cross_entropy_with_integer_labels(logits, y).mean()

    def step(state, picked):
        params, moments = state
        image, view = picked
        gradient = jax.grad(loss)(params, features[image, view], labels[image])
        updates, moments = tx.update(gradient, moments, params)
        return (optax.apply_updates(params, updates), moments), None

    def one_pass(state, key):
        image_key, view_key = jax.random.split(key)
        image = jax.random.permutation(image_key, images)[: steps * batch].reshape(steps, batch)
        view = jax.random.randint(view_key, (steps, batch), 0, views)
        return jax.lax.scan(step, state, (image, view))

    (params, _), _ = jax.lax.scan(one_pass, (params, tx.init(params)), jax.random.split(order_key, passes))
    return params

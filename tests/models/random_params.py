"""Parameters of a model without a compiled initialisation, which takes as long to compile as a training step."""

import jax
import numpy as np


def random_params(model, *inputs, noise=0.1, seed=1):
    """Random parameters of the shapes and dtypes that `model.init` gives; kernels keep the scale of their input.

    Args:
      noise: standard deviation of what is added to all, biases and norms included: none is hidden by a zero or a one.
    """
    shapes = jax.eval_shape(model.init, jax.random.key(0), *inputs)["params"]
    rng = np.random.default_rng(seed)

    def draw(path, leaf):
        fan_in = leaf.size // leaf.shape[-1]
        spread = fan_in**-0.5 if fan_in > 1 else 0.0
        centre = 1.0 if path[-1].key == "scale" else 0.0
        return (centre + (spread + noise) * rng.standard_normal(leaf.shape)).astype(leaf.dtype)

    return jax.tree_util.tree_map_with_path(draw, shapes)

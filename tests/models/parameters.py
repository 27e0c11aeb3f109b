"""Random parameters of a module, without compiling its initialisation."""

import jax
import numpy as np


def randomised(module, *inputs, seed=1):
    """All leaves random, norms and biases included, so that none is hidden by a zero or a one."""
    shapes = jax.eval_shape(module.init, jax.random.key(0), *inputs)["params"]
    rng = np.random.default_rng(seed)

    def draw(path, leaf):
        return (0.2 * rng.standard_normal(leaf.shape) + (path[-1].key == "scale")).astype(leaf.dtype)

    return jax.tree.map_with_path(draw, shapes)

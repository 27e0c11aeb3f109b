"""The dense feature path as a serialised StableHLO module that runs with `jax` alone."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from infmae_jax.models.config import InfMAEConfig
from infmae_jax.models.infmae import InfMAE

PLATFORMS = ("cpu", "cuda", "tpu")


def export_features(config: InfMAEConfig, params: dict[str, Any], image_size: tuple[int, int]) -> bytes:
    """Serialises `InfMAE.features` with its weights inside.

    The result is read with `jax.export.deserialize(data).call(images)`: images (B,H,W,1) float32, normalised, any B and
    the given H x W; it returns the dict of `features`.

    Args:
      config: architecture.
      params: parameter tree; the encoder's part is enough.
      image_size: pixel rows and columns (H, W), multiples of 16.
    """
    model, variables = InfMAE(config), {"params": {"encoder": params["encoder"]}}

    def features(images: jax.Array) -> dict[str, jax.Array]:
        return model.apply(variables, images, method="features")

    (batch,) = jax.export.symbolic_shape("b")
    return serialised(features, jax.ShapeDtypeStruct((batch, *image_size, 1), jnp.float32))


def serialised(function: Callable[[jax.Array], Any], images: jax.ShapeDtypeStruct) -> bytes:
    """A function of images as a StableHLO module, without source locations, which name folders and users."""
    limit = jax.config.jax_traceback_in_locations_limit
    jax.config.update("jax_traceback_in_locations_limit", 0)
    try:
        return bytes(jax.export.export(jax.jit(function), platforms=PLATFORMS)(images).serialize())
    finally:
        jax.config.update("jax_traceback_in_locations_limit", limit)

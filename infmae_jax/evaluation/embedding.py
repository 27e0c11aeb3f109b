"""Lists of images of any size -> one vector each, by a frozen encoder: for comparing images, as in de-duplication."""

from __future__ import annotations

from collections.abc import Callable

import jax
import numpy as np

from data_pipelines.transforms import center_crop_resize
from infmae_jax.evaluation.encoder import FrozenEncoder, load_encoder
from infmae_jax.evaluation.features import encode, images_at_once

_BATCH = 32


def image_embedding(checkpoint: str) -> Callable[[list[np.ndarray]], np.ndarray]:
    """Returns the pooled features of a checkpoint's encoder as a function of images.

    Args:
      checkpoint: a run folder, a published checkpoint file, or "random" (see `load_encoder`).

    Raises:
      InputError: no such checkpoint.
    """
    return embedding_of(load_encoder(checkpoint))


def embedding_of(encoder: FrozenEncoder) -> Callable[[list[np.ndarray]], np.ndarray]:
    """Returns a function of n images, (H,W) uint8 of any sizes, to their pooled features (n,D) float32.

    The whole image is squeezed into the encoder's image size, so that nothing of a scene is lost.
    """
    at_once = images_at_once(_BATCH, jax.devices()[:1])
    params = jax.device_put(encoder.params)

    def embed(images: list[np.ndarray]) -> np.ndarray:
        vectors = []
        for start in range(0, len(images), _BATCH):
            group = images[start : start + _BATCH]
            # Padded to one size, so that one program is compiled.
            batch = np.zeros((_BATCH, *encoder.image_size, 1), np.uint8)
            for place, image in enumerate(group):
                batch[place, ..., 0] = center_crop_resize(image, encoder.image_size, stretch=True)
            vectors.append(np.asarray(encode(encoder.model, params, batch, at_once)["pooled"])[: len(group)])
        return np.concatenate(vectors)

    return embed

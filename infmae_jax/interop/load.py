"""`infmae_jax.load`: a trained model from wherever it is stored."""

from __future__ import annotations

import os
from typing import Any

from infmae_jax.interop import formats
from infmae_jax.models.infmae import InfMAE


def load(path: str | os.PathLike, **architecture: Any) -> tuple[InfMAE, dict[str, Any]]:
    """Loads a model and its parameters.

    Args:
      path: a run folder of this project, or a published checkpoint (`.pth`, `.safetensors`).
      **architecture: `heads`, `decoder_heads` (default 12 and 16, as published) and `norm_pix_loss` (default False) of
        a published checkpoint, whose tensors do not tell them.

    Returns:
      The module and its float32 parameters, for `model.apply({"params": params}, ...)`.

    Raises:
      InputError: the path is missing, damaged, or holds another architecture; one line says which and why.
    """
    checkpoint = formats.read(path, formats.detect(path), **architecture)
    return InfMAE(checkpoint.model), checkpoint.params

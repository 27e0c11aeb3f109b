"""A frozen encoder: restored from a run, read from a published checkpoint, or left as initialised."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from data_pipelines.errors import InputError
from infmae_jax.models.infmae import VARIANTS, InfMAE, InfMAEConfig, variant
from infmae_jax.models.patches import PATCH, token_grid
from infmae_jax.interop.runs import read_run
from infmae_jax.training.run_folder import read_config
from infmae_jax.training.config import from_config

RANDOM = "random"
DEFAULT_SIZE = (224, 224)
_ENCODER_FIELDS = ("encoder", "widths", "depths", "heads", "mlp_ratio")


@dataclasses.dataclass(frozen=True)
class FrozenEncoder:
    """Weights to take features from.

    Attributes:
      model: the architecture.
      params: {"encoder": tree of float32 arrays}; other subtrees are ignored.
      image_size: pixel rows and columns that images are brought to.
      name: for messages and results: the path, or "random".
      step: checkpoint step, None where there is none.
    """

    model: InfMAEConfig
    params: Mapping[str, Any]
    image_size: tuple[int, int] = DEFAULT_SIZE
    name: str = ""
    step: int | None = None

    @functools.cached_property
    def digest(self) -> str:
        """SHA-256 of architecture and weights: two encoders with the same digest have the same features."""
        sha = hashlib.sha256(json.dumps(dataclasses.asdict(self.model), sort_keys=True).encode())
        for path, leaf in jax.tree_util.tree_leaves_with_path(self.params["encoder"]):
            sha.update(jax.tree_util.keystr(path).encode())
            sha.update(np.ascontiguousarray(leaf).tobytes())
        return sha.hexdigest()


def load_encoder(
    checkpoint: str,
    model: str = "",
    like: str = "",
    image_size: tuple[int, int] = (0, 0),
    seed: int = 0,
) -> FrozenEncoder:
    """Restores or makes an encoder.

    Args:
      checkpoint: a run folder, a published checkpoint file, or "random" for an untrained encoder.
      model: variant of an untrained encoder ("" is "tiny"); for a checkpoint, the variant that it must be, if given.
      like: a run whose architecture and image size an untrained encoder takes, instead of `model`.
      image_size: rows and columns; (0, 0) takes those of the run, 224x224 where there is no run.
      seed: of an untrained encoder's weights.

    Raises:
      InputError: no such checkpoint, another variant, an unknown variant, sides not divisible by 16.
    """
    if checkpoint == RANDOM:
        if like and model:
            raise InputError(f"like={like} and model={model} both name an architecture; give one of them")
        config, size = _run_architecture(like) if like else (_variant(model or "tiny"), DEFAULT_SIZE)
        return untrained_encoder(config, _checked_size(image_size, size), seed)
    path = Path(checkpoint)
    if not path.exists():
        raise InputError(f"checkpoint {checkpoint} does not exist; give a run folder, a checkpoint file or {RANDOM!r}")
    if path.is_dir():
        run = read_run(path, subtree="encoder")
        config, params, size, step = run.model, run.params, run.image_size, run.step
    else:
        from infmae_jax.interop.load import load

        module, params = load(path)
        config, size, step = module.config, DEFAULT_SIZE, None
    if model and not _same_encoder(_variant(model), config):
        found = _describe(config)
        raise InputError(f"checkpoint {checkpoint} is not the variant {model!r} but {found}; leave model empty")
    return FrozenEncoder(config, {"encoder": params["encoder"]}, _checked_size(image_size, size), checkpoint, step)


def untrained_encoder(
    model: InfMAEConfig, image_size: tuple[int, int] = DEFAULT_SIZE, seed: int = 0
) -> FrozenEncoder:
    """An encoder with its initial random weights: the baseline that shows what pretraining adds."""
    options = {"fuse_stages": model.fuse_stages} if model.encoder == "hybrid" else {}
    init = functools.partial(InfMAE(model).init, method="features", **options)
    # It runs once: compiling it with optimisation costs twice the time and gains nothing.
    with jax.default_device(jax.local_devices(backend="cpu")[0]):
        init = jax.jit(init, compiler_options={"xla_backend_optimization_level": 0})
        params = jax.tree.map(np.asarray, init(jax.random.key(seed), jnp.zeros((1, PATCH, PATCH, 1)))["params"])
    return FrozenEncoder(model, {"encoder": params["encoder"]}, image_size, RANDOM)


def _run_architecture(run: str) -> tuple[InfMAEConfig, tuple[int, int]]:
    config = read_config(run)
    size = config.get("data", {}).get("image_size", DEFAULT_SIZE)
    return from_config(InfMAEConfig, config["model"], "model."), tuple(size)


def _variant(name: str) -> InfMAEConfig:
    if name not in VARIANTS:
        raise InputError(f"model {name!r} is not one of {', '.join(VARIANTS)}")
    return variant(name)


def _checked_size(asked: tuple[int, int], default: tuple[int, int]) -> tuple[int, int]:
    size = tuple(asked) if any(asked) else tuple(default)
    try:
        token_grid(*size)
    except (ValueError, TypeError) as error:
        raise InputError(f"image_size {size} must be rows, columns, both multiples of {PATCH}") from error
    return size


def _same_encoder(a: InfMAEConfig, b: InfMAEConfig) -> bool:
    return all(getattr(a, name) == getattr(b, name) for name in _ENCODER_FIELDS)


def _describe(config: InfMAEConfig) -> str:
    names = [name for name in VARIANTS if _same_encoder(variant(name), config)]
    return names[0] if names else f"{config.encoder} of widths {config.widths} and depths {config.depths}"

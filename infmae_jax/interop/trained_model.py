"""A trained model wherever it is stored: architecture, weights, and how its images became pixels."""

import dataclasses
import functools
import hashlib
import json
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from data_pipelines import masking
from data_pipelines.errors import InputError
from data_pipelines.intensity import Intensity
from data_pipelines.masking import MaskConfig
from infmae_jax.models.config import InfMAEConfig
from infmae_jax.models.infmae import InfMAE
from infmae_jax.models.patches import PATCH, normalize

DEFAULT_SIZE = (224, 224)
_AT_ONCE_ON_CPU = 8  # images; those of Base then pass through a CPU a quarter faster than 64 at once
_STRIDES = {"stage1": 4, "stage2": 8, "stage3": 16}
FEATURES = ("pooled", "fused", *_STRIDES, "multi")  # of `vectors`
_EXPECTED = "give uint8, uint16 or bool arrays of shape (N,H,W), (N,H,W,1), (N,H,W,3) or (H,W)"


@dataclasses.dataclass(frozen=True, eq=False)
class TrainedModel:
    """Weights and what is needed to use them; unpacks as `module, params`.

    Attributes:
      config: architecture.
      params: tree of float32 arrays, as `InfMAE.init` makes it; of an encoder alone, only {"encoder": ...}.
      mask: the token selection that belongs to it.
      image_size: pixel rows and columns of its pretraining crops.
      intensity: how stored 8- or 16-bit values became its 8-bit pixels.
      name: for messages and results: the path, or "random".
      step: checkpoint step of a run, None elsewhere.
      score_filters: the published scoring convolution, weight (D,C,16,16) and bias (D,), float32; None where the model
        does not come from a published InfMAE checkpoint.
    """

    config: InfMAEConfig
    params: Mapping[str, Any]
    mask: MaskConfig = MaskConfig()
    image_size: tuple[int, int] = DEFAULT_SIZE
    intensity: Intensity = Intensity()
    name: str = ""
    step: int | None = None
    score_filters: tuple[np.ndarray, np.ndarray] | None = None

    def __repr__(self) -> str:
        """One line: the weights would be thousands."""
        count = sum(leaf.size for leaf in jax.tree.leaves(dict(self.params)))
        step = "" if self.step is None else f", step {self.step}"
        size = "x".join(map(str, self.image_size))
        return f"<{self.name or 'model'}{step}: {self.config.encoder.kind}, {count:,} parameters, images {size}>"

    def __getitem__(self, index: int) -> Any:
        """Of `module, params`, which is how Python unpacks what has no iterator."""
        return (self.module, self.params)[index]

    @property
    def module(self) -> InfMAE:
        """The Flax module, for `module.apply({"params": params}, ...)`."""
        return InfMAE(self.config)

    @functools.cached_property
    def digest(self) -> str:
        """SHA-256 of architecture and encoder weights: two models with the same digest have the same features."""
        sha = hashlib.sha256(json.dumps(dataclasses.asdict(self.config.encoder), sort_keys=True).encode())
        for path, leaf in jax.tree_util.tree_leaves_with_path(self.params["encoder"]):
            sha.update(jax.tree_util.keystr(path).encode())
            sha.update(np.ascontiguousarray(leaf).tobytes())
        return sha.hexdigest()

    @functools.cached_property
    def device_params(self) -> Any:
        """`params` on the default device, sent there once."""
        return jax.device_put(dict(self.params))

    def features(self, images: np.ndarray) -> dict[str, np.ndarray]:
        """Features of whole images of any size; compiled once per shape.

        Args:
          images: uint8, uint16 or bool, (N,H,W), (N,H,W,1), (N,H,W,3) or (H,W), as stored: the intensity mapping of the
            model's run brings them to 8 bit. Sides that are not multiples of 16 are padded with their last row and
            column, and the maps cut again.

        Returns:
          float32: stage1 (N,ceil(H/4),ceil(W/4),C1), stage2 (N,ceil(H/8),ceil(W/8),C2), stage3 (N,ceil(H/16),
          ceil(W/16),D) before the final norm, and pooled (N,D), the mean over tokens after it. A ViT has stage3 and
          pooled alone.

        Raises:
          InputError: another dtype (floats, too) or shape, no image, or channels that the model does not take.
        """
        return jax.device_get(self._encode(images, False))

    def vectors(self, images: np.ndarray, feature: str = "pooled") -> np.ndarray:
        """One vector of float32 per image, (N,D).

        Args:
          images: as for `features`.
          feature: "pooled"; "stage1", "stage2", "stage3": the mean over that map; "multi": those three side by side;
            "fused": pooled with stages 1 and 2 added to the tokens, where pretraining did so.

        Raises:
          InputError: the encoder has no such feature.
        """
        found = jax.device_get(self._encode(images, True))
        names = tuple(_STRIDES) if feature == "multi" else (feature,)
        if missing := [name for name in names if name not in found]:
            raise InputError(f"feature {missing[0]!r} is not one of {', '.join(found)} of this encoder")
        return np.concatenate([found[name] for name in names], axis=1)

    def _encode(self, images: np.ndarray, average: bool) -> dict[str, jax.Array]:
        pixels = self.to_pixels(images)
        rows, columns = (-extent % PATCH for extent in pixels.shape[1:3])
        padded = np.pad(pixels, ((0, 0), (0, rows), (0, columns), (0, 0)), mode="edge")
        return encode(self.config, {"encoder": self.device_params["encoder"]}, padded, pixels.shape[1:3], average)

    def to_pixels(self, images: np.ndarray) -> np.ndarray:
        """Stored images, see `features`, as (N,H,W,1 or 3) uint8 under the run's intensity mapping; InputError."""
        images = np.asarray(images)
        if images.dtype not in (np.uint8, np.uint16, np.bool_):
            raise InputError(f"images are {images.dtype}: {_EXPECTED}, as the files store them, not normalised")
        shape = images.shape
        if images.ndim == 2:
            images = images[None]
        if images.ndim == 3:
            images = images[..., None]
        colour_image = len(shape) == 3 and shape[2] == 3 and min(shape[:2]) >= PATCH
        if images.ndim != 4 or images.shape[-1] not in (1, 3) or 0 in shape or colour_image:
            raise InputError(f"images have the shape {shape}: {_EXPECTED}, with at least one pixel each")
        if images.shape[-1] not in (1, self.config.encoder.in_channels):
            raise InputError(f"images have 3 channels, the model {self.name} takes 1: give one of them, or their mean")
        if images.dtype == np.bool_:
            images = images.astype(np.uint8) * np.uint8(255)
        flat = images.reshape(*images.shape[:2], -1)  # channels side by side: they share one mapping
        return np.stack([self.intensity.apply(image) for image in flat]).reshape(images.shape)

    def reconstruct(self, images: np.ndarray, seed: int = 0) -> "Reconstruction":
        """Predicts the masked patches of images, one image at a time.

        Args:
          images: as for `features`, sides multiples of 16, one channel.
          seed: of random masks.

        Raises:
          InputError: unusable images, or a model without a decoder.
        """
        if "decoder" not in self.params:
            raise InputError(f"{self.name} is an encoder alone; reconstruction needs a checkpoint with its decoder")
        pixels = self.to_pixels(images)
        if pixels.shape[-1] != 1:
            raise InputError("images have 3 channels: masks are chosen on one; give one channel")
        scores = masking.token_scores(pixels[..., 0], self.mask)
        ids_keep = masking.select_visible(scores, self.mask, np.random.default_rng(seed))
        params = self.device_params
        results = [_predict(self.config, params, p[None], i[None]) for p, i in zip(pixels, ids_keep, strict=True)]
        pred, losses = (np.stack([np.asarray(result[part]) for result in results]) for part in (0, 1))
        return Reconstruction(pixels[..., 0], scores, ids_keep, pred[:, 0].astype(np.float32), losses)


class Reconstruction(NamedTuple):
    """images (N,H,W) uint8 as the model sees them, scores (N,n) of their tokens, ids_keep (N,K) of the visible ones,
    pred (N,n,P) predicted patches, losses (N,) float32."""

    images: np.ndarray
    scores: np.ndarray
    ids_keep: np.ndarray
    pred: np.ndarray
    losses: np.ndarray


def images_at_once(batch: int) -> int:
    """How many images of a batch to take at once: all; on a CPU a few, whose activations its caches hold."""
    some = max(n for n in range(1, _AT_ONCE_ON_CPU + 1) if batch % n == 0)
    return some if jax.default_backend() == "cpu" and 2 * some >= _AT_ONCE_ON_CPU else batch


@functools.partial(jax.jit, static_argnums=(0, 3, 4))
def encode(
    config: InfMAEConfig, params: dict, pixels: jax.Array, size: tuple[int, int], average: bool
) -> dict[str, jax.Array]:
    """(N,H,W,C) uint8 padded, and the size before -> float32 maps that cover that size, or their means."""
    at_once = images_at_once(len(pixels))

    def take(some: jax.Array) -> dict[str, jax.Array]:
        features = functools.partial(InfMAE(config).apply, {"params": params}, normalize(some), method="features")
        maps = features()
        found = {"pooled": maps["pooled"].astype(jnp.float32)}
        if average and "stage1_output_decode" in params["encoder"]:
            # XLA computes what both calls share once.
            found["fused"] = features(fuse_stages=True)["pooled"].astype(jnp.float32)
        for name, stride in _STRIDES.items():
            if name in maps:
                cells = maps[name][:, : -(-size[0] // stride), : -(-size[1] // stride)].astype(jnp.float32)
                found[name] = cells.mean(axis=(1, 2)) if average else cells
        return found

    if at_once == len(pixels):
        return take(pixels)
    pieces = jax.lax.map(take, pixels.reshape(-1, at_once, *pixels.shape[1:]))
    return jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), pieces)


@functools.partial(jax.jit, static_argnums=0)
def _predict(config: InfMAEConfig, params: dict, image: jax.Array, ids_keep: jax.Array) -> tuple[jax.Array, jax.Array]:
    """(1,H,W,1) uint8 and (1,K) -> what the model predicts (1,n,P), and its loss ()."""
    out = InfMAE(config).apply({"params": params}, normalize(image), ids_keep)
    return out.pred, out.loss

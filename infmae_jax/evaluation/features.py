"""Features of images under a frozen encoder: decoded by threads, encoded in fixed batches, cached in parts."""

from __future__ import annotations

import collections
import concurrent.futures
import dataclasses
import functools
import hashlib
import itertools
import json
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import tqdm
from jax.sharding import NamedSharding, PartitionSpec

from data_pipelines.transforms import center_crop_resize, random_resized_crop
from data_pipelines.decode import read_image_file
from data_pipelines.errors import InputError
from data_pipelines.intensity import Intensity
from infmae_jax.interop.trained_model import TrainedModel
from infmae_jax.models.config import InfMAEConfig
from infmae_jax.models.infmae import InfMAE
from infmae_jax.models.patches import normalize
from infmae_jax.training.config import MeshConfig
from infmae_jax.training.sharding import make_mesh, place_batch

FEATURES = ("pooled", "fused", "stage1", "stage2", "stage3", "multi")
_BATCHES_PER_PART = 16  # a killed run loses at most the part that it was computing
_BATCHES_AHEAD = 3
_AT_ONCE_ON_CPU = 8  # images; those of Base then pass through a CPU a quarter faster than 64 at once


@dataclasses.dataclass(frozen=True)
class Views:
    """How an image is brought to the encoder's size; V = 1 + flip + crops views.

    Attributes:
      size: pixel rows and columns.
      stretch: True: the whole image, squeezed to `size`. False: its centre, the aspect ratio kept.
      flip: also that view mirrored.
      crops: also this many RandomResizedCrops (scale 0.2-1, ratio 3/4-4/3), each mirrored with probability 1/2.
      seed: of the crops, which are a function of the seed and the image's place in the list.
    """

    size: tuple[int, int]
    stretch: bool = True
    flip: bool = False
    crops: int = 0
    seed: int = 0

    @property
    def count(self) -> int:
        return 1 + int(self.flip) + self.crops

    def of(self, image: np.ndarray, index: int) -> np.ndarray:
        """(H,W) uint8, the image's place in the list -> (V, *size) uint8."""
        whole = center_crop_resize(image, self.size, stretch=self.stretch)
        views = [whole, whole[:, ::-1]] if self.flip else [whole]
        rng = np.random.default_rng((self.seed, index))
        for _ in range(self.crops):
            crop = random_resized_crop(image, rng, self.size)
            views.append(crop[:, ::-1] if rng.random() < 0.5 else crop)
        return np.stack(views)


class FeatureExtractor:
    """Takes features of lists of images with one encoder, compiled once.

    Args:
      encoder: the frozen encoder.
      batch_size: images a device call, rounded up to a multiple of the local devices, over which a batch is cut.
      threads: that decode images.
      cache: folder for finished features; None keeps nothing. Features are found again when the encoder's digest, the
        views and the files (path, size, time of change) are the same.
    """

    def __init__(self, encoder: TrainedModel, batch_size: int = 64, threads: int = 4, cache: Path | None = None):
        self._encoder = encoder
        self._mesh = make_mesh(MeshConfig(), jax.local_devices())
        self._batch = -(-batch_size // self._mesh.size) * self._mesh.size
        self._threads = threads
        self._cache = cache

    def extract(self, files: Sequence[Path], views: Views, feature: str = "pooled", label: str = "") -> np.ndarray:
        """Features (n,V,D) float32 of n image files.

        Args:
          files: image files.
          views: how each is brought to size.
          feature: "pooled": mean over tokens after the final norm; "fused": the same with stages 1 and 2 added to the
            tokens before the norm, as in pretraining; "stage1", "stage2", "stage3": mean over the cells of that
            feature map; "multi": those three, concatenated. Stages 1 and 2 and "fused" are the hybrid encoder's.
          label: of the progress line.

        Raises:
          InputError: an unknown feature for this encoder, an unreadable image, features that are not finite.
        """
        _check_feature(feature, self._encoder.config)
        names = ("stage1", "stage2", "stage3") if feature == "multi" else (feature,)
        folder = None if self._cache is None else self._cache / self.key(files, views)[:16]
        size = _BATCHES_PER_PART * self._batch
        parts = []
        with _progress(f"features {label}".strip(), len(files)) as bar:
            for number, start in enumerate(range(0, len(files), size)):
                chosen = range(start, min(start + size, len(files)))
                path = None if folder is None else folder / f"part_{number:05d}.npz"
                parts.append(self._part(files, chosen, views, names, path, bar))
        features = np.concatenate(parts)
        bad = ~np.isfinite(features).all(axis=(1, 2))
        if bad.any():
            name, file = self._encoder.name, files[int(bad.argmax())]
            raise InputError(f"features of {file} are not finite under {name}; use an earlier checkpoint")
        return features

    def key(self, files: Sequence[Path], views: Views) -> str:
        """SHA-256 of everything that features depend on."""
        stats = [(str(file.resolve()), file.stat().st_size, file.stat().st_mtime_ns) for file in files]
        known = [self._encoder.digest, repr(self._encoder.intensity), dataclasses.asdict(views), stats, self._batch]
        return hashlib.sha256(json.dumps(known).encode()).hexdigest()

    def _part(
        self,
        files: Sequence[Path],
        chosen: range,
        views: Views,
        names: tuple[str, ...],
        path: Path | None,
        bar: tqdm.tqdm,
    ) -> np.ndarray:
        """Features (len(chosen),V,D) of some of the files, from the cache if they are there."""
        if path is not None and path.is_file():
            with np.load(path) as stored:
                bar.update(len(chosen))
                return np.concatenate([stored[name] for name in names], axis=-1)
        arrays = self._encode_files(files, chosen, views, bar)
        if path is not None:
            write_npz(path, arrays)
        return np.concatenate([arrays[name] for name in names], axis=-1)

    def _encode_files(
        self, files: Sequence[Path], chosen: range, views: Views, bar: tqdm.tqdm
    ) -> dict[str, np.ndarray]:
        """Every feature, (len(chosen),V,D) float32, by name."""
        images = self._decoded(files, chosen, views, bar)
        results: list[dict[str, np.ndarray]] = []
        pending = None  # read one batch late, so that the next one is prepared while the device computes
        while group := list(itertools.islice(images, self._batch)):
            batch = np.zeros((self._batch, *views.size, 1), np.uint8)
            batch[: len(group), :, :, 0] = group
            running = self._encode(batch), len(group)
            if pending is not None:
                results.append(_to_host(*pending))
            pending = running
        results.append(_to_host(*pending))
        shape = (len(chosen), views.count, -1)
        return {name: np.concatenate([r[name] for r in results]).reshape(shape) for name in results[0]}

    def _decoded(
        self, files: Sequence[Path], chosen: range, views: Views, bar: tqdm.tqdm
    ) -> Iterator[np.ndarray]:
        """The views (H,W) uint8 of the files in order, decoded a few batches ahead by threads."""
        pool = concurrent.futures.ThreadPoolExecutor(self._threads)
        waiting = collections.deque()
        todo = iter(chosen)
        ahead = max(1, _BATCHES_AHEAD * self._batch // views.count)
        try:
            for index in itertools.islice(todo, ahead):
                waiting.append(pool.submit(_read_views, files[index], index, views, self._encoder.intensity))
            while waiting:
                result = waiting.popleft().result()
                for index in itertools.islice(todo, 1):
                    waiting.append(pool.submit(_read_views, files[index], index, views, self._encoder.intensity))
                bar.update(1)
                yield from result
        finally:
            pool.shutdown(cancel_futures=True)

    def _encode(self, batch: np.ndarray) -> dict[str, jax.Array]:
        images = place_batch({"image": batch}, self._mesh)["image"]
        return encode(self._encoder.config, self._params, images, images_at_once(self._batch, self._mesh.devices.flat))

    @functools.cached_property
    def _params(self):
        return jax.device_put(self._encoder.params, NamedSharding(self._mesh, PartitionSpec()))


def images_at_once(batch: int, devices: Sequence[jax.Device]) -> int:
    """How many images of a batch to take at once: all; on a lone CPU a few, whose activations its caches hold."""
    first, *others = devices
    some = max(n for n in range(1, _AT_ONCE_ON_CPU + 1) if batch % n == 0)
    return some if first.platform == "cpu" and not others and 2 * some >= _AT_ONCE_ON_CPU else batch


def in_pieces(take: Callable[[jax.Array], Any], images: jax.Array, at_once: int) -> Any:
    """`take(images)`, a function of each image by itself, for so many images at a time."""
    if at_once == len(images):
        return take(images)
    pieces = jax.lax.map(take, images.reshape(-1, at_once, *images.shape[1:]))
    return jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), pieces)


@functools.partial(jax.jit, static_argnums=(0, 3))
def encode(model: InfMAEConfig, params: dict, images: jax.Array, at_once: int) -> dict[str, jax.Array]:
    """(B,H,W,1) uint8 -> one float32 vector (B,D) an image for every feature name but "multi".

    Compiled once for an architecture and batch shape, whatever the weights. `at_once`: see `images_at_once`.
    """
    return in_pieces(functools.partial(_encode_at_once, model, params), images, at_once)


def _encode_at_once(model: InfMAEConfig, params: dict, images: jax.Array) -> dict[str, jax.Array]:
    module, normalized = InfMAE(model), normalize(images)
    maps = module.apply({"params": params}, normalized, method="features")
    vectors = {"pooled": maps["pooled"]}
    if model.encoder.kind == "hybrid" and model.encoder.fuse_stages:
        # XLA computes what both calls share once.
        fused = module.apply({"params": params}, normalized, fuse_stages=True, method="features")
        vectors["fused"] = fused["pooled"]
    for name in ("stage1", "stage2", "stage3"):
        if name in maps:
            vectors[name] = maps[name].astype(jnp.float32).mean(axis=(1, 2))
    return {name: vector.astype(jnp.float32) for name, vector in vectors.items()}


def write_npz(path: Path, arrays: dict[str, np.ndarray]) -> None:
    """Writes beside and renames: a reader never sees half a file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    with temporary.open("wb") as stream:
        np.savez(stream, **arrays)
    temporary.replace(path)


def _read_views(file: Path, index: int, views: Views, intensity: Intensity) -> np.ndarray:
    return views.of(read_image_file(file, intensity), index)


def _to_host(vectors: dict[str, jax.Array], count: int) -> dict[str, np.ndarray]:
    """Fetches a batch and cuts off its padding."""
    return {name: np.asarray(vector)[:count] for name, vector in vectors.items()}


def _check_feature(feature: str, model: InfMAEConfig) -> None:
    available = FEATURES if model.encoder.kind == "hybrid" else ("pooled", "stage3")
    if not model.encoder.fuse_stages:
        available = tuple(name for name in available if name != "fused")
    if feature not in available:
        raise InputError(f"feature {feature!r} is not one of {', '.join(available)} of this encoder")


def _progress(description: str, total: int) -> tqdm.tqdm:
    """Images done, rate and time left: live on a terminal, a line every 15 s elsewhere."""
    interval = 0.5 if sys.stderr.isatty() else 15.0
    return tqdm.tqdm(desc=description, total=total, unit="image", mininterval=interval, maxinterval=interval)

"""Scores of every pixel of images of any size: whole, or by overlapping windows whose scores are averaged.

Shape letters: N images, H W rows and columns of their canvas, K scores per pixel (classes).
"""

import collections
import concurrent.futures
import dataclasses
import functools
import itertools
from collections.abc import Callable, Hashable, Iterable, Iterator
from typing import Any, NamedTuple, Self, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from data_pipelines.errors import InputError
from data_pipelines.transforms import PAD_GRAY
from infmae_jax.models.patches import normalize

MULTIPLE = 32  # of a canvas: the coarsest map of the heads has stride 32
_PIXELS = 4 * 1024**2  # of the images of a device call, on each device
_PIXELS_ON_CPU = 512**2  # more leave the caches: four such images at once take 1.3 times as long
T = TypeVar("T")
K = TypeVar("K", bound=Hashable)
BatchSize = Callable[[tuple[int, int]], int]  # canvas -> images per device call
Scores = Callable[[Any, jax.Array], jax.Array]  # (params, (N,h,w,1) float32 normalised) -> (N,h,w,K) float32


@dataclasses.dataclass(frozen=True)
class Windows:
    """How large images are looked at.

    Attributes:
      size: rows and columns of a window; (0, 0): images are looked at whole.
      stride: rows and columns from one window to the next.
      batch_size: windows per device call, and device.
    """

    size: tuple[int, int] = (512, 512)
    stride: tuple[int, int] = (341, 341)
    batch_size: int = 4

    def __post_init__(self):
        if any(side < 0 or side % MULTIPLE for side in self.size) or (0 in self.size) != (self.size == (0, 0)):
            raise InputError(f"windows.size={self.size} must be rows, columns, multiples of {MULTIPLE}; 0,0 is whole")
        if self.batch_size < 1 or (
            self.size != (0, 0) and not all(w <= 16 * s <= 16 * w for s, w in zip(self.stride, self.size, strict=True))
        ):
            raise InputError(
                f"windows.stride={self.stride} must be from a 16th of the size {self.size} to all of it, "
                "windows.batch_size at least 1"
            )

    def tiled(self, size: tuple[int, int], overlap: int | None = None) -> Self:
        """Windows of another size, of which neighbours share `overlap` pixels, by default a third of each side."""
        stride = tuple(side - (side // 3 + 1 if overlap is None else overlap) for side in size)
        return dataclasses.replace(self, size=size, stride=stride)

    def __str__(self) -> str:
        if self.size == (0, 0):
            return "whole images"
        return f"{self.tiles}, scores averaged"

    @property
    def tiles(self) -> str:
        return f"windows of {self.size[0]}x{self.size[1]}, stride {self.stride[0]}x{self.stride[1]}"


class Tile(NamedTuple):
    """A part of an image, in pixels."""

    top: int
    left: int
    height: int
    width: int


def canvas_of(height: int, width: int) -> tuple[int, int]:
    """The sides of an image rounded up to multiples of 32: one program serves all images of a canvas."""
    return -(-height // MULTIPLE) * MULTIPLE, -(-width // MULTIPLE) * MULTIPLE


def window_starts(extent: int, window: int, stride: int) -> list[int]:
    """First pixels of the windows along one side: a stride apart, the last one shifted back inside."""
    if extent <= window:
        return [0]
    count = -(-(extent - window) // stride) + 1
    return [min(number * stride, extent - window) for number in range(count)]


def tiles_of(height: int, width: int, windows: Windows) -> list[Tile]:
    """The tiles that cover an image: one where it is looked at whole or is no larger than a window."""
    if windows.size == (0, 0):
        return [Tile(0, 0, height, width)]
    rows, columns = (
        window_starts(extent, size, stride)
        for extent, size, stride in zip((height, width), windows.size, windows.stride, strict=True)
    )
    size = min(height, windows.size[0]), min(width, windows.size[1])
    return [Tile(row, column, *size) for row in rows for column in columns]


def window_scores(scores: Scores, params: Any, images: jax.Array, windows: Windows) -> jax.Array:
    """(N,H,W) uint8 -> (N,H,W,K) float32: the mean over all windows that show a pixel. To be jitted."""
    count, height, width = images.shape
    pixels = normalize(images)[..., None]
    tiles = tiles_of(height, width, windows)
    if len(tiles) == 1:
        return scores(params, pixels)
    corners, size = [tile[:2] for tile in tiles], tiles[0][2:]
    at_once = min(max(1, windows.batch_size // count), len(corners))
    spare = -len(corners) % at_once  # the last group is filled up with windows that do not count
    groups = np.array(corners + corners[:1] * spare).reshape(-1, at_once, 2)
    weights = np.array([1.0] * len(corners) + [0.0] * spare, np.float32).reshape(-1, at_once)

    def add(total: jax.Array, group: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, None]:
        places = [(0, row, column, 0) for row, column in group[0]]
        cut = [jax.lax.dynamic_slice(pixels, place, (count, *size, 1)) for place in places]
        found = scores(params, jnp.concatenate(cut)).reshape(at_once, count, *size, -1)
        for place, part, weight in zip(places, found, group[1], strict=True):
            before = jax.lax.dynamic_slice(total, place, part.shape)
            total = jax.lax.dynamic_update_slice(total, before + weight * part, place)
        return total, None

    seen = np.zeros((height, width, 1), np.float32)
    for row, column in corners:
        seen[row : row + size[0], column : column + size[1]] += 1
    outputs = jax.eval_shape(scores, params, pixels[:, : size[0], : size[1]]).shape[-1]
    total, _ = jax.lax.scan(add, jnp.zeros((count, height, width, outputs), jnp.float32), (groups, weights))
    return total / seen[None]


@functools.cache
def _host_mesh() -> Mesh:
    """This host's devices. Every host works through its own share of the images, so that none waits for another."""
    return Mesh(np.array(jax.local_devices()), ("images",))


def batch_size_of(windows: Windows) -> BatchSize:
    """`windows.batch_size` images per device of this host, fewer of large canvases, whose scores take room."""
    devices = _host_mesh().devices
    most = _PIXELS_ON_CPU if devices.flat[0].platform == "cpu" else _PIXELS
    return lambda canvas: devices.size * max(1, min(windows.batch_size, most // (canvas[0] * canvas[1])))


def on_every_device(params: Any) -> Any:
    """Parameters of any layout (arrays of NumPy, or over all hosts) on each of this host's devices."""
    leaves = jax.tree.leaves(params)
    if not all(getattr(leaf, "is_fully_addressable", True) for leaf in leaves):
        everywhere = NamedSharding(leaves[0].sharding.mesh, PartitionSpec())
        whole = jax.jit(lambda tree: tree, out_shardings=everywhere)(params)
        params = jax.tree.map(lambda array: array.addressable_data(0), whole)
    return jax.device_put(params, NamedSharding(_host_mesh(), PartitionSpec()))


def over_devices(batch: Any) -> Any:
    """Arrays with a leading dimension, a multiple of this host's devices, spread over them."""
    return jax.device_put(batch, NamedSharding(_host_mesh(), PartitionSpec("images")))


def in_groups(items: Iterable[T], kind: Callable[[T], K], size: Callable[[K], int]) -> Iterator[list[T]]:
    """The items, those of a kind together, at most `size(kind)` at once; what is left of a kind comes at the end."""
    waiting: dict[K, list[T]] = {}
    for item in items:
        of = kind(item)
        group = waiting.setdefault(of, [])
        group.append(item)
        if len(group) == size(of):
            yield waiting.pop(of)
    yield from waiting.values()


def on_canvases(
    images: Iterable[T], pixels: Callable[[T], np.ndarray], size: BatchSize
) -> Iterator[tuple[list[T], np.ndarray, np.ndarray]]:
    """Images of one canvas together: they, (N,H,W) uint8 of them, filled up, and (N,2) int32, how much is image."""
    for group in in_groups(images, lambda image: canvas_of(*pixels(image).shape), size):
        canvas = canvas_of(*pixels(group[0]).shape)
        batch = np.zeros((size(canvas), *canvas), np.uint8)
        sizes = np.tile(np.array(canvas, np.int32), (len(batch), 1))
        for place, image in enumerate(map(pixels, group)):
            batch[place] = PAD_GRAY
            batch[place, : image.shape[0], : image.shape[1]] = image
            sizes[place] = image.shape
        yield group, batch, sizes


def one_behind(items: Iterable[T]) -> Iterator[T]:
    """The items, each after the next one is made: devices are at work on that while this one is looked at."""
    before: list[T] = []
    for item in items:
        yield from before
        before = [item]
    yield from before


def ahead(function: Callable[[Any], T], items: Iterable[Any], threads: int = 4, most: int = 32) -> Iterator[T]:
    """`map` in threads, in order, with at most `most` results waiting."""
    rest = iter(items)
    with concurrent.futures.ThreadPoolExecutor(threads) as pool:
        waiting = collections.deque(pool.submit(function, item) for item in itertools.islice(rest, most))
        while waiting:
            yield waiting.popleft().result()
            waiting.extend(pool.submit(function, item) for item in itertools.islice(rest, 1))


def readable(
    read: Callable[[Any], T], items: Iterable[Any], errors: type[Exception], leave_out: Callable[[Any, Exception], None]
) -> Iterator[T]:
    """What `read` makes of the items, `ahead`; those on which it raises one of `errors` go to `leave_out`, in order."""

    def tried(item: Any) -> tuple[Any, Any, Exception | None]:
        try:
            return item, read(item), None
        except errors as error:
            return item, None, error

    for item, found, error in ahead(tried, items):
        if error is None:
            yield found
        else:
            leave_out(item, error)

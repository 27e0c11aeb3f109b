"""Images, patches, tokens: the index arithmetic shared by encoders, decoder, loss and pictures."""

import jax
import jax.numpy as jnp
import numpy as np

from data_pipelines.masking import PATCH, token_grid
from data_pipelines.transforms import MEAN as PIXEL_MEAN
from data_pipelines.transforms import STD as PIXEL_STD


def normalize(images: jax.Array) -> jax.Array:
    """Maps uint8 intensities (any shape) to float32 network input: (x / 255 - 0.425) / 0.200 (InfMAE's constants)."""
    return (images.astype(jnp.float32) / 255.0 - PIXEL_MEAN) / PIXEL_STD


def check_images(images: jax.Array, channels: int) -> tuple[int, int]:
    """Token grid of images (B,H,W,C) for a model of C channels; one channel stands for as many equal ones.

    Raises:
      ValueError: another rank or number of channels, or sides that are not positive multiples of the patch.
    """
    if images.ndim != 4:
        raise ValueError(f"images must be (B,H,W,C), got {images.shape}")
    if images.shape[-1] not in (1, channels):
        raise ValueError(f"images have {images.shape[-1]} channels, the model takes {channels} (or 1, repeated)")
    return token_grid(*images.shape[1:3])


def check_ids(ids_keep: jax.Array, batch: int, grid: tuple[int, int]) -> None:
    """ValueError unless visible tokens are (B,K) integers with 1 <= K <= h*w and, outside jit, inside the grid.

    Under jit values are not known: ids there are promised to be in bounds.
    """
    shape, tokens = ids_keep.shape, grid[0] * grid[1]
    if len(shape) != 2 or shape[0] != batch or not 1 <= shape[1] <= tokens or ids_keep.dtype.kind not in "iu":
        raise ValueError(f"ids_keep must be ({batch},K) integers, K from 1 to {tokens}, got {shape} {ids_keep.dtype}")
    if not isinstance(ids_keep, jax.core.Tracer):
        ids = np.asarray(ids_keep)
        bad = ids[(ids < 0) | (ids >= tokens)]
        if bad.size:
            raise ValueError(f"ids_keep names token {bad[0]}, the images have tokens 0 to {tokens - 1}")


def grid_to_tokens(cells: jax.Array, grid: tuple[int, int]) -> jax.Array:
    """(B, h*r, w*r, C) -> (B, N, r, r, C): cuts a map of cells into the r x r cells of each token."""
    batch, rows, columns, channels = cells.shape
    (h, w), r = grid, rows // grid[0]
    cells = cells.reshape(batch, h, r, w, columns // w, channels)
    return cells.transpose(0, 1, 3, 2, 4, 5).reshape(batch, h * w, r, columns // w, channels)


def tokens_to_grid(tokens: jax.Array, grid: tuple[int, int]) -> jax.Array:
    """(B, N, r, r, C) -> (B, h*r, w*r, C): inverse of `grid_to_tokens`."""
    batch, _, r, s, channels = tokens.shape
    h, w = grid
    tokens = tokens.reshape(batch, h, w, r, s, channels)
    return tokens.transpose(0, 1, 3, 2, 4, 5).reshape(batch, h * r, w * s, channels)


def patchify(images: jax.Array) -> jax.Array:
    """(B,H,W,C) -> (B,N,P): the pixels of each patch in the order row, column, channel."""
    batch, height, width, channels = images.shape
    return grid_to_tokens(images, token_grid(height, width)).reshape(batch, -1, PATCH**2 * channels)


def take_tokens(tokens: jax.Array, ids: jax.Array) -> jax.Array:
    """(B,N,...), (B,K) int32 -> (B,K,...): the listed tokens of each sample, in the listed order."""
    return jax.vmap(lambda x, i: x.at[i].get(mode="promise_in_bounds", unique_indices=True))(tokens, ids)


def place_tokens(tokens: jax.Array, ids: jax.Array, background: jax.Array) -> jax.Array:
    """(B,K,...), (B,K), (B,N,...) -> (B,N,...): the background with each sample's tokens put at their positions."""
    put = jax.vmap(lambda b, x, i: b.at[i].set(x, mode="promise_in_bounds", unique_indices=True))
    return put(background, tokens, ids)


def token_mask(ids_keep: jax.Array, num_tokens: int) -> jax.Array:
    """(B,K) -> (B,N) float32: 0 where a token is visible, 1 where it is masked."""
    ones = jnp.ones((ids_keep.shape[0], num_tokens), jnp.float32)
    return place_tokens(jnp.zeros(ids_keep.shape, jnp.float32), ids_keep, ones)


def masked_ids(ids_keep: jax.Array, num_tokens: int) -> jax.Array:
    """(B,K) -> (B,N-K) int32: the tokens that are not listed, in ascending order."""
    in_order = jnp.argsort(token_mask(ids_keep, num_tokens), axis=1, stable=True)
    return in_order[:, ids_keep.shape[1] :].astype(ids_keep.dtype)


def position_embedding(grid: tuple[int, int], width: int, source: tuple[int, int] | None = None) -> np.ndarray:
    """Fixed 2-D sin-cos position embedding, (N, D) float32, for any grid.

    The first half of the channels encodes the token's column (x), the second its row (y); each half is the sines, then
    the cosines, of the coordinate times 10000 ** (-i / (D/4)).

    Args:
      grid: token rows and columns (h, w).
      width: D.
      source: a grid whose table is stretched to `grid` by bicubic interpolation; None: the table is made for `grid`.
    """
    if source is not None and source != grid:
        table = position_embedding(source, width).astype(np.float64).reshape(*source, width)
        rows, columns = (_bicubic_matrix(*sizes) for sizes in zip(source, grid, strict=True))
        return np.einsum("hwd,ih,jw->ijd", table, rows, columns, optimize=True).reshape(-1, width).astype(np.float32)
    if width % 4:
        raise ValueError(f"a 2-D sin-cos position embedding needs a width divisible by 4, got {width}")
    frequency = 10000.0 ** (-np.arange(width // 4, dtype=np.float64) / (width / 4))
    rows, columns = np.meshgrid(np.arange(grid[0]), np.arange(grid[1]), indexing="ij")
    angles = [np.outer(axis.reshape(-1).astype(np.float64), frequency) for axis in (columns, rows)]
    return np.concatenate([f(a) for a in angles for f in (np.sin, np.cos)], axis=1).astype(np.float32)


def _bicubic_matrix(size: int, out: int) -> np.ndarray:
    """(out, size) weights of bicubic interpolation as PyTorch defines it: half-pixel centres, a = -0.75, edge values
    repeated outside, no smoothing before shrinking."""
    a, matrix = -0.75, np.zeros((out, size))
    for row, centre in zip(matrix, (np.arange(out) + 0.5) * size / out - 0.5, strict=True):
        for tap in range(int(np.floor(centre)) - 1, int(np.floor(centre)) + 3):
            x = abs(centre - tap)
            near, far = ((a + 2) * x - (a + 3)) * x * x + 1, a * (((x - 5) * x + 8) * x - 4)
            row[min(max(tap, 0), size - 1)] += near if x <= 1 else far
    return matrix

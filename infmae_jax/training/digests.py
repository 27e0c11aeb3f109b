"""Exact digests of arrays that do not depend on how they are laid out over devices.

The digest of an array is two sums, modulo 2^32, over its elements. What an element adds is its bits, combined with its
index in the whole array and mixed; the mixing is a bijection of the bits, so that no change of a single element goes
unseen, and not linear, so that swapped elements and flips in several of them do not cancel out (but for a chance of
about 2^-64). Integer sums have no rounding: any mesh, any order and NumPy give the same digest. It finds accidents,
not forgery.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import NamedSharding, PartitionSpec

from infmae_jax.training.sharding import path_text

# Per sum: index multiplier, offset, and the multipliers of the two mixing rounds (odd, hence invertible).
_CONSTANTS = (
    (0x9E3779B1, 0x3C6EF372, 0x2C1B3C6D, 0x297A2D39),
    (0xB5297A4D, 0x68E31DA4, 0x1B56C4E9, 0xC2B2AE3D),
)
_UINTS = {1: np.uint8, 2: np.uint16, 4: np.uint32}
_CHUNK = 1 << 20  # elements that NumPy works on at a time


@dataclasses.dataclass(frozen=True)
class Fingerprint:
    """Digests of a tree's leaves.

    Attributes:
      digests: path with slashes -> "dtype[shape] sums", e.g. "float32[3,4] 00f1c2d37a8b9c0d".
      not_finite: paths of the leaves that hold NaN or infinity.
      unequal: paths of the leaves whose copies on different devices are not the same.
    """

    digests: dict[str, str]
    not_finite: tuple[str, ...]
    unequal: tuple[str, ...]


def fingerprint(tree: Any) -> Fingerprint:
    """Digests of a tree of JAX arrays, computed where they are; to be called by all processes that hold parts of them.

    Waits for the arrays to be computed. Where copies differ, the digest is that of the first one.
    """
    leaves = {path_text(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(tree)}
    sums = [_sums_of_shards(leaf) for leaf in leaves.values()]  # all dispatched before any is waited for
    values = _gather(sums)
    digests, unequal = {}, []
    for row, (path, leaf) in enumerate(leaves.items()):
        copies: dict[Any, list[np.ndarray]] = {}
        for device, index in leaf.sharding.devices_indices_map(leaf.shape).items():
            copies.setdefault(str(index), []).append(values[device.id][row])
        digests[path] = _text(leaf, sum(same[0].astype(np.uint64) for same in copies.values()))
        if any((other != same[0]).any() for same in copies.values() for other in same[1:]):
            unequal.append(path)
    not_finite = [path for row, path in enumerate(leaves) if any(value[row][2] for value in values.values())]
    return Fingerprint(digests, tuple(not_finite), tuple(unequal))


def differing(found: Fingerprint, expected: Mapping[str, str]) -> list[str]:
    """Paths of the leaves that are not, on every device, what `expected` says; leaves not in `found` do not count."""
    wrong = {path for path, digest in found.digests.items() if expected.get(path) != digest}
    return sorted(wrong | set(found.unequal))


def host_digests(tree: Any) -> dict[str, str]:
    """Digests of a tree of NumPy arrays: path with slashes -> the same text as from `fingerprint`."""
    return {path_text(path): host_digest(leaf) for path, leaf in jax.tree_util.tree_leaves_with_path(tree)}


def host_digest(array: np.ndarray) -> str:
    """Digest of one NumPy array."""
    bits = np.ascontiguousarray(array).reshape(-1)
    bits = bits.astype(np.uint8) if bits.dtype == bool else bits.view(_UINTS[bits.dtype.itemsize])
    totals = np.zeros(2, np.uint64)
    for start in range(0, bits.size, _CHUNK):
        part = bits[start : start + _CHUNK].astype(np.uint32)
        index = np.arange(start, start + part.size, dtype=np.uint32)
        totals += [_mixed(part, index, constants, np.uint32).sum(dtype=np.uint64) for constants in _CONSTANTS]
    return _text(array, totals)


def layout(array: Any) -> str:
    """Data type and shape, the first word of a digest: "float32[3,4]"."""
    return f"{np.dtype(array.dtype)}[{','.join(map(str, array.shape))}]"


def empty_array(digest: str) -> np.ndarray:
    """An uninitialised array of the layout that a digest tells."""
    dtype, shape = digest.split(" ")[0].rstrip("]").split("[")
    return np.empty([int(size) for size in shape.split(",") if size], jnp.dtype(dtype))


def _text(array: Any, totals: np.ndarray) -> str:
    one, two = (int(total) % 2**32 for total in totals[:2])
    return f"{layout(array)} {one:08x}{two:08x}"


def _mixed(bits: Any, index: Any, constants: tuple[int, int, int, int], uint: Any) -> Any:
    """What every element adds to a sum; `uint` makes a uint32 constant of NumPy or JAX."""
    step, offset, first, second = map(uint, constants)
    x = bits ^ (index * step + offset)
    x = (x ^ (x >> uint(16))) * first
    x = (x ^ (x >> uint(15))) * second
    return x ^ (x >> uint(16))


def _sums_of_shards(leaf: jax.Array) -> jax.Array:
    """(…,3) uint32, on each device the two sums over its part of the leaf and how many of its numbers are not finite.

    No device talks to another, so that many such small programs can be under way at once.
    """
    if isinstance(leaf.sharding, NamedSharding):
        return _sums_on_mesh(leaf, leaf.sharding)
    if len(leaf.sharding.device_set) == 1:
        return _sums(leaf, leaf.shape, (0,) * leaf.ndim)
    raise TypeError(f"digests need NamedSharding or a single device, not {leaf.sharding}")


@functools.partial(jax.jit, static_argnames="sharding")
def _sums_on_mesh(leaf: jax.Array, sharding: NamedSharding) -> jax.Array:
    axes = sharding.mesh.axis_names
    spec = tuple(sharding.spec) + (None,) * (leaf.ndim - len(sharding.spec))

    def local(block: jax.Array) -> jax.Array:
        starts = tuple(
            jnp.uint32(0) if names is None else jax.lax.axis_index(names).astype(jnp.uint32) * jnp.uint32(size)
            for names, size in zip(spec, block.shape, strict=True)
        )
        return _sums(block, leaf.shape, starts).reshape((1,) * len(axes) + (3,))

    return jax.shard_map(
        local, mesh=sharding.mesh, in_specs=PartitionSpec(*spec), out_specs=PartitionSpec(*axes), check_vma=False
    )(leaf)


@functools.partial(jax.jit, static_argnames="shape")
def _sums(block: jax.Array, shape: tuple[int, ...], starts: tuple[Any, ...]) -> jax.Array:
    """(3,) uint32 of a block that begins at `starts` of an array of `shape`."""
    if block.dtype == bool:
        bits = block.astype(jnp.uint32)
    else:
        bits = jax.lax.bitcast_convert_type(block, _UINTS[block.dtype.itemsize]).astype(jnp.uint32)
    index, stride = jnp.zeros(block.shape, jnp.uint32), 1
    for dim in reversed(range(block.ndim)):
        along = jax.lax.broadcasted_iota(jnp.uint32, block.shape, dim) + jnp.asarray(starts[dim], jnp.uint32)
        index, stride = index + along * jnp.uint32(stride % 2**32), stride * shape[dim]
    totals = [jnp.sum(_mixed(bits, index, constants, jnp.uint32), dtype=jnp.uint32) for constants in _CONSTANTS]
    floats = jnp.issubdtype(block.dtype, jnp.floating)
    not_finite = jnp.sum(~jnp.isfinite(block), dtype=jnp.uint32) if floats else jnp.uint32(0)
    return jnp.stack([*totals, not_finite])


def _gather(sums: list[jax.Array]) -> dict[int, np.ndarray]:
    """Device id -> (leaves, 3), for the devices of all processes."""
    shards = [{shard.device.id: shard.data for shard in array.addressable_shards} for array in sums]
    ids = sorted(set().union(*shards))
    zero = np.zeros(3, np.uint32)
    mine = np.stack([[np.reshape(row.get(i, zero), 3) for i in ids] for row in jax.device_get(shards)], axis=1)
    if jax.process_count() == 1:
        return dict(zip(ids, mine, strict=True))
    with jax.transfer_guard("allow"):
        all_ids, all_sums = multihost_utils.process_allgather((np.asarray(ids, np.int32), mine))
    return dict(zip(all_ids.reshape(-1).tolist(), all_sums.reshape(-1, *mine.shape[1:]), strict=True))

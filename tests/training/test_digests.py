"""Digests see every change, and do not see how arrays are laid out over devices."""

import functools

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from infmae_jax.training import digests

DTYPES = [np.float32, ml_dtypes.bfloat16, np.int32, np.uint8, np.bool_]
LAYOUTS = [(1, (1,), (None, None)), (2, (2,), ("x", None)), (4, (4,), (None, "x")), (4, (2, 2), ("x", "y")),
           (4, (2, 2), (("y", "x"), None)), (4, (2, 2), ("y", None)), (4, (2, 2), (None, None))]  # fmt: skip


def on_mesh(array, devices, mesh_shape, spec):
    axes = ("x", "y")[: len(mesh_shape)]
    mesh = jax.make_mesh(mesh_shape, axes, axis_types=(AxisType.Auto,) * len(axes), devices=jax.devices()[:devices])
    return jax.device_put(array, NamedSharding(mesh, PartitionSpec(*spec)))


def slow_digest(array):
    """The definition, in Python's integers, element by element."""
    array = np.asarray(array)
    kind = {1: "B", 2: "H", 4: "I"}[array.dtype.itemsize]
    totals = [0, 0]
    for index, bits in enumerate(memoryview(array.tobytes()).cast(kind)):
        for lane, (step, offset, first, second) in enumerate(digests._CONSTANTS):
            x = bits ^ ((index * step + offset) % 2**32)
            x = (x ^ (x >> 16)) * first % 2**32
            x = (x ^ (x >> 15)) * second % 2**32
            totals[lane] += x ^ (x >> 16)
    sums = "".join(f"{total % 2**32:08x}" for total in totals)
    return f"{array.dtype}[{','.join(map(str, array.shape))}] {sums}"


def random_array(dtype, shape, seed=0):
    bits = np.random.default_rng(seed).integers(0, 256, (int(np.prod(shape)) * np.dtype(dtype).itemsize,), np.uint8)
    return (bits % 2).astype(bool).reshape(shape) if dtype is np.bool_ else bits.view(dtype).reshape(shape)


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: np.dtype(d).name)
@pytest.mark.parametrize("shape", [(), (0, 3), (4,), (8, 12), (4, 4, 3, 2)], ids=str)
def test_numpy_and_device_compute_the_definition(dtype, shape):
    array = random_array(dtype, shape)
    assert digests.host_digest(array) == slow_digest(array)
    assert digests.fingerprint({"a": {"b": jnp.asarray(array)}}).digests == {"a/b": slow_digest(array)}
    if len(shape) > 1 and array.size:
        assert digests.host_digest(np.asfortranarray(array)) == slow_digest(array)


def test_numpy_works_in_chunks(monkeypatch):
    array = random_array(np.float32, (37, 5))
    monkeypatch.setattr(digests, "_CHUNK", 16)
    assert digests.host_digest(array) == slow_digest(array)


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: np.dtype(d).name)
def test_layout_over_devices_does_not_matter(dtype):
    tree = {"kernel": random_array(dtype, (8, 12)), "scale": random_array(dtype, (), 1)}
    expected = digests.host_digests(tree)
    for devices, mesh_shape, spec in LAYOUTS:
        place = functools.partial(on_mesh, devices=devices, mesh_shape=mesh_shape)
        placed = {"kernel": place(tree["kernel"], spec=spec), "scale": place(tree["scale"], spec=())}
        found = digests.fingerprint(placed)
        assert found.digests == expected and not found.unequal and not digests.differing(found, expected)


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_every_flipped_bit_changes_the_digest(data):
    dtype = data.draw(st.sampled_from(DTYPES[:4]))
    array = data.draw(hnp.arrays(np.uint8, data.draw(st.integers(1, 12)) * np.dtype(dtype).itemsize)).view(dtype)
    original, before = array.tobytes(), digests.host_digest(array)
    seen = set()
    for bit in range(8 * array.nbytes):
        changed = np.frombuffer(original, np.uint8).copy()
        changed[bit // 8] ^= 1 << bit % 8
        seen.add(digests.host_digest(changed.view(dtype)))
    assert before not in seen and len(seen) == 8 * array.nbytes


def test_every_flipped_bit_changes_the_digest_on_the_device():
    array = random_array(np.float32, (4, 2))
    changed = np.stack([array.view(np.uint32)] * 256)
    for bit in range(256):
        changed[bit].reshape(-1)[bit // 32] ^= np.uint32(1 << bit % 32)
    rows = digests.fingerprint([*map(jnp.asarray, changed.view(np.float32))]).digests.values()
    assert len({*rows, digests.host_digest(array)}) == 257


@settings(max_examples=100, deadline=None)
@given(hnp.arrays(np.float32, st.integers(2, 40), elements=st.sampled_from([0.0, 1.0, -1.0, 0.5, 2.0])), st.randoms())
def test_other_orders_have_other_digests(array, random):
    order = list(range(array.size))
    random.shuffle(order)
    same = (array[order].view(np.uint32) == array.view(np.uint32)).all()
    assert (digests.host_digest(array[order]) == digests.host_digest(array)) == same


@settings(max_examples=100, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 63), st.integers(0, 31)), min_size=2, max_size=6, unique=True))
def test_several_flips_do_not_cancel(flips):
    array = np.zeros(64, np.uint32)
    for index, bit in flips:
        array[index] ^= np.uint32(1 << bit)
    assert digests.host_digest(array.view(np.float32)) != digests.host_digest(np.zeros(64, np.float32))


def test_wrong_copy_on_one_device_is_found():
    array = random_array(np.int32, (4, 6))
    devices, mesh_shape, spec = 4, (2, 2), ("y", None)
    good = on_mesh(array, devices, mesh_shape, spec)
    copies = [np.array(shard.data) for shard in good.addressable_shards]
    copies[3][1, 2] ^= 1
    bad = jax.make_array_from_single_device_arrays(
        array.shape, good.sharding, [jax.device_put(c, s.device) for c, s in zip(copies, good.addressable_shards)]
    )
    found = digests.fingerprint({"a": bad, "b": good})
    assert found.unequal == ("a",)
    assert digests.differing(found, digests.host_digests({"a": array, "b": array})) == ["a"]


def test_what_is_not_finite_is_named():
    tree = {"good": jnp.ones(3), "nan": jnp.asarray([1.0, np.nan]), "ints": jnp.arange(3),
            "inf": on_mesh(np.asarray([[1.0, 2.0], [3.0, -np.inf]], np.float32), 4, (2, 2), ("x", "y"))}  # fmt: skip
    assert set(digests.fingerprint(tree).not_finite) == {"nan", "inf"}

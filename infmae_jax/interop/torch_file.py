"""The torch checkpoint file format, read without torch.

Since torch 1.6 a checkpoint is a zip archive of uncompressed records: `NAME/data.pkl`, a pickle that describes the
tensors, and `NAME/data/KEY`, the bytes of each storage. Before that it was five pickles and the storages in one stream.
"""

import io
import mmap
import os
import struct
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO

import ml_dtypes
import numpy as np

from data_pipelines.errors import InputError
from infmae_jax.interop import pickle_data, wrappers

_DTYPES = {
    "FloatStorage": np.dtype(np.float32),
    "DoubleStorage": np.dtype(np.float64),
    "HalfStorage": np.dtype(np.float16),
    "BFloat16Storage": np.dtype(ml_dtypes.bfloat16),
    "LongStorage": np.dtype(np.int64),
    "IntStorage": np.dtype(np.int32),
    "ShortStorage": np.dtype(np.int16),
    "CharStorage": np.dtype(np.int8),
    "ByteStorage": np.dtype(np.uint8),
    "BoolStorage": np.dtype(np.bool_),
}
_MAX_RECORDS = 100_000
_MAX_EXPANSION = 2  # tied weights are stored once: tensors may be this many times as large as the file
_LEGACY_MAGIC = 0x1950A86A20F9469CFC6C
_LEGACY_PICKLES = 5  # magic number, protocol, system, the object, the keys of its storages
# What `zipfile` raises for files that are cut, altered or encrypted.
_DAMAGE = (zipfile.BadZipFile, EOFError, NotImplementedError, OverflowError, RuntimeError, ValueError, struct.error)


def read_checkpoint(path: str | os.PathLike) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """Reads the tensors of a torch checkpoint; no code of the file is run, and its size bounds time and memory.

    Args:
      path: a file holding a bare state dict, or one under a usual key such as `{"model": state_dict, ...}`.

    Returns:
      The state dict, name -> read-only array of the stored dtype and shape, and what else the file holds at its top
      level that is a string or number (an optimizer's tensors beside the model are not even read).

    Raises:
      InputError: the file is missing, truncated, damaged, no torch checkpoint, has no state dict, or its pickle asks
        for anything but tensors and plain values.
    """
    path = Path(path)
    try:
        with path.open("rb") as file:
            start = file.read(16)
            file.seek(0)
            return _read_zip(file) if start.startswith(b"PK") else _read_legacy(file, start)
    except (pickle_data.PickleRefused, InputError) as error:
        raise InputError(f"{path} cannot be loaded: {error}") from error
    except OSError as error:
        raise InputError(f"{path} cannot be read: {error.strerror or error}") from error
    except _DAMAGE as error:
        raise InputError(f"{path} is truncated or damaged ({error}); copy it again") from error


def _read_zip(file: BinaryIO) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    with zipfile.ZipFile(file) as archive:
        records = {info.filename: info for info in archive.infolist()}
        pickles = [name for name in records if name.endswith("/data.pkl") and name.count("/") == 1]
        if len(pickles) != 1 or len(records) > _MAX_RECORDS:
            raise pickle_data.PickleRefused("it is a zip archive but no torch checkpoint (no data.pkl inside)")
        root = pickles[0].removesuffix("data.pkl")

        def record(name: str) -> bytes:
            # Uncompressed, as torch writes them: no record is larger than the file.
            if records[name].compress_type != zipfile.ZIP_STORED:
                raise pickle_data.PickleRefused("its records are compressed, which torch never does")
            return archive.read(records[name])

        def storage_bytes(key: str) -> bytes | None:
            name = f"{root}data/{key}"
            return record(name) if name in records else None

        if records[pickles[0]].file_size > pickle_data.MAX_BYTES:
            raise pickle_data.PickleRefused("its pickle is too large to describe a model")
        swapped = f"{root}byteorder" in records and record(f"{root}byteorder") == b"big"
        tree, _ = pickle_data.read_pickle(io.BytesIO(record(pickles[0])))
        return _arrays_of(tree, file, storage_bytes, swapped)


def _read_legacy(file: BinaryIO, start: bytes) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    # The stream opens with the pickled magic number: protocol 2, LONG1, ten bytes.
    if start[2:14] != b"\x8a\x0a" + _LEGACY_MAGIC.to_bytes(10, "little"):
        raise pickle_data.PickleRefused("it is not a torch checkpoint (neither a zip archive nor torch's older format)")
    data = memoryview(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ))
    head = io.BytesIO(data[: pickle_data.MAX_BYTES])
    _, _, (system, _), (tree, storages), (keys, _) = [pickle_data.read_pickle(head) for _ in range(_LEGACY_PICKLES)]
    if not isinstance(system, dict) or not isinstance(keys, list) or not all(isinstance(key, str) for key in keys):
        raise pickle_data.PickleRefused("its header is damaged")
    sizes = {key: _dtype(storage).itemsize for key, storage in storages.items()}
    found, end = {}, head.tell()
    for key in keys:
        first = end + 8
        end = first + int.from_bytes(data[end:first], "little") * sizes.get(key, 0)
        if end > len(data):
            raise EOFError("it ends inside its tensors")
        found[key] = data[first:end]
    return _arrays_of(tree, file, found.get, system.get("little_endian") is False)


def _arrays_of(
    tree: Any, file: BinaryIO, storage_bytes: Callable[[str], bytes | memoryview | None], swapped: bool
) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    if not isinstance(tree, dict):
        raise pickle_data.PickleRefused("it holds no state dict (a whole pickled module cannot be loaded)")
    tensors = wrappers.find_state(tree, lambda item: isinstance(item, pickle_data.StoredTensor))
    if not tensors:
        raise pickle_data.PickleRefused("it holds no state dict, neither at its top level nor under 'model'")
    storages = {tensor.storage.key: tensor.storage for tensor in tensors.values()}
    size = os.fstat(file.fileno()).st_size
    stored = sum(storage.count * _dtype(storage).itemsize for storage in storages.values())
    if stored > size:
        raise EOFError(f"its tensors have {stored} bytes, the file has {size}")
    flat = {key: _storage_array(storage, storage_bytes(key), swapped) for key, storage in storages.items()}
    arrays = {name: _view(name, tensor, flat[tensor.storage.key]) for name, tensor in tensors.items()}
    if sum(array.nbytes for array in arrays.values()) > _MAX_EXPANSION * size:
        raise pickle_data.PickleRefused(f"its tensors are more than {_MAX_EXPANSION} times as large as the file")
    return arrays, {key: item for key, item in tree.items() if isinstance(item, (str, int, float))}


def _dtype(storage: pickle_data.Storage) -> np.dtype:
    if storage.kind not in _DTYPES:
        raise pickle_data.PickleRefused(f"a tensor has the element type {storage.kind!r}, which is not supported")
    return _DTYPES[storage.kind]


def _storage_array(storage: pickle_data.Storage, data: bytes | memoryview | None, swapped: bool) -> np.ndarray:
    dtype = _dtype(storage)
    if data is None:
        raise pickle_data.PickleRefused(f"the numbers of storage {storage.key} are not in the file")
    if len(data) != storage.count * dtype.itemsize:
        raise EOFError(f"storage {storage.key} has {len(data)} bytes, {storage.count * dtype.itemsize} expected")
    array = np.frombuffer(bytes(data), dtype)
    return array.byteswap() if swapped else array


def _view(name: str, tensor: pickle_data.StoredTensor, flat: np.ndarray) -> np.ndarray:
    shape, stride = tensor.shape, tensor.stride
    count = int(np.prod(shape, dtype=object))
    last = tensor.offset + sum((extent - 1) * step for extent, step in zip(shape, stride, strict=True))
    if count and (count > flat.size or last >= flat.size):
        raise pickle_data.PickleRefused(f"tensor {name} reaches outside its storage")
    if not count:
        return np.empty(shape, flat.dtype)
    steps = [step * flat.itemsize for step in stride]
    return np.lib.stride_tricks.as_strided(flat[tensor.offset :], shape, steps, writeable=False)

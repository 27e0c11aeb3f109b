"""Writes checkpoints the way torch does, with Python's own pickler, for tests of a reader that has none.

`pickle` only writes names that it can import, so stand-ins for torch's modules are put in `sys.modules` meanwhile.
"""

import collections
import io
import pickle
import struct
import sys
import types
import zipfile

import numpy as np

KINDS = {"float32": "FloatStorage", "float64": "DoubleStorage", "float16": "HalfStorage", "int64": "LongStorage"}
LEGACY_MAGIC = 0x1950A86A20F9469CFC6C


class Tensor:
    """A strided view of a flat array, pickled as torch pickles a tensor."""

    def __init__(self, storage, shape, stride=None, offset=0):
        self.storage = storage
        self.shape = tuple(shape)
        contiguous = [int(np.prod(self.shape[axis + 1 :])) for axis in range(len(self.shape))]
        self.stride = tuple(contiguous if stride is None else stride)
        self.offset = offset

    def __reduce__(self):
        import torch._utils  # the stand-in

        hooks = collections.OrderedDict()
        args = (_Storage(self.storage), self.offset, self.shape, self.stride, False, hooks)
        return torch._utils._rebuild_tensor_v2, args


def tensor(array):
    """A contiguous tensor with a storage of its own."""
    return Tensor(np.ascontiguousarray(array).reshape(-1), np.shape(array))


class _Storage:
    def __init__(self, array):
        self.array = array


def pickle_objects(objects, protocol=2, legacy=False):
    """The pickles of `objects` one after another, and the storages that they mention: key -> flat array."""
    modules = _stand_ins()
    keys, storages = {}, {}

    class Pickler(pickle._Pickler):
        def persistent_id(self, item):
            if not isinstance(item, _Storage):
                return None
            key = keys.setdefault(id(item.array), str(len(keys)))
            storages[key] = item.array
            kind = getattr(modules["torch"], KINDS[item.array.dtype.name])
            return ("storage", kind, key, "cpu", item.array.size) + ((None,) if legacy else ())

    kept = {name: sys.modules.get(name) for name in modules}
    sys.modules.update(modules)
    try:
        stream = io.BytesIO()
        for item in objects:
            Pickler(stream, protocol).dump(item)
    finally:
        for name, module in kept.items():
            if module is None:
                del sys.modules[name]
            else:
                sys.modules[name] = module
    return stream.getvalue(), storages


def _stand_ins():
    torch, utils = types.ModuleType("torch"), types.ModuleType("torch._utils")
    for kind in KINDS.values():
        setattr(torch, kind, type(kind, (), {"__module__": "torch"}))
    utils._rebuild_tensor_v2 = lambda: None
    utils._rebuild_tensor_v2.__module__ = "torch._utils"
    utils._rebuild_tensor_v2.__name__ = utils._rebuild_tensor_v2.__qualname__ = "_rebuild_tensor_v2"
    torch._utils = utils
    return {"torch": torch, "torch._utils": utils}


def save(path, item, protocol=2):
    """Writes `item`, with `Tensor`s in it, in torch's zip format."""
    pickled, storages = pickle_objects([item], protocol)
    save_raw(path, pickled, {key: array.tobytes() for key, array in storages.items()})


def save_raw(path, pickled, storages=None, byteorder=b"little"):
    """A zip archive around a given pickle and the bytes of storages."""
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("name/data.pkl", pickled)
        archive.writestr("name/byteorder", byteorder)
        for key, data in (storages or {}).items():
            archive.writestr(f"name/data/{key}", data)
        archive.writestr("name/version", b"3\n")


def save_legacy(path, item):
    """Writes `item` in the format that torch had before 1.6."""
    header, _ = pickle_objects([LEGACY_MAGIC, 1001, {"protocol_version": 1001, "little_endian": True}])
    body, storages = pickle_objects([item], legacy=True)
    keys, _ = pickle_objects([list(storages)])
    data = b"".join(struct.pack("<q", array.size) + array.tobytes() for array in storages.values())
    path.write_bytes(header + body + keys + data)

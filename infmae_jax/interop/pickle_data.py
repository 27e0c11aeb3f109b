"""Reads the pickle inside a torch checkpoint as data, on a machine that has no way to run code.

A pickle is a program for a small stack machine. As it comes, Python's machine imports whatever name the program gives
and calls it, and crashes or never ends when keys of dictionaries are deep tuples. Ours is its form in Python, in which
the instructions that import, call, hash or set attributes are replaced: it knows the few names of the format, builds
plain values for them and an inert stand-in for the rest of what checkpoints carry. Nothing is imported, no object of a
foreign class is made, nothing but strings and numbers is hashed, and time and memory are bounded by `MAX_BYTES` and
`MAX_STEPS`.
"""

import io
import pickle
import pickletools
import re
from collections.abc import Callable
from typing import Any, NamedTuple

MAX_BYTES = 32 << 20  # the pickle of a billion-parameter model with optimizer state is below 1 MB
MAX_STEPS = 500_000  # instructions and arguments of calls; Base with its optimizer has 30,000
MAX_RANK = 32
MAX_KEY, MAX_NAME = 1000, 200  # characters of a key, of an imported name


class PickleRefused(ValueError):
    """The pickle is damaged or asks for something that is not data; the message is one clause."""


class Storage(NamedTuple):
    """A flat run of numbers outside the pickle: its key in the file, torch's name of the element type, the length."""

    key: str
    kind: str
    count: int


class StoredTensor(NamedTuple):
    """A strided view of a storage; offset and stride count elements."""

    storage: Storage
    offset: int
    shape: tuple[int, ...]
    stride: tuple[int, ...]


class Inert(NamedTuple):
    """Stands for a name, or for an object that a checkpoint carries beside its tensors and that nobody here reads; what
    is put into it is forgotten."""

    name: str

    def forget(self, *unused) -> None:
        """Takes anything."""

    add = append = extend = __setitem__ = forget


class _Dict(dict):
    """A dictionary that hashes only what is safe to hash."""

    def __init__(self, pairs=()):
        super().__init__()
        for key, value in pairs:
            self[key] = value

    def __setitem__(self, key: Any, value: Any) -> None:
        if not _is_key(key):
            raise PickleRefused("it has dictionary keys that are neither short text nor numbers")
        super().__setitem__(key, value)


def _rebuild_tensor(storage, offset, shape, stride, *unused) -> StoredTensor:
    """`unused`: requires_grad, backward hooks, metadata: nothing that belongs to the numbers."""
    if not isinstance(storage, Storage):
        raise PickleRefused("a tensor without a storage")
    if len(shape) != len(stride) or len(shape) > MAX_RANK or not all(map(_is_count, (offset, *shape, *stride))):
        raise PickleRefused("a tensor with an impossible shape")
    return StoredTensor(storage, offset, tuple(shape), tuple(stride))


def _rebuild_typed_tensor(storage, offset, shape, stride, grad, hooks, dtype, *unused):
    name = getattr(dtype, "name", "unknown")
    raise PickleRefused(f"a tensor has the element type {name!r}, which is not supported")


# What a call of these names makes. The names are data of the file format.
_MAKERS = {
    "torch._utils._rebuild_tensor_v2": _rebuild_tensor,
    "torch._utils._rebuild_tensor": _rebuild_tensor,
    "torch._utils._rebuild_tensor_v3": _rebuild_typed_tensor,
    "torch._utils._rebuild_parameter": lambda tensor, *unused: tensor,
    "torch._utils._rebuild_parameter_with_state": lambda tensor, *unused: tensor,
    "collections.OrderedDict": _Dict,
    "torch.Size": lambda extents=(): extents if isinstance(extents, tuple) else tuple(extents[: MAX_RANK + 1]),
}
# Names of what checkpoints carry beside tensors: arguments, random states, paths, NumPy numbers, configs. All inert.
_INERT = re.compile(
    r"(torch|numpy|collections|argparse|pathlib|datetime|omegaconf|yacs|easydict|addict|typing)(\.(?!__)\w+)+"
    r"|_codecs\.encode|copy_?reg\._reconstructor"
    r"|(builtins|__builtin__)\.(object|set|frozenset|bytearray|complex|slice|range|int|float|str|bool|dict|list|tuple)"
)

# What checkpoints are written with. Others make objects of classes, take extensions, or share memory.
_INSTRUCTIONS = frozenset(
    "PROTO FRAME STOP MARK POP DUP PUT BINPUT LONG_BINPUT MEMOIZE GET BINGET LONG_BINGET NONE NEWTRUE NEWFALSE "
    "INT BININT BININT1 BININT2 LONG LONG1 LONG4 FLOAT BINFLOAT STRING BINSTRING SHORT_BINSTRING BINBYTES "
    "SHORT_BINBYTES BINBYTES8 BYTEARRAY8 UNICODE BINUNICODE SHORT_BINUNICODE BINUNICODE8 EMPTY_TUPLE TUPLE TUPLE1 "
    "TUPLE2 TUPLE3 EMPTY_LIST LIST APPEND APPENDS EMPTY_DICT DICT SETITEM SETITEMS EMPTY_SET ADDITEMS FROZENSET "
    "GLOBAL STACK_GLOBAL REDUCE NEWOBJ BUILD BINPERSID".split()
)
_DAMAGED = "its pickle is damaged"


def _is_count(value: Any) -> bool:
    return type(value) is int and 0 <= value < 1 << 62


def _is_key(key: Any) -> bool:
    """What may be hashed: the hash of deep tuples crashes the interpreter, that of shared ones or large values takes
    time without end."""
    if isinstance(key, str):
        return len(key) <= MAX_KEY
    return key is None or isinstance(key, float) or (isinstance(key, int) and abs(key) < 1 << 63)


class _Machine(pickle._Unpickler):
    """One run over one pickle: Python's machine with these methods in place of its own."""

    def __init__(self, stream: io.BytesIO):
        super().__init__(stream, encoding="latin1")
        self.steps = 0
        self.storages: dict[str, Storage] = {}

    def spend(self, steps: int) -> None:
        self.steps += steps
        if self.steps > MAX_STEPS:
            raise PickleRefused("its pickle is too long to describe a model")

    def find_class(self, module: str, attribute: str) -> Inert:
        """Stands for a name that checkpoints are known to hold."""
        if len(module) + len(attribute) > MAX_NAME:
            raise PickleRefused(_DAMAGED)
        name = f"{module}.{attribute}"
        if name not in _MAKERS and not _INERT.fullmatch(name):
            raise PickleRefused(f"it asks to import {name!r}, and loading a checkpoint never runs code from it")
        return Inert(name)

    def load_reduce(self) -> None:
        """Makes what a call of a name stands for."""
        args, called = self.stack.pop(), self.stack.pop()
        if not isinstance(called, Inert) or not isinstance(args, tuple):
            raise PickleRefused("its pickle calls something that is not a name")
        self.spend(sum(len(arg) for arg in args if isinstance(arg, (dict, list, tuple))))
        maker = _MAKERS.get(called.name, lambda *unused: called)
        self.append(maker(*args))

    load_newobj = load_reduce
    load_bytearray8 = pickle._Unpickler.load_binbytes8  # its own makes room for as much as the pickle says it holds

    def load_build(self) -> None:
        """Drops the attributes of an object: no plain value has any."""
        self.stack.pop()

    def load_empty_dictionary(self) -> None:
        self.append(_Dict())

    def load_dict(self) -> None:
        items = self.pop_mark()
        self.append(_Dict(zip(items[::2], items[1::2], strict=True)))

    def load_empty_set(self) -> None:
        self.append(Inert("set"))

    def load_frozenset(self) -> None:
        self.pop_mark()
        self.append(Inert("frozenset"))

    def persistent_load(self, identity: Any) -> Storage:
        """Stands for numbers that are stored beside the pickle."""
        if not isinstance(identity, tuple) or len(identity) < 5 or identity[0] != "storage":
            raise PickleRefused(_DAMAGED)
        _, kind, key, _, count = identity[:5]
        if not isinstance(kind, Inert) or not _is_count(count) or not _is_key(key):
            raise PickleRefused(_DAMAGED)
        if len(identity) > 5 and identity[5] is not None:
            raise PickleRefused("its tensors are views in the oldest torch format; save it again with torch >= 1.6")
        return self.storages.setdefault(str(key), Storage(str(key), kind.name.removeprefix("torch."), count))


def _instruction(opcode: pickletools.OpcodeInfo) -> Callable[[_Machine], None]:
    """What the machine does at an instruction: counts it, then does or refuses it."""
    method = pickle._Unpickler.dispatch[ord(opcode.code)].__name__

    def step(machine: _Machine) -> None:
        machine.spend(1)
        if opcode.name not in _INSTRUCTIONS:
            raise PickleRefused(f"its pickle uses the instruction {opcode.name}, which no checkpoint needs")
        getattr(machine, method)()

    return step


_Machine.dispatch = {ord(opcode.code): _instruction(opcode) for opcode in pickletools.opcodes}


def read_pickle(stream: io.BytesIO) -> tuple[Any, dict[str, Storage]]:
    """Builds the value of one pickle out of plain containers, numbers, strings, `StoredTensor` and `Inert`.

    Args:
      stream: positioned at a pickle; is left right behind it.

    Returns:
      The value, and by their keys the storages that the pickle mentions.

    Raises:
      PickleRefused: the pickle is damaged, too long, uses an instruction that no checkpoint needs, or names anything
        that is not part of the checkpoint format.
    """
    machine = _Machine(stream)
    try:
        return machine.load(), machine.storages
    except PickleRefused:
        raise
    except Exception as error:  # whatever the machine makes of it
        raise PickleRefused(_DAMAGED) from error

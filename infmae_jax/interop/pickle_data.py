"""Reads the pickle inside a torch checkpoint as data: an interpreter that has no way to run code.

A pickle is a program for a small stack machine. Python's own machine imports whatever name the program gives and calls
it. This one knows a dozen names, builds plain values for them and refuses every other name, so what a file may do is
bounded by this page: nothing is imported, no object of a foreign class is made, no method of one is called.
"""

from __future__ import annotations

import pickletools
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, BinaryIO


class PickleRefused(ValueError):
    """The pickle is damaged or asks for something that is not data; the message is one clause."""


@dataclass(frozen=True)
class Storage:
    """A flat run of numbers kept outside the pickle.

    Attributes:
      key: name of the run inside the file.
      kind: torch's name of the element type, such as `FloatStorage`.
      count: number of elements.
    """

    key: str
    kind: str
    count: int


@dataclass(frozen=True)
class StoredTensor:
    """A strided view of a storage; offset and stride count elements."""

    storage: Storage
    offset: int
    shape: tuple[int, ...]
    stride: tuple[int, ...]


@dataclass(frozen=True)
class Inert:
    """Stands for an object that a checkpoint may carry beside its tensors and that nobody here reads."""

    name: str


@dataclass(frozen=True)
class _Name:
    """A module-level name that the pickle mentions."""

    name: str


class _Mark:
    """The stack's own marker; one instance, `_MARK`."""


_MARK = _Mark()


def _rebuild_tensor(storage, offset, shape, stride, *unused) -> StoredTensor:
    del unused  # requires_grad, backward hooks, metadata: nothing that belongs to the numbers
    if not isinstance(storage, Storage):
        raise PickleRefused("a tensor without a storage")
    numbers = (offset, *shape, *stride)
    if len(shape) != len(stride) or not all(isinstance(number, int) and number >= 0 for number in numbers):
        raise PickleRefused("a tensor with an impossible shape")
    return StoredTensor(storage, offset, tuple(shape), tuple(stride))


def _rebuild_parameter(tensor, *unused):
    del unused
    return tensor


def _ordered_dict(items=()) -> dict:
    return {key: value for key, value in items}


# What may be called, and what stands in for it. The names are data of the file format.
_CALLABLE: dict[str, Callable[..., Any]] = {
    "torch._utils._rebuild_tensor_v2": _rebuild_tensor,
    "torch._utils._rebuild_tensor": _rebuild_tensor,
    "torch._utils._rebuild_parameter": _rebuild_parameter,
    "collections.OrderedDict": _ordered_dict,
    "torch.Size": tuple,
}
_INERT = {
    "argparse.Namespace",
    "torch.device",
    "collections.defaultdict",
    "_codecs.encode",
    "numpy.dtype",
    "numpy.core.multiarray.scalar",
    "numpy._core.multiarray.scalar",
}
_STORAGE_KIND = re.compile(r"torch\.[A-Z][A-Za-z0-9]*Storage")

# Instructions whose argument is the value itself: INT, BININT1, LONG4, FLOAT, UNICODE, BINBYTES8, ...
_CONSTANT = re.compile(r"(BIN)?(INT|FLOAT)[12]?|LONG[14]?|(SHORT_)?(BIN)?(UNICODE|STRING|BYTES)8?")
_LITERALS = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False, "MARK": _MARK}
_EMPTY = {"EMPTY_DICT": dict, "EMPTY_LIST": list, "EMPTY_TUPLE": tuple, "EMPTY_SET": set}
_FIXED_TUPLES = {"TUPLE1": 1, "TUPLE2": 2, "TUPLE3": 3}
_IGNORED = frozenset({"PROTO", "FRAME"})


class _Machine:
    """One run over one pickle: a stack and a memo."""

    def __init__(self):
        self.stack: list[Any] = []
        self.memo: dict[int, Any] = {}

    def step(self, opcode: str, arg: Any) -> None:
        """Applies one instruction."""
        if opcode in _IGNORED:
            return
        if _CONSTANT.fullmatch(opcode):
            self.stack.append(arg)
        elif opcode in _LITERALS:
            self.stack.append(_LITERALS[opcode])
        elif opcode in _EMPTY:
            self.stack.append(_EMPTY[opcode]())
        elif opcode in _FIXED_TUPLES:
            self.stack.append(tuple(self._pop(_FIXED_TUPLES[opcode])))
        else:
            action = getattr(self, "_op_" + opcode.lower(), None)
            if action is None:
                raise PickleRefused(f"its pickle uses the instruction {opcode}, which no checkpoint needs")
            action(arg)

    def _pop(self, count: int) -> list[Any]:
        if len(self.stack) < count:
            raise PickleRefused("its pickle is damaged")
        taken = self.stack[len(self.stack) - count :]
        del self.stack[len(self.stack) - count :]
        return taken

    def _pop_to_mark(self) -> list[Any]:
        items = []
        while (top := self.stack.pop()) is not _MARK:
            items.append(top)
        return items[::-1]

    def _op_tuple(self, _):
        self.stack.append(tuple(self._pop_to_mark()))

    def _op_list(self, _):
        self.stack.append(self._pop_to_mark())

    def _op_dict(self, _):
        items = self._pop_to_mark()
        self.stack.append(dict(zip(items[::2], items[1::2], strict=True)))

    def _op_append(self, _):
        (item,) = self._pop(1)
        self._extend([item])

    def _op_appends(self, _):
        self._extend(self._pop_to_mark())

    def _op_additems(self, _):
        self.stack[-1].update(self._pop_to_mark())

    def _op_setitem(self, _):
        self._fill(self._pop(2))

    def _op_setitems(self, _):
        self._fill(self._pop_to_mark())

    def _op_pop(self, _):
        self._pop(1)

    def _op_pop_mark(self, _):
        self._pop_to_mark()

    def _op_dup(self, _):
        self.stack.append(self.stack[-1])

    def _extend(self, items: list[Any]) -> None:
        if isinstance(self.stack[-1], list):
            self.stack[-1].extend(items)
        elif not isinstance(self.stack[-1], Inert):
            raise PickleRefused("its pickle is damaged")

    def _fill(self, flat: list[Any]) -> None:
        if isinstance(self.stack[-1], dict):
            self.stack[-1].update(zip(flat[::2], flat[1::2], strict=True))
        elif not isinstance(self.stack[-1], Inert):
            raise PickleRefused("its pickle is damaged")

    def _op_put(self, arg):
        self.memo[arg] = self.stack[-1]

    _op_binput = _op_long_binput = _op_put

    def _op_memoize(self, _):
        self.memo[len(self.memo)] = self.stack[-1]

    def _op_get(self, arg):
        self.stack.append(self.memo[arg])

    _op_binget = _op_long_binget = _op_get

    def _op_global(self, arg):
        self._push_name(arg.replace(" ", ".", 1))

    def _op_stack_global(self, _):
        module, name = self._pop(2)
        self._push_name(f"{module}.{name}")

    def _push_name(self, name: str) -> None:
        if name not in _CALLABLE and name not in _INERT and not _STORAGE_KIND.fullmatch(name):
            raise PickleRefused(f"it asks to import {name!r}, and loading a checkpoint never runs code from it")
        self.stack.append(_Name(name))

    def _op_reduce(self, _):
        called, args = self._pop(2)
        if not isinstance(called, _Name) or not isinstance(args, tuple):
            raise PickleRefused("its pickle calls something that is not a name")
        maker = _CALLABLE.get(called.name)
        self.stack.append(Inert(called.name) if maker is None else maker(*args))

    _op_newobj = _op_reduce

    def _op_build(self, _):
        self._pop(1)  # an object's attributes: kept by no plain value, and Inert has none

    def _op_binpersid(self, _):
        (identity,) = self._pop(1)
        if not isinstance(identity, tuple) or len(identity) < 5 or identity[0] != "storage":
            raise PickleRefused("its pickle is damaged")
        _, kind, key, _, count = identity[:5]
        if not isinstance(kind, _Name) or not isinstance(count, int) or count < 0:
            raise PickleRefused("its pickle is damaged")
        if len(identity) > 5 and identity[5] is not None:
            raise PickleRefused("its tensors are views in the oldest torch format; save it again with torch >= 1.6")
        self.stack.append(Storage(str(key), kind.name.removeprefix("torch."), count))


def read_pickle(stream: bytes | BinaryIO) -> Any:
    """Builds the value of one pickle out of plain containers, numbers, strings, `StoredTensor` and `Inert`.

    Args:
      stream: the pickle, or a file positioned at one; a file is left right behind it.

    Raises:
      PickleRefused: the pickle is damaged, uses an instruction that no checkpoint needs, or names anything that is not
        part of the checkpoint format.
    """
    machine = _Machine()
    try:
        for opcode, arg, _ in pickletools.genops(stream):
            if opcode.name == "STOP":
                (value,) = machine.stack
                return value
            machine.step(opcode.name, arg)
    except PickleRefused:
        raise
    except (ArithmeticError, AttributeError, LookupError, MemoryError, RecursionError, TypeError, ValueError) as error:
        raise PickleRefused("its pickle is damaged") from error
    raise PickleRefused("its pickle is damaged")

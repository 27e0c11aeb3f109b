"""Reads the pickle inside a torch checkpoint as data: an interpreter that has no way to run code.

A pickle is a program for a small stack machine. Python's own machine imports whatever name the program gives and calls
it, and crashes or never ends when keys of dictionaries are deep tuples. This one knows the few names of the format,
builds plain values for them and an inert stand-in for the rest of what checkpoints carry. Nothing is imported, no
object of a foreign class is made, nothing but strings and integers is hashed, and time and memory are bounded by
`MAX_BYTES` and `MAX_STEPS`.
"""

import io
import pickletools
import re
from typing import Any, NamedTuple

MAX_BYTES = 32 << 20  # the pickle of a billion-parameter model with optimizer state is below 1 MB
MAX_STEPS = 500_000  # instructions and arguments of calls; Base with its optimizer has 30,000
MAX_RANK = 32
MAX_NAME = 1000  # characters of a key or of an imported name


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
    """Stands for a name, or for an object that a checkpoint carries beside its tensors and that nobody here reads."""

    name: str


def _rebuild_tensor(storage, offset, shape, stride, *unused) -> StoredTensor:
    """`unused`: requires_grad, backward hooks, metadata: nothing that belongs to the numbers."""
    if not isinstance(storage, Storage):
        raise PickleRefused("a tensor without a storage")
    if len(shape) != len(stride) or len(shape) > MAX_RANK or not all(map(_is_count, (offset, *shape, *stride))):
        raise PickleRefused("a tensor with an impossible shape")
    return StoredTensor(storage, offset, tuple(shape), tuple(stride))


def _rebuild_typed_tensor(storage, offset, shape, stride, grad, hooks, dtype, *unused):
    name = getattr(dtype, "name", "unknown")
    raise PickleRefused(f"a tensor has the element type {_short(name)}, which is not supported")


# What a call of these names makes. The names are data of the file format.
_MAKERS = {
    "torch._utils._rebuild_tensor_v2": _rebuild_tensor,
    "torch._utils._rebuild_tensor": _rebuild_tensor,
    "torch._utils._rebuild_tensor_v3": _rebuild_typed_tensor,
    "torch._utils._rebuild_parameter": lambda tensor, *unused: tensor,
    "torch._utils._rebuild_parameter_with_state": lambda tensor, *unused: tensor,
    "collections.OrderedDict": lambda items=(): _fill({}, [value for key, item in items for value in (key, item)]),
    "torch.Size": lambda extents=(): extents if isinstance(extents, tuple) else tuple(extents[: MAX_RANK + 1]),
}
# Names of what checkpoints carry beside tensors: arguments, random states, paths, NumPy numbers, configs. All inert.
_INERT = re.compile(
    r"(torch|numpy|collections|argparse|pathlib|datetime|omegaconf|yacs|easydict|addict|typing)(\.(?!__)\w+)+"
    r"|_codecs\.encode|copy_?reg\._reconstructor"
    r"|(builtins|__builtin__)\.(object|set|frozenset|bytearray|complex|slice|range|int|float|str|bool|dict|list|tuple)"
)

_CONSTANT = re.compile(r"(BIN)?(INT|FLOAT)[12]?|LONG[14]?|(SHORT_)?(BIN)?(UNICODE|STRING|BYTES)8?|BYTEARRAY8")
_MARK = Inert("mark")
_FIXED = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False, "MARK": _MARK}
_DAMAGED = "its pickle is damaged"


def _is_count(value: Any) -> bool:
    return type(value) is int and 0 <= value < 1 << 62


def _short(name: str) -> str:
    return repr(name if len(name) <= 80 else name[:80] + "...")


def _fill(target: Any, flat: list[Any]) -> Any:
    """Sets key, value, key, value, ... of a dictionary; an inert stand-in forgets them."""
    if isinstance(target, Inert):
        return target
    keys = flat[::2]
    if not isinstance(target, dict):
        raise PickleRefused(_DAMAGED)
    if not all(map(_is_key, keys)):
        raise PickleRefused("it has dictionary keys that are neither short text nor numbers")
    target.update(zip(keys, flat[1::2], strict=True))
    return target


def _is_key(key: Any) -> bool:
    """What may be hashed: the hash of deep tuples crashes the interpreter, that of shared ones or large values takes
    time without end."""
    return len(key) <= MAX_NAME if isinstance(key, str) else key is None or isinstance(key, float) or _is_index(key)


def _is_index(value: Any) -> bool:
    return isinstance(value, int) and abs(value) < 1 << 63


class _Machine:
    """One run over one pickle: a stack and a memo."""

    def __init__(self):
        self.stack: list[Any] = []
        self.memo: dict[int, Any] = {}
        self.steps = 0

    def step(self, name: str, arg: Any) -> None:
        """Applies one instruction."""
        stack = self.stack
        self._spend(1)
        if _CONSTANT.fullmatch(name):
            stack.append(arg)
        elif name in _FIXED:
            stack.append(_FIXED[name])
        elif name in ("PUT", "BINPUT", "LONG_BINPUT", "MEMOIZE"):
            self.memo[len(self.memo) if arg is None else arg] = stack[-1]
        elif name in ("GET", "BINGET", "LONG_BINGET"):
            stack.append(self.memo[arg])
        elif name == "DUP":
            stack.append(stack[-1])
        elif name in ("POP", "BUILD"):  # BUILD: attributes of an object, which no plain value has
            stack.pop()
        elif name.startswith("EMPTY_"):
            kinds = {"EMPTY_DICT": dict, "EMPTY_LIST": list, "EMPTY_TUPLE": tuple}
            stack.append(kinds[name]() if name in kinds else Inert("set"))
        elif name in ("TUPLE1", "TUPLE2", "TUPLE3"):
            stack.append(tuple(self._pop(int(name[-1]))))
        elif name in ("TUPLE", "LIST", "DICT", "FROZENSET"):
            items = self._pop_to_mark()
            makers = {"TUPLE": tuple, "LIST": list, "DICT": lambda flat: _fill({}, flat)}
            stack.append(makers[name](items) if name in makers else Inert("frozenset"))
        elif name in ("SETITEM", "SETITEMS"):
            items = self._pop(2) if name == "SETITEM" else self._pop_to_mark()
            _fill(stack[-1], items)
        elif name in ("APPEND", "APPENDS", "ADDITEMS"):
            items = self._pop(1) if name == "APPEND" else self._pop_to_mark()
            if not isinstance(stack[-1], Inert):
                stack[-1].extend(items)
        elif name in ("GLOBAL", "STACK_GLOBAL"):
            stack.append(self._named(*(arg.split(" ", 1) if arg else self._pop(2))))
        elif name in ("REDUCE", "NEWOBJ"):
            stack.append(self._call(*self._pop(2)))
        elif name == "BINPERSID":
            stack.append(self._storage(stack.pop()))
        elif name not in ("PROTO", "FRAME"):
            raise PickleRefused(f"its pickle uses the instruction {name}, which no checkpoint needs")

    def _spend(self, steps: int) -> None:
        self.steps += steps
        if self.steps > MAX_STEPS:
            raise PickleRefused("its pickle is too long to describe a model")

    def _pop(self, count: int) -> list[Any]:
        if len(self.stack) < count:
            raise PickleRefused(_DAMAGED)
        taken = self.stack[-count:]
        del self.stack[-count:]
        return taken

    def _pop_to_mark(self) -> list[Any]:
        items = []
        while (top := self.stack.pop()) is not _MARK:
            items.append(top)
        return items[::-1]

    def _named(self, module: str, attribute: str) -> Inert:
        if len(module) + len(attribute) > MAX_NAME:
            raise PickleRefused(_DAMAGED)
        name = f"{module}.{attribute}"
        if name not in _MAKERS and not _INERT.fullmatch(name):
            raise PickleRefused(f"it asks to import {_short(name)}, and loading a checkpoint never runs code from it")
        return Inert(name)

    def _call(self, called: Any, args: Any) -> Any:
        if not isinstance(called, Inert) or not isinstance(args, tuple):
            raise PickleRefused("its pickle calls something that is not a name")
        maker = _MAKERS.get(called.name)
        if maker is None:
            return called
        self._spend(sum(len(arg) for arg in args if isinstance(arg, (list, tuple))))
        return maker(*args)

    def _storage(self, identity: Any) -> Storage:
        if not isinstance(identity, tuple) or len(identity) < 5 or identity[0] != "storage":
            raise PickleRefused(_DAMAGED)
        _, kind, key, _, count = identity[:5]
        if not isinstance(kind, Inert) or not _is_count(count) or not _is_key(key):
            raise PickleRefused(_DAMAGED)
        if len(identity) > 5 and identity[5] is not None:
            raise PickleRefused("its tensors are views in the oldest torch format; save it again with torch >= 1.6")
        return Storage(str(key), kind.name.removeprefix("torch."), count)


def read_pickle(stream: bytes | io.BytesIO) -> Any:
    """Builds the value of one pickle out of plain containers, numbers, strings, `StoredTensor` and `Inert`.

    Args:
      stream: the pickle, or a stream positioned at one, which is left right behind it.

    Raises:
      PickleRefused: the pickle is damaged, too long, uses an instruction that no checkpoint needs, or names anything
        that is not part of the checkpoint format.
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
        raise PickleRefused(_DAMAGED) from error
    raise PickleRefused(_DAMAGED)

"""Reads the pickle inside a TorchScript archive as data. No name in it is imported, and nothing is called.

The standard library's `pickletools` lists a pickle's operations without running them. Only the few that describe a
module and its tensors are supported. All others are refused, and the error names them.
"""

from __future__ import annotations

import pickletools
import warnings
from collections.abc import Iterator
from copy import copy
from pathlib import Path
from typing import Any, NamedTuple

from brlite.errors import ModelError
from brlite.files.quoting import excerpt, reason

MAX_DEPTH = 64
MAX_VISITS = 400_000  # of attributes; a model of 100 layers has some 20,000
MAX_NAME = 256  # characters of a tensor's or a module's name, with those of the modules around it
MAX_OPERATIONS = 2_000_000  # 128 MB: each may leave an object of 64 bytes
MAX_DIMENSIONS = 64
STORAGES = {"torch FloatStorage": "F32", "torch HalfStorage": "F16", "torch BFloat16Storage": "BF16"}
# Functions that a pickle may call. Their result is their first argument.
WRAPPERS = (
    "torch.jit._pickle build_intlist",
    "torch.jit._pickle build_doublelist",
    "torch.jit._pickle build_boollist",
    "torch.jit._pickle restore_type_tag",
    "torch._utils _rebuild_parameter",
)
# The value that an operation pushes, and how many values it takes; others take those above the last mark.
_PUSHED: dict[str, Any] = {"EMPTY_DICT": {}, "EMPTY_LIST": [], "EMPTY_TUPLE": ()}
_PUSHED |= {"NONE": None, "NEWTRUE": True, "NEWFALSE": False}
_NUM_TAKEN = {"TUPLE1": 1, "TUPLE2": 2, "TUPLE3": 3, "SETITEM": 2, "APPEND": 1, "NEWOBJ": 2, "REDUCE": 2}


class Global(NamedTuple):
    """A name that the pickle refers to, as "module name". It is never imported."""

    name: str


class Storage(NamedTuple):
    """A sequence of numbers that tensors are views of. `key` names its member of the archive."""

    dtype: str
    key: str
    num_elements: int


class TensorValue(NamedTuple):
    """A view of a storage: offset and strides in elements. It holds no weights if the storage's type is unknown."""

    storage: Storage
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]


class Record:
    """A module: the name of its class and its attributes."""

    def __init__(self, type_name: str) -> None:
        self.type_name = type_name
        self.state: dict[str, Any] = {}


class _Refused(Exception):
    """An operation or value of the pickle that is not supported."""


def read_pickle(data: bytes, file: Path) -> Any:
    """The object that a traced module's pickle describes. Raises `ModelError`."""
    machine = _Machine()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", DeprecationWarning)  # Python only warns of a damaged name
            for number, (operation, argument, _) in enumerate(pickletools.genops(data)):
                if number == MAX_OPERATIONS:
                    raise _Refused(f"has more than {MAX_OPERATIONS} operations")
                if operation.name == "STOP":
                    return machine.stack.pop()
                machine.do(operation.name, argument)
    except _Refused as error:
        raise ModelError(f"{file}: data.pkl: {error}; only plain modules and tensors are read") from None
    except (ValueError, IndexError, KeyError, TypeError, AttributeError, RecursionError, DeprecationWarning) as error:
        raise ModelError(f"{file}: data.pkl is broken: {reason(error)}") from error
    raise ModelError(f"{file}: data.pkl is cut short")


def walk_tensors(module: Record, file: Path) -> Iterator[tuple[str, Record, TensorValue]]:
    """Yields each tensor below a module, depth first: name, module, tensor. One may come under several names."""
    todo: list[tuple[str, int, Record]] = [("", 0, module)]
    num_visits = 0
    while todo:
        prefix, depth, record = todo.pop()
        num_visits += len(record.state)
        if depth > MAX_DEPTH or num_visits > MAX_VISITS:
            raise ModelError(f"{file}: its modules are nested without end")
        below = []
        for name, value in record.state.items():
            if not isinstance(value, TensorValue | Record):
                continue
            full_name = f"{prefix}{name}"
            if len(full_name) > MAX_NAME:
                raise ModelError(
                    f"{file}: {excerpt(full_name)} has {len(full_name)} characters; allowed are {MAX_NAME}"
                )
            if isinstance(value, TensorValue):
                yield full_name, record, value
            else:
                below.append((f"{full_name}.", depth + 1, value))
        todo += reversed(below)


class _Machine:
    """The stack, marks and memo of a pickle's virtual machine (Python's `pickletools` documents the operations)."""

    def __init__(self) -> None:
        self.stack: list[Any] = []
        self._marks: list[int] = []
        self._memo: dict[int, Any] = {}

    def do(self, name: str, argument: Any) -> None:
        """Do one operation. Raises `_Refused` if it is not supported; for a broken pickle, lists and dicts raise."""
        stack = self.stack
        match name:
            case "PROTO" | "FRAME":
                pass
            case "BINUNICODE" | "SHORT_BINUNICODE" | "BININT" | "BININT1" | "BININT2" | "LONG1" | "BINFLOAT":
                stack.append(argument)
            case _ if name in _PUSHED:
                stack.append(copy(_PUSHED[name]))
            case "BINPUT" | "LONG_BINPUT" | "MEMOIZE":
                self._memo[len(self._memo) if argument is None else argument] = stack[-1]
            case "BINGET" | "LONG_BINGET":
                stack.append(self._memo[argument])
            case "MARK":
                self._marks.append(len(stack))
            case "TUPLE" | "TUPLE1" | "TUPLE2" | "TUPLE3":
                stack.append(tuple(self._take(name)))
            case "SETITEM" | "SETITEMS":
                items = self._take(name)
                if not all(isinstance(key, str | int) for key in items[::2]):
                    # A nested tuple can take exponential time to hash.
                    raise _Refused(f"has a dict with the keys {excerpt(items[::2])}")
                stack[-1].update(zip(items[::2], items[1::2], strict=True))
            case "APPEND" | "APPENDS":
                items = self._take(name)
                stack[-1].extend(items)
            case "GLOBAL":
                stack.append(Global(argument))
            case "BINPERSID":
                stack.append(_storage(stack.pop()))
            case "NEWOBJ" | "REDUCE":
                stack.append((_new_object if name == "NEWOBJ" else _call)(*self._take(name)))
            case "BUILD":
                record, state = stack[-2], stack.pop()
                if not isinstance(record, Record) or not isinstance(state, dict):
                    raise _Refused(f"builds {excerpt(record)}")
                record.state = state
            case _:
                raise _Refused(f"has the operation {name}")

    def _take(self, name: str) -> list[Any]:
        """The values that an operation takes from the end of the stack."""
        start = len(self.stack) - _NUM_TAKEN[name] if name in _NUM_TAKEN else self._marks.pop()
        if not 0 <= start <= len(self.stack):
            raise IndexError("takes more values than there are")
        items = self.stack[start:]
        del self.stack[start:]
        return items


def _storage(reference: Any) -> Storage:
    match reference:
        case ("storage", Global(name), str(key), str(), int(num_elements)) if num_elements >= 0:
            return Storage(STORAGES.get(name, name), key, num_elements)
        case _:
            raise _Refused(f"refers to {excerpt(reference)}")


def _new_object(kind: Any, arguments: Any) -> Record:
    if not isinstance(kind, Global) or not kind.name.startswith("__torch__") or arguments != ():
        raise _Refused(f"makes an object of {excerpt(kind)}")
    return Record(kind.name.replace(" ", "."))


def _call(function: Any, arguments: Any) -> Any:
    name = function.name if isinstance(function, Global) else excerpt(function)
    if name == "collections OrderedDict" and arguments == ():
        return {}
    if name in WRAPPERS:
        return arguments[0]
    if name != "torch._utils _rebuild_tensor_v2":
        raise _Refused(f"calls {excerpt(name)}")
    storage, offset, shape, strides = arguments[:4]
    if not isinstance(storage, Storage):
        raise _Refused(f"has a tensor of {excerpt(storage)}")
    for numbers in ((offset,), shape, strides):
        if not isinstance(numbers, tuple) or len(numbers) > MAX_DIMENSIONS:
            raise _Refused(f"has the impossible size {excerpt(numbers)}")
        if not all(type(number) is int and 0 <= number < 2**63 for number in numbers):
            raise _Refused(f"has the impossible size {excerpt(numbers)}")
    if len(shape) != len(strides):
        raise _Refused(f"has a tensor of shape {excerpt(shape)} and strides {excerpt(strides)}")
    return TensorValue(storage, offset, shape, strides)

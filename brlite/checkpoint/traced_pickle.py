"""The pickle inside a TorchScript archive, understood as data. Nothing that it names is looked up, made or called.

The standard library lists a pickle's operations without running them. The few that describe a module and its tensors
are followed here; any other is refused by its name.
"""

from __future__ import annotations

import pickletools
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from brlite.errors import ModelError
from brlite.files.quoting import excerpt, reason

MAX_DEPTH = 64
MAX_VISITS = 4_000_000
MAX_OPERATIONS = 2_000_000  # each may leave an object of 64 bytes
MAX_DIMENSIONS = 64
STORAGES = {"torch FloatStorage": "F32", "torch HalfStorage": "F16", "torch BFloat16Storage": "BF16"}
LIST_BUILDERS = tuple(f"torch.jit._pickle {name}" for name in ("build_intlist", "build_doublelist", "build_boollist"))


class Global(NamedTuple):
    """A name that the pickle refers to: module and name with a space between. It is never looked up."""

    name: str


class Storage(NamedTuple):
    """The numbers that tensors are windows of, by the name of their member in the archive."""

    dtype: str
    key: str
    num_elements: int


class TensorValue(NamedTuple):
    """A window of a storage. Its numbers are no weights where the storage's type is none of `STORAGES`."""

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
    """What of a pickle is not understood."""


def read_pickle(data: bytes, file: Path) -> Any:
    """What a traced module's pickle describes. Its operations are listed by the standard library, which runs none."""
    machine = _Machine()
    try:
        for number, (name, argument) in enumerate(_operations(data)):
            if number == MAX_OPERATIONS:
                raise _Refused(f"has more than {MAX_OPERATIONS} operations")
            if name == "STOP":
                return machine.pop()
            machine.do(name, argument)
    except _Refused as error:
        raise ModelError(f"{file}: data.pkl: {error}; only plain modules and tensors are read") from None
    except (ValueError, IndexError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ModelError(f"{file}: data.pkl is broken: {reason(error)}") from error
    raise ModelError(f"{file}: data.pkl is cut short")


def _operations(data: bytes) -> Iterator[tuple[str, Any]]:
    """The names of the operations up to the first STOP, with their arguments. Raises `ValueError`."""
    with warnings.catch_warnings():
        warnings.simplefilter("error", DeprecationWarning)  # a damaged name is one that Python would only warn of
        try:
            for operation, argument, _ in pickletools.genops(data):
                yield operation.name, argument
        except DeprecationWarning as warning:
            raise ValueError(str(warning)) from None


class _Machine:
    """The stack and the memory that a pickle's operations work on."""

    def __init__(self) -> None:
        self._stack: list[Any] = []
        self._marks: list[int] = []
        self._memo: dict[int, Any] = {}

    def pop(self) -> Any:
        return self._stack.pop()

    def do(self, name: str, argument: Any) -> None:
        if name in PUSHED:
            self._stack.append(argument)
        elif name in MADE:
            self._stack.append(MADE[name]())
        elif name in ("PROTO", "FRAME"):
            pass
        elif name in ("BINPUT", "LONG_BINPUT"):
            self._memo[argument] = self._stack[-1]
        elif name == "MEMOIZE":
            self._memo[len(self._memo)] = self._stack[-1]
        elif name in ("BINGET", "LONG_BINGET"):
            self._stack.append(self._memo[argument])
        elif name in TUPLES:
            self._tuple(TUPLES[name])
        elif name in OPERATIONS:
            OPERATIONS[name](self)
        elif name == "GLOBAL":
            self._stack.append(Global(argument))
        else:
            raise _Refused(f"has the operation {name}")

    def mark(self) -> None:
        self._marks.append(len(self._stack))

    def _since_mark(self) -> list[Any]:
        start = self._marks.pop()
        items = self._stack[start:]
        del self._stack[start:]
        return items

    def tuple_since_mark(self) -> None:
        self._stack.append(tuple(self._since_mark()))

    def _tuple(self, size: int) -> None:
        items = [self._stack.pop() for _ in range(size)]
        self._stack.append(tuple(reversed(items)))

    def set_items(self) -> None:
        items = self._since_mark()
        self._stack[-1].update(zip(map(_key, items[::2]), items[1::2], strict=True))

    def set_item(self) -> None:
        value, key = self._stack.pop(), self._stack.pop()
        self._stack[-1][_key(key)] = value

    def extend(self) -> None:
        items = self._since_mark()
        self._stack[-1].extend(items)

    def append(self) -> None:
        item = self._stack.pop()
        self._stack[-1].append(item)

    def persistent(self) -> None:
        match self._stack.pop():
            case ("storage", Global(name), str(key), str(), int(num_elements)) if num_elements >= 0:
                dtype = STORAGES.get(name, name)
                self._stack.append(Storage(dtype, key, num_elements))
            case other:
                raise _Refused(f"refers to {excerpt(other)}")

    def new_object(self) -> None:
        arguments, kind = self._stack.pop(), self._stack.pop()
        if not isinstance(kind, Global) or not kind.name.startswith("__torch__") or arguments != ():
            raise _Refused(f"makes an object of {excerpt(kind)}")
        self._stack.append(Record(kind.name.replace(" ", ".")))

    def build(self) -> None:
        state = self._stack.pop()
        record = self._stack[-1]
        if not isinstance(record, Record) or not isinstance(state, dict):
            raise _Refused(f"builds {excerpt(record)}")
        record.state = state

    def reduce(self) -> None:
        arguments, function = self._stack.pop(), self._stack.pop()
        name = function.name if isinstance(function, Global) else excerpt(function)
        if name == "torch._utils _rebuild_tensor_v2":
            self._stack.append(_tensor(*arguments[:4]))
        elif name == "collections OrderedDict" and arguments == ():
            self._stack.append({})
        elif name in (*LIST_BUILDERS, "torch.jit._pickle restore_type_tag", "torch._utils _rebuild_parameter"):
            self._stack.append(arguments[0])
        else:
            raise _Refused(f"calls {excerpt(name)}")


PUSHED = ("BINUNICODE", "SHORT_BINUNICODE", "BININT", "BININT1", "BININT2", "LONG1", "BINFLOAT")
MADE: dict[str, Callable[[], Any]] = {
    "NONE": lambda: None,
    "NEWTRUE": lambda: True,
    "NEWFALSE": lambda: False,
    "EMPTY_DICT": dict,
    "EMPTY_LIST": list,
    "EMPTY_TUPLE": tuple,
}
TUPLES = {"TUPLE1": 1, "TUPLE2": 2, "TUPLE3": 3}
OPERATIONS: dict[str, Callable[[_Machine], None]] = {
    "MARK": _Machine.mark,
    "TUPLE": _Machine.tuple_since_mark,
    "SETITEM": _Machine.set_item,
    "SETITEMS": _Machine.set_items,
    "APPEND": _Machine.append,
    "APPENDS": _Machine.extend,
    "BINPERSID": _Machine.persistent,
    "NEWOBJ": _Machine.new_object,
    "BUILD": _Machine.build,
    "REDUCE": _Machine.reduce,
}


def _tensor(storage: object, offset: object, shape: object, strides: object) -> TensorValue:
    if not isinstance(storage, Storage):
        raise _Refused(f"has a tensor of {excerpt(storage)}")
    (first,), sizes, steps = (_counts(numbers) for numbers in ((offset,), shape, strides))
    if len(sizes) != len(steps):
        raise _Refused(f"has a tensor of shape {excerpt(shape)} and strides {excerpt(strides)}")
    return TensorValue(storage, first, sizes, steps)


def _key(key: object) -> str | int:
    """Of a dict. To hash a tuple takes as long as all that is nested in it, however often that is the same one."""
    if not isinstance(key, str | int):
        raise _Refused(f"has a dict with the key {excerpt(key)}")
    return key


def _counts(numbers: object) -> tuple[int, ...]:
    if not isinstance(numbers, tuple) or len(numbers) > MAX_DIMENSIONS:
        raise _Refused(f"has the impossible size {excerpt(numbers)}")
    if not all(type(number) is int and 0 <= number < 2**63 for number in numbers):
        raise _Refused(f"has the impossible size {excerpt(numbers)}")
    return numbers


def walk_tensors(module: Record, file: Path) -> Iterator[tuple[str, Record, TensorValue]]:
    """Every tensor below a module, depth first. The same one may be reached by several names."""
    todo: list[tuple[str, int, Record]] = [("", 0, module)]
    num_visits = 0
    while todo:
        prefix, depth, record = todo.pop()
        num_visits += len(record.state)
        if depth > MAX_DEPTH or num_visits > MAX_VISITS:
            raise ModelError(f"{file}: its modules are nested without end")
        below = []
        for name, value in record.state.items():
            if isinstance(value, TensorValue):
                yield f"{prefix}{name}", record, value
            elif isinstance(value, Record):
                below.append((f"{prefix}{name}.", depth + 1, value))
        todo += reversed(below)

"""Pickles of plain values and numeric arrays, read by an interpreter that can do nothing else.

Python's own unpickler calls what a file names. Here a name is a word: an array, a dtype and text
written as bytes are told by the few names that NumPy and Python write for them, everything else
is refused. What comes out is None, bool, int, float, bytes, str, list, tuple, dict (with keys of
text) and arrays of numbers over the file's own bytes. The file's size and a number of steps bound
the time and the memory: `pickletools` takes what an instruction is followed by out of the file,
and never more than is there.
"""

from __future__ import annotations

import codecs
import io
import re
import struct
from collections.abc import Callable
from dataclasses import dataclass
from pickletools import opcodes
from typing import Any, NoReturn

import numpy as np

# Values and steps of a pickle take memory and time of their own; CIFAR-100 takes 400,000.
_MAX_STEPS = 2_000_000
_MULTIARRAY = ("numpy.core.multiarray", "numpy._core.multiarray")
_NUMERIC = ("numpy.core.numeric", "numpy._core.numeric")
_NAMES = frozenset(
    [("numpy", "ndarray"), ("numpy", "dtype"), ("_codecs", "encode"), ("__builtin__", "bytes")]
    + [(module, "_reconstruct") for module in _MULTIARRAY]
    + [(module, "_frombuffer") for module in _NUMERIC]
)
_DTYPE = re.compile(r"[<>|=]?(?:b1|[iu][1248]|f[248])")
_LATIN_1 = ("latin1", "latin-1")


class RefusedPickleError(ValueError):
    """A pickle that is damaged, or holds anything but plain values and numeric arrays."""


@dataclass(frozen=True)
class _Name:
    """What a pickle would have called."""

    module: str
    name: str


@dataclass
class _Type:
    """A dtype that is still being told."""

    dtype: np.dtype


@dataclass
class _Array:
    """An array: empty until its state has been told."""

    values: np.ndarray | None = None


# Where the items of a list, a tuple or a dict begin on the stack.
_MARK = object()


def loads(content: bytes) -> Any:  # noqa: ANN401
    """The value of a pickle.

    Raises:
        RefusedPickleError: It is damaged, or holds anything but plain values and numeric arrays.
    """
    reader = _Reader(content)
    try:
        return reader.run()
    except (IndexError, KeyError, TypeError, ValueError, OverflowError, struct.error) as error:
        if isinstance(error, RefusedPickleError):
            raise
        raise RefusedPickleError(f"damaged at byte {reader.position}: {error!r:.100}") from error


class _Reader:
    """The machine that pickles are programs of: a stack of values and a memo of numbered ones."""

    def __init__(self, content: bytes) -> None:
        self._file = io.BytesIO(content)
        self._stack: list[Any] = []
        self._memo: dict[int, Any] = {}
        # Text turned into bytes is copied; no sound pickle does that to the same text twice.
        self._bytes_left = len(content)

    @property
    def position(self) -> int:
        """How far the file has been read."""
        return self._file.tell()

    def run(self) -> Any:  # noqa: ANN401
        for _ in range(_MAX_STEPS):
            code = self._file.read(1)
            if not code:
                _refuse("it ends too early")
            instruction = _BY_CODE.get(code)
            name = "" if instruction is None else instruction.name
            if name == "STOP":
                return _finished(self._stack.pop())
            # Names and quoted text are no ASCII here, as `pickletools` takes them for.
            if name == "STRING":
                self._stack.append(self._quoted())
            elif name == "GLOBAL":
                self._push_name(*(self._file.readline()[:-1].decode() for _ in range(2)))
            elif instruction is None or name not in _INSTRUCTIONS:
                _refuse(f"its instruction {code!r} is not allowed")
            else:
                self._step(name, instruction.arg and instruction.arg.reader(self._file))
        _refuse(f"it takes more than {_MAX_STEPS} steps")

    def _step(self, name: str, argument: Any) -> None:  # noqa: ANN401
        """One instruction, by its name in `pickletools`, and what follows it in the file."""
        if name in _VALUES:
            self._stack.append(_plain(argument))
        elif name in _CONSTANTS:
            self._stack.append(_CONSTANTS[name])
        elif name in _EMPTY:
            self._stack.append(_EMPTY[name]())
        elif name in _STRINGS:
            self._stack.append(argument.encode("latin-1"))
        elif name in _PUTS:
            self._put(len(self._memo) if argument is None else argument)
        elif name in _GETS:
            self._stack.append(self._memo[argument])
        elif name in _ITEMS:
            self._take_items(name, self._items(_ITEMS[name]))
        elif name == "DUP":
            self._stack.append(self._stack[-1])
        elif name not in _LAYOUT:
            {"STACK_GLOBAL": self._stack_name, "REDUCE": self._reduce, "BUILD": self._build}[name]()

    def _take_items(self, name: str, items: list[Any]) -> None:
        """Make a value of items, or put them into the list or dict that lies below them."""
        if name in _MAKERS:
            self._stack.append(_MAKERS[name](items))
        elif name.startswith("APPEND"):
            if type(self._stack[-1]) is not list:
                _refuse("it appends to what is no list")
            self._stack[-1].extend(items)
        elif name.startswith("SETITEM"):
            if type(self._stack[-1]) is not dict:
                _refuse("it sets items of what is no dict")
            self._stack[-1].update(_dict_of(items))

    def _quoted(self) -> bytes:
        """Bytes in quotes, as Python 2 wrote them in the oldest protocol."""
        text = self._file.readline().strip()
        if len(text) < 2 or text[:1] != text[-1:] or text[:1] not in (b"'", b'"'):
            _refuse("it holds text without quotes")
        return codecs.escape_decode(text[1:-1])[0]

    def _pop(self) -> Any:  # noqa: ANN401
        value = self._stack.pop()
        if value is _MARK:
            _refuse("its values are out of order")
        return value

    def _items(self, count: int | None) -> list[Any]:
        """The last values, so many or down to the mark, in their order."""
        if count is not None:
            return [self._pop() for _ in range(count)][::-1]
        # From the end: it lies right below the items.
        start = len(self._stack) - 1
        while self._stack[start] is not _MARK:
            start -= 1
            if start < 0:
                _refuse("its values are out of order")
        items = self._stack[start + 1 :]
        del self._stack[start:]
        return items

    def _put(self, place: int) -> None:
        if self._stack[-1] is _MARK:
            _refuse("its values are out of order")
        self._memo[place] = self._stack[-1]

    def _push_name(self, module: str, name: str) -> None:
        if (module, name) not in _NAMES:
            _refuse(f"it asks for {module}.{name}, which is not allowed")
        self._stack.append(_Name(module, name))

    def _stack_name(self) -> None:
        name, module = self._pop(), self._pop()
        if type(module) is not str or type(name) is not str:
            _refuse("it asks for what has no name")
        self._push_name(module, name)

    def _reduce(self) -> None:
        arguments, function = self._pop(), self._pop()
        if type(function) is not _Name or type(arguments) is not tuple:
            _refuse("it calls what is no function")
        if function.name == "_reconstruct":
            self._stack.append(_Array())
        elif function.name == "dtype":
            self._stack.append(_Type(_numeric(arguments[0])))
        elif function.name == "_frombuffer":
            content, kind, shape, order = arguments
            if order not in ("C", "F"):
                _refuse("it holds an array of unknown order")
            self._stack.append(_Array(_array(content, kind, shape, order == "F")))
        elif function.name == "encode":
            self._stack.append(self._encoded(*arguments))
        elif function.name == "bytes" and not arguments:
            # How the oldest protocols spell empty ones.
            self._stack.append(b"")
        else:
            _refuse(f"it calls {function.module}.{function.name}, which is not allowed")

    def _encoded(self, text: str, encoding: str) -> bytes:
        if type(text) is not str or encoding not in _LATIN_1:
            _refuse("it encodes what is no text")
        self._bytes_left -= len(text)
        if self._bytes_left < 0:
            _refuse("it makes more bytes than it has")
        return text.encode("latin-1")

    def _build(self) -> None:
        state, target = self._pop(), self._stack[-1]
        if type(state) is not tuple:
            _refuse("it builds what is no array")
        if type(target) is _Type:
            _, order, *parts = state
            # Fields of a structure, and the like.
            if any(part is not None for part in parts[:3]):
                _refuse("it holds an array whose values are no numbers")
            told: Any = _text(order)
            target.dtype = target.dtype.newbyteorder(told)
        elif type(target) is _Array and target.values is None:
            _, shape, kind, fortran, content = state
            target.values = _array(content, kind, shape, fortran is True)
        else:
            _refuse("it builds what is no array")


def _refuse(reason: str) -> NoReturn:
    raise RefusedPickleError(reason)


def _plain(value: Any) -> Any:  # noqa: ANN401
    if type(value) is int and not -(2**63) <= value < 2**64:
        _refuse("it holds a number of more than 64 bits")
    # Nothing here writes to them.
    return bytes(value) if type(value) is bytearray else value


def _dict_of(items: list[Any]) -> dict[Any, Any]:
    keys, values = items[::2], items[1::2]
    # Numbers can be chosen so that looking them up takes for ever.
    if len(keys) != len(values) or not all(type(key) in (bytes, str) for key in keys):
        _refuse("it holds a dict whose keys are no text")
    return dict(zip(keys, values, strict=True))


def _text(value: Any) -> str:  # noqa: ANN401
    if type(value) is bytes:
        value = value.decode("ascii")
    if type(value) is not str:
        _refuse("it holds a dtype without a name")
    return value


def _numeric(name: Any) -> np.dtype:  # noqa: ANN401
    text = _text(name)
    if not _DTYPE.fullmatch(text):
        _refuse(f"it holds an array whose values are no numbers but {text[:40]!r}")
    return np.dtype(text)


def _array(content: Any, kind: Any, shape: Any, fortran: bool) -> np.ndarray:  # noqa: ANN401
    if type(content) not in (bytes, bytearray) or type(kind) is not _Type:
        _refuse("it holds an array whose values are no numbers")
    if type(shape) is not tuple or len(shape) > 8 or not all(type(size) is int for size in shape):
        _refuse("it holds an array without a shape")
    size = kind.dtype.itemsize
    for length in shape:
        size *= length
    if min(shape, default=0) < 0 or size != len(content):
        _refuse(f"it holds an array of {len(content)} bytes, expected {size} for shape {shape}")
    values = np.frombuffer(content, kind.dtype)
    return values.reshape(shape, order="F" if fortran else "C")


def _finished(value: Any) -> Any:  # noqa: ANN401
    """A value with its arrays, down to the items of a dict."""
    if type(value) is dict:
        return {key: _finished_item(item) for key, item in value.items()}
    return _finished_item(value)


def _finished_item(value: Any) -> Any:  # noqa: ANN401
    if type(value) is _Array and value.values is not None:
        return value.values
    if value is _MARK or type(value) in (_Array, _Name, _Type):
        _refuse("it holds what is neither a plain value nor an array")
    return value


_BY_CODE = {instruction.code.encode("latin-1"): instruction for instruction in opcodes}
# Instructions of protocols 0 to 5, by their names in `pickletools`. Those followed by their value:
_VALUES = frozenset(
    "INT BININT BININT1 BININT2 LONG LONG1 LONG4 FLOAT BINFLOAT UNICODE BINUNICODE "
    "SHORT_BINUNICODE BINUNICODE8 BINBYTES SHORT_BINBYTES BINBYTES8 BYTEARRAY8".split()
)
# What Python 2 called text is bytes.
_STRINGS = frozenset(("BINSTRING", "SHORT_BINSTRING"))
_CONSTANTS = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False, "MARK": _MARK}
_EMPTY: dict[str, type] = {"EMPTY_LIST": list, "EMPTY_TUPLE": tuple, "EMPTY_DICT": dict}
# How many of the last values instructions take; None is all of them down to the mark.
_ITEMS = {"TUPLE1": 1, "TUPLE2": 2, "TUPLE3": 3, "TUPLE": None, "LIST": None, "DICT": None}
_ITEMS |= {"APPEND": 1, "APPENDS": None, "SETITEM": 2, "SETITEMS": None, "POP": 1, "POP_MARK": None}
_MAKERS: dict[str, Callable[[list[Any]], Any]] = {"LIST": list, "DICT": _dict_of}
_MAKERS |= dict.fromkeys(("TUPLE1", "TUPLE2", "TUPLE3", "TUPLE"), tuple)
_PUTS = frozenset(("PUT", "BINPUT", "LONG_BINPUT", "MEMOIZE"))
_GETS = frozenset(("GET", "BINGET", "LONG_BINGET"))
# How the file is laid out.
_LAYOUT = frozenset(("PROTO", "FRAME"))
_OTHERS = frozenset(("DUP", "STACK_GLOBAL", "REDUCE", "BUILD"))
_INSTRUCTIONS = frozenset().union(
    _VALUES, _STRINGS, _CONSTANTS, _EMPTY, _ITEMS, _PUTS, _GETS, _LAYOUT, _OTHERS
)

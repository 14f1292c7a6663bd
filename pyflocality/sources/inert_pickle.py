"""Pickles of plain values and numeric arrays, read by an interpreter that can do nothing else.

Python's own unpickler calls what a file names. Here a name is a word: an array, a dtype and text
written as bytes are told by the few names that NumPy and Python write for them, everything else
is refused. What comes out is None, bool, int, float, bytes, str, list, tuple, dict (with keys of
text) and arrays of numbers over the file's own bytes. The file's size and a number of steps bound
the time and the memory: a length is compared with what is there before anything is made.
"""

from __future__ import annotations

import codecs
import re
import struct
from collections.abc import Callable
from dataclasses import dataclass
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


class _Mark:
    """Where the items of a list, a tuple or a dict begin on the stack."""


_MARK = _Mark()


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
        self._content = content
        self.position = 0
        self._stack: list[Any] = []
        self._memo: dict[int, Any] = {}
        # Text turned into bytes is copied; no sound pickle does that to the same text twice.
        self._bytes_left = len(content)

    def run(self) -> Any:  # noqa: ANN401
        for _ in range(_MAX_STEPS):
            code = self._take(1)
            if code == b".":
                return _finished(self._stack.pop())
            step = _STEPS.get(code)
            if step is None:
                _refuse(f"its instruction {code!r} is not allowed")
            step(self)
        _refuse(f"it takes more than {_MAX_STEPS} steps")

    # What follows an instruction in the file.

    def _take(self, size: int) -> bytes:
        end = self.position + size
        if end > len(self._content):
            _refuse("it ends too early")
        found = self._content[self.position : end]
        self.position = end
        return found

    def _line(self) -> bytes:
        end = self._content.find(b"\n", self.position)
        if end < 0:
            _refuse("it ends too early")
        found = self._content[self.position : end]
        self.position = end + 1
        return found

    def number(self, form: str) -> int | float:
        return struct.unpack(form, self._take(struct.calcsize(form)))[0]

    def sized(self, form: str) -> bytes:
        return self._take(self.number(form))

    def plain_line(self) -> str:
        return self._line().decode("utf-8")

    def quoted(self) -> bytes:
        """Bytes in quotes, as Python 2 wrote them in the oldest protocol."""
        text = self._line().strip()
        if len(text) < 2 or text[:1] != text[-1:] or text[:1] not in (b"'", b'"'):
            _refuse("it holds text without quotes")
        return codecs.escape_decode(text[1:-1])[0]

    def whole(self) -> int | bool:
        text = self._line()
        if text in (b"00", b"01"):
            return text == b"01"
        return _bounded(int(text[:40].rstrip(b"L")))

    def little(self, size: int) -> int:
        return _bounded(int.from_bytes(self._take(min(size, 40)), "little", signed=True))

    def decimal(self) -> float:
        return float(self._line()[:40])

    def escaped(self) -> str:
        return self._line().decode("raw-unicode-escape")

    def text(self, form: str) -> str:
        return self.sized(form).decode("utf-8", "surrogatepass")

    # What instructions do.

    def push(self, value: Any) -> None:  # noqa: ANN401
        self._stack.append(value)

    def pop(self) -> Any:  # noqa: ANN401
        value = self._stack.pop()
        if value is _MARK:
            _refuse("its values are out of order")
        return value

    def drop(self) -> None:
        self._stack.pop()

    def double(self) -> None:
        self.push(self._stack[-1])

    def pop_to_mark(self) -> list[Any]:
        # From the end: it lies right below the items.
        start = len(self._stack) - 1
        while self._stack[start] is not _MARK:
            start -= 1
            if start < 0:
                _refuse("its values are out of order")
        items = self._stack[start + 1 :]
        del self._stack[start:]
        return items

    def remember(self, place: int) -> None:
        if self._stack[-1] is _MARK:
            _refuse("its values are out of order")
        self._memo[place] = self._stack[-1]

    def remember_next(self) -> None:
        self.remember(len(self._memo))

    def recall(self, place: int) -> None:
        self.push(self._memo[place])

    def tuple_of(self, count: int) -> None:
        items = [self.pop() for _ in range(count)]
        self.push(tuple(reversed(items)))

    def extend(self, items: list[Any]) -> None:
        target = self._stack[-1]
        if type(target) is not list:
            _refuse("it appends to what is no list")
        target.extend(items)

    def update(self, items: list[Any]) -> None:
        target = self._stack[-1]
        if type(target) is not dict or len(items) % 2:
            _refuse("it sets items of what is no dict")
        target.update(_dict_of(items))

    def name(self, module: str, name: str) -> None:
        if (module, name) not in _NAMES:
            _refuse(f"it asks for {module}.{name}, which is not allowed")
        self.push(_Name(module, name))

    def stack_name(self) -> None:
        name, module = self.pop(), self.pop()
        if type(module) is not str or type(name) is not str:
            _refuse("it asks for what has no name")
        self.name(module, name)

    def reduce(self) -> None:
        arguments, function = self.pop(), self.pop()
        if type(function) is not _Name or type(arguments) is not tuple:
            _refuse("it calls what is no function")
        if function.name == "_reconstruct":
            self.push(_Array())
        elif function.name == "dtype":
            self.push(_Type(_numeric(arguments[0])))
        elif function.name == "_frombuffer":
            content, kind, shape, order = arguments
            if order not in ("C", "F"):
                _refuse("it holds an array of unknown order")
            self.push(_Array(_array(content, kind, shape, order == "F")))
        elif function.name == "encode":
            self.push(self._encoded(*arguments))
        elif function.name == "bytes" and not arguments:
            # How the oldest protocols spell empty ones.
            self.push(b"")
        else:
            _refuse(f"it calls {function.module}.{function.name}, which is not allowed")

    def _encoded(self, text: str, encoding: str) -> bytes:
        if type(text) is not str or encoding not in _LATIN_1:
            _refuse("it encodes what is no text")
        self._bytes_left -= len(text)
        if self._bytes_left < 0:
            _refuse("it makes more bytes than it has")
        return text.encode("latin-1")

    def build(self) -> None:
        state, target = self.pop(), self._stack[-1]
        if type(state) is not tuple:
            _refuse("it builds what is no array")
        if type(target) is _Type:
            _, order, *parts = state
            # Fields of a structure, and the like.
            if any(part is not None for part in parts[:3]):
                _refuse("it holds an array whose values are no numbers")
            target.dtype = target.dtype.newbyteorder(_text(order))
        elif type(target) is _Array and target.values is None:
            _, shape, kind, fortran, content = state
            target.values = _array(content, kind, shape, fortran is True)
        else:
            _refuse("it builds what is no array")


def _refuse(reason: str) -> NoReturn:
    raise RefusedPickleError(reason)


def _bounded(value: int) -> int:
    if not -(2**63) <= value < 2**64:
        _refuse("it holds a number of more than 64 bits")
    return value


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
    if type(value) in (_Array, _Name, _Type, _Mark):
        _refuse("it holds what is neither a plain value nor an array")
    return value


def _pushing(read: Callable[[_Reader], Any]) -> Callable[[_Reader], None]:
    return lambda machine: machine.push(read(machine))


# Instructions by their names in `pickletools`, of protocols 0 to 5.
_STEPS: dict[bytes, Callable[[_Reader], Any]] = {
    # PROTO, FRAME: how the file is laid out.
    b"\x80": lambda machine: machine.number("<B"),
    b"\x95": lambda machine: machine.number("<Q"),
    # NONE, NEWTRUE, NEWFALSE
    b"N": lambda machine: machine.push(None),
    b"\x88": lambda machine: machine.push(True),
    b"\x89": lambda machine: machine.push(False),
    # INT, BININT, BININT1, BININT2, LONG, LONG1, LONG4
    b"I": _pushing(_Reader.whole),
    b"J": _pushing(lambda machine: machine.number("<i")),
    b"K": _pushing(lambda machine: machine.number("<B")),
    b"M": _pushing(lambda machine: machine.number("<H")),
    b"L": _pushing(_Reader.whole),
    b"\x8a": _pushing(lambda machine: machine.little(machine.number("<B"))),
    b"\x8b": _pushing(lambda machine: machine.little(machine.number("<I"))),
    # FLOAT, BINFLOAT
    b"F": _pushing(_Reader.decimal),
    b"G": _pushing(lambda machine: machine.number(">d")),
    # STRING, BINSTRING, SHORT_BINSTRING: what Python 2 called text is bytes.
    b"S": _pushing(_Reader.quoted),
    b"T": _pushing(lambda machine: machine.sized("<I")),
    b"U": _pushing(lambda machine: machine.sized("<B")),
    # BINBYTES, SHORT_BINBYTES, BINBYTES8, BYTEARRAY8: nothing here writes to them.
    b"B": _pushing(lambda machine: machine.sized("<I")),
    b"C": _pushing(lambda machine: machine.sized("<B")),
    b"\x8e": _pushing(lambda machine: machine.sized("<Q")),
    b"\x96": _pushing(lambda machine: machine.sized("<Q")),
    # UNICODE, BINUNICODE, SHORT_BINUNICODE, BINUNICODE8
    b"V": _pushing(_Reader.escaped),
    b"X": _pushing(lambda machine: machine.text("<I")),
    b"\x8c": _pushing(lambda machine: machine.text("<B")),
    b"\x8d": _pushing(lambda machine: machine.text("<Q")),
    # EMPTY_LIST, LIST, APPEND, APPENDS
    b"]": lambda machine: machine.push([]),
    b"l": _pushing(_Reader.pop_to_mark),
    b"a": lambda machine: machine.extend([machine.pop()]),
    b"e": lambda machine: machine.extend(machine.pop_to_mark()),
    # EMPTY_TUPLE, TUPLE1, TUPLE2, TUPLE3, TUPLE
    b")": lambda machine: machine.push(()),
    b"\x85": lambda machine: machine.tuple_of(1),
    b"\x86": lambda machine: machine.tuple_of(2),
    b"\x87": lambda machine: machine.tuple_of(3),
    b"t": _pushing(lambda machine: tuple(machine.pop_to_mark())),
    # EMPTY_DICT, DICT, SETITEM, SETITEMS
    b"}": lambda machine: machine.push({}),
    b"d": _pushing(lambda machine: _dict_of(machine.pop_to_mark())),
    b"s": lambda machine: machine.update([machine.pop(), machine.pop()][::-1]),
    b"u": lambda machine: machine.update(machine.pop_to_mark()),
    # MARK, POP, POP_MARK, DUP
    b"(": lambda machine: machine.push(_MARK),
    b"0": _Reader.drop,
    b"1": _Reader.pop_to_mark,
    b"2": _Reader.double,
    # PUT, BINPUT, LONG_BINPUT, MEMOIZE; GET, BINGET, LONG_BINGET
    b"p": lambda machine: machine.remember(machine.whole()),
    b"q": lambda machine: machine.remember(machine.number("<B")),
    b"r": lambda machine: machine.remember(machine.number("<I")),
    b"\x94": _Reader.remember_next,
    b"g": lambda machine: machine.recall(machine.whole()),
    b"h": lambda machine: machine.recall(machine.number("<B")),
    b"j": lambda machine: machine.recall(machine.number("<I")),
    # GLOBAL, STACK_GLOBAL, REDUCE, BUILD
    b"c": lambda machine: machine.name(machine.plain_line(), machine.plain_line()),
    b"\x93": _Reader.stack_name,
    b"R": _Reader.reduce,
    b"b": _Reader.build,
}

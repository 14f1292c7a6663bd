"""Values that an argument may be given by mistake, and what each kind of argument makes of them.

A kind of argument turns the value of a sound call into tries: a label, a value, and a verdict of
what the call must do with it:

| verdict | what the call must do |
|---|---|
| WRONG | refuse it by an error that names the argument |
| MAY | the same, or take it and answer with finite numbers |
| SAME | the same, or take it and answer what the sound call does: it means the same |
"""

from __future__ import annotations

import datetime
import decimal
import fractions
import math
import numbers
import pathlib
from collections.abc import Callable, Iterator
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

WRONG, MAY, SAME = "wrong", "may", "same"


class Try(NamedTuple):
    """A value to put in the place of a sound one."""

    label: str
    value: object
    verdict: str


Kind = Callable[[object], Iterator[Try]]


class _Unfriendly:
    """An object that can be told nothing about."""

    def __repr__(self) -> str:
        raise RuntimeError("no repr")


class _OddTensor(torch.Tensor):
    """A tensor of a class of its own."""


ODD = {
    "None": None,
    "str": "three",
    "digits as str": "3",
    "empty str": "",
    "NUL": "\0",
    "long str": "x" * 100_000,
    "bidi str": "\u202etxt\u2066\u2069",
    "escape str": "\x1b[2J",
    "surrogate str": "\udcff",
    "bytes": b"3",
    "bytearray": bytearray(b"3"),
    "list": [1.0],
    "empty list": [],
    "nested list": [[1], [2]],
    "tuple": (1, 2),
    "dict": {"a": 1},
    "set": {1},
    "generator": (i for i in ()),
    "object": object(),
    "unfriendly": _Unfriendly(),
    "class": int,
    "exception": ValueError("x"),
    "function": len,
    "lambda": lambda *a, **k: None,
    "module": math,
    "ellipsis": ...,
    "slice": slice(0, 2),
    "range": range(2),
    "date": datetime.date(2020, 1, 1),
    "dtype": torch.float16,
    "numpy dtype": np.dtype("f4"),
    "device": torch.device("meta"),
    "torch size": torch.Size([1, 2]),
    "storage": torch.zeros(2).untyped_storage(),
    "linear": nn.Linear(1, 1),
    "path": pathlib.Path("nonexistent/file"),
    "Decimal": decimal.Decimal("0.5"),
    "complex": 1j,
    "np.complex": np.complex64(1j),
    "np.str": np.str_("3"),
    "np.datetime": np.datetime64("2020-01-01"),
    "np.void": np.void(b"abc"),
    "np.array0": np.array(0.5),
    "np.array1": np.array([0.5]),
    "np.array empty": np.zeros(0),
    "np.array object": np.array([object()]),
    "np.array str": np.array(["a"]),
    "np.masked": np.ma.masked_array([0.5], [True]),
    "symint": torch.SymInt,
}

NUMBERS = {
    "True": True,
    "np.bool": np.bool_(True),
    "0": 0,
    "0.0": 0.0,
    "-0.0": -0.0,
    "-1": -1,
    "-0.5": -0.5,
    "1": 1,
    "2": 2,
    "0.5": 0.5,
    "2.0": 2.0,
    "2.5": 2.5,
    "nan": math.nan,
    "inf": math.inf,
    "-inf": -math.inf,
    "10**400": 10**400,
    "-10**400": -(10**400),
    "2**31": 2**31,
    "2**31-1": 2**31 - 1,
    "2**63": 2**63,
    "2**63-1": 2**63 - 1,
    "2**64": 2**64,
    "-2**63": -(2**63),
    "1e308": 1e308,
    "-1e308": -1e308,
    "1e30": 1e30,
    "1e-30": 1e-30,
    "5e-324": 5e-324,
    "Fraction": fractions.Fraction(1, 3),
    "huge Fraction": fractions.Fraction(10**400, 3),
    "tiny Fraction": fractions.Fraction(1, 10**400),
    "np.float16": np.float16(0.5),
    "np.float32": np.float32(0.5),
    "np.float64": np.float64(0.5),
    "np.longdouble": np.longdouble("1e4000"),
    "np.float nan": np.float32("nan"),
    "np.int8": np.int8(2),
    "np.uint64": np.uint64(2**63),
    "np.int64": np.int64(3),
}

SCALAR_TENSORS = {
    "tensor0": lambda: torch.tensor(0.5),
    "tensor1": lambda: torch.tensor([0.5]),
    "tensor2": lambda: torch.tensor([0.5, 0.6]),
    "tensor3": lambda: torch.tensor([0.5, 0.6, 0.7]),
    "tensor empty": lambda: torch.zeros(0),
    "tensor 2-D": lambda: torch.full((2, 2), 0.5),
    "tensor int": lambda: torch.tensor(2),
    "tensor uint16": lambda: torch.tensor(2).to(torch.uint16),
    "tensor bool": lambda: torch.tensor(True),
    "tensor complex": lambda: torch.tensor(1j),
    "tensor nan": lambda: torch.tensor(math.nan),
    "tensor inf": lambda: torch.tensor([0.5, math.inf]),
    "tensor -1": lambda: torch.tensor(-1.0),
    "tensor 0": lambda: torch.tensor([0.0, 0.5]),
    "tensor 1e308": lambda: torch.tensor(1e308, dtype=torch.float64),
    "tensor 5e-324": lambda: torch.tensor(5e-324, dtype=torch.float64),
    "tensor meta": lambda: torch.tensor(0.5, device="meta"),
    "tensor meta 1-D": lambda: torch.zeros(2, device="meta"),
    "tensor sparse": lambda: torch.tensor([0.5, 0.6]).to_sparse(),
    "tensor nested": lambda: torch.nested.nested_tensor([torch.ones(1), torch.ones(2)]),
    "tensor float8": lambda: torch.tensor([0.5, 0.5]).to(torch.float8_e4m3fn),
    "tensor half": lambda: torch.tensor([0.5, 0.5]).half(),
    "tensor quantized": lambda: torch.quantize_per_tensor(torch.ones(2), 0.1, 0, torch.qint8),
    "tensor grad": lambda: torch.tensor([0.5, 0.5], requires_grad=True),
    "tensor lazy": lambda: nn.parameter.UninitializedParameter(),
}

# Forms of a tensor that hold no values as a computation reads them, whatever its dtype.
STRANGE_TENSORS = {
    "meta": lambda t: t.to("meta"),
    "sparse COO": lambda t: t.to_sparse(),
    "sparse CSR": lambda t: t.flatten(1).to_sparse_csr(),
    "sparse CSR same shape": lambda t: torch.ones_like(t).to_sparse_csr(),
    "sparse BSR": lambda t: t.flatten(1).to_sparse_bsr((1, 1)),
    "nested": lambda t: torch.nested.nested_tensor(list(t.float())),
    "nested jagged": lambda t: torch.nested.nested_tensor(list(t.float()), layout=torch.jagged),
    "quantized": lambda t: torch.quantize_per_tensor(t.float(), 0.1, 0, torch.qint8),
    "quantized per channel": lambda t: torch.quantize_per_channel(
        t.float(), torch.ones(len(t)), torch.zeros(len(t)), 0, torch.quint8
    ),
    "mkldnn": lambda t: t.float().to_mkldnn(),
    "lazy": lambda t: nn.parameter.UninitializedParameter(),
    "numpy": lambda t: t.numpy(),
    "list": lambda t: t.tolist(),
    "0-dim": lambda t: t.flatten()[0],
    "flat": lambda t: t.flatten(),
    "a dimension less": lambda t: t[0],
    "a dimension more": lambda t: t[None, None],
    "no values": lambda t: t[..., :0],
    "longer": lambda t: torch.cat([t, t], -1),
    "complex": lambda t: t.to(torch.complex64),
    "complex32": lambda t: t.to(torch.complex32),
    "float8 e4m3fn": lambda t: t.float().to(torch.float8_e4m3fn),
    "float8 e5m2": lambda t: t.float().to(torch.float8_e5m2),
    "float8 e8m0": lambda t: t.float().abs().to(torch.float8_e8m0fnu),
    "uint16": lambda t: t.float().abs().to(torch.uint16),
    "uint32": lambda t: t.float().abs().to(torch.uint32),
    "uint64": lambda t: t.float().abs().to(torch.uint64),
    "int8": lambda t: t.to(torch.int8),
}
INTEGERS = {
    "int64": lambda t: t.to(torch.int64),
    "int32": lambda t: t.to(torch.int32),
    "bool": lambda t: t > 0,
    "uint8": lambda t: t.float().abs().to(torch.uint8),
}
FLOATS = {
    "float16": lambda t: t.half(),
    "bfloat16": lambda t: t.bfloat16(),
    "float32": lambda t: t.float(),
    "float64": lambda t: t.double(),
}
BAD_VALUES = {
    "one NaN": lambda t: _with(t, math.nan),
    "all NaN": lambda t: torch.full_like(t, math.nan),
    "inf": lambda t: _with(t, math.inf),
    "-inf": lambda t: _with(t, -math.inf),
}
FAR_VALUES = {
    "1e30": lambda t: _with(t, 1e30),
    "all 1e38": lambda t: torch.full_like(t, 1e38),
    "1e-45": lambda t: torch.full_like(t, 1e-45),
    "zeros": torch.zeros_like,
    "expanded": lambda t: t[:1].expand_as(t),
    "one value expanded": lambda t: t.flatten()[0].expand(t.shape),
    "none": lambda t: t[:0],
    "requires grad": lambda t: t.clone().requires_grad_(),
    "inference": lambda t: _inference(t),
}
# The same values, in other memory.
SAME_VALUES = {
    "strided": lambda t: t.transpose(0, -1).contiguous().transpose(0, -1),
    "offset": lambda t: torch.cat([t[:1], t])[1:],
    "every second": lambda t: t.repeat_interleave(2, 0)[::2],
    "subclass": lambda t: t.clone().as_subclass(_OddTensor),
}
SAME_FLOATS = {
    "parameter": lambda t: nn.Parameter(t.clone()),
    "real part": lambda t: torch.complex(t, t).real,
    "negative view": lambda t: torch._neg_view(t.neg()),
    "imaginary part of a conjugate": lambda t: torch.complex(t, t.neg()).conj().imag,
}


# Odd tensors that are rows of finite floating-point numbers all the same.
FINITE_ROWS = frozenset({"tensor1", "tensor2", "tensor3", "tensor 0", "tensor half", "tensor grad"})


def _with(t: Tensor, value: float) -> Tensor:
    changed = t.clone()
    changed.view(-1)[-1] = value
    return changed


def _inference(t: Tensor) -> Tensor:
    with torch.inference_mode():
        return t.clone()


def _made(makers: dict, *arguments: object) -> Iterator[tuple[str, object]]:
    for label, make in makers.items():
        try:
            value = make(*arguments)
        except (RuntimeError, NotImplementedError, TypeError, ValueError, IndexError):
            # This torch has no such tensors of this shape.
            continue
        yield label, value


def _odd(allowed: Callable[[str, object], str | None] = lambda label, value: None) -> Iterator[Try]:
    for group in (ODD, NUMBERS):
        for label, value in group.items():
            yield Try(label, value, allowed(label, value) or WRONG)
    for label, value in _made(SCALAR_TENSORS):
        yield Try(label, value, allowed(label, value) or WRONG)


def as_float(value: object) -> float:
    try:
        return float(value)
    except OverflowError:
        return math.inf


def is_number(value: object) -> bool:
    return isinstance(value, numbers.Real) and not isinstance(value, (bool, np.bool_))


def tensor(
    *,
    dtypes: dict | None = None,
    finite: bool = True,
    optional: bool = False,
    odd: object = None,
    far: bool = True,
) -> Kind:
    """Tensors: floating-point ones, or what `dtypes` has of the tables above.

    Without `far` no values are tried whose products leave the range of float32.
    """
    allowed = FLOATS if dtypes is None else dtypes

    def tries(base: Tensor) -> Iterator[Try]:
        def verdict(label: str, value: object) -> str | None:
            return MAY if (value is None and optional) else odd(label, value) if odd else None

        yield from _odd(verdict)
        if base is None:
            return
        for label, value in _made(STRANGE_TENSORS, base):
            if label == "flat" and base.ndim == 1:
                continue
            yield Try("tensor: " + label, value, MAY if label in allowed else WRONG)
        for label, value in _made(INTEGERS | FLOATS, base):
            if value.dtype != base.dtype:
                yield Try("tensor: " + label, value, MAY if label in allowed else WRONG)
        if base.is_floating_point():
            for label, value in _made(BAD_VALUES, base):
                yield Try("tensor: " + label, value, WRONG if finite else MAY)
            for label, value in _made(SAME_FLOATS, base):
                yield Try("tensor: " + label, value, SAME)
        for label, value in _made(FAR_VALUES, base):
            if not far and label in ("1e30", "all 1e38"):
                continue
            yield Try("tensor: " + label, value, MAY)
        for label, value in _made(SAME_VALUES, base):
            yield Try("tensor: " + label, value, SAME)

    return tries


def real(
    low: float = -math.inf,
    high: float = math.inf,
    *,
    low_open: bool = True,
    high_open: bool = True,
    optional: bool = False,
    tensors: bool = False,
    shapes: bool = False,
) -> Kind:
    """Numbers between two ends; `tensors` where a tensor of them will do, too, or of any shape."""

    def inside(number: float) -> bool:
        above = number > low if low_open else number >= low
        below = number < high if high_open else number <= high
        return math.isfinite(number) and above and below

    def verdict(label: str, value: object) -> str | None:
        if value is None and optional:
            return MAY
        if is_number(value):
            return MAY if inside(as_float(value)) else None
        if isinstance(value, Tensor) and tensors:
            if label in ("tensor0", "tensor int", "tensor grad", "tensor half", "tensor1"):
                return MAY
            if label in ("tensor2", "tensor uint16"):
                return MAY
            if shapes and label in ("tensor3", "tensor 2-D", "tensor empty"):
                return MAY
            if label in ("tensor 1e308", "tensor 5e-324"):
                return MAY if inside(float(value)) else None
            if label == "tensor 0":
                return MAY if inside(0.0) else None
        return None

    def tries(base: object) -> Iterator[Try]:
        yield from _odd(verdict)
        if is_number(base):
            yield Try("the same as Fraction", fractions.Fraction(base), SAME)
            yield Try("the same as NumPy", np.float64(base), SAME)
            if tensors:
                exact = torch.tensor(float(base), dtype=torch.float64)
                yield Try("the same as tensor", exact, SAME)

    return tries


def level(*, zero: bool = True, positive_only: bool = False) -> Kind:
    """Noise-schedule coefficients: a number, or one for every image."""
    return real(0.0, low_open=positive_only or not zero, tensors=True)


def one_level(*, zero: bool = False) -> Kind:
    """A noise-schedule coefficient of a whole call."""
    return real(0.0, low_open=not zero, tensors=True)


def count(low: int = 1, high: float = math.inf, *, optional: bool = False) -> Kind:
    """Whole numbers."""

    def verdict(label: str, value: object) -> str | None:
        if value is None and optional:
            return MAY
        whole = isinstance(value, numbers.Integral) and is_number(value)
        return MAY if whole and low <= value <= high else None

    def tries(base: object) -> Iterator[Try]:
        yield from _odd(verdict)
        if isinstance(base, int):
            yield Try("the same as NumPy", np.int32(base), SAME)

    return tries


def only(is_allowed: Callable[[object], bool] = lambda value: False) -> Kind:
    """Anything for which `is_allowed` holds."""

    def verdict(label: str, value: object) -> str | None:
        try:
            return MAY if is_allowed(value) else None
        except Exception:
            return None

    return lambda base: _odd(verdict)


def anything_callable(*, optional: bool = False) -> Kind:
    """Functions: what cannot be called is wrong, and what a wrong function raises is its own."""
    odd = only(lambda value: value is None and optional)
    return lambda base: (attempt for attempt in odd(base) if not callable(attempt.value))


def flag() -> Kind:
    """True or False."""
    return only(lambda value: isinstance(value, (bool, np.bool_)))


def instance(*classes: type, optional: bool = False) -> Kind:
    """Objects of a class."""
    return only(lambda value: isinstance(value, classes) or (optional and value is None))


def choice(*choices: object) -> Kind:
    """One of a few."""
    return only(lambda value: any(value is one or value == one for one in choices))


def path(*, optional: bool = False) -> Kind:
    """Names of files: anything but a name is wrong, and there is none of the odd ones."""

    def verdict(label: str, value: object) -> str | None:
        return MAY if value is None and optional else None

    return lambda base: _odd(verdict)

"""Checks of names, choices, flags, sequences and objects."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import numpy as np
import torch

from pyflocality._support.checks.describing import describe

T = TypeVar("T")
Choice = TypeVar("Choice", bound=str)


def check_choice(value: object, name: str, choices: Sequence[Choice]) -> Choice:
    """One of a few strings."""
    if not isinstance(value, str) or value not in choices:
        listed = ", ".join(repr(choice) for choice in choices)
        raise ValueError(f"`{name}` must be one of {listed}, got {describe(value)}")
    return choices[choices.index(value)]


def check_flag(value: object, name: str) -> bool:
    """True or False."""
    if not isinstance(value, (bool, np.bool_)):
        raise TypeError(f"`{name}` must be True or False, got {describe(value)}")
    return bool(value)


def check_text(value: object, name: str) -> str:
    """A string."""
    if not isinstance(value, str):
        raise TypeError(f"`{name}` must be a string, got {describe(value)}")
    return str(value)


def check_instance(value: object, name: str, kind: type[T], expected: str | None = None) -> T:
    """An object of a class; `expected` says which where its name does not."""
    if not isinstance(value, kind):
        wanted = f"a {kind.__name__}" if expected is None else expected
        raise TypeError(f"`{name}` must be {wanted}, got {describe(value)}")
    return value


def check_callable(value: object, name: str, expected: str = "callable") -> Callable[..., Any]:
    """Something that can be called; `expected` says how."""
    if not callable(value):
        raise TypeError(f"`{name}` must be {expected}, got {describe(value)}")
    return value


def check_generator(value: object) -> torch.Generator | None:
    """A source of randomness, or None for the default one."""
    if value is not None and not isinstance(value, torch.Generator):
        raise TypeError(f"`generator` must be a torch.Generator, got {describe(value)}")
    return value


def check_float_dtype(value: object) -> torch.dtype | None:
    """A dtype to compute in, float32 or float64; or None, which leaves it open."""
    if value is not None and not isinstance(value, torch.dtype):
        raise TypeError(f"`dtype` must be torch.float32 or torch.float64, got {describe(value)}")
    if value not in (None, torch.float32, torch.float64):
        raise ValueError(f"`dtype` must be torch.float32 or torch.float64, got {value}")
    return value


def check_sequence(
    value: object, name: str, expected: str = "a sequence", *, length: int | None = None
) -> Sequence[Any]:
    """A sequence that is no text, of a length where one is given."""
    if not isinstance(value, Sequence) or isinstance(value, (str, bytes, bytearray, memoryview)):
        raise TypeError(f"`{name}` must be {expected}, got {describe(value)}")
    if length is not None and len(value) != length:
        raise ValueError(f"`{name}` must be {expected}, got {describe(value)}")
    return value

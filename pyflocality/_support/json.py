"""JSON objects from files: what is damaged, nested or of the wrong kind is told as ValueError."""

from __future__ import annotations

import json
import zlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, TypeGuard


@dataclass(frozen=True)
class Kind:
    """What a field may hold: in words, and as a predicate."""

    words: str
    fits: Callable[[object], bool]

    def or_none(self) -> Kind:
        """This, or null."""
        return Kind(f"{self.words} or null", lambda value: value is None or self.fits(value))


def _is_whole(value: object) -> TypeGuard[int]:
    # Beyond 63 bits it is the size or the number of nothing.
    return isinstance(value, int) and not isinstance(value, bool) and -(2**63) <= value < 2**63


def _is_count(value: object) -> TypeGuard[int]:
    return _is_whole(value) and value >= 0


def _all(fits: Callable[[object], bool]) -> Callable[[object], bool]:
    return lambda value: isinstance(value, list) and all(map(fits, value))


COUNT = Kind("a whole number, not negative", _is_count)
POSITIVE = Kind("a positive whole number", lambda value: _is_count(value) and value > 0)
TEXT = Kind("a string", lambda value: isinstance(value, str))
TEXTS = Kind("strings", _all(TEXT.fits))
COUNTS = Kind("whole numbers, not negative", _all(_is_count))
WHOLE_NUMBERS = Kind("whole numbers", _all(_is_whole))


def shape(dimensions: int) -> Kind:
    """Positive lengths of so many dimensions."""
    return Kind(
        f"{dimensions} positive whole numbers",
        lambda value: (
            isinstance(value, list) and len(value) == dimensions and all(map(POSITIVE.fits, value))
        ),
    )


def parsed_object(text: str | bytes) -> dict[str, Any]:
    """The object that a text holds.

    Raises:
        ValueError: It is no JSON, is nested too deeply, or holds something else than an object.
    """
    try:
        entry = json.loads(text)
    except RecursionError:
        raise ValueError("not readable as JSON: it is nested too deeply") from None
    except ValueError as error:
        raise ValueError(f"not readable as JSON: {error}") from None
    if not isinstance(entry, dict):
        raise ValueError(f"holds a JSON {type(entry).__name__}, expected an object")
    return entry


def check_fields(entry: Mapping[str, object], kinds: Mapping[str, Kind]) -> None:
    """Raise ValueError unless every field is there and of its kind."""
    for name, kind in kinds.items():
        if name not in entry:
            raise ValueError(f"has no {name!r}")
        if not kind.fits(entry[name]):
            raise ValueError(f"{name!r} must be {kind.words}, got {_shown(entry[name])}")


def _shown(value: object) -> str:
    # The representation of what is nested deeply is another recursion.
    return type(value).__name__ if isinstance(value, (list, dict)) else repr(value)[:60]


def crc32_of(entry: Mapping[str, object]) -> int:
    """CRC-32 of an object as `json` writes it."""
    return zlib.crc32(json.dumps(entry).encode())


def sealed(entry: Mapping[str, object]) -> str:
    """An object as text that carries its own checksum under `self`."""
    return json.dumps({**entry, "self": crc32_of(entry)})


def unsealed(text: str | bytes) -> dict[str, Any]:
    """What `sealed` made a text of.

    Raises:
        ValueError: It is something else, or does not match its checksum.
    """
    entry = parsed_object(text)
    if "self" not in entry:
        raise ValueError("carries no checksum")
    own = entry.pop("self")
    try:
        matches = own == crc32_of(entry)
    except RecursionError:
        matches = False
    if not matches:
        raise ValueError("does not match its checksum")
    return entry

"""Checks of numbers."""

from __future__ import annotations

import math
import numbers
import os

import torch

from pyflocality._support.checks.describing import describe

# What a kernel counts by, and beyond it nothing can be counted.
_MOST = 2**63 - 1


def check_real(
    value: object,
    name: str,
    *,
    low: float = -math.inf,
    high: float = math.inf,
    above: bool = False,
    below: bool = False,
) -> float:
    """A finite number between two ends, as a float; `above` and `below` leave out an end itself."""
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        raise TypeError(f"`{name}` must be a number, got {describe(value)}")
    try:
        number = float(value)
    except (OverflowError, ValueError):
        number = -math.inf if value < 0 else math.inf
    inside = (number > low if above else number >= low) and (
        number < high if below else number <= high
    )
    # In comparisons alone: compilers take the number for a symbol.
    if not (inside and -math.inf < number < math.inf):
        raise ValueError(f"`{name}` must {_range(low, high, above, below)}, got {describe(value)}")
    return number


def _range(low: float, high: float, above: bool, below: bool) -> str:
    if high == math.inf and low == 0:
        return "be finite and positive" if above else "be finite and not negative"
    if high == math.inf and low == -math.inf:
        return "be finite"
    if high == math.inf:
        return f"be finite and {'above' if above else 'at least'} {low:g}"
    return f"be in {'(' if above else '['}{low:g}, {high:g}{')' if below else ']'}"


def check_positive(value: object, name: str) -> float:
    """A finite number above zero."""
    return check_real(value, name, low=0.0, above=True)


def check_count(value: object, name: str, *, minimum: int = 1, maximum: int = _MOST) -> int:
    """A whole number of at least `minimum`, and at most `maximum`."""
    if isinstance(value, bool) or not isinstance(value, numbers.Integral):
        raise TypeError(f"`{name}` must be a whole number, got {describe(value)}")
    count = int(value)
    if count < minimum:
        raise ValueError(f"`{name}` must be at least {minimum}, got {describe(value)}")
    if count > maximum:
        raise ValueError(f"`{name}` must be at most {maximum}, got {describe(value)}")
    return count


def check_rounds(value: object, name: str, *, minimum: int = 1) -> int:
    """A number of steps, probes or passes, of which nobody waits for more than a million."""
    return check_count(value, name, minimum=minimum, maximum=1_000_000)


def check_within_memory(
    count: int, bytes_each: int, name: str, device: torch.device | str = "cpu"
) -> int:
    """A number of things that are kept in memory, all of them at once.

    What the machine has is the limit, not what is free: a wrong number is wrong by far.
    """
    memory = _memory(torch.device(device))
    if count * bytes_each > memory:
        raise ValueError(
            f"`{name}` must be at most {memory // bytes_each}, as {memory / 2**30:.3g} GB of "
            f"memory hold no more of {bytes_each} bytes each, got {count}"
        )
    return count


def _memory(device: torch.device) -> int:
    """Bytes of memory of a device."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, OSError, ValueError):
        # A system that does not tell: what no machine has.
        return 2**47

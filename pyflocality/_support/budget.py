"""The memory budget: how much working memory an operation may take."""

from __future__ import annotations

import functools
import math
import numbers
import os
import re

from pyflocality._support.checks import describe

_UNITS = {"": 1, "K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}
_DEFAULT = "1GB"
# Bytes that a call may take whatever its budget.
ALWAYS_ALLOWED = 16 * 2**20


def memory_budget_bytes(budget: int | str | None) -> int:
    """Bytes of working memory an operation may take beyond its inputs and its result.

    Args:
        budget: Bytes, a string such as `"2GB"` or `"512M"` (powers of 1024), or None for the
            environment variable `PYFLOCALITY_MEMORY_BUDGET` and, without it, 1 GB.

    Raises:
        TypeError: `budget` is neither a whole number nor a string.
        ValueError: `budget` is not positive or cannot be read.
    """
    source = "`memory_budget`"
    if budget is None:
        budget = os.environ.get("PYFLOCALITY_MEMORY_BUDGET", _DEFAULT)
        source = "the environment variable PYFLOCALITY_MEMORY_BUDGET"
    if isinstance(budget, bool) or not isinstance(budget, (numbers.Integral, str)):
        raise TypeError(f"{source} must be bytes or a string like '2GB', got {describe(budget)}")
    return parsed_bytes(budget, source)


@functools.lru_cache
def parsed_bytes(given: int | str, source: str, minimum: int = 1) -> int:
    """Bytes, of a number or a string such as `"2GB"` or `"512M"` (powers of 1024).

    Args:
        given: The number or the string.
        source: What error messages call it.
        minimum: The least that it may be.

    Raises:
        ValueError: It is less, 2^63 or more, or cannot be read.
    """
    if isinstance(given, str):
        match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([KMGT]?)(?:i?B)?\s*", given, re.IGNORECASE)
        if match is None:
            raise ValueError(
                f"{source} must be bytes or a string like '2GB', got {describe(given)}"
            )
        given = int(min(float(match[1]) * _UNITS[match[2].upper()], 2.0**63))
    if not minimum <= given < 2**63:
        least = "positive" if minimum == 1 else f"at least {minimum}"
        raise ValueError(f"{source} must be {least} and below 2^63, got {describe(given)}")
    return int(given)


def check_least(budget: int | str | None, least: int) -> None:
    """Refuse a call that cannot do with its memory budget.

    Small calls may take `ALWAYS_ALLOWED` bytes whatever the budget: what a call takes at least is
    a few images and numbers the size of its result.

    Args:
        budget: As `memory_budget_bytes` takes it.
        least: Bytes of working memory that the call takes however few images it looks at.

    Raises:
        ValueError: That is more than the budget.
    """
    given = memory_budget_bytes(budget)
    if least > max(given, ALWAYS_ALLOWED):
        raise ValueError(
            f"`memory_budget` must be at least {math.ceil(least / 2**20)}MB for this call, which "
            f"looks at one training image at a time then, got {given} bytes"
        )


def check_given(budget: int | str | None, least: int, what: str) -> None:
    """Refuse what a memory budget that somebody gave cannot hold; the default refuses nothing.

    Args:
        budget: As `memory_budget_bytes` takes it.
        least: Bytes of working memory that are taken whatever the budget.
        what: What takes them.

    Raises:
        ValueError: The argument or the environment variable is there, and is less.
    """
    if budget is not None or "PYFLOCALITY_MEMORY_BUDGET" in os.environ:
        check_within(budget, least, what)


def check_within(budget: int | str | None, least: int, what: str) -> None:
    """Refuse what a memory budget cannot hold, the default one too.

    Args:
        budget: As `memory_budget_bytes` takes it.
        least: Bytes of working memory that are taken whatever the budget.
        what: What takes them.

    Raises:
        ValueError: The budget is less.
    """
    given = memory_budget_bytes(budget)
    if least > max(given, ALWAYS_ALLOWED):
        is_told = budget is None and "PYFLOCALITY_MEMORY_BUDGET" in os.environ
        source = " from the environment variable PYFLOCALITY_MEMORY_BUDGET" if is_told else ""
        raise ValueError(
            f"`memory_budget` must be at least {math.ceil(least / 2**20)}MB for {what}, got "
            f"{given} bytes{source}"
        )


def images_per_chunk(budget: int | str | None, bytes_per_image: int, num_images: int) -> int:
    """How many training images fit the budget at once: at least one, at most all."""
    fitting = memory_budget_bytes(budget) // max(bytes_per_image, 1)
    return max(1, min(fitting, num_images))

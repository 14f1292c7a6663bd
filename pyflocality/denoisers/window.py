"""Denoisers with a square window around every pixel."""

from __future__ import annotations

import math
import numbers
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, TypeVar

from pyflocality._support.checks import check_sequence, describe
from pyflocality.data import TrainingSet
from pyflocality.denoisers.base import DenoiserOptions, PosteriorDenoiser

if TYPE_CHECKING:
    from typing_extensions import Unpack

T = TypeVar("T")
Window = int | Callable[[float, float], int] | Sequence[tuple[float, int]]


def level_rule(
    given: object, name: str, check: Callable[[object], T], single: type
) -> Callable[[float, float], T]:
    """What depends on the noise level, given in any form, as a function (alpha, sigma) -> value.

    Args:
        given: One value for all levels; a function (alpha, sigma) -> value; or a table of pairs
            (sigma / alpha, value), of which the nearest in log(sigma / alpha) counts.
        name: Name of the argument in error messages.
        check: Returns a value in its canonical form, or raises the error that is due.
        single: What one value is an instance of.

    Raises:
        TypeError: `given` has none of these forms.
        ValueError: A value is refused, or the table is empty or holds a noise level that is not
            positive.
    """
    if isinstance(given, single):
        value = check(given)
        return lambda alpha, sigma: value
    if callable(given):
        return lambda alpha, sigma: check(given(alpha, sigma))
    rows = check_sequence(
        given,
        name,
        "one value, a function (alpha, sigma) -> value or a table of (sigma / alpha, value) pairs",
    )
    if len(rows) == 0:
        raise ValueError(f"`{name}` must be a table of at least one pair, got none")
    table = []
    for row in rows:
        if not isinstance(row, Sequence) or len(row) != 2:
            raise TypeError(f"`{name}` must hold pairs (sigma / alpha, value), got {describe(row)}")
        ratio, value = row
        is_number = isinstance(ratio, numbers.Real) and not isinstance(ratio, bool)
        if not is_number:
            raise TypeError(f"`{name}` must hold numbers as noise levels, got {describe(ratio)}")
        if not 0 < ratio < math.inf:
            raise ValueError(f"`{name}` must hold positive noise levels, got {describe(ratio)}")
        table.append((math.log(ratio), check(value)))

    def nearest(alpha: float, sigma: float) -> T:
        if sigma == 0:
            return min(table, key=lambda entry: entry[0])[1]
        level = math.log(sigma / alpha)
        return min(table, key=lambda entry: abs(entry[0] - level))[1]

    return nearest


def window_rule(window: Window, check: Callable[[object], int]) -> Callable[[float, float], int]:
    """A window given in any form, as a function (alpha, sigma) -> size; see `level_rule`."""
    return level_rule(window, "window", check, numbers.Real)


class WindowDenoiser(PosteriorDenoiser):
    """Base class of the denoisers with a window, fixed or by noise level.

    Args:
        data: The training set.
        window: Side of the window in pixels; or a function (alpha, sigma) -> side; or a table of
            pairs (sigma / alpha, side).
        check_window: Returns a side as an int, or raises the error that is due.
        temperature: Divides the logits.
        options: Backend, dtype, memory and precision: see `pyflocality.denoisers.DenoiserOptions`.
    """

    def __init__(
        self,
        data: TrainingSet,
        window: Window,
        check_window: Callable[[object], int],
        *,
        temperature: float = 1.0,
        **options: Unpack[DenoiserOptions],
    ) -> None:
        super().__init__(data, temperature, **options)
        # Refuses a wrong integer or table at once; what a function answers is checked when it
        # is called.
        window_rule(window, check_window)
        self.window = window
        self._check_window = check_window

    def extra_repr(self) -> str:
        """What `repr` shows."""
        return f"{super().extra_repr()}, window={self.window}"

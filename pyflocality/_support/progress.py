"""One progress bar for every long job, and the time of one that cannot tell how far it is."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterable, Iterator
from typing import TypeVar

from pyflocality._support.streams import Forgiving
from pyflocality._support.text import printable
from pyflocality._support.waiting import interruptible

T = TypeVar("T")
# Quick jobs stay silent.
_DELAY_SECONDS = 0.5


def progress_bar(
    items: Iterable[T], *, description: str, total: int | None = None, enabled: bool = True
) -> Iterator[T]:
    """Iterate over `items` behind a progress bar on standard error, unless it is not `enabled`.

    The bar shows once a job has run for half a second, so quick jobs stay silent. Where standard
    error is missing, closed or full, there is no bar. `total` is for items without a length.
    """
    if not enabled or sys.stderr is None:
        yield from items
        return
    from tqdm.auto import tqdm

    yield from tqdm(
        items,
        desc=printable(description),
        total=total,
        delay=_DELAY_SECONDS,
        file=Forgiving(sys.stderr),
    )


def timed_call(
    call: Callable[[], T], *, description: str, seconds: float, enabled: bool = True
) -> T:
    """The result of an `interruptible` call, with the time that has passed on standard error.

    Args:
        call: What to do.
        description: What it is.
        seconds: How long it is going to take, about.
        enabled: Whether to show the time, as in `progress_bar`.
    """
    if not enabled or sys.stderr is None:
        return interruptible(call)
    from tqdm.auto import tqdm

    start = time.monotonic()
    about = f"{printable(description)} (about {max(1.0, seconds):.0f} s)"
    shown: list[tqdm[None]] = []

    def show() -> None:
        passed = time.monotonic() - start
        if passed < _DELAY_SECONDS:
            return
        if not shown:
            shown.append(
                tqdm(desc=about, bar_format="{desc}: {n:.0f} s", file=Forgiving(sys.stderr))
            )
        # At most ten times a second, as often as this is called.
        shown[0].n = int(passed)
        shown[0].refresh()

    try:
        return interruptible(call, show)
    finally:
        for bar in shown:
            bar.close()

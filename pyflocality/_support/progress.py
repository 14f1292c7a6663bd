"""One progress bar for every long job."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator
from typing import TypeVar

from pyflocality._support.streams import Forgiving
from pyflocality._support.text import printable

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

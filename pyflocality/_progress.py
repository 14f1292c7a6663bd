"""One progress bar for every long job."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import TypeVar

T = TypeVar("T")


def progress_bar(
    items: Iterable[T], *, description: str, total: int | None = None, enabled: bool = True
) -> Iterator[T]:
    """Iterate over `items` behind a progress bar on standard error.

    The bar shows once a job has run for half a second, so quick jobs stay silent.

    Args:
        items: What to iterate over.
        description: Words in front of the bar.
        total: Number of items, where `len(items)` cannot tell.
        enabled: False iterates silently.
    """
    if not enabled:
        yield from items
        return
    from tqdm.auto import tqdm

    yield from tqdm(items, desc=description, total=total, delay=0.5)

"""One progress bar for every long job."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator
from contextlib import suppress
from typing import Any, TextIO, TypeVar

from pyflocality._support.text import printable

T = TypeVar("T")
# Quick jobs stay silent.
_DELAY_SECONDS = 0.5


def progress_bar(
    items: Iterable[T], *, description: str, total: int | None = None, enabled: bool = True
) -> Iterator[T]:
    """Iterate over `items` behind a progress bar on standard error.

    The bar shows once a job has run for half a second, so quick jobs stay silent. Where standard
    error is missing, closed or full, there is no bar.

    Args:
        items: What to iterate over.
        description: Words in front of the bar.
        total: Number of items, where `len(items)` cannot tell.
        enabled: False iterates silently.
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
        file=_Forgiving(sys.stderr),
    )


class _Forgiving:
    """A stream for a bar, which is not worth ending a job for."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def write(self, text: str) -> None:
        """Write what can be written."""
        with suppress(OSError, ValueError):
            self._stream.write(text)

    def flush(self) -> None:
        """Show it."""
        with suppress(OSError, ValueError):
            self._stream.flush()

    def __getattr__(self, name: str) -> Any:  # noqa: ANN401
        """Everything else is the stream's."""
        return getattr(self._stream, name)

"""Names from outside, such as those of files, and sizes, made fit for a message."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager


def printable(text: str) -> str:
    r"""Text with everything that does not show on a terminal as a visible escape.

    Line ends, escape sequences, marks that reverse the direction of writing, invisible characters
    and bytes that are no text (surrogates) become `\n`, `\x1b`, `\u202e`, `\udcff`; letters of
    any script stay as they are, and so does what has been escaped before.
    """
    if text.isprintable():
        return text
    return "".join(
        char if char.isprintable() else char.encode("unicode_escape").decode("ascii")
        for char in text
    )


def bytes_told(number: float) -> str:
    """A size in units of a thousand: "4.71 GB"."""
    for unit in ("B", "kB", "MB", "GB"):
        if number < 999.5:
            return f"{number:.3g} {unit}"
        number /= 1000
    return f"{number:.3g} TB"


def time_told(seconds: float) -> str:
    """A time in the unit that fits it: "41 s", "12 min", "3.5 h"."""
    if seconds < 99.5:
        return f"{seconds:.2g} s"
    if seconds < 99.5 * 60:
        return f"{seconds / 60:.2g} min"
    return f"{seconds / 3600:.2g} h"


@contextmanager
def printable_errors() -> Iterator[None]:
    """Errors of the block get messages fit to be shown, whatever names are in them."""
    try:
        yield
    except Exception as error:
        error.args = tuple(
            printable(argument) if isinstance(argument, str) else argument
            for argument in error.args
        )
        raise

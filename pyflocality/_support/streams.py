"""What the command line says: text that fits any stream, whatever becomes of its reader.

A stream may be missing (`pythonw`, daemons, `2>&-`), closed by its reader (`| head`), full, or of
an encoding without the characters of a name. None of that ends a run: what cannot be written is
lost, and only an answer that is nowhere else is an error.
"""

from __future__ import annotations

import errno
import os
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout, suppress
from typing import Any, TextIO

from pyflocality._support.text import printable


class Forgiving:
    """A stream that takes every text, and remembers whether it could write it.

    Args:
        stream: Where the text goes; None loses it.

    Attributes:
        failure: Why the first text that was lost could not be written, or None.
    """

    def __init__(self, stream: TextIO | None) -> None:
        self._stream = stream
        self.failure: Exception | None = None

    def write(self, text: str) -> int:
        """Write, with escapes for the characters that the encoding lacks."""
        if self._stream is None:
            return len(text)
        try:
            self._stream.write(text)
        except UnicodeEncodeError as error:
            self.write(text.encode(error.encoding, "backslashreplace").decode(error.encoding))
        except (OSError, ValueError) as error:
            self.failure = self.failure or error
        return len(text)

    def flush(self) -> None:
        """Hand on what was written."""
        if self._stream is None:
            return
        try:
            self._stream.flush()
        except (OSError, ValueError) as error:
            self.failure = self.failure or error

    def isatty(self) -> bool:
        """Whether a person may be looking."""
        return self._stream is not None and self._stream.isatty()

    def settle(self) -> None:
        """Flush, and let go of what cannot be written: Python's own end would fail with it."""
        self.flush()
        stream = self._stream
        is_standard = stream in (sys.__stdout__, sys.__stderr__)
        if self.failure is None or stream is None or not is_standard:
            return
        with suppress(OSError, ValueError):
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, stream.fileno())
            os.close(nowhere)

    def __getattr__(self, name: str) -> Any:  # noqa: ANN401
        """Everything else is the stream's."""
        return getattr(self._stream, name)


@contextmanager
def forgiving_streams() -> Iterator[None]:
    """Make standard output and standard error forgiving inside a `with` block."""
    out, err = Forgiving(sys.stdout), Forgiving(sys.stderr)
    with redirect_stdout(out), redirect_stderr(err):
        try:
            yield
        finally:
            out.settle()
            err.settle()


def occupy_standard_descriptors() -> None:
    """Open those of 0, 1 and 2 that are closed, or the next file would take their place."""
    for descriptor in range(3):
        try:
            os.fstat(descriptor)
        except OSError:
            with suppress(OSError):
                os.open(os.devnull, os.O_RDWR)


def tell(message: str) -> None:
    """Say something in one line on standard error."""
    _written(sys.stderr, printable(message))


def answer(text: str, *, only_here: bool) -> None:
    """Print what a command came to on standard output.

    Args:
        text: Lines of text.
        only_here: Whether that is the one place where somebody looks for it.

    Raises:
        OSError: It is, and could not be written. A reader that has gone has had enough.
    """
    failure = _written(sys.stdout, "\n".join(map(printable, text.split("\n"))))
    if failure is None or getattr(failure, "errno", None) == errno.EPIPE:
        return
    reason = getattr(failure, "strerror", None) or str(failure)
    if only_here:
        raise OSError(getattr(failure, "errno", None) or errno.EIO, reason, "standard output")
    tell(f"pyflocality: warning: standard output cannot be written: {reason}")


def listed(paths: Iterable[str | os.PathLike[str]]) -> str:
    """Paths in one line."""
    return ", ".join(printable(os.fspath(path)) for path in paths)


def _written(stream: TextIO | Forgiving | None, text: str) -> Exception | None:
    """Write a line; why it could not be, or None."""
    stream = stream if isinstance(stream, Forgiving) else Forgiving(stream)
    stream.write(text + "\n")
    stream.flush()
    return stream.failure

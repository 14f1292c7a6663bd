"""Signals that end a command: through every `finally`, so that nothing half-done stays behind."""

from __future__ import annotations

import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

# What a signal has to be answered by for us to answer it: an inherited SIG_IGN, as under nohup,
# and the handlers of a program that calls us, stay.
_DEFAULTS = {
    "SIGINT": signal.default_int_handler,
    "SIGTERM": signal.SIG_DFL,
    "SIGHUP": signal.SIG_DFL,
}


class Ended(KeyboardInterrupt):
    """A signal has ended the command.

    Attributes:
        number: Which one.
    """

    def __init__(self, number: int) -> None:
        super().__init__(number)
        self.number = number


@contextmanager
def ended_by_signals() -> Iterator[None]:
    """Raise `Ended` where SIGINT, SIGTERM or SIGHUP comes inside a `with` block."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {}
    for name, default in _DEFAULTS.items():
        # Windows has no SIGHUP.
        number = getattr(signal, name, None)
        if number is not None and signal.getsignal(number) == default:
            before[number] = signal.signal(number, _end)
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextmanager
def uninterrupted() -> Iterator[None]:
    """Let no signal that could be answered cut the moment of a `with` block in two."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {}
    try:
        for name in _DEFAULTS:
            number = getattr(signal, name, None)
            # A handler that was not installed by Python cannot be put back.
            if number is not None and signal.getsignal(number) is not None:
                before[number] = signal.signal(number, signal.SIG_IGN)
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def last_word(error: KeyboardInterrupt) -> tuple[str, int]:
    """What is said of a command that a signal has ended, and its exit code."""
    number = getattr(error, "number", signal.SIGINT)
    if number == signal.SIGINT:
        return "interrupted", 128 + number
    return f"ended by {signal.Signals(number).name}", 128 + number


def _end(number: int, frame: FrameType | None) -> None:
    del frame
    # What is being cleaned up after the first signal is not to be cut off by the second.
    if not isinstance(sys.exc_info()[1], KeyboardInterrupt):
        raise Ended(number)

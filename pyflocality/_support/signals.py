"""Signals that end a command: through every `finally`, so that nothing half-done stays behind."""

from __future__ import annotations

import itertools
import os
import signal
import socket
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

from pyflocality._support.streams import tell

# What a signal has to be answered by for us to answer it: an inherited SIG_IGN, as under nohup,
# and the handlers of a program that calls us, stay.
_DEFAULTS = {
    "SIGINT": signal.default_int_handler,
    "SIGTERM": signal.SIG_DFL,
    "SIGHUP": signal.SIG_DFL,
}
# How long a signal may be without an answer before somebody is told why.
_PATIENCE_SECONDS = 0.7


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
    """Raise `Ended` where SIGINT, SIGTERM or SIGHUP comes inside a `with` block.

    Python answers signals between two of its steps. A kernel or a library may take seconds for
    one; whoever waits is told so, and a second signal ends the process as it is. So does the third
    where cleaning up does not come to its end.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    answered, came = threading.Event(), itertools.count(1)

    def end(number: int, frame: FrameType | None) -> None:
        del frame
        answered.set()
        if next(came) > 2:
            os._exit(128 + number)
        # What is being cleaned up after the first signal is not to be cut off by the second.
        if not isinstance(sys.exc_info()[1], KeyboardInterrupt):
            raise Ended(number)

    before = {number: signal.signal(number, end) for number in _ours()}
    try:
        with _watched(frozenset(before), answered):
            yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextmanager
def _watched(numbers: frozenset[int], answered: threading.Event) -> Iterator[None]:
    """Hear of signals from a thread that does not wait for Python's next step."""
    heard, woken = socket.socketpair()
    for end in (heard, woken):
        end.setblocking(end is heard)
    before = signal.set_wakeup_fd(woken.fileno(), warn_on_full_buffer=False)

    def watch() -> None:
        has_told = False
        while data := heard.recv(1):
            number = data[0]
            if number not in numbers or answered.wait(_PATIENCE_SECONDS):
                continue
            words, code = last_word(Ended(number))
            if has_told:
                tell(f"pyflocality: {words} amid a computation")
                os._exit(code)
            has_told = True
            tell(f"pyflocality: {words}: waiting for the computation at hand; once more to quit")

    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    try:
        yield
    finally:
        signal.set_wakeup_fd(before, warn_on_full_buffer=before == -1)
        # The watcher hears that nothing more will come.
        woken.close()
        watcher.join()
        heard.close()


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


def nothing_to_end() -> None:
    """Let no signal that could be answered replace the exit code of a command that has ended.

    The libraries take their time to go, and the code tells what became of the results.
    """
    if threading.current_thread() is not threading.main_thread():
        return
    for number in _ours():
        signal.signal(number, signal.SIG_IGN)


def _ours() -> list[signal.Signals]:
    """The signals that could be answered by us; Windows has no SIGHUP."""
    known = {signal.Signals[name]: _DEFAULTS[name] for name in _DEFAULTS if hasattr(signal, name)}
    return [number for number, default in known.items() if signal.getsignal(number) == default]


def last_word(error: KeyboardInterrupt) -> tuple[str, int]:
    """What is said of a command that a signal has ended, and its exit code."""
    number = getattr(error, "number", signal.SIGINT)
    if number == signal.SIGINT:
        return "interrupted", 128 + number
    return f"ended by {signal.Signals(number).name}", 128 + number

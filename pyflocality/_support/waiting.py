"""Long calls into libraries, during which Python still answers signals."""

from __future__ import annotations

import contextvars
import threading
from collections.abc import Callable
from typing import TypeVar

import torch

T = TypeVar("T")
# How often the main thread looks up where the system does not wake it.
_PAUSE_SECONDS = 0.1
# The ends of calls whose callers were interrupted: nothing can stop them.
_abandoned: list[threading.Event] = []


def interruptible(call: Callable[[], T], meanwhile: Callable[[], object] | None = None) -> T:
    """The result of a call that does not return to Python for seconds, such as one of LAPACK.

    It runs in a thread of its own, while the main thread, where Python handles signals, waits: an
    interruption is raised at once, though the call goes on until it is done or the process ends.

    Args:
        call: What to do. It must leave nothing half-done behind that matters.
        meanwhile: What the main thread does every tenth of a second until then.
    """
    if threading.current_thread() is not threading.main_thread():
        return call()
    result: list[T] = []
    failure: list[BaseException] = []
    context, done = contextvars.copy_context(), threading.Event()

    def work() -> None:
        # A new thread takes on the number of torch's threads when it asks for it.
        torch.get_num_threads()
        try:
            result.append(context.run(call))
        except BaseException as error:
            failure.append(error)
        finally:
            done.set()

    try:
        threading.Thread(target=work, daemon=True).start()
        # Not `join`: interrupted, Python 3.11 takes the thread for stopped.
        while not done.wait(_PAUSE_SECONDS):
            if meanwhile is not None:
                meanwhile()
    except BaseException:
        _abandoned.append(done)
        raise
    if failure:
        raise failure[0]
    return result[0]


def has_abandoned_calls() -> bool:
    """Whether a call is still running whose caller was interrupted."""
    return not all(done.is_set() for done in _abandoned)

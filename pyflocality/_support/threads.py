"""What threads share: values that are made at first use and kept."""

from __future__ import annotations

import threading


class Lock:
    """A re-entrant lock of an object's kept values; copied or pickled it is a lock of its own."""

    def __init__(self) -> None:
        self._lock = threading.RLock()

    def __enter__(self) -> None:
        """Wait for the other threads."""
        self._lock.acquire()

    def __exit__(self, *_: object) -> None:
        """Let the next thread in."""
        self._lock.release()

    def __reduce__(self) -> tuple[type[Lock], tuple[()]]:
        """A new lock."""
        return Lock, ()

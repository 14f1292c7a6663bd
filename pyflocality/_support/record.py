"""What a run tells about itself: time by stage, versions, memory."""

from __future__ import annotations

import platform
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any

from pyflocality._support.streams import tell


class Stages:
    """Stopwatch of a run's stages, which are announced on standard error.

    Args:
        announce: Whether to say what is being done.

    Attributes:
        seconds: Wall-clock time by stage, in order.
    """

    def __init__(self, *, announce: bool) -> None:
        self.announce = announce
        self.seconds: dict[str, float] = {}

    @contextmanager
    def __call__(self, name: str, message: str) -> Iterator[None]:
        """Time a block as a stage, or as one more piece of it."""
        if self.announce:
            tell(message)
        start = time.perf_counter()
        yield
        spent = time.perf_counter() - start
        self.seconds[name] = round(self.seconds.get(name, 0.0) + spent, 4)


def software() -> dict[str, Any]:
    """Versions of what the result may depend on."""
    import numpy
    import torch

    from pyflocality._version import __version__

    return {
        "pyflocality": __version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "numpy": numpy.__version__,
        "platform": platform.platform(),
        "threads": torch.get_num_threads(),
    }


def memory_bytes() -> dict[str, int]:
    """Memory of this process in bytes, by the names that Linux has for its kinds.

    Raises:
        OSError: The system does not tell.
    """
    with open("/proc/self/status", encoding="ascii") as status:
        fields = [line.split() for line in status]
    return {field[0][:-1]: int(field[1]) * 1024 for field in fields if field[-1:] == ["kB"]}


def peak_memory_bytes() -> int | None:
    """Largest resident memory of this process so far, or None where the system does not tell."""
    # Linux's getrusage would count what a parent process held when it started this one.
    with suppress(OSError, KeyError):
        return memory_bytes()["VmHWM"]
    try:
        import resource
    except ImportError:
        return None
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024

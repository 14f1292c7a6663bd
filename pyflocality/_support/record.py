"""What a run tells about itself: time by stage, versions."""

from __future__ import annotations

import platform
import time
from collections.abc import Iterator
from contextlib import contextmanager
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

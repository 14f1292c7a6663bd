"""What a run tells about itself: time by stage, memory, versions, the denoiser's calls."""

from __future__ import annotations

import platform
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING, Any

from pyflocality.cli._streams import tell

if TYPE_CHECKING:
    from torch import Tensor

    from pyflocality.denoisers import Denoiser


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


class ObservedDenoiser:
    """A denoiser that notes level and time of each call.

    Args:
        denoiser: The denoiser that answers.

    Attributes:
        calls: For each call sigma, alpha and seconds; for a model whose weights are built for
            each noise level also the seconds of that and the share of weights not zero.
    """

    def __init__(self, denoiser: Denoiser) -> None:
        self.denoiser = denoiser
        self.image_shape, self.device = denoiser.image_shape, denoiser.device
        self.calls: list[dict[str, float]] = []

    def __call__(self, x: Tensor, sigma: float, alpha: float) -> Tensor:
        """The denoiser's answer."""
        call = {"alpha": alpha, "sigma": sigma}
        start = time.perf_counter()
        if hasattr(self.denoiser, "weights_at"):
            weights = self.denoiser.weights_at(sigma, alpha)
            call["density"] = weights.density
            call["weights_seconds"] = round(time.perf_counter() - start, 4)
            start = time.perf_counter()
        answer = self.denoiser(x, sigma, alpha)
        if answer.is_cuda:
            import torch

            torch.cuda.synchronize(answer.device)
        call["seconds"] = round(time.perf_counter() - start, 4)
        self.calls.append(call)
        return answer


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


def peak_memory_bytes() -> int | None:
    """Largest resident memory of this process so far, or None where the system does not tell."""
    # Linux's getrusage would count what a parent process held when it started this one.
    with suppress(OSError), open("/proc/self/status", encoding="ascii") as status:
        for line in status:
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    try:
        import resource
    except ImportError:
        return None
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024

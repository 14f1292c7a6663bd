"""The GPU under test: its clock, its facts, and its state."""

from __future__ import annotations

import importlib.util
import subprocess
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from unittest import mock

import torch

from pyflocality.backends import selection

from ..command import Record
from .runner import seconds_of

# Larger than the L2 cache of any GPU so far.
_FLUSH_BYTES = 256 * 2**20
_LONGEST_KERNELS = 3


class Timer:
    """Times functions on a device, each from a cold cache.

    Args:
        device: A CUDA device, timed by its events; a CPU in dry runs.
    """

    def __init__(self, device: torch.device) -> None:
        self._cuda = device.type == "cuda"
        self._flush = torch.empty(_FLUSH_BYTES if self._cuda else 1, dtype=torch.int8)
        self._flush = self._flush.to(device)

    def seconds(self, function: Callable[[], object]) -> float:
        """Seconds of one run."""
        self._flush.zero_()
        if not self._cuda:
            return seconds_of(function)
        first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda.synchronize()
        first.record()
        function()
        last.record()
        last.synchronize()
        return float(first.elapsed_time(last)) / 1e3

    def allocated(self) -> int:
        """Bytes that torch holds on the device; 0 on a CPU."""
        if not self._cuda:
            return 0
        torch.cuda.synchronize()
        return torch.cuda.memory_allocated()

    def peak_memory(self, function: Callable[[], object], before: int | None = None) -> int | None:
        """Most bytes in a run beyond those `before`, which are those there now; None on a CPU."""
        before = self.allocated() if before is None else before
        if self._cuda:
            torch.cuda.reset_peak_memory_stats()
        function()
        if not self._cuda:
            return None
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before

    def busy(self, function: Callable[[], object]) -> Record:
        """How long one run keeps the GPU busy, and its longest kernels, by torch's profiler."""
        if not self._cuda:
            return {"unavailable": "a dry run has no CUDA device"}
        try:
            from torch.profiler import ProfilerActivity, profile

            torch.cuda.synchronize()
            with profile(activities=[ProfilerActivity.CUDA]) as profiler:
                function()
                torch.cuda.synchronize()
            events = [
                (event.name, event.time_range.elapsed_us() / 1e6)
                for event in profiler.events()
                if event.device_type.name == "CUDA"
            ]
        except Exception as error:  # noqa: BLE001  (a profiler that fails must not cost the case)
            return {"unavailable": f"{type(error).__name__}: {error}"[:500]}
        return busy_times(events)


def busy_times(events: Iterable[tuple[str, float]]) -> Record:
    """Sum of the seconds of all kernels, and the kernels that take the most of them."""
    calls: dict[str, list[float]] = {}
    for name, seconds in events:
        calls.setdefault(name, []).append(seconds)
    if not calls:
        # CUPTI needs rights that a container may not have.
        return {"unavailable": "the profiler saw no kernel"}
    by_time = sorted(calls, key=lambda name: -sum(calls[name]))
    return {
        "seconds": sum(map(sum, calls.values())),
        "launches": sum(map(len, calls.values())),
        "longest": [
            {"kernel": name[:200], "seconds": sum(calls[name]), "launches": len(calls[name])}
            for name in by_time[:_LONGEST_KERNELS]
        ],
    }


def gpu_facts(number: int = 0) -> Record:
    """GPU of a number, driver and the versions that matter."""
    facts: Record = {"cuda": torch.version.cuda, "gpu": None}
    for package in ("triton", "cupy"):
        result = importlib.util.find_spec(package)
        facts[package] = importlib.import_module(package).__version__ if result else None
    if torch.cuda.is_available():
        properties = torch.cuda.get_device_properties(number)
        facts |= {
            "gpu": properties.name,
            "multiprocessors": properties.multi_processor_count,
            "gpu_memory_gib": round(properties.total_memory / 2**30, 1),
            "driver": _smi("driver_version"),
        }
    return facts


def gpu_state() -> dict[str, str | None]:
    """Clocks, temperature and power, where they can be read."""
    names = ("clocks.sm", "clocks.mem", "temperature.gpu", "power.draw")
    return {name: _smi(name) for name in names}


def _smi(query: str) -> str | None:
    command = ["nvidia-smi", f"--query-gpu={query}", "--format=csv,noheader", "--id=0"]
    try:
        return subprocess.run(
            command, capture_output=True, text=True, check=True, timeout=20
        ).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return None


@contextmanager
def pretended_gpu() -> Iterator[None]:
    """Let the Triton backend serve CPU tensors in a block: its kernels run in the interpreter."""

    def unless_triton(reason: Callable[..., str | None]) -> Callable[..., str | None]:
        return lambda backend, *more: None if backend == "triton" else reason(backend, *more)

    with ExitStack() as stack:
        for name in ("machine_reason", "_device_reason"):
            reason = unless_triton(getattr(selection, name))
            stack.enter_context(mock.patch.object(selection, name, reason))
        yield

"""The GPU under test: its clock, its facts, and its state."""

from __future__ import annotations

import importlib.util
import subprocess
import time
from collections.abc import Callable
from typing import Any

import torch

# Larger than the L2 cache of any GPU so far.
_FLUSH_BYTES = 256 * 2**20
_MOST_ROUNDS = 30


class Timer:
    """Times functions on a device, each from a cold cache.

    Args:
        device: A CUDA device, timed by its events; a CPU in dry runs.
    """

    def __init__(self, device: torch.device) -> None:
        self._cuda = device.type == "cuda"
        self._flush = torch.empty(_FLUSH_BYTES if self._cuda else 1, dtype=torch.int8)
        self._flush = self._flush.to(device)

    def in_turns(
        self, functions: dict[str, Callable[[], object]], budget: float
    ) -> dict[str, list[float]]:
        """Seconds of each function, A B A B .., until the budget is spent; one round at least."""
        seconds: dict[str, list[float]] = {name: [] for name in functions}
        start = time.perf_counter()
        for _ in range(_MOST_ROUNDS):
            for name, function in functions.items():
                seconds[name].append(self._time(function))
            if not self._cuda or time.perf_counter() - start > budget:
                break
        return seconds

    def _time(self, function: Callable[[], object]) -> float:
        self._flush.zero_()
        if not self._cuda:
            start = time.perf_counter()
            function()
            return time.perf_counter() - start
        first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda.synchronize()
        first.record()
        function()
        last.record()
        last.synchronize()
        return first.elapsed_time(last) / 1e3

    def peak_memory(self, function: Callable[[], object]) -> int | None:
        """Most bytes a run holds beyond what was there; None on a CPU."""
        if not self._cuda:
            function()
            return None
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        function()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before


def gpu_facts(number: int = 0) -> dict[str, Any]:
    """GPU of a number, driver and the versions that matter."""
    facts: dict[str, Any] = {"cuda": torch.version.cuda, "gpu": None}
    for package in ("triton", "cupy"):
        found = importlib.util.find_spec(package)
        facts[package] = importlib.import_module(package).__version__ if found else None
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

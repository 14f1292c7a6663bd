"""Facts about the machine and the software that a timing depends on; nothing that names a host.

Beside them the rates that bound every timing: of a matmul and of a copy.
"""

from __future__ import annotations

import os
import platform
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

import pyflocality
from pyflocality._support.native import native_module
from pyflocality.backends.selection import machine_reason

_CHECKOUT = Path(__file__).resolve().parents[1]
# Of the rates: side of the matrices, bytes of the copy (far above the caches), runs.
_SIDE, _COPY_BYTES, _RUNS = 2048, 256 * 2**20, 7


def machine_facts() -> dict[str, Any]:
    """Processor, memory, system and versions."""
    return {
        "cpu": _cpu_model(),
        "cores": _cores(),
        "threads": torch.get_num_threads(),
        "memory_gib": _memory_gib(),
        "instruction_sets": (
            native_module().instruction_sets() if machine_reason("cpu") is None else []
        ),
        "os": _system(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "torch_blas": "mkl" if torch.backends.mkl.is_available() else "other",
        "numpy": np.__version__,
        "pyflocality": pyflocality.__version__,
        "commit": _git("rev-parse", "HEAD"),
        "changes": _has_changes(),
    }


def machine_rates() -> dict[str, float]:
    """The best of some runs on all threads: what this machine reaches where nothing else hinders.

    Returns:
        `matmul_gflops_per_second` of float32 matrices of side 2048, two operations a
        multiply-add; `copy_gbytes_per_second` of 256 MiB, read and written.
    """
    left, right, out = (torch.rand(_SIDE, _SIDE) for _ in range(3))
    source = torch.ones(_COPY_BYTES, dtype=torch.uint8)
    target = torch.empty_like(source)
    matmul = _shortest(lambda: torch.matmul(left, right, out=out))
    copy = _shortest(lambda: target.copy_(source))
    return {
        "matmul_gflops_per_second": 2 * _SIDE**3 / matmul / 1e9,
        "copy_gbytes_per_second": 2 * _COPY_BYTES / copy / 1e9,
    }


def _shortest(function: Callable[[], object]) -> float:
    """Seconds of the fastest of some runs."""
    seconds = []
    for _ in range(_RUNS):
        start = time.perf_counter()
        function()
        seconds.append(time.perf_counter() - start)
    return min(seconds)


def _cpu_model() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    facts = dict(line.split(":", 1) for line in lines if ":" in line)
    for key in ("model name", "Model", "Hardware"):
        for name, value in facts.items():
            if name.strip() == key:
                return value.strip()
    return platform.processor() or platform.machine()


def _cores() -> int:
    """Processor cores this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _memory_gib() -> float | None:
    try:
        return round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1)
    except (AttributeError, OSError, ValueError):
        return None


def _system() -> str:
    try:
        name = platform.freedesktop_os_release()["PRETTY_NAME"]
    except (AttributeError, KeyError, OSError):
        name = platform.system()
    return f"{name}, {platform.machine()}"


def _git(*arguments: str) -> str | None:
    """Output of a git command in the checkout, or None where there is none."""
    # Installed, this folder may lie inside a checkout of something else.
    if not (_CHECKOUT / "setup.py").is_file():
        return None
    try:
        done = subprocess.run(
            ["git", *arguments], cwd=_CHECKOUT, capture_output=True, text=True, check=True
        )
    except (OSError, subprocess.CalledProcessError):
        return None
    return done.stdout.strip()


def _has_changes() -> bool | None:
    """Whether sources that a timing depends on differ from the commit."""
    status = _git(
        "status", "--porcelain", "--", "pyflocality", "csrc", "kernels", "benchmarks/*.py"
    )
    return None if status is None else bool(status)

"""What is installed, which backends can run and which settings are in force."""

from __future__ import annotations

import importlib.metadata
import os
import platform
from typing import TypedDict

import torch

from pyflocality._support.budget import memory_budget_bytes
from pyflocality._version import __version__
from pyflocality.backends.native_build import outdated_reason
from pyflocality.backends.selection import (
    BACKENDS,
    OPERATIONS,
    Implementation,
    machine_reason,
    requested_backend,
)
from pyflocality.storage.limit import CacheUse, cache_use, told_use

# Distributions a package may have been installed from: CuPy has one per CUDA version.
_PACKAGES = {
    "torch": ("torch",),
    "numpy": ("numpy",),
    "triton": ("triton",),
    "cupy": ("cupy-cuda13x", "cupy-cuda12x", "cupy"),
    "scikit-learn": ("scikit-learn",),
    "matplotlib": ("matplotlib",),
    "diffusers": ("diffusers",),
}

# What the backends are, in the order of the README.
_KINDS = {
    "reference": "plain torch on any device, float32 and float64, in chunks that fit the memory "
    "budget",
    "cpu": "C++ for CPU tensors, built on installation, AVX2 and AVX-512 where the processor has "
    "them; float32, masks of zeros and ones",
    "triton": "tensor-core kernels for GPU tensors, compiled at first use; float32 from 8-bit "
    "images",
    "cuda": "CUDA C++ for GPU tensors, compiled at first use by NVRTC through CuPy; float32",
}


def backend_table() -> str:
    """The backends and the operations that they implement, as a table in Markdown."""
    lines = ["| backend | what it is | operations |", "|---|---|---|"]
    for backend, kind in _KINDS.items():
        served = [f"`{op}`" for op, table in sorted(OPERATIONS.items()) if backend in table]
        lines.append(f"| `{backend}` | {kind} | {', '.join(served)} |")
    return "\n".join(lines)


def _installed(distributions: tuple[str, ...]) -> str | None:
    for name in distributions:
        try:
            return importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return None


def _by_name(table: dict[str, Implementation]) -> dict[str, str]:
    """Why "auto" passes over some backends of an operation, by backend."""
    return {name: one.by_name_only for name, one in table.items() if one.by_name_only is not None}


def _cores() -> int:
    """Cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


class Configuration(TypedDict):
    """Versions, backends with the reason why they cannot run here, operations and settings.

    `outdated` is why the native extension may not be that of its sources, or None.
    """

    pyflocality: str
    python: str
    platform: str
    packages: dict[str, str | None]
    threads: int
    cores: int
    gpus: list[str]
    backends: dict[str, str | None]
    operations: dict[str, list[str]]
    by_name_only: dict[str, dict[str, str]]
    backend: str
    memory_budget: int
    cache: CacheUse
    outdated: str | None
    environment: dict[str, str]


def configuration() -> Configuration:
    """The configuration as plain values: versions, backends, operations, settings."""
    gpus = [
        torch.cuda.get_device_name(index)
        for index in range(torch.cuda.device_count() if torch.cuda.is_available() else 0)
    ]
    return {
        "pyflocality": __version__,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "packages": {name: _installed(names) for name, names in _PACKAGES.items()},
        "threads": torch.get_num_threads(),
        "cores": _cores(),
        "gpus": gpus,
        "backends": {name: machine_reason(name) for name in BACKENDS if name != "auto"},
        "operations": {op: list(table) for op, table in sorted(OPERATIONS.items())},
        "by_name_only": {
            op: reasons for op, table in sorted(OPERATIONS.items()) if (reasons := _by_name(table))
        },
        "backend": requested_backend(None),
        "memory_budget": memory_budget_bytes(None),
        "cache": cache_use(),
        "outdated": None if machine_reason("cpu") is not None else outdated_reason(),
        "environment": {
            name: value for name, value in os.environ.items() if name.startswith("PYFLOCALITY_")
        },
    }


def format_configuration(config: Configuration) -> str:
    """The configuration as text for a person."""
    packages = ", ".join(
        f"{name} {version or '(not installed)'}" for name, version in config["packages"].items()
    )
    lines = [
        f"pyflocality {config['pyflocality']}, Python {config['python']}, {config['platform']}",
        f"packages: {packages}",
        f"CPU threads: {config['threads']} of {config['cores']} cores; "
        f"GPUs: {', '.join(config['gpus']) or 'none'}",
        f"backend: {config['backend']}; memory budget: {config['memory_budget'] / 2**30:g} GB",
        f"cache: {told_use(config['cache'])}",
    ]
    if config["backends"].get(config["backend"]) is not None:
        lines.append(
            f"PROBLEM: backend {config['backend']!r} is asked for and unavailable here, so every "
            "operation raises an error; choose another by PYFLOCALITY_BACKEND or pf.use_backend"
        )
    if config["outdated"] is not None:
        lines.append(f"PROBLEM: {config['outdated']}")
    lines.append("backends:")
    for name, reason in config["backends"].items():
        lines.append(f"  {name:<10} {'ready' if reason is None else 'unavailable: ' + reason}")
    lines.append("operations, and the backends that implement them in order of preference:")
    for op, backends in config["operations"].items():
        by_name = config["by_name_only"].get(op, {})
        told = [f"{name} (by name only)" if name in by_name else name for name in backends]
        lines.append(f"  {op:<26} {', '.join(told)}")
    lines += _by_name_lines(config["by_name_only"])
    for name, value in config["environment"].items():
        lines.append(f"{name}={value}")
    return "\n".join(lines)


def _by_name_lines(by_name_only: dict[str, dict[str, str]]) -> list[str]:
    """A line for each reason why backends run by name only: which, and how to use them."""
    backends: dict[str, set[str]] = {}
    for by_name in by_name_only.values():
        for name, why in by_name.items():
            backends.setdefault(why, set()).add(name)
    lines = []
    for why, names in sorted(backends.items()):
        every, one = " and ".join(sorted(names)), max(names)
        lines.append(
            f"by name only: 'auto' passes over {every}, as {why}; to use one, name it by "
            f"backend={one!r} in a call, pf.use_backend({one!r}) or PYFLOCALITY_BACKEND={one}"
        )
    return lines


def show_config() -> None:
    """Print versions, the backends that can run here (or why not) and the settings in force."""
    print(format_configuration(configuration()))

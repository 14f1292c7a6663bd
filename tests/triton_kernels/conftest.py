"""Where the kernels under test run: on the GPU if there is one, else in Triton's interpreter.

The interpreter must be chosen before Triton is imported, for its own functions too. So this
file, which pytest imports before the test files beside it, sets the variable; nothing collected
earlier may import Triton.
"""

from __future__ import annotations

import os
import sys

import pytest
import torch

if not torch.cuda.is_available() and os.environ.get("TRITON_INTERPRET") != "1":
    if "triton.language" in sys.modules:
        raise pytest.UsageError(
            "Triton was imported before its interpreter could be switched on: run "
            "`pytest tests/triton_kernels` by itself, or set TRITON_INTERPRET=1"
        )
    os.environ["TRITON_INTERPRET"] = "1"

collect_ignore_glob: list[str] = []
try:
    import triton.language  # noqa: F401
except ImportError:
    # pytest.importorskip in each file would say the same a dozen times.
    collect_ignore_glob = ["test_*.py"]
    if os.environ.get("CI") == "true":
        raise


@pytest.fixture
def device() -> torch.device:
    """Where tensors of a kernel under test live."""
    return torch.device("cpu" if os.environ.get("TRITON_INTERPRET") == "1" else "cuda")


class Launches:
    """Records the launches of a module's kernels, which run as they would."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self._monkeypatch = monkeypatch
        self.calls: list[tuple[str, tuple[int, ...], dict[str, object]]] = []

    def watch(self, module: object, *names: str) -> None:
        """Record the kernels of these names from here on."""
        for name in names:
            kernel = _Watched(name, getattr(module, name), self.calls)
            self._monkeypatch.setattr(module, name, kernel)

    def of(self, name: str) -> list[tuple[tuple[int, ...], dict[str, object]]]:
        """Grid and keyword arguments of every launch of a kernel."""
        return [(grid, options) for called, grid, options in self.calls if called == name]


class _Watched:
    def __init__(self, name: str, kernel: object, calls: list) -> None:
        self.name, self.kernel, self.calls = name, kernel, calls

    def __getitem__(self, grid: tuple[int, ...]) -> object:
        def launch(*args: object, **options: object) -> None:
            self.calls.append((self.name, grid, options))
            self.kernel[grid](*args, **options)

        return launch


@pytest.fixture
def launches(monkeypatch: pytest.MonkeyPatch) -> Launches:
    """Watch which kernels run, with which grid and which constants."""
    return Launches(monkeypatch)

"""The GPU kernels for the suite: those of the checkout, and in dry runs without a GPU."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from unittest import mock

ROOT = Path(__file__).resolve().parents[2]


def pretend_gpu(stack: ExitStack) -> None:
    """Let the Triton backend serve CPU tensors: its kernels run in the interpreter."""
    from pyflocality.backends import selection as _backends

    for name in ("machine_reason", "_device_reason"):
        reason = getattr(_backends, name)

        def answer(
            backend: str, *device: object, reason: Callable[..., str | None] = reason
        ) -> str | None:
            return None if backend == "triton" else reason(backend, *device)

        stack.enter_context(mock.patch.object(_backends, name, answer))


def pytest_configure() -> None:
    """As a plugin of pytest: the tests find the kernels where nothing is installed."""
    find_checkout_packages()


def find_checkout_packages() -> None:
    """Make the checkout importable as it is, where the package is not installed."""
    sys.path.append(str(ROOT))
    import pyflocality

    for name in ("kernels", "csrc"):
        full = f"pyflocality.{name}"
        if importlib.util.find_spec(full) is None:
            folder = ROOT / name
            spec = importlib.util.spec_from_file_location(
                full, folder / "__init__.py", submodule_search_locations=[str(folder)]
            )
            module = importlib.util.module_from_spec(spec)
            sys.modules[full] = module
            spec.loader.exec_module(module)
            setattr(pyflocality, name, module)

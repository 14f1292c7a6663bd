"""The GPU kernels for the suite: also those that no operation uses yet, also without a GPU.

A kernel is entered for the suite's own process, so that it can be measured before it is offered to
anybody; what the library has entered itself stays as it is.
"""

from __future__ import annotations

import importlib.util
import sys
from contextlib import ExitStack
from pathlib import Path
from unittest import mock

ROOT = Path(__file__).resolve().parents[1]

# Backend, module and function by operation.
KERNELS = {
    "masked_posterior": ("triton", "kernels.masked_posterior", "masked_posterior_state"),
    "masked_posterior_jvp": (
        "triton",
        "kernels.masked_posterior_jvp",
        "masked_posterior_jvp_state",
    ),
    "global_posterior": ("triton", "kernels.global_posterior", "global_posterior_state"),
    "global_posterior_jvp": (
        "triton",
        "kernels.global_posterior_jvp",
        "global_posterior_jvp_state",
    ),
    "covariance": ("triton", "kernels.covariance", "accumulate_covariance"),
    "equivariant_posterior": (
        "triton",
        "kernels.equivariant_posterior",
        "equivariant_posterior_state",
    ),
    "window_posterior": ("cuda", "cuda.window_posterior", "window_posterior_state"),
    "window_posterior_jvp": ("cuda", "cuda.window_posterior", "window_posterior_jvp_state"),
    "window_posterior_vjp": ("cuda", "cuda.window_adjoint", "window_posterior_vjp"),
    "patch_set": ("cuda", "cuda.window_adjoint", "patch_set_mean"),
}


def enter_kernels(stack: ExitStack) -> list[str]:
    """Enter the kernels that the library does not use; their names, "operation/backend".

    Args:
        stack: Takes them away again.
    """
    from pyflocality import _backends, ops  # noqa: F401  (operations register themselves)

    entered = []
    for op, (backend, module, function) in KERNELS.items():
        if backend not in _backends.OPERATIONS[op]:
            kernel = _backends.Implementation(f"pyflocality.{module}", function)
            table = _backends.OPERATIONS[op]
            stack.enter_context(mock.patch.dict(table, {backend: kernel}))
            entered.append(f"{op}/{backend}")
    return entered


def pretend_gpu(stack: ExitStack) -> None:
    """Let the Triton backend serve CPU tensors: its kernels run in the interpreter."""
    from pyflocality import _backends

    for name in ("machine_reason", "_device_reason"):
        reason = getattr(_backends, name)

        def answer(backend: str, *device, reason=reason) -> str | None:
            return None if backend == "triton" else reason(backend, *device)

        stack.enter_context(mock.patch.object(_backends, name, answer))


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

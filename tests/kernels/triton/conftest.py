"""Where the kernels under test run: on the GPU if there is one, else in Triton's interpreter.

The interpreter is chosen in the conftest.py above, before anything imports Triton.
"""

from __future__ import annotations

import os
from collections.abc import Iterator

import numpy as np
import pytest
import torch

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


def _product(left: np.ndarray, right: np.ndarray, sums: np.ndarray) -> np.ndarray:
    """sums + left @ right: every value adds its own row and column alone, from first to last.

    A BLAS adds in an order that depends on the processor and on where in the matrix a value
    lies: with it, bits that no kernel lets depend on the batch would.
    """
    if not np.issubdtype(sums.dtype, np.floating):
        return np.matmul(left, right, dtype=sums.dtype) + sums
    left, right = left.astype(sums.dtype), right.astype(sums.dtype)
    total = left[..., :1] * right[..., :1, :]
    term = np.empty_like(total)
    for k in range(1, left.shape[-1]):
        np.multiply(left[..., k, None], right[..., k, None, :], out=term)
        total += term
    return total + sums


@pytest.fixture(autouse=True)
def fixed_product(monkeypatch: pytest.MonkeyPatch) -> None:
    """The interpreter's products are ours, not those of a BLAS."""
    if os.environ.get("TRITON_INTERPRET") != "1":
        return
    interpreter = pytest.importorskip("triton.runtime.interpreter")

    def dot(builder: object, a: object, b: object, d: object, *unused: object) -> object:
        return interpreter.TensorHandle(_product(a.data, b.data, d.data), d.dtype.scalar)

    monkeypatch.setattr(interpreter.InterpreterBuilder, "create_dot", dot)


@pytest.fixture(autouse=True)
def guarded_memory(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Every access of a kernel lies within a tensor of its launch, and fresh memory holds NaN.

    On a GPU compute-sanitizer tells the same; a stray read there and here may well find what a
    test expects.
    """
    if os.environ.get("TRITON_INTERPRET") != "1":
        yield
        return
    interpreter = pytest.importorskip("triton.runtime.interpreter")
    spans: list[tuple[int, int]] = []
    arguments = interpreter.GridExecutor._init_args_hst
    builder = interpreter.InterpreterBuilder
    load, store = builder.create_masked_load, builder.create_masked_store

    def arguments_noted(executor: object, *given: object) -> tuple:
        here, named = arguments(executor, *given)
        tensors = [tensor for tensor in (*here, *named.values()) if hasattr(tensor, "data_ptr")]
        storages = [tensor.untyped_storage() for tensor in tensors]
        spans[:] = sorted({(s.data_ptr(), s.data_ptr() + s.nbytes()) for s in storages})
        return here, named

    def check(pointers: object, mask: object) -> None:
        places = np.broadcast_to(pointers.data, np.broadcast(pointers.data, mask.data).shape)
        first = places[np.broadcast_to(mask.data, places.shape)].astype(np.int64)
        size = max(1, pointers.get_element_ty().primitive_bitwidth // 8)
        starts, ends = (np.array(side) for side in zip(*spans, strict=True))
        span = np.searchsorted(starts, first, side="right") - 1
        inside = (span >= 0) & (first + size <= ends[span])
        assert inside.all(), "a kernel reads or writes outside of its tensors"

    def checked_load(self: object, pointers: object, mask: object, *rest: object) -> object:
        check(pointers, mask)
        return load(self, pointers, mask, *rest)

    def checked_store(
        self: object, pointers: object, value: object, mask: object, *rest: object
    ) -> object:
        check(pointers, mask)
        return store(self, pointers, value, mask, *rest)

    monkeypatch.setattr(interpreter.GridExecutor, "_init_args_hst", arguments_noted)
    monkeypatch.setattr(builder, "create_masked_load", checked_load)
    monkeypatch.setattr(builder, "create_masked_store", checked_store)
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(before)


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

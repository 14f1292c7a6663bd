"""Which implementation serves an operation.

Every operation has a table of implementations, one per backend, in order of preference. An
implementation carries one predicate, which answers None or the reason it cannot serve a call.
That one answer serves the automatic choice (a debug message), an explicit request (the error),
`pyflocality doctor` and the skips of the tests.

Precedence: the `backend=` argument, `use_backend`, the environment variable
`PYFLOCALITY_BACKEND`, then `"auto"`: the first implementation of the table that can serve, but
for those that run by name only. Whoever names a backend gets that backend or an error, never
another one.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import logging
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar, Token
from dataclasses import dataclass
from typing import Any

import torch

from pyflocality._support.caller import warn_once
from pyflocality._support.checks import check_choice
from pyflocality._support.native import native_module
from pyflocality.posterior.call import Call

logger = logging.getLogger("pyflocality")

BACKENDS = ("auto", "reference", "cpu", "triton", "cuda")
# Why "auto" passes over a kernel that passes every test without a GPU.
UNPROVEN = "no GPU has run these kernels yet"

_requested: ContextVar[str | None] = ContextVar("pyflocality_backend", default=None)
_trace: ContextVar[list[tuple[str, str]] | None] = ContextVar("pyflocality_trace", default=None)


class BackendUnavailableError(RuntimeError):
    """The backend that was asked for cannot run this operation here.

    Attributes:
        backend: The backend asked for.
        op: The operation.
        reason: Why it cannot serve, and the cure where there is one.
        available: The backends that can serve the same call.
    """

    def __init__(self, backend: str, op: str, reason: str, available: tuple[str, ...]) -> None:
        self.backend, self.op, self.reason, self.available = backend, op, reason, available
        others = ", ".join(available) or "none"
        super().__init__(
            f"backend {backend!r} cannot run {op}: {reason}. Backends that can: {others}"
        )


@dataclass(frozen=True)
class Implementation:
    """One backend's way to run an operation.

    Attributes:
        module: Module that holds it, imported at first use; or, if it has a file of its own, what
            the name of that begins with.
        function: Its name there.
        limits: Reason why this implementation cannot serve a call, or None if it can. Only what
            is special to it: the machine and the device are checked for the whole backend.
        by_name_only: Reason why "auto" passes over it, or None where it does not.
        joins_ranks: Whether what it answers can be joined over the ranks of a sharded set.
    """

    module: str
    function: str
    limits: Callable[[Call], str | None] = lambda call: None
    by_name_only: str | None = None
    joins_ranks: bool = False

    def load(self) -> Callable[..., Any]:
        """The function itself."""
        module = importlib.import_module(_file_of(self.module, self.function))
        return getattr(module, self.function)

    @property
    def file(self) -> str:
        """The module that has it: one with its name at the end where there is such a file."""
        return _file_of(self.module, self.function)


@functools.cache
def _file_of(module: str, function: str) -> str:
    own = f"{module}_{function}"
    return module if importlib.util.find_spec(own) is None else own


OPERATIONS: dict[str, dict[str, Implementation]] = {}


def register(op: str, implementations: dict[str, Implementation]) -> None:
    """Enter the table of an operation: implementations by backend, in order of preference."""
    OPERATIONS[op] = implementations


def machine_reason(backend: str) -> str | None:
    """Why this machine cannot run a backend at all, or None if it can."""
    if backend == "reference":
        return None
    if backend == "cpu":
        try:
            native_module()
        except ImportError as error:
            from pyflocality.backends.native_build import missing_reason

            return missing_reason(error)
        return None
    package = {"triton": "triton", "cuda": "cupy"}[backend]
    if importlib.util.find_spec(package) is None:
        wanted = f"'pyflocality[{backend}]'"
        # The extra brings CuPy for CUDA 13; CuPy has to be for the CUDA that torch brings.
        cuda = (torch.version.cuda or "13").split(".")[0]
        if backend == "cuda" and cuda != "13":
            wanted = f"cupy-cuda{cuda}x"
        return f"the package {package!r} is not installed: pip install {wanted}"
    if not torch.cuda.is_available():
        cure = (
            "install a build of torch with CUDA: this one has none"
            if torch.version.cuda is None
            else "see whether nvidia-smi lists a GPU and its driver is new enough for CUDA "
            f"{torch.version.cuda}, and what CUDA_VISIBLE_DEVICES says"
        )
        return f"torch sees no CUDA device: {cure}"
    return None


def _device_reason(backend: str, device: torch.device) -> str | None:
    if backend == "cpu" and device.type != "cpu":
        return f"it serves CPU tensors, these are on {device}"
    if backend in ("triton", "cuda") and device.type != "cuda":
        return f"it serves CUDA tensors, these are on {device}"
    return None


def reason(op: str, backend: str, call: Call) -> str | None:
    """Why a backend cannot serve a call of an operation, or None if it can."""
    implementation = OPERATIONS[op].get(backend)
    if implementation is None:
        return "it has no implementation of this operation"
    return (
        machine_reason(backend)
        or _device_reason(backend, call.device)
        or implementation.limits(call)
        or _sharded_reason(implementation, call)
    )


def _sharded_reason(implementation: Implementation, call: Call) -> str | None:
    """Why an implementation cannot serve a call on a sharded set, or None."""
    if call.facts.get("ranks") is None:
        return None
    if not implementation.joins_ranks:
        return "it cannot join the parts of a sharded set"
    if call.requires_grad:
        return (
            "torch cannot differentiate through the join of a sharded set: take first derivatives "
            "by `x` alone, outside of other derivatives"
        )
    return None


def requested_backend(argument: str | None) -> str:
    """The backend in force: argument, then `use_backend`, then environment, then "auto"."""
    if argument is not None:
        return check_choice(argument, "backend", BACKENDS)
    chosen = _requested.get() or os.environ.get("PYFLOCALITY_BACKEND")
    return "auto" if chosen is None else check_choice(chosen, "PYFLOCALITY_BACKEND", BACKENDS)


def select(op: str, call: Call, backend: str | None = None) -> Callable[..., Any]:
    """Choose and load the implementation that serves a call.

    Raises:
        BackendUnavailableError: A named backend cannot serve the call.
        ValueError: There is no backend of that name.
    """
    table = OPERATIONS[op]
    request = requested_backend(backend)
    if request == "auto":
        for name, implementation in table.items():
            # Devices first: to look for a package and a GPU may take longer than a small call.
            why_not = (
                implementation.by_name_only
                or _device_reason(name, call.device)
                or machine_reason(name)
                or implementation.limits(call)
                or _sharded_reason(implementation, call)
            )
            if why_not is None:
                if name == "cpu":
                    _tell_if_outdated()
                elif "cpu" in table and call.device.type == "cpu":
                    _tell_of_missing_extension(table["cpu"], call)
                return _chosen(op, name)
            logger.debug("%s: backend %s passed over: %s", op, name, why_not)
        # The last is the reference, which serves all that can be served.
        why = _sharded_reason(list(table.values())[-1], call)
        raise BackendUnavailableError("auto", op, why or "no backend can serve this call", ())
    why_not = reason(op, request, call)
    if why_not is not None:
        available = tuple(name for name in table if reason(op, name, call) is None)
        raise BackendUnavailableError(request, op, why_not, available)
    return _chosen(op, request)


def _tell_of_missing_extension(native: Implementation, call: Call) -> None:
    """Say once where "auto" takes another backend for want of the native extension alone."""
    # What native kernels would not have served either is no loss.
    if native.by_name_only or native.limits(call):
        return
    why_not = machine_reason("cpu")
    if why_not is not None:
        warn_once(
            "tensors of the CPU are served by the reference backend, about 50 times slower than "
            f"by native kernels: {why_not}"
        )


@functools.cache
def _tell_if_outdated() -> None:
    from pyflocality.backends.native_build import outdated_reason

    why = outdated_reason()
    if why is not None:
        warn_once(why)


def _chosen(op: str, backend: str) -> Callable[..., Any]:
    logger.debug("%s: backend %s", op, backend)
    calls = _trace.get()
    if calls is not None:
        calls.append((op, backend))
    return OPERATIONS[op][backend].load()


class use_backend:  # noqa: N801  (reads as a function, like torch.no_grad)
    """Choose the backend of every operation from here on, or inside a `with` block.

    The choice is that of the current thread (more exactly, of the current `contextvars` context):
    threads started later begin with "auto" again. PYFLOCALITY_BACKEND is for the whole process.

    Args:
        backend: `"auto"`, `"reference"`, `"cpu"`, `"triton"` or `"cuda"`. A `backend=` argument
            of a call still wins over it.

    Raises:
        ValueError: There is no backend of that name.

    Examples:
        >>> import pyflocality as pf
        >>> with pf.use_backend("reference"):
        ...     ...
    """

    def __init__(self, backend: str) -> None:
        check_choice(backend, "backend", BACKENDS)
        self._token: Token[str | None] | None = _requested.set(backend)

    def __enter__(self) -> use_backend:
        """Enter the block; the choice is in force since construction."""
        return self

    def __exit__(self, *_: object) -> None:
        """Restore the choice that was in force before."""
        if self._token is not None:
            _requested.reset(self._token)
            self._token = None


@contextmanager
def trace_backends() -> Iterator[list[tuple[str, str]]]:
    """Record which backend ran each operation inside a `with` block.

    Yields:
        A list that fills with pairs (operation, backend), in order of execution.
    """
    calls: list[tuple[str, str]] = []
    token = _trace.set(calls)
    try:
        yield calls
    finally:
        _trace.reset(token)

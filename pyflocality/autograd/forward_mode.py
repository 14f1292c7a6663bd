"""Derivatives by torch's forward mode, from any number of threads.

A process has one level of forward mode. Whichever thread opens it, all find it open, and as it is
closed the tangents of all are gone. So the library's uses of it take turns, and where somebody
else has it open, who may close it at any time, the derivative is found by two reversals instead.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import TypeVar

import torch
from torch import Tensor
from torch._C import _functorch as functorch
from torch.autograd import forward_ad

T = TypeVar("T")
Function = Callable[[Tensor], Tensor]
# (function, x, tangent) -> value of the function and its derivative along the tangent.
Derivative = Callable[[Function, Tensor, Tensor], tuple[Tensor, Tensor]]

_turn = threading.RLock()
_asked: ContextVar[bool] = ContextVar("pyflocality_forward_mode", default=False)


def derivative_along(function: Function, x: Tensor, tangent: Tensor) -> tuple[Tensor, Tensor]:
    """Value of a function and its derivative along a tangent.

    Also inside a block `torch.autograd.forward_ad.dual_level`, where `torch.func.jvp` refuses.
    """
    return in_forward_mode(lambda derivative: derivative(function, x, tangent))


def in_forward_mode(run: Callable[[Derivative], T]) -> T:
    """The answer of a function that takes derivatives along tangents by the one it is given.

    It may be asked twice, the second time with another way to take them.
    """
    if torch.compiler.is_dynamo_compiling():
        return run(_by_torch)
    if _asked.get() or _is_within_jvp():
        # No turn of its own: whoever asks has the level open and waits for the answer.
        return run(_by_forward_mode)
    with _turn:
        if _opened():
            try:
                return run(_by_forward_mode)
            except RuntimeError as error:
                # What is differentiated opens the level by itself, as torch.func.jvp does.
                if "Nested forward mode" not in str(error):
                    raise
            finally:
                torch._C._exit_dual_level(level=0)
            return run(_by_two_reversals)
    return run(_by_two_reversals)


@contextmanager
def asked_by_forward_mode() -> Iterator[None]:
    """A block that computes what torch's forward mode asked for in this thread."""
    token = _asked.set(True)
    try:
        yield
    finally:
        _asked.reset(token)


def _is_within_jvp() -> bool:
    """Whether this thread is inside `torch.func.jvp`, the caller's own or one of the library.

    The threads of torch's backward pass count as the thread that started it.
    """
    stack = functorch.get_interpreter_stack() or ()
    return any(layer.key() == functorch.TransformType.Jvp for layer in stack)


def _opened() -> bool:
    """Open the level; False where it is open already.

    Not by `forward_ad.enter_dual_level`, which lets compiled graphs of all threads know of it.
    """
    try:
        torch._C._enter_dual_level()
    except RuntimeError:
        return False
    return True


def _by_forward_mode(function: Function, x: Tensor, tangent: Tensor) -> tuple[Tensor, Tensor]:
    """As `torch.func.jvp` in a level that is open, which that would open or count on."""
    # A tensor whose elements share memory cannot carry a tangent.
    x, tangent = x.contiguous(), tangent.contiguous()
    layer = functorch._jvp_increment_nesting()
    try:
        with forward_ad._set_fwd_grad_enabled(True):
            dual = function(forward_ad.make_dual(x, tangent, level=0))
            value, derivative = forward_ad.unpack_dual(dual, level=0)
            derivative = torch.zeros_like(value) if derivative is None else derivative
            return (
                functorch._unwrap_for_grad(value, layer),
                functorch._unwrap_for_grad(derivative, layer),
            )
    finally:
        functorch._jvp_decrement_nesting()


def _by_torch(function: Function, x: Tensor, tangent: Tensor) -> tuple[Tensor, Tensor]:
    value, derivative = torch.func.jvp(function, (x,), (tangent,))[:2]
    return value, derivative


def _by_two_reversals(function: Function, x: Tensor, tangent: Tensor) -> tuple[Tensor, Tensor]:
    """The transpose of the transposed derivative, which needs no forward mode."""
    value, transposed = torch.func.vjp(function, x)[:2]
    _, again = torch.func.vjp(lambda g: transposed(g)[0], torch.zeros_like(value))[:2]
    return value, again(tangent)[0]

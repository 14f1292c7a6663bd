"""The one place where torch's derivatives, compiler and tracers meet the denoisers.

A call that nobody differentiates runs a denoiser's `_denoise`, `_jvp` or `_vjp` on plain tensors.
Else torch is told what the derivatives of an estimate are: `_jvp` for forward mode, `_vjp` for
backward, which scan the training set in chunks as the estimate does. Nothing but the arguments is
kept for them. All other derivatives, by noise level and of higher order, are torch's own through
`_denoise`, which then runs on the reference backend: correct, not fast.

`torch.compile` and other tracers cannot look into a scan of a training set: it depends on values,
and runs native code. They record one operator of the library `pyflocality` instead, which finds
its denoiser by number when the graph runs, checks the values that exist only then, and has the
derivatives of its function.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from typing import Protocol
from weakref import WeakValueDictionary

import torch
from torch import Tensor, nn
from torch._C import _functorch as functorch
from torch.autograd import forward_ad

from pyflocality._support.checks import Noisy
from pyflocality._support.levels import Levels
from pyflocality._support.transforms import (
    in_full_precision,
    is_differentiated,
    is_traced,
    without_forward_mode,
)
from pyflocality.autograd.row_map import Argument, RowMap, jvp_by_torch, vjp_by_torch
from pyflocality.backends.selection import requested_backend, use_backend


class Differentiable(Protocol):
    """A denoiser, as far as its derivatives need it."""

    _handle: int

    def parameters(self) -> Iterator[nn.Parameter]:
        """Parameters by which torch may differentiate, too."""

    def _checked(self, x: Tensor, sigma: float | Tensor, alpha: float | Tensor) -> Noisy:
        """The arguments of a call, checked."""

    def _denoise(self, x: Tensor, levels: Levels) -> Tensor:
        """Estimates [B, C, H, W]."""

    def _jvp(self, x: Tensor, tangents: Tensor, levels: Levels) -> tuple[Tensor, Tensor]:
        """Estimates and derivatives along tangents [K, B, C, H, W]."""

    def _vjp(self, x: Tensor, cotangents: Tensor, levels: Levels) -> Tensor:
        """Transposed derivatives along cotangents [K, B, C, H, W]."""


_handles = itertools.count()
_denoisers: WeakValueDictionary[int, Differentiable] = WeakValueDictionary()


def new_handle(denoiser: Differentiable) -> int:
    """The number by which operators know a denoiser, for as long as it lives."""
    handle = next(_handles)
    _denoisers[handle] = denoiser
    return handle


def _denoiser_of(handle: int) -> Differentiable:
    denoiser = _denoisers.get(handle)
    if denoiser is None:
        raise RuntimeError("the denoiser that this graph calls is gone: keep it for the graph")
    return denoiser


def estimate(denoiser: Differentiable, noisy: Noisy) -> Tensor:
    """A denoiser's estimates, with all derivatives with respect to the arguments."""
    x, levels = noisy.x, noisy.levels
    if _has_parameters(denoiser):
        # Derivatives with respect to parameters may be asked for, too: torch sees all operations.
        return denoiser._denoise(x, levels)
    if not noisy.looked_at or is_differentiated(x, *levels):
        if torch.compiler.is_dynamo_compiling() and forward_ad._current_level >= 0:
            raise NotImplementedError(
                "compiled graphs lose forward-mode tangents: call the denoiser uncompiled inside "
                "torch.autograd.forward_ad.dual_level, or `denoiser.jvp`"
            )
        return _recorded("estimate", denoiser, noisy)
    with torch.no_grad(), in_full_precision(x.device):
        return denoiser._denoise(x, levels) if len(x) > 0 else torch.zeros_like(x)


def jvp(denoiser: Differentiable, noisy: Noisy) -> tuple[Tensor, Tensor]:
    """Estimates and derivatives along the directions, themselves differentiable."""
    x, levels, tangents, looked_at = noisy
    own = _has_parameters(denoiser)
    if not looked_at or tangents.numel() == 0 or is_differentiated(x, tangents, *levels):
        if own:
            return estimate(denoiser, noisy), denoiser._jvp(x, tangents, levels)[1]
        return estimate(denoiser, noisy), _recorded("jvp", denoiser, noisy)
    with torch.no_grad():
        if own:
            return denoiser._jvp(x, tangents, levels)
        with in_full_precision(x.device):
            return denoiser._jvp(x, tangents, levels)


def vjp(denoiser: Differentiable, noisy: Noisy) -> Tensor:
    """Derivatives with respect to x of estimates times directions, differentiable again."""
    x, levels, cotangents, looked_at = noisy
    if _has_parameters(denoiser):
        return denoiser._vjp(x, cotangents, levels)
    if not looked_at or cotangents.numel() == 0 or is_differentiated(x, cotangents, *levels):
        return _recorded("vjp", denoiser, noisy)
    with torch.no_grad(), in_full_precision(x.device):
        return denoiser._vjp(x, cotangents, levels)


def _has_parameters(denoiser: Differentiable) -> bool:
    return next(denoiser.parameters(), None) is not None


def _recorded(name: str, denoiser: Differentiable, noisy: Noisy) -> Tensor:
    """An answer that torch, or the graph that it makes, knows with its derivatives."""
    x, levels, directions, looked_at = noisy
    arguments = (x, *levels) if name == "estimate" else (x, *levels, directions)
    if torch.compiler.is_dynamo_compiling():
        return getattr(torch.ops.pyflocality, name)(denoiser._handle, *arguments)
    rows = _Estimate(denoiser, requested_backend(None), looked_at)
    return (rows if name == "estimate" else rows.products(name))(*arguments)


def _estimate(denoiser: Differentiable, x: Tensor, levels: Levels) -> Tensor:
    return denoiser._denoise(x, levels) if len(x) > 0 else torch.zeros_like(x)


def _jvp(denoiser: Differentiable, x: Tensor, levels: Levels, tangents: Tensor) -> Tensor:
    return _of_finite(lambda given: denoiser._jvp(x, given, levels)[1], tangents)


def _vjp(denoiser: Differentiable, x: Tensor, levels: Levels, cotangents: Tensor) -> Tensor:
    return _of_finite(lambda given: denoiser._vjp(x, given, levels), cotangents)


def _of_finite(product: Callable[[Tensor], Tensor], directions: Tensor) -> Tensor:
    """A product with directions [K, B, C, H, W]; NaN where they overflowed, as torch has it."""
    if directions.numel() == 0:
        return torch.zeros_like(directions)
    finite = torch.isfinite(directions).flatten(2).all(2)[:, :, None, None, None]
    if finite.all():
        return product(directions)
    return product(directions.where(finite, 0.0)).where(finite, torch.nan)


_FUNCTIONS: dict[str, Callable[..., Tensor]] = {"estimate": _estimate, "jvp": _jvp, "vjp": _vjp}


def _run(
    name: str, denoiser: Differentiable, looked_at: bool, x: Tensor, *rest: Argument
) -> Tensor:
    """What a denoiser answers for plain tensors, whose values are looked at if nobody could."""
    alpha, sigma, *directions = rest
    levels = Levels(alpha, sigma)
    if not looked_at:
        x, levels, _, _ = denoiser._checked(x, sigma, alpha)
    with in_full_precision(x.device):
        return _FUNCTIONS[name](denoiser, x, levels, *directions)


class _Estimate(RowMap):
    """A denoiser's estimate x0 from (x, alpha, sigma).

    Args:
        denoiser: The denoiser.
        backend: Backend that is in force now, and shall be where derivatives are computed later.
        looked_at: Whether the values are checked.
    """

    def __init__(self, denoiser: Differentiable, backend: str, looked_at: bool) -> None:
        def plain(x: Tensor, alpha: Argument, sigma: Argument) -> Tensor:
            with use_backend(backend), in_full_precision(x.device):
                return _estimate(denoiser, x, Levels(alpha, sigma))

        self.denoiser, self.backend, self.looked_at = denoiser, backend, looked_at
        super().__init__(self._function("estimate"), plain, (0, 0, 0), 0)

    def _function(self, name: str) -> Callable[..., Tensor]:
        """A function of the denoiser, or the operator in its place that a trace records."""

        def run(x: Tensor, *rest: Argument) -> Tensor:
            with use_backend(self.backend):
                if not is_traced():
                    return _run(name, self.denoiser, self.looked_at, x, *rest)
                levels = Levels(*rest[:2]).tensors(len(x))
                with torch._C._AutoDispatchBelowAutograd():
                    operator = getattr(torch.ops.pyflocality, name)
                    return operator(self.denoiser._handle, x, *levels, *rest[2:])

        return run

    def products(self, name: str) -> RowMap:
        """Derivatives along directions [K, B, C, H, W], "jvp", or against them, "vjp"."""
        by_torch = {"jvp": lambda *given: jvp_by_torch(*given)[1], "vjp": vjp_by_torch}[name]

        def plain(x: Tensor, alpha: Argument, sigma: Argument, directions: Tensor) -> Tensor:
            return by_torch(lambda z: self.plain(z, alpha, sigma), x, directions)

        return RowMap(self._function(name), plain, (0, 0, 0, 1), 1)

    def jvp(self, number: int, arguments: Sequence[Argument], tangent: Tensor) -> Tensor:
        """With respect to x the denoiser's own product, to the levels torch's derivative."""
        if number == 0:
            return self.products("jvp")(*arguments, tangent[None])[0]
        return super().jvp(number, arguments, tangent)

    def vjp(self, number: int, arguments: Sequence[Argument], cotangent: Tensor) -> Tensor:
        """With respect to a level, one number a row, the derivative itself tells the product."""
        if number == 0:
            return self.products("vjp")(*arguments, cotangent[None])[0]
        level = torch.as_tensor(arguments[number])
        derivative = self.jvp(number, arguments, torch.ones_like(level))
        return (derivative.double() * cotangent.double()).flatten(1).sum(1).to(level.device)


def _define(name: str, directions: str) -> None:
    """Enter a function as an operator, whose result looks like its last image-like argument."""

    def run(handle: int, *arguments: Tensor) -> Tensor:
        with torch.no_grad(), without_forward_mode():
            return _run(name, _denoiser_of(handle), False, *arguments)

    def differentiated(handle: int, *arguments: Tensor) -> Tensor:
        if functorch.peek_interpreter_stack() is not None:
            raise NotImplementedError(
                "torch.func inside torch.compile does not see the derivatives of a denoiser: call "
                "`denoiser.jvp` or `denoiser.vjp` there, or torch.func outside"
            )
        # As a graph is run or traced again, nothing but the number of the denoiser is known.
        rows = _Estimate(_denoiser_of(handle), requested_backend(None), False)
        return (rows if name == "estimate" else rows.products(name))(*arguments)

    schema = f"(int denoiser, Tensor x, Tensor alpha, Tensor sigma{directions}) -> Tensor"
    _LIBRARY.define(name + schema, tags=(torch.Tag.pt2_compliant_tag,))
    # Older releases of torch compile, frame by frame, what a compiled graph calls.
    _LIBRARY.impl(name, torch._disable_dynamo(run), "CompositeExplicitAutograd")
    _LIBRARY.impl(name, differentiated, "Autograd")
    like = 3 if directions else 0
    torch.library.register_fake(
        f"pyflocality::{name}",
        lambda denoiser, *arguments: torch.empty_like(arguments[like]),
        lib=_LIBRARY,
    )


_LIBRARY = torch.library.Library("pyflocality", "DEF")
_define("estimate", "")
_define("jvp", ", Tensor tangents")
_define("vjp", ", Tensor cotangents")

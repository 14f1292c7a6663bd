"""What a denoiser computes, as functions and as operators that graphs hold unopened.

`torch.compile` and other tracers cannot look into a scan of a training set: it depends on values,
and runs native code. They record one operator of the library `pyflocality` instead, which finds
its denoiser by number when the graph runs. Its derivatives are entered by
`pyflocality.autograd.function`.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import TYPE_CHECKING
from weakref import WeakValueDictionary

import torch
from torch import Tensor

from pyflocality._support.transforms import in_full_precision, without_forward_mode

if TYPE_CHECKING:
    from pyflocality.denoisers.base import Denoiser

_handles = itertools.count()
_denoisers: WeakValueDictionary[int, Denoiser] = WeakValueDictionary()


def new_handle(denoiser: Denoiser) -> int:
    """The number by which operators know a denoiser, for as long as it lives."""
    handle = next(_handles)
    _denoisers[handle] = denoiser
    return handle


def denoiser_of(handle: int) -> Denoiser:
    """The denoiser of a number."""
    denoiser = _denoisers.get(handle)
    if denoiser is None:
        raise RuntimeError("the denoiser that this graph calls is gone: keep it for the graph")
    return denoiser


def _estimate(denoiser: Denoiser, x: Tensor, sigma: Tensor, alpha: Tensor) -> Tensor:
    x, sigma, alpha = denoiser._checked(x, sigma, alpha)
    with in_full_precision(x.device):
        return denoiser._denoise(x, sigma, alpha) if len(x) > 0 else torch.zeros_like(x)


def _directional(
    denoiser: Denoiser, x: Tensor, sigma: Tensor, alpha: Tensor, tangents: Tensor
) -> Tensor:
    x, sigma, alpha = denoiser._checked(x, sigma, alpha)
    with in_full_precision(x.device):
        return _of_finite(lambda part: denoiser._jvp(x, part, sigma, alpha)[1], tangents)


def _transposed(
    denoiser: Denoiser, x: Tensor, sigma: Tensor, alpha: Tensor, cotangents: Tensor
) -> Tensor:
    x, sigma, alpha = denoiser._checked(x, sigma, alpha)
    with in_full_precision(x.device):
        return _of_finite(lambda part: denoiser._vjp(x, part, sigma, alpha), cotangents)


def _of_finite(product: Callable[[Tensor], Tensor], directions: Tensor) -> Tensor:
    """A product with directions [K, B, C, H, W]; NaN where they overflowed, as torch has it."""
    if directions.numel() == 0:
        return torch.zeros_like(directions)
    finite = torch.isfinite(directions).flatten(2).all(2)[:, :, None, None, None]
    if finite.all():
        return product(directions)
    return product(directions.where(finite, 0.0)).where(finite, torch.nan)


FUNCTIONS: dict[str, Callable[..., Tensor]] = {
    "estimate": _estimate,
    "directional": _directional,
    "transposed": _transposed,
}


def _define(name: str, directions: str, like: int) -> None:
    """Enter a function as an operator whose result looks like one of its arguments."""

    def run(denoiser: int, *arguments: Tensor) -> Tensor:
        with torch.no_grad(), without_forward_mode():
            return FUNCTIONS[name](denoiser_of(denoiser), *arguments)

    # Older releases of torch compile, frame by frame, what a compiled graph calls.
    run = torch._disable_dynamo(run)
    schema = f"(int denoiser, Tensor x, Tensor sigma, Tensor alpha{directions}) -> Tensor"
    LIBRARY.define(name + schema, tags=(torch.Tag.pt2_compliant_tag,))
    LIBRARY.impl(name, run, "CompositeExplicitAutograd")
    torch.library.register_fake(
        f"pyflocality::{name}",
        lambda denoiser, *arguments: torch.empty_like(arguments[like]),
        lib=LIBRARY,
    )


LIBRARY = torch.library.Library("pyflocality", "DEF")
_define("estimate", "", 0)
_define("directional", ", Tensor tangents", 3)
_define("transposed", ", Tensor cotangents", 3)

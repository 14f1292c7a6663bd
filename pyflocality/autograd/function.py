"""The one place where torch's derivatives meet the denoisers.

`estimate` calls a denoiser's `_denoise` on plain tensors, without a graph and on the fastest
backend, and tells torch what its derivatives are: `_jvp` for forward mode, `_vjp` for backward,
which scan the training set in chunks as the estimate does. Nothing but the arguments is kept for
them. All other derivatives, by noise level and of higher order, are torch's own through
`_denoise`, which then runs on the reference backend: correct, not fast.

Everything here works row by row: image b of a result depends on image b of the arguments alone.
So `torch.vmap` is a larger batch, or more directions where only these are mapped.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch._C import _functorch as functorch
from torch.autograd import forward_ad

from pyflocality._support.transforms import in_full_precision, is_traced
from pyflocality.autograd.forward_mode import asked_by_forward_mode, derivative_along
from pyflocality.autograd.operators import FUNCTIONS, LIBRARY, denoiser_of
from pyflocality.backends.selection import requested_backend, use_backend

if TYPE_CHECKING:
    from pyflocality.denoisers.base import Denoiser


def estimate(denoiser: Denoiser, x: Tensor, sigma: Tensor, alpha: Tensor) -> Tensor:
    """A denoiser's estimate, with all derivatives by its arguments.

    Args:
        denoiser: The denoiser.
        x: Noisy images, [B, C, H, W].
        sigma: Noise levels, float64 [B].
        alpha: Signal coefficients, float64 [B].
    """
    if has_parameters(denoiser):
        return denoiser._denoise(x, sigma, alpha)
    if torch.compiler.is_dynamo_compiling():
        if forward_ad._current_level >= 0:
            raise NotImplementedError(
                "compiled graphs lose forward-mode tangents: call the denoiser uncompiled inside "
                "torch.autograd.forward_ad.dual_level, or `denoiser.jvp`"
            )
        return torch.ops.pyflocality.estimate(denoiser._handle, x, sigma, alpha)
    return apply(Estimate(denoiser, requested_backend(None)), x, sigma, alpha)


def directional(
    denoiser: Denoiser, x: Tensor, sigma: Tensor, alpha: Tensor, tangents: Tensor
) -> Tensor:
    """Derivatives of the estimate along tangents [K, B, C, H, W], themselves differentiable."""
    if has_parameters(denoiser):
        return denoiser._jvp(x, tangents, sigma, alpha)[1]
    if torch.compiler.is_dynamo_compiling():
        return torch.ops.pyflocality.directional(denoiser._handle, x, sigma, alpha, tangents)
    return Estimate(denoiser, requested_backend(None)).directional(x, sigma, alpha, tangents)


def transposed(
    denoiser: Denoiser, x: Tensor, sigma: Tensor, alpha: Tensor, cotangents: Tensor
) -> Tensor:
    """Derivatives by x of the estimate times cotangents [K, B, C, H, W], as `directional`."""
    if has_parameters(denoiser):
        return denoiser._vjp(x, cotangents, sigma, alpha)
    if torch.compiler.is_dynamo_compiling():
        return torch.ops.pyflocality.transposed(denoiser._handle, x, sigma, alpha, cotangents)
    return Estimate(denoiser, requested_backend(None)).transposed(x, sigma, alpha, cotangents)


def has_parameters(denoiser: Denoiser) -> bool:
    """Whether derivatives by parameters may be asked for, too: then torch sees all operations."""
    return next(denoiser.parameters(), None) is not None


class RowMap:
    """A function of batches that works row by row, with its derivatives.

    Args:
        run: The function, for plain tensors.
        plain: The same function in operations that torch differentiates.
        axes: Which axis of each argument is the batch: 0, or 1 behind K directions. Direction k
            of a result depends on direction k of the arguments alone.
        axis: Which axis of the result is the batch; where it is 0, directions are summed.
    """

    def __init__(
        self,
        run: Callable[..., Tensor],
        plain: Callable[..., Tensor],
        axes: tuple[int, ...],
        axis: int,
    ) -> None:
        self.run, self.plain, self.axes, self.axis = run, plain, axes, axis

    def push(self, number: int, arguments: Sequence[Tensor], tangent: Tensor) -> Tensor:
        """Derivative of the result along a tangent of one argument."""

        def pushed(*given: Tensor) -> Tensor:
            _refuse_tracing()
            along = _with_one_free(self.plain, given[:-1], number)
            with in_full_precision(given[0].device):
                return derivative_along(along, given[number], given[-1])[1]

        axes = (*self.axes, self.axes[number])
        return apply(RowMap(pushed, pushed, axes, self.axis), *arguments, tangent)

    def pull(self, number: int, arguments: Sequence[Tensor], cotangent: Tensor) -> Tensor:
        """Derivative by one argument of the sum of result times cotangent."""

        def pulled(*given: Tensor) -> Tensor:
            _refuse_tracing()
            along = _with_one_free(self.plain, given[:-1], number)
            with in_full_precision(given[0].device):
                return torch.func.vjp(along, given[number])[1](given[-1])[0]

        axes = (*self.axes, self.axis)
        return apply(RowMap(pulled, pulled, axes, self.axes[number]), *arguments, cotangent)


class Estimate(RowMap):
    """A denoiser's estimate x0 from (x, sigma, alpha).

    Args:
        denoiser: The denoiser.
        backend: Backend that is in force now, and shall be where derivatives are computed later.
    """

    def __init__(self, denoiser: Denoiser, backend: str) -> None:
        def plain(x: Tensor, sigma: Tensor, alpha: Tensor) -> Tensor:
            with use_backend(backend), in_full_precision(x.device):
                return denoiser._denoise(x, sigma, alpha) if len(x) > 0 else torch.zeros_like(x)

        super().__init__(self._registered("estimate"), plain, (0, 0, 0), 0)
        self.denoiser, self.backend = denoiser, backend

    def _registered(self, name: str) -> Callable[..., Tensor]:
        """A function of the denoiser, or the operator in its place that a trace records."""

        def run(*arguments: Tensor) -> Tensor:
            with use_backend(self.backend):
                if is_traced():
                    operator = getattr(torch.ops.pyflocality, name)
                    with torch._C._AutoDispatchBelowAutograd():
                        return operator(self.denoiser._handle, *arguments)
                return FUNCTIONS[name](self.denoiser, *arguments)

        return run

    def push(self, number: int, arguments: Sequence[Tensor], tangent: Tensor) -> Tensor:
        """By x the denoiser's own product, by the levels torch's derivative."""
        if number == 0:
            return self.directional(*arguments, tangent[None])[0]
        return super().push(number, arguments, tangent)

    def pull(self, number: int, arguments: Sequence[Tensor], cotangent: Tensor) -> Tensor:
        """By x the denoiser's own product; by a level, one number a row, the derivative itself."""
        if number == 0:
            return self.transposed(*arguments, cotangent[None])[0]
        derivative = self.push(number, arguments, torch.ones_like(arguments[number]))
        return (derivative.double() * cotangent.double()).flatten(1).sum(1)

    def directional(self, x: Tensor, sigma: Tensor, alpha: Tensor, tangents: Tensor) -> Tensor:
        """Derivatives along tangents [K, B, C, H, W]."""

        def plain(x: Tensor, sigma: Tensor, alpha: Tensor, tangents: Tensor) -> Tensor:
            return jvp_by_torch(self.plain, x, tangents, sigma, alpha)[1]

        rows = RowMap(self._registered("directional"), plain, (0, 0, 0, 1), 1)
        return apply(rows, x, sigma, alpha, tangents)

    def transposed(self, x: Tensor, sigma: Tensor, alpha: Tensor, cotangents: Tensor) -> Tensor:
        """Derivatives by x for cotangents [K, B, C, H, W]."""

        def plain(x: Tensor, sigma: Tensor, alpha: Tensor, cotangents: Tensor) -> Tensor:
            return vjp_by_torch(self.plain, x, cotangents, sigma, alpha)

        rows = RowMap(self._registered("transposed"), plain, (0, 0, 0, 1), 1)
        return apply(rows, x, sigma, alpha, cotangents)


def jvp_by_torch(
    denoise: Callable[..., Tensor], x: Tensor, tangents: Tensor, sigma: Tensor, alpha: Tensor
) -> tuple[Tensor, Tensor]:
    """Estimate and derivatives along tangents by forward-mode differentiation, one at a time."""
    if len(tangents) == 0:
        return denoise(x, sigma, alpha), torch.zeros_like(tangents)
    pairs = [derivative_along(lambda z: denoise(z, sigma, alpha), x, u) for u in tangents]
    return pairs[0][0], torch.stack([derivative for _, derivative in pairs])


def vjp_by_torch(
    denoise: Callable[..., Tensor], x: Tensor, cotangents: Tensor, sigma: Tensor, alpha: Tensor
) -> Tensor:
    """Transposed derivatives by backward differentiation, through one graph of the estimate."""
    if len(cotangents) == 0:
        return torch.zeros_like(cotangents)
    _, pull = torch.func.vjp(lambda z: denoise(z, sigma, alpha), x)
    return torch.stack([pull(g)[0] for g in cotangents])


def apply(rows: RowMap, *arguments: Tensor) -> Tensor:
    """The value of a map, known to torch with its derivatives."""
    return _Apply.apply(rows, *arguments)


def _refuse_tracing() -> None:
    if is_traced():
        raise NotImplementedError(
            "only first derivatives by `x` can be traced or compiled: call the denoiser outside "
            "for derivatives by `sigma` or `alpha` and for derivatives of derivatives"
        )


def _with_one_free(
    function: Callable[..., Tensor], arguments: Sequence[Tensor], number: int
) -> Callable[[Tensor], Tensor]:
    before, after = arguments[:number], arguments[number + 1 :]
    return lambda argument: function(*before, argument, *after)


class _Apply(torch.autograd.Function):
    """`RowMap` as torch wants it. Arguments: the map, then its tensors."""

    @staticmethod
    def forward(rows: RowMap, *arguments: Tensor) -> Tensor:
        return rows.run(*(argument.detach() for argument in arguments))

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:  # noqa: ANN401
        ctx.rows = inputs[0]
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*inputs[1:])
        ctx.save_for_forward(*inputs[1:])

    @staticmethod
    def jvp(ctx: Any, _: None, *tangents: Tensor | None) -> Tensor:  # noqa: ANN401
        arguments = ctx.saved_tensors
        with asked_by_forward_mode():
            parts = [
                ctx.rows.push(number, arguments, tangent)
                for number, tangent in enumerate(tangents)
                if tangent is not None
            ]
        return sum(parts[1:], start=parts[0])

    @staticmethod
    def backward(ctx: Any, cotangent: Tensor | None) -> tuple[Tensor | None, ...]:  # noqa: ANN401
        arguments, needed = ctx.saved_tensors, ctx.needs_input_grad[1:]
        if cotangent is None:
            return (None,) * (1 + len(needed))
        return None, *(
            ctx.rows.pull(number, arguments, cotangent) if need else None
            for number, need in enumerate(needed)
        )

    @staticmethod
    def vmap(
        info: Any,  # noqa: ANN401
        in_dims: tuple[int | None, ...],
        rows: RowMap,
        *arguments: Tensor,
    ) -> tuple[Tensor, int]:
        size, mapped = info.batch_size, in_dims[1:]
        # Directions alone are mapped: they become more directions of the same rows.
        more_directions = rows.axis == 1 and all(
            axis == 1 for axis, dim in zip(rows.axes, mapped, strict=True) if dim is not None
        )
        folded = []
        for argument, axis, dim in zip(arguments, rows.axes, mapped, strict=True):
            if more_directions and axis == 0:
                folded.append(argument)
                continue
            at = 0 if more_directions else axis
            if dim is None:
                sizes = [-1] * argument.ndim
                argument = argument.unsqueeze(at).expand(*sizes[:at], size, *sizes[at:])
            else:
                argument = argument.movedim(dim, at)
            folded.append(argument.flatten(at, at + 1))
        at = 0 if more_directions else rows.axis
        result = _Apply.apply(rows, *folded)
        return result.unflatten(at, (size, -1)), at


def _enter_derivatives(name: str) -> None:
    """Let an operator have the derivatives of its function, in graphs that do not open it."""

    def run(denoiser: int, *arguments: Tensor) -> Tensor:
        if functorch.peek_interpreter_stack() is not None:
            raise NotImplementedError(
                "torch.func inside torch.compile does not see the derivatives of a denoiser: call "
                "`denoiser.jvp` or `denoiser.vjp` there, or torch.func outside"
            )
        # As a graph is run or traced again, nothing but the number of the denoiser is known.
        estimate = Estimate(denoiser_of(denoiser), requested_backend(None))
        if name == "estimate":
            return apply(estimate, *arguments)
        return getattr(estimate, name)(*arguments)

    LIBRARY.impl(name, run, "Autograd")


for _name in FUNCTIONS:
    _enter_derivatives(_name)

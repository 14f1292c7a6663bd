"""Functions of batches that work row by row, and their derivatives in all of torch's ways.

Image b of a result depends on image b of the arguments alone, so `torch.vmap` is a larger batch, or
more directions where only these are mapped. Derivatives that a map does not tell itself are torch's
own, through operations that torch differentiates.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from pyflocality._support.transforms import in_full_precision, is_traced
from pyflocality.autograd.forward_mode import Function, asked_by_forward_mode, derivative_along

# Numbers are the same for all rows and have no derivatives.
Argument = Tensor | float


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

    def jvp(self, number: int, arguments: Sequence[Argument], tangent: Tensor) -> Tensor:
        """Derivative of the result along a tangent of one argument."""

        def product(*given: Tensor) -> Tensor:
            along = self._with_one_free(given[:-1], number)
            with in_full_precision(tangent.device):
                return derivative_along(along, given[number], given[-1])[1]

        axes = (*self.axes, self.axes[number])
        return RowMap(product, product, axes, self.axis)(*arguments, tangent)

    def vjp(self, number: int, arguments: Sequence[Argument], cotangent: Tensor) -> Tensor:
        """Derivative with respect to one argument of the sum of result times cotangent."""

        def product(*given: Tensor) -> Tensor:
            along = self._with_one_free(given[:-1], number)
            with in_full_precision(cotangent.device):
                return torch.func.vjp(along, given[number])[1](given[-1])[0]

        axes = (*self.axes, self.axis)
        return RowMap(product, product, axes, self.axes[number])(*arguments, cotangent)

    def __call__(self, *arguments: Argument) -> Tensor:
        """The value, known to torch with its derivatives."""
        return _Apply.apply(self, *arguments)

    def _with_one_free(
        self, arguments: Sequence[Argument], number: int
    ) -> Callable[[Tensor], Tensor]:
        """The function of one argument, in operations that torch differentiates."""
        if is_traced():
            raise NotImplementedError(
                "only first derivatives by `x` can be traced or compiled: call the denoiser "
                "outside for derivatives by `sigma` or `alpha` and for derivatives of derivatives"
            )
        before, after = arguments[:number], arguments[number + 1 :]
        return lambda argument: self.plain(*before, argument, *after)


def jvp_by_torch(function: Function, x: Tensor, tangents: Tensor) -> tuple[Tensor, Tensor]:
    """Value and derivatives along tangents by forward-mode differentiation, one at a time."""
    if len(tangents) == 0:
        return function(x), torch.zeros_like(tangents)
    pairs = [derivative_along(function, x, u) for u in tangents]
    return pairs[0][0], torch.stack([derivative for _, derivative in pairs])


def vjp_by_torch(function: Function, x: Tensor, cotangents: Tensor) -> Tensor:
    """Transposed derivatives by backward differentiation, through one graph of the function."""
    if len(cotangents) == 0:
        return torch.zeros_like(cotangents)
    _, transposed = torch.func.vjp(function, x)[:2]
    return torch.stack([transposed(g)[0] for g in cotangents])


class _Apply(torch.autograd.Function):
    """`RowMap` as torch wants it. Arguments: the map, then its own."""

    @staticmethod
    def forward(rows: RowMap, *arguments: Argument) -> Tensor:
        return rows.run(*(a.detach() if isinstance(a, Tensor) else a for a in arguments))

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:  # noqa: ANN401
        ctx.rows, *arguments = inputs
        ctx.set_materialize_grads(False)
        ctx.numbers = [None if isinstance(a, Tensor) else a for a in arguments]
        tensors = [a for a in arguments if isinstance(a, Tensor)]
        ctx.save_for_backward(*tensors)
        ctx.save_for_forward(*tensors)

    @staticmethod
    def jvp(ctx: Any, _: None, *tangents: Tensor | None) -> Tensor:  # noqa: ANN401
        arguments = _arguments(ctx)
        with asked_by_forward_mode():
            products = [
                ctx.rows.jvp(number, arguments, tangent)
                for number, tangent in enumerate(tangents)
                if tangent is not None
            ]
        return sum(products[1:], start=products[0])

    @staticmethod
    def backward(ctx: Any, cotangent: Tensor | None) -> tuple[Tensor | None, ...]:  # noqa: ANN401
        needed = ctx.needs_input_grad[1:]
        if cotangent is None:
            return (None,) * (1 + len(needed))
        arguments = _arguments(ctx)
        return None, *(
            ctx.rows.vjp(number, arguments, cotangent) if need else None
            for number, need in enumerate(needed)
        )

    @staticmethod
    def vmap(
        info: Any,  # noqa: ANN401
        in_dims: tuple[int | None, ...],
        rows: RowMap,
        *arguments: Argument,
    ) -> tuple[Tensor, int]:
        size, mapped = info.batch_size, in_dims[1:]
        # Directions alone are mapped: they become more directions of the same rows.
        more_directions = rows.axis == 1 and all(
            axis == 1 for axis, dim in zip(rows.axes, mapped, strict=True) if dim is not None
        )
        folded = []
        for argument, axis, dim in zip(arguments, rows.axes, mapped, strict=True):
            if isinstance(argument, float) or (more_directions and axis == 0):
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


def _arguments(ctx: Any) -> list[Argument]:  # noqa: ANN401
    """The arguments of the map that a context is of."""
    tensors = iter(ctx.saved_tensors)
    return [next(tensors) if number is None else number for number in ctx.numbers]

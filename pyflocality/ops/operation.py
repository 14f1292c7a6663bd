"""What an operation is: declared once, and everything else is derived from the declaration.

That is the choice of a backend and its report, the path of a call with its join over the ranks of
a sharded set, log-sum-exps, what a step costs and its plan, the README's table of backends, and
what benchmarks and tests run on every operation.

An implementation is found by its name: that of the variant `jvp` of `window_posterior` on the
backend `cpu` is the function `jvp` of `pyflocality/kernels/cpu/window_posterior.py`, or of
`window_posterior_jvp.py` where the variant has a file of its own; those of the backend `reference`
are in `pyflocality/reference`.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor

from pyflocality._support.checks import LevelLike, Pixel, describe
from pyflocality._support.transforms import has_readable_values
from pyflocality.backends.selection import UNPROVEN, Implementation, register, select
from pyflocality.ops.costs import Size, Work
from pyflocality.ops.path import Query, joined, performed
from pyflocality.posterior.call import Call
from pyflocality.posterior.problem import (
    PosteriorOptions,
    PosteriorProblem,
    posterior_problem,
    problem_along,
)
from pyflocality.posterior.state import PosteriorState, finalize, finalize_jvp, log_sum_exp
from pyflocality.posterior.tangents import jacobian_factor

Kind = Literal["scan", "jvp", "vjp"]
# Backends whose implementations join the ranks of a sharded set between the scans that they make.
_JOINING = ("cpu", "reference")
_FLOAT_BYTES = 4


@dataclass(frozen=True)
class Served:
    """How a backend serves a variant of an operation.

    Attributes:
        limits: Name of the predicate in `pyflocality.kernels.limits` that tells what its kernel
            cannot serve; None where it serves all that its machine and device do.
        by_name_only: Reason why "auto" passes over it, or None where it does not.
        answers_values: Whether its kernel answers value images, too; the reference does.
    """

    limits: str | None = None
    by_name_only: str | None = None
    answers_values: bool = False

    def why_not(self, call: Call) -> str | None:
        """Reason why the kernel cannot serve a call, or None if it can."""
        if self.limits is None:
            return None
        if call.facts.get("values", False) and not self.answers_values:
            return "it answers the images alone, and `values` are given"
        # Only where a kernel may run: whoever has none of them imports none of them.
        limits = importlib.import_module("pyflocality.kernels.limits")
        return getattr(limits, self.limits)(call)


def unproven(limits: str, *, answers_values: bool = False) -> Served:
    """As `Served`, of a kernel that no GPU has run yet."""
    return Served(limits, UNPROVEN, answers_values)


@dataclass(frozen=True)
class Variant:
    """An operation itself, or its derivatives along directions.

    Attributes:
        backends: The backends that have it, in order of preference.
        flops: Operations of one run, by the rule of `pyflocality.ops.costs`.
        scans: How often the images are read.
    """

    backends: Mapping[str, Served]
    flops: Callable[[Size], float]
    scans: int = 1


def per_pair(flops: Callable[[Size], float]) -> Callable[[Size], float]:
    """Operations of all pairs of a noisy and a training image, from those of one."""
    return lambda size: size.images * size.batch * flops(size)


def _no_query(image_shape: Sequence[int]) -> Query:
    return ()


def _no_facts(*query: object) -> dict[str, object]:
    return {}


def _all_inputs(pixel: Pixel, image_shape: Sequence[int]) -> Tensor:
    return torch.ones(tuple(image_shape), dtype=torch.bool)


def _no_example(size: Size, generator: torch.Generator) -> Query:
    return ()


@dataclass(frozen=True, eq=False)
class Operation:
    """An operation on a training set.

    The query is what it takes beside a `PosteriorProblem`: what a posterior is over, such as the
    side of a window. Methods whose names end in `_of` take a problem and a query that were checked
    before, and check nothing.

    Attributes:
        name: Its name, which the files of its implementations have, too.
        variants: The operation itself ("scan"), and its derivatives along directions in the space
            of the noisy images ("jvp") and in that of the answers ("vjp").
        answers_state: Whether the variants "scan" and "jvp" answer a `PosteriorState`, with one
            posterior for each query, that answers D values between them; else they answer what
            the operation does.
        answers_values: Whether it answers value images, as `PosteriorOptions` tells of `values`.
        parameters: Names of the query's arguments.
        check: Makes a query of the shape (C, H, W) of the images and what a caller gives, or raises
            the error that is due.
        facts: What predicates of backends are told of a query.
        inputs: Inputs that the posterior of an output value compares, bool [C, H, W], from its
            place, the shape of the images and the query; None where they count with different
            weights.
        example: What a caller may give for images of a size: random where it is large.
        model: Name of the model, on the command line, whose step it is.
        beside: Bytes that are read and written beside the images; None for noisy images,
            directions and answers in float32.
    """

    name: str
    variants: Mapping[Kind, Variant]
    answers_state: bool = True
    answers_values: bool = False
    parameters: tuple[str, ...] = ()
    check: Callable[..., Query] = _no_query
    facts: Callable[..., dict[str, object]] = _no_facts
    inputs: Callable[..., Tensor | None] = _all_inputs
    example: Callable[[Size, torch.Generator], Query] = _no_example
    model: str | None = None
    beside: Callable[[Size], int] | None = None

    def mean(
        self,
        x: Tensor,
        images: Tensor,
        given: Query,
        sigma: LevelLike,
        alpha: float | Tensor,
        backend: str | None,
        options: PosteriorOptions,
    ) -> Tensor:
        """The answers [B, C, H, W] in x's dtype; all arguments are as a caller gave them."""
        self._check_options(options)
        problem = posterior_problem(x, images, sigma, alpha, **options)
        return self.mean_of(problem, self.check(problem.image_shape, *given), backend)

    def jvp(
        self,
        x: Tensor,
        tangents: Tensor,
        images: Tensor,
        given: Query,
        sigma: LevelLike,
        alpha: float | Tensor,
        backend: str | None,
        options: PosteriorOptions,
    ) -> tuple[Tensor, Tensor]:
        """As `mean`, and the derivatives along tangents, [K, B, C, H, W]."""
        self._check_options(options)
        level = (sigma, alpha)
        problem, along = problem_along(x, images, *level, options, tangents, "tangents")
        return self.jvp_of(problem, along, self.check(problem.image_shape, *given), backend)

    def vjp(
        self,
        x: Tensor,
        cotangents: Tensor,
        images: Tensor,
        given: Query,
        sigma: LevelLike,
        alpha: float | Tensor,
        backend: str | None,
        options: PosteriorOptions,
    ) -> Tensor:
        """Vector-Jacobian products along cotangents, [K, B, C, H, W]."""
        self._check_options(options)
        level = (sigma, alpha)
        problem, along = problem_along(
            x, images, *level, options, cotangents, "cotangents", transposed=True
        )
        return self.vjp_of(problem, along, self.check(problem.image_shape, *given), backend)

    def log_sum_exp(
        self,
        x: Tensor,
        images: Tensor,
        given: Query,
        sigma: LevelLike,
        alpha: float | Tensor,
        backend: str | None,
        options: PosteriorOptions,
    ) -> Tensor:
        """Log of the sum that normalises each posterior, float64 [B, Q]."""
        if options.get("values") is not None:
            raise ValueError("`values` must be None for log-sum-exps, which average none")
        problem = posterior_problem(x, images, sigma, alpha, **options)
        # Also where the square of a small one is no number above 0.
        if has_readable_values(problem.scale) and torch.isinf(problem.scale).any():
            raise ValueError(f"`sigma` must be positive, got {describe(sigma)}")
        return self.log_sum_exp_of(problem, self.check(problem.image_shape, *given), backend)

    def _check_options(self, options: PosteriorOptions) -> None:
        if options.get("values") is not None and not self.answers_values:
            raise ValueError(f"`values` must be None for {self.name}, which answers images alone")

    def mean_of(
        self, problem: PosteriorProblem, query: Query = (), backend: str | None = None
    ) -> Tensor:
        """The answers in the dtype of the noisy images, [B, C, H, W] or [B, A, C, H, W]."""
        result = self.run("scan", problem, query, backend)
        if self.answers_state:
            # [B, Q, V] -> [B, V, Q], in the order of the values of an image.
            result = finalize(result).transpose(1, 2)
        return result.reshape(len(problem.x), *problem.answer_shape).to(problem.dtype)

    def jvp_of(
        self,
        problem: PosteriorProblem,
        tangents: Tensor,
        query: Query = (),
        backend: str | None = None,
    ) -> tuple[Tensor, Tensor]:
        """As `mean_of`, and the derivatives of all that along tangents [K, B, C, H, W]."""
        result = self.run("jvp", problem, query, backend, tangents.to(problem.x.dtype))
        if self.answers_state:
            values = problem.answered * problem.images[0].numel() // result.total.shape[1]
            factor = jacobian_factor(problem)
            result = (part.transpose(-1, -2) for part in finalize_jvp(result, values, factor))
        mean, product = result
        shape = len(problem.x), *problem.answer_shape
        shaped = mean.reshape(shape), product.reshape(len(tangents), *shape)
        return shaped[0].to(problem.dtype), shaped[1].to(problem.dtype)

    def vjp_of(
        self,
        problem: PosteriorProblem,
        cotangents: Tensor,
        query: Query = (),
        backend: str | None = None,
    ) -> Tensor:
        """Vector-Jacobian products [K, B, C, H, W] along cotangents, K times what is answered."""
        result = self.run("vjp", problem, query, backend, cotangents.to(problem.x.dtype))
        return result.reshape(len(cotangents), *problem.x.shape).to(problem.dtype)

    def log_sum_exp_of(
        self, problem: PosteriorProblem, query: Query = (), backend: str | None = None
    ) -> Tensor:
        """Log of the sum that normalises each posterior, float64 [B, Q]; of positive noise."""
        # The tolerance of precision="auto" is for posterior means, and so are values.
        plain = replace(problem, precision="exact", values=None, with_image=False)
        state: PosteriorState = self.run("scan", plain, query, backend)
        exact = state._replace(minimum=state.minimum.double(), total=state.total.double())
        return log_sum_exp(exact, problem.scale)

    def run(
        self,
        kind: Kind,
        problem: PosteriorProblem,
        query: Query,
        backend: str | None,
        *directions: Tensor,
    ) -> Any:  # noqa: ANN401  (a state or finished results, as is declared)
        """What the implementation of a variant answers, for the images of all ranks."""
        name = self.name if kind == "scan" else f"{self.name}_{kind}"
        call = problem.call(*directions, **self.facts(*query))
        run = select(name, call, backend)
        if problem.ranks is None:
            return performed(run, call, problem, *directions, *query)
        state = self.answers_state and kind != "vjp"
        return joined(run, name, call, problem.ranks, problem, directions, query, state)

    def variant_name(self, kind: Kind) -> str:
        """The name under which a variant is chosen, traced and reported."""
        return self.name if kind == "scan" else f"{self.name}_{kind}"

    def work(self, kind: Kind, size: Size) -> Work:
        """What one run of a variant takes."""
        variant, directions = self.variants[kind], 0 if kind == "scan" else size.directions
        if self.beside is None:
            answered = size.answered
            # Of x, the directions and the answers: cotangents are of the size of answers.
            batches = {
                "scan": 1 + answered,
                "jvp": (1 + directions) * (1 + answered),
                "vjp": 1 + directions * (1 + answered),
            }[kind]
            beside = _FLOAT_BYTES * batches * size.batch * size.values
        else:
            beside = self.beside(size)
        stored = variant.scans * size.images * size.values * size.image_bytes
        # What only finds the posteriors reads no value images.
        value_scans = 1 if kind == "scan" else variant.scans
        stored += value_scans * size.images * size.values * size.value_images * _FLOAT_BYTES
        return Work(variant.flops(size), stored + beside, variant.scans)


# By name; every one of them is declared in a file of its name.
OPERATIONS: dict[str, Operation] = {}


def declare(operation: Operation) -> Operation:
    """Enter an operation, and its variants into the tables from which backends are chosen."""
    OPERATIONS[operation.name] = operation
    for kind, variant in operation.variants.items():
        states = operation.answers_state and kind != "vjp"
        register(
            operation.variant_name(kind),
            {
                backend: Implementation(
                    *_place(backend, operation.name, kind),
                    served.why_not,
                    by_name_only=served.by_name_only,
                    joins_ranks=states or backend in _JOINING,
                )
                for backend, served in variant.backends.items()
            },
        )
    return operation


def _place(backend: str, name: str, kind: Kind) -> tuple[str, str]:
    """Module and function of an implementation."""
    home = "reference" if backend == "reference" else f"kernels.{backend}"
    return f"pyflocality.{home}.{name}", kind

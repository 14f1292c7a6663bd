"""From a problem to what an implementation answers: choice, checks around a file, join of ranks."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from pyflocality._support.transforms import in_full_precision
from pyflocality.backends.selection import select
from pyflocality.posterior.call import Call
from pyflocality.posterior.problem import PosteriorProblem
from pyflocality.storage.mapped import MappedFile, checked_around
from pyflocality.weights import QueryWeights

# What an operation takes beside a problem.
Query = tuple[Any, ...]


def chosen(name: str, call: Call, backend: str | None) -> Callable[..., Any]:
    """The implementation that serves a call, in full precision and with its file checked."""
    run, file = select(name, call, backend), call.facts.get("file")
    if isinstance(file, MappedFile):
        run = checked_around(file, run)

    def in_own_precision(*arguments: object) -> Any:  # noqa: ANN401
        with in_full_precision(call.device):
            return run(*arguments)

    return in_own_precision


def answered(
    name: str,
    call: Call,
    backend: str | None,
    problem: PosteriorProblem,
    directions: tuple[Tensor, ...],
    query: Query,
    state: bool,
) -> Any:  # noqa: ANN401  (a state or finished results)
    """What a variant answers for the images of all ranks; `state` tells whether that is a state."""
    run, ranks = chosen(name, call, backend), problem.ranks
    if ranks is None:
        return run(problem, *directions, *query)
    numbers = [value for value in query if isinstance(value, int)]
    tensors = [tensor for value in (*directions, *query) for tensor in _tensors_of(value)]
    ranks.agree(f"{name} {numbers}", problem.x, problem.alpha, problem.scale, *tensors)
    result = run(problem, *directions, *query)
    if not state:
        return result
    if not directions:
        return ranks.merged(result, problem.scale)
    values = problem.images[0].numel() // result.total.shape[1]
    return ranks.merged_tangents(result, problem.scale, values)


def _tensors_of(value: object) -> list[Tensor]:
    if isinstance(value, QueryWeights):
        return [torch.from_numpy(value.bits) if value.is_mask else value.dense(torch.float64)]
    return [value] if isinstance(value, Tensor) else []

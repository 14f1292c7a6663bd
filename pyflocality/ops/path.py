"""From a problem to what an implementation answers: checks around a file, join of ranks."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from pyflocality._support.transforms import in_full_precision
from pyflocality.posterior.call import Call
from pyflocality.posterior.problem import PosteriorProblem
from pyflocality.posterior.ranks import Ranks
from pyflocality.storage.mapped import checked_around
from pyflocality.weights import QueryWeights

# What an operation takes beside a problem.
Query = tuple[Any, ...]


def performed(run: Callable[..., Any], call: Call, *arguments: object) -> Any:  # noqa: ANN401
    """What a chosen implementation answers: its files are checked, in full precision."""
    files = call.facts.get("files", ())
    for file in files if isinstance(files, tuple) else ():
        run = checked_around(file, run)
    with in_full_precision(call.device):
        return run(*arguments)


def joined(
    run: Callable[..., Any],
    name: str,
    call: Call,
    ranks: Ranks,
    problem: PosteriorProblem,
    directions: tuple[Tensor, ...],
    query: Query,
    state: bool,
) -> Any:  # noqa: ANN401  (a state or finished results)
    """What a variant answers for the images of all ranks; `state` tells whether that is a state."""
    numbers = [value for value in query if isinstance(value, int)]
    tensors = [tensor for value in (*directions, *query) for tensor in _tensors_of(value)]
    what = f"{name} {numbers}" + ("" if problem.values is None else f" of {problem.answered}")
    ranks.agree(what, problem.x, problem.alpha, problem.scale, *tensors)
    result = performed(run, call, problem, *directions, *query)
    if not state:
        return result
    if not directions:
        return ranks.merged(result, problem.scale)
    values = problem.answered * problem.images[0].numel() // result.total.shape[1]
    return ranks.merged_tangents(result, problem.scale, values)


def _tensors_of(value: object) -> list[Tensor]:
    if isinstance(value, QueryWeights):
        # Masks that are made when they are used come of moments, which ranks have agreed on.
        if not value.is_held:
            return []
        return [torch.from_numpy(value.bits) if value.is_mask else value.dense(torch.float64)]
    return [value] if isinstance(value, Tensor) else []

"""Posterior weights spread over masks on the CPU: units as in `native.posterior`.

Two passes over the training images: a scan for every query's smallest distance and total weight,
then one that computes the distances again and applies the weights. Nothing is kept per image and
query.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from pyflocality._support.native import native_module
from pyflocality.kernels.cpu.posterior import (
    difference_tree,
    in_parts_by_noise,
    merged_stored,
    scan_stored,
    spread_stored,
    value_unit,
    within_range,
)
from pyflocality.posterior.problem import PosteriorProblem
from pyflocality.posterior.state import PosteriorState, finalize
from pyflocality.posterior.tangents import jacobian_factor
from pyflocality.weights import QueryWeights


def filtered_posterior_mean(
    problem: PosteriorProblem,
    weights: QueryWeights,
    responses: QueryWeights,
    *,
    instruction_set: str | None = None,
) -> Tensor:
    """Blend of Q posterior means under masks of responses, [B, D]."""
    shape = problem.images.shape[1:]
    trees = difference_tree(weights, shape), difference_tree(responses, shape)

    def run(part: PosteriorProblem, rows: Tensor, centre: np.ndarray | None) -> tuple[Tensor, ...]:
        state = _scan(part, trees[0], weights, centre, instruction_set)
        return (_spread(part, trees, state, (), centre, instruction_set)[:, 0],)

    (sums,) = in_parts_by_noise(problem, run)
    unit, shift = value_unit(problem)
    return sums / responses.dense(torch.float64).sum(0) * unit + shift


def masked_posterior_vjp(
    problem: PosteriorProblem,
    cotangents: Tensor,
    weights: QueryWeights,
    *,
    instruction_set: str | None = None,
) -> Tensor:
    """Transposed derivatives along cotangents [K, B, C, H, W], of the same shape."""
    tree = difference_tree(weights, problem.images.shape[1:])
    directions = cotangents.detach().float().flatten(2).transpose(0, 1)

    def run(part: PosteriorProblem, rows: Tensor, centre: np.ndarray | None) -> tuple[Tensor, ...]:
        state = _scan(part, tree, weights, centre, instruction_set)
        mean = finalize(state)[..., 0].float()
        per_image = (directions[rows], mean, within_range(part))
        return (_spread(part, (tree, tree), state, per_image, centre, instruction_set),)

    (sums,) = in_parts_by_noise(problem, run)
    unit, _ = value_unit(problem)
    factor = jacobian_factor(problem) * unit**2
    return (sums * factor[:, None, None]).transpose(0, 1).reshape(cotangents.shape)


def _scan(
    problem: PosteriorProblem,
    tree: Any,  # noqa: ANN401
    weights: QueryWeights,
    centre: np.ndarray | None,
    instruction_set: str | None,
) -> PosteriorState:
    """The first pass, over the images of all ranks, in stored units."""

    def scan(*args: object, **options: object) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        return native_module().masked_posterior(tree, *args, **options)

    # Lanes of a query's two sums, its minimum, and a state in double precision.
    per_image = weights.shape[0] * 160
    state = scan_stored(problem, scan, per_image, instruction_set, centre=centre)
    return merged_stored(problem, state)


def _spread(
    problem: PosteriorProblem,
    trees: tuple[Any, Any],
    state: PosteriorState,
    per_image: tuple[Tensor, ...],
    centre: np.ndarray | None,
    instruction_set: str | None,
) -> Tensor:
    """The second pass: sums over all images in stored units, float64 [B, K, D]."""

    def spread(*args: object, **options: object) -> np.ndarray:
        return native_module().masked_adjoint(*trees, *args, **options)

    return spread_stored(problem, spread, state, per_image, instruction_set, centre=centre)

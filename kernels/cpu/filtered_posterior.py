"""Blend of posterior means under masks of responses on the CPU."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from pyflocality._support.native import native_module
from pyflocality.kernels.cpu.masked_posterior import by_noise, difference_tree, scan_outputs
from pyflocality.kernels.cpu.passes import apply_weights
from pyflocality.kernels.stored import StoredProblem
from pyflocality.posterior.problem import PosteriorProblem
from pyflocality.weights import QueryWeights


def scan(
    problem: PosteriorProblem,
    weights: QueryWeights,
    responses: QueryWeights,
    *,
    instruction_set: str | None = None,
) -> Tensor:
    """The blend of the means of all queries, [B, D]."""
    shape = problem.images.shape[1:]
    tree, answers = difference_tree(weights, shape), difference_tree(responses, shape)
    kernel = native_module().filtered_posterior

    def run(stored: StoredProblem, rows: Tensor, centre: np.ndarray | None) -> tuple[Tensor, ...]:
        state = scan_outputs(stored, tree, weights, centre, instruction_set)
        options = {"tree": tree, "answers": answers, "centre": centre}
        return (apply_weights(stored, kernel, state, instruction_set, **options)[:, 0],)

    (sums,) = by_noise(problem, run)
    stored = StoredProblem(problem)
    means = sums / responses.dense(torch.float64).sum(0)
    return means * stored.step + stored.shift

"""Blend of posterior means under masks of responses on the CPU."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from pyflocality.kernels.cpu.masked_posterior import (
    Centre,
    by_noise,
    difference_tree,
    scan_outputs,
)
from pyflocality.kernels.cpu.passes import apply_weights, native_kernel
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
    """The blend of the means of all queries, [B, A, D]."""
    shape, everything = problem.images.shape[1:], StoredProblem(problem)
    tree, answers = difference_tree(weights, shape), difference_tree(responses, shape)

    def run(stored: StoredProblem, rows: Tensor, centre: Centre) -> tuple[Tensor]:
        options = {"tree": tree, "centre": centre}
        scanned = stored.without_values
        state = scan_outputs(scanned, weights.shape[0], instruction_set, **options)
        kernel = native_kernel("filtered_posterior", instruction_set, answers=answers, **options)
        return (apply_weights(stored, kernel, state),)

    (sums,) = by_noise(everything, run)
    answering = np.unpackbits(responses.bits, axis=1, count=responses.shape[1])
    return everything.means(sums / torch.from_numpy(answering.sum(0, dtype=np.float64)))

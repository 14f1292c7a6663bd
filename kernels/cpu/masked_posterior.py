"""Posterior over masks on the CPU: a query per output, as in the reference.

Which rounding errors matter depends on the noise: see `masked_posterior.h`. Noisy images are
worked on apart by it, each as if it were alone.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any
from weakref import WeakKeyDictionary

import numpy as np
import torch
from torch import Tensor

from pyflocality._support.native import native_module
from pyflocality.kernels.cpu.passes import (
    apply_weights,
    native_kernel,
    scan_images,
    scan_tangents,
    scan_values,
)
from pyflocality.kernels.stored import StoredProblem
from pyflocality.posterior.problem import PosteriorProblem
from pyflocality.posterior.state import PosteriorState, finalize
from pyflocality.weights import QueryWeights

# Where passes count from: nowhere, or an image [D].
Centre = np.ndarray | None

_trees: WeakKeyDictionary[QueryWeights, Any] = WeakKeyDictionary()
# Lanes of a query's two sums, its minimum, and a state in double precision.
_BYTES_PER_QUERY = 160


def scan(
    problem: PosteriorProblem, weights: QueryWeights, *, instruction_set: str | None = None
) -> PosteriorState:
    """The state of all images."""
    tree = difference_tree(weights, problem.images.shape[1:])

    def run(stored: StoredProblem, rows: Tensor, centre: Centre) -> PosteriorState:
        kernel = native_kernel("masked_posterior", instruction_set, tree=tree, centre=centre)
        return scan_values(stored.problem, kernel, weights.shape[1] * _BYTES_PER_QUERY)

    return PosteriorState(*by_noise(StoredProblem(problem), run))


def jvp(
    problem: PosteriorProblem,
    tangents: Tensor,
    weights: QueryWeights,
    *,
    instruction_set: str | None = None,
) -> PosteriorState:
    """The state of all images with tangents [K, B, C, H, W]."""
    tree = difference_tree(weights, problem.images.shape[1:])
    kernel = native_kernel("masked_posterior_jvp", instruction_set, tree=tree)
    # Distances are counted from the centre too.
    mean = torch.from_numpy(_about_the_mean(problem))
    noisy = StoredProblem(problem).noisy.flatten(1)
    centre = torch.where(_mostly_noise(problem)[:, None], mean, noisy)
    # Sums with lanes are those of one noisy image at a time: they do not grow with the batch.
    return scan_tangents(problem, tangents, kernel, centre, weights.shape[0], 0)


def vjp(
    problem: PosteriorProblem,
    cotangents: Tensor,
    weights: QueryWeights,
    *,
    instruction_set: str | None = None,
) -> Tensor:
    """Vector-Jacobian products of cotangents [K, B, C, H, W], of the same shape."""
    tree = difference_tree(weights, problem.images.shape[1:])
    everything = StoredProblem(problem)
    directions = cotangents.detach().float().flatten(2).transpose(0, 1)

    def run(stored: StoredProblem, rows: Tensor, centre: Centre) -> tuple[Tensor]:
        options = {"tree": tree, "centre": centre}
        state = scan_outputs(stored, weights, instruction_set, **options)
        mean = finalize(state)[..., 0].float()
        kernel = native_kernel("masked_posterior_vjp", instruction_set, **options)
        further = (directions[rows], mean, stored.centre.flatten(1))
        return (apply_weights(stored, kernel, state, further),)

    (sums,) = by_noise(everything, run)
    return (sums * everything.slope[:, None, None]).transpose(0, 1).reshape(cotangents.shape)


def scan_outputs(
    stored: StoredProblem, weights: QueryWeights, instruction_set: str | None, **options: object
) -> PosteriorState:
    """The scan before a second pass, over the images of all ranks, in stored units."""
    kernel = native_kernel("masked_posterior", instruction_set, **options)
    state = scan_images(stored, kernel, weights.shape[0] * _BYTES_PER_QUERY)
    return stored.problem.merged(state, stored.scale)


def by_noise(
    stored: StoredProblem, run: Callable[[StoredProblem, Tensor, Centre], tuple[Tensor, ...]]
) -> tuple[Tensor, ...]:
    """What `run` answers, a row for each noisy image: those with little and much noise apart.

    A batch of both reads the images once for each kind: what is computed costs far more.

    Args:
        stored: The problem of all noisy images.
        run: Takes a stored problem, which of the noisy images [b] it is of, and where its passes
            count from: nowhere, or about the mean image, float32 [D].
    """
    noisy = _mostly_noise(stored.problem)
    results, order = [], []
    for centred in (False, True):
        rows = (noisy == centred).nonzero()[:, 0]
        if len(rows) == 0 and (centred or len(noisy) > 0):
            continue
        centre = _about_the_mean(stored.problem) if centred else None
        part = stored if len(rows) == len(noisy) else stored.part(rows)
        results.append(run(part, rows, centre))
        order.append(rows)
    if len(results) == 1:
        return results[0]
    back = torch.cat(order).argsort()
    return tuple(torch.cat(pieces)[back] for pieces in zip(*results, strict=True))


def difference_tree(weights: QueryWeights, image_shape: torch.Size) -> Any:  # noqa: ANN401
    """The schedule of a set of masks (`pyflocality._C.DifferenceTree`), built once."""
    if weights not in _trees:
        queries, inputs = weights.shape
        grids = (tuple(image_shape), (1, *image_shape[1:]))
        # Queries of values or pixels, with one for all that no other answers, or of anything.
        grid = next(
            (grid for grid in grids if queries - math.prod(grid) in (0, 1)), (1, 1, queries)
        )
        _trees[weights] = native_module().DifferenceTree(weights.bits, inputs, *grid)
    return _trees[weights]


def _mostly_noise(problem: PosteriorProblem) -> Tensor:
    """Where the noise is larger than the images are different, bool [B]: sigma / alpha > 0.5."""
    return problem.scale * problem.alpha.square() < 2.0


def _about_the_mean(problem: PosteriorProblem) -> np.ndarray:
    """About the mean image, in stored units, float32 [D]: any value serves, this one well.

    It is the same on all ranks of a sharded set, whose sums are counted from it.
    """
    mean = next(problem.reader.blocks(1024)).flatten(1).float().mean(0)
    return (problem.summed(mean) / (problem.ranks.count if problem.ranks else 1)).numpy()

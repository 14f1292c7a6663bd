"""Posterior over masks on the CPU: a query per output, as in the reference.

Which rounding errors matter depends on the noise: see `masked_posterior.h`. Noisy images are
worked on apart by it, each as if it were alone.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
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
from pyflocality.posterior.tiles import joined, output_bands
from pyflocality.weights import QueryWeights

# Where passes count from: nowhere, or an image [D].
Centre = np.ndarray | None

# Schedules of masks, and weights that are none.
_trees: WeakKeyDictionary[QueryWeights, Any] = WeakKeyDictionary()
# Bits of the masks that are scanned together: a schedule takes several times as much.
_BAND_BYTES = 2**26
# Images that the centre is found from, and values of them that are copied together.
_LOOKED_AT, _COPIED_VALUES = 1024, 2**24
# Of a query: lanes of its sum of weights, its minimum, and these in double precision; and of a
# value that it answers.
_BYTES_PER_QUERY, _BYTES_PER_VALUE = 88, 72


def scan(
    problem: PosteriorProblem, weights: QueryWeights, *, instruction_set: str | None = None
) -> PosteriorState:
    """The state of all images."""
    if not weights.is_mask:
        return _scan_weighted(problem, weights, instruction_set)

    def run(stored: StoredProblem, rows: Tensor, centre: Centre) -> PosteriorState:
        states = []
        for outputs, tree in schedules(weights, problem.image_shape):
            kernel = native_kernel("masked_posterior", instruction_set, tree=tree, centre=centre)
            size = len(outputs) * _bytes_per_query(problem)
            states.append((outputs, scan_values(stored.problem, kernel, size)))
        return joined(states)

    return PosteriorState(*by_noise(StoredProblem(problem), run))


def jvp(
    problem: PosteriorProblem,
    tangents: Tensor,
    weights: QueryWeights,
    *,
    instruction_set: str | None = None,
) -> PosteriorState:
    """The state of all images with tangents [K, B, C, H, W]."""
    # Distances are counted from the centre too.
    mean = torch.from_numpy(_about_the_mean(problem))
    noisy = StoredProblem(problem).noisy.flatten(1)
    centre = torch.where(_mostly_noise(problem)[:, None], mean, noisy)
    states = []
    for outputs, tree in schedules(weights, problem.image_shape):
        kernel = native_kernel("masked_posterior_jvp", instruction_set, tree=tree)
        # Sums with lanes are those of one noisy image at a time: they do not grow with the batch.
        state = scan_tangents(problem, tangents, kernel, centre, len(outputs), 0, outputs)
        states.append((outputs, state))
    return joined(states)


def vjp(
    problem: PosteriorProblem,
    cotangents: Tensor,
    weights: QueryWeights,
    *,
    instruction_set: str | None = None,
) -> Tensor:
    """Vector-Jacobian products [K, B, C, H, W] along cotangents of what is answered."""
    everything = StoredProblem(problem)
    directions = everything.cotangents(cotangents)

    def run(stored: StoredProblem, rows: Tensor, centre: Centre) -> tuple[Tensor]:
        results = []
        for outputs, tree in schedules(weights, problem.image_shape):
            options = {"tree": tree, "centre": centre}
            state = scan_outputs(stored, len(outputs), instruction_set, **options)
            mean = torch.zeros(len(rows), problem.answered, weights.shape[1], dtype=torch.float32)
            mean[:, :, outputs] = finalize(state).mT.float()
            kernel = native_kernel("masked_posterior_vjp", instruction_set, **options)
            further = (directions[rows], mean.flatten(1), stored.centre.flatten(1))
            results.append(apply_weights(stored, kernel, state, further))
        return (sum(results[1:], results[0]),)

    (sums,) = by_noise(everything, run)
    return everything.derivatives(sums)


def schedules(weights: QueryWeights, image_shape: Sequence[int]) -> Iterator[tuple[Tensor, Any]]:
    """Outputs that are scanned together, int64 [n], and the schedule of their masks.

    How masks are cut up depends on the shape of the images alone, and so do all sums.
    """
    bands = bands_of(image_shape)
    if len(bands) == 1 and weights.is_held:
        yield torch.arange(weights.shape[0]), difference_tree(weights, image_shape)
        return
    channels, _, width = image_shape
    for outputs in bands:
        grid = channels, len(outputs) // (channels * width), width
        bits = weights.tile(outputs).bits
        yield (
            outputs,
            native_module().DifferenceTree(bits, weights.shape[1], *grid, outputs.tolist()),
        )


def bands_of(image_shape: Sequence[int]) -> list[Tensor]:
    """The outputs of an image (C, H, W) whose masks have a schedule together, int64 [n] each.

    A schedule of all outputs is kept with the masks, those of bands are made for every scan.
    """
    return output_bands(image_shape, -(-math.prod(image_shape) // 8), _BAND_BYTES)


def _scan_weighted(
    problem: PosteriorProblem, weights: QueryWeights, instruction_set: str | None
) -> PosteriorState:
    """The state of all images of weights that are not negative."""
    states, inputs = [], weights.shape[1]
    bands = output_bands(problem.image_shape, 4 * inputs, _BAND_BYTES)
    for outputs in bands:
        given = _trees.get(weights) if len(bands) == 1 else None
        if given is None:
            dense = weights.tile(outputs).dense(torch.float32)
            given = native_module().InputWeights(dense.numpy(), outputs.tolist())
        if len(bands) == 1:
            _trees[weights] = given
        kernel = native_kernel("weighted_posterior", instruction_set, weights=given)
        size = len(outputs) * _bytes_per_query(problem)
        states.append((outputs, scan_values(problem, kernel, size)))
    return joined(states)


def scan_outputs(
    stored: StoredProblem, queries: int, instruction_set: str | None, **options: object
) -> PosteriorState:
    """The scan before a second pass, over the images of all ranks, in stored units."""
    kernel = native_kernel("masked_posterior", instruction_set, **options)
    state = scan_images(stored, kernel, queries * _bytes_per_query(stored.problem))
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


def _bytes_per_query(problem: PosteriorProblem) -> int:
    """Working memory of a query and thread."""
    return _BYTES_PER_QUERY + _BYTES_PER_VALUE * problem.answered


def difference_tree(weights: QueryWeights, image_shape: Sequence[int]) -> Any:  # noqa: ANN401
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
    first = next(problem.reader.blocks(_LOOKED_AT)).flatten(1)
    # As many at a time as are no great copy; all of them but of large images.
    pieces = first.split(max(1, _COPIED_VALUES // first.shape[1]))
    mean = sum(piece.float().sum(0) for piece in pieces) / len(first)
    return (problem.summed(mean) / (problem.ranks.count if problem.ranks else 1)).numpy()

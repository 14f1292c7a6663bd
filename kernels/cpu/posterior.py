"""Posterior scans on the CPU.

The kernels work in the units in which the images are stored: for bytes u the noisy image becomes
127.5 (x / alpha + 1) and its squared distances to u are (127.5 / alpha)^2 times those of x to
alpha v. Results come back in the units of the formulas.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any
from weakref import WeakKeyDictionary

import numpy as np
import torch

from pyflocality._support.budget import memory_budget_bytes
from pyflocality._support.native import native_module
from pyflocality.posterior.problem import PosteriorProblem
from pyflocality.posterior.state import PosteriorState, merge
from pyflocality.weights import QueryWeights

# Images at a time where they are read from a file that exceeds the memory budget, or are copied:
# where their memory is not contiguous or holds no such copy of them.
_BLOCK_BYTES = 32 * 2**20
# Distances count in powers of two; the factor must stay positive and finite in float32.
_SMALLEST_FACTOR, _LARGEST_FACTOR = 2.0**-126, 2.0**120

_trees: WeakKeyDictionary[QueryWeights, Any] = WeakKeyDictionary()

Scan = Callable[..., tuple[np.ndarray, np.ndarray, np.ndarray]]
Join = Callable[[PosteriorState, PosteriorState, torch.Tensor], PosteriorState]


def global_posterior_state(
    problem: PosteriorProblem, *, instruction_set: str | None = None
) -> PosteriorState:
    """Scan with one query per batch element, as the reference of this name."""
    values = problem.images[0].numel()
    return _scan(problem, native_module().global_posterior, 24 * values, instruction_set)


def window_posterior_state(
    problem: PosteriorProblem, window: int, *, instruction_set: str | None = None
) -> PosteriorState:
    """Scan with a query per pixel, as the reference of this name."""
    return _scan_windows(problem, native_module().window_posterior, instruction_set, window=window)


def equivariant_posterior_state(
    problem: PosteriorProblem,
    window: int,
    circular: bool,
    *,
    instruction_set: str | None = None,
) -> PosteriorState:
    """Scan of all patches with a query per pixel, as the reference of this name."""
    return _scan_windows(
        problem,
        native_module().equivariant_posterior,
        instruction_set,
        window=window,
        circular=circular,
    )


def _scan_windows(
    problem: PosteriorProblem, scan: Scan, instruction_set: str | None, **options: int
) -> PosteriorState:
    channels, height, width = problem.images.shape[1:]
    # Per query and thread: lanes of the sums, and a state in double precision.
    per_query = (channels + 1) * 64 + 20 + 8 * channels
    return _scan(
        problem,
        scan,
        height * width * per_query,
        instruction_set,
        channels=channels,
        height=height,
        width=width,
        **options,
    )


def masked_posterior_state(
    problem: PosteriorProblem, weights: QueryWeights, *, instruction_set: str | None = None
) -> PosteriorState:
    """Scan with a query per output value, as the reference of this name.

    Which rounding errors matter depends on the noise: see `masked_posterior.h`. Noisy images
    are scanned apart by it, each as if it were alone.
    """
    tree = difference_tree(weights, problem.images.shape[1:])
    values = problem.images[0].numel()

    def run(
        part: PosteriorProblem, rows: torch.Tensor, centre: np.ndarray | None
    ) -> tuple[torch.Tensor, ...]:
        def scan(*args: object, **options: object) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
            return native_module().masked_posterior(tree, *args, centre=centre, **options)

        return _scan(part, scan, values * 160, instruction_set)

    return PosteriorState(*in_parts_by_noise(problem, run))


def in_parts_by_noise(
    problem: PosteriorProblem, run: Callable[..., tuple[torch.Tensor, ...]]
) -> tuple[torch.Tensor, ...]:
    """What `run` answers, a row for each noisy image: those with little and much noise apart.

    A batch of both reads the images once for each kind: what is computed costs far more.

    Args:
        problem: The problem.
        run: Takes a problem, which of the noisy images [b] it is of, and where its scans count
            from: nowhere, or about the mean image, float32 [D].
    """
    noisy = mostly_noise(problem)
    parts, order = [], []
    for centred in (False, True):
        rows = (noisy == centred).nonzero()[:, 0]
        if len(rows) == 0 and (centred or len(problem.x) > 0):
            continue
        part = replace(
            problem, x=problem.x[rows], alpha=problem.alpha[rows], scale=problem.scale[rows]
        )
        centre = stored_centre(problem, problem.images[0].numel()) if centred else None
        parts.append(run(part, rows, centre))
        order.append(rows)
    back = torch.cat(order).argsort()
    return tuple(torch.cat(pieces)[back] for pieces in zip(*parts, strict=True))


def mostly_noise(problem: PosteriorProblem) -> torch.Tensor:
    """Where the noise is larger than the images are different, bool [B]: sigma / alpha > 0.5."""
    return problem.scale * problem.alpha.square() < 2.0


def stored_centre(problem: PosteriorProblem, values: int) -> np.ndarray:
    """About the mean image, in stored units, float32 [D]: any value serves, this one well.

    It is the same on all ranks of a sharded set, whose sums are counted from it.
    """
    mean = next(problem.reader.blocks(1024)).reshape(-1, values).float().mean(0)
    return (problem.summed(mean) / (problem.ranks.count if problem.ranks else 1)).numpy()


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


def _scan(
    problem: PosteriorProblem,
    scan: Scan,
    bytes_per_query: int,
    instruction_set: str | None,
    **geometry: int,
) -> PosteriorState:
    """Run a kernel over all images; the state in the units of the formulas."""
    state = scan_stored(problem, scan, bytes_per_query, instruction_set, **geometry)
    weighted = state.weighted
    if problem.images.dtype == torch.uint8:
        weighted = weighted / 127.5 - state.total[..., None]
    return PosteriorState(state.minimum * distance_unit(problem), state.total, weighted)


def noisy_in_stored_units(problem: PosteriorProblem) -> torch.Tensor:
    """The noisy images as a kernel takes them, float32 [B, D]."""
    noisy = problem.x.detach().double().flatten(1) / problem.alpha[:, None]
    if problem.images.dtype == torch.uint8:
        noisy = (noisy + 1.0) * 127.5
    return noisy.float()


def distance_unit(problem: PosteriorProblem) -> torch.Tensor:
    """What a squared distance of 1 in stored units is in those of the formulas, [B, 1]."""
    unit = problem.alpha / 127.5 if problem.images.dtype == torch.uint8 else problem.alpha
    return unit.square()[:, None]


def stored_factor(problem: PosteriorProblem) -> torch.Tensor:
    """Factor of squared distances in stored units in the power of two, float32 [B]."""
    factor = problem.scale[:, None] * distance_unit(problem) * math.log2(math.e)
    return factor.flatten().clamp(_SMALLEST_FACTOR, _LARGEST_FACTOR).float()


def value_unit(problem: PosteriorProblem) -> tuple[float, float]:
    """What a stored value of 1 is in the units of the formulas, and what 0 is."""
    return (1 / 127.5, -1.0) if problem.images.dtype == torch.uint8 else (1.0, 0.0)


def within_range(problem: PosteriorProblem) -> torch.Tensor:
    """The noisy images cut to the range of stored values, in stored units, [B, D]."""
    low, high = (0.0, 255.0) if problem.images.dtype == torch.uint8 else (-1.0, 1.0)
    return noisy_in_stored_units(problem).clamp(low, high)


def scan_stored(
    problem: PosteriorProblem,
    scan: Scan,
    bytes_per_query: int,
    instruction_set: str | None,
    per_query: tuple[torch.Tensor, ...] = (),
    join: Join = merge,
    **geometry: object,
) -> PosteriorState:
    """Run a kernel over all images, for as many noisy images at a time as the budget allows.

    Every block of images is read once, for all noisy images in turn.

    Args:
        problem: The problem.
        scan: The kernel.
        bytes_per_query: Working memory per noisy image and thread.
        instruction_set: As the callers take it.
        per_query: Further float32 arguments of the kernel, a row for each noisy image.
        join: Joins the states of blocks of images.
        geometry: Further arguments of the kernel, the same for all.

    Returns:
        The state in stored units, but for its weights: they are the same in all units.
    """
    noisy = noisy_in_stored_units(problem)
    factor = stored_factor(problem)
    threads = torch.get_num_threads()
    budget = memory_budget_bytes(problem.memory_budget) - problem.reader.buffer_bytes(
        _block(problem)
    )
    at_a_time = max(1, budget // (bytes_per_query * (threads + 1)))
    options = {"threads": threads, "isa": instruction_set or "", **geometry}
    split = [part.contiguous().split(at_a_time) for part in (noisy, factor, *per_query)]
    parts = [[row.numpy() for row in rows] for rows in zip(*split, strict=True)]
    scales = [row.double() * math.log(2.0) for row in split[1]]
    states: list[PosteriorState] = []
    for images in image_blocks(problem):
        found = [_as_state(scan(images, *arrays, **options)) for arrays in parts]
        states = list(map(join, states, found, scales)) if states else found
    return PosteriorState(*(torch.cat(part) for part in zip(*states, strict=True)))


def merged_stored(problem: PosteriorProblem, state: PosteriorState) -> PosteriorState:
    """A state in stored units after the images of all ranks, for scans before `spread_stored`."""
    return problem.merged(state, stored_factor(problem).double() * math.log(2.0))


def spread_stored(
    problem: PosteriorProblem,
    spread: Callable[..., np.ndarray],
    state: PosteriorState,
    per_image: tuple[torch.Tensor, ...],
    instruction_set: str | None,
    **geometry: object,
) -> torch.Tensor:
    """Sums over all images in stored units, float64 [B, K, D], of a kernel that applies weights.

    Args:
        problem: The problem.
        spread: The kernel.
        state: What the scan before it found on all ranks, in stored units.
        per_image: Nothing to apply the weights themselves (K = 1); else cotangents [B, K, D],
            and posterior means and what values are counted from, a row for each noisy image.
        instruction_set: As the callers take it.
        geometry: Further arguments of the kernel.
    """
    noisy = noisy_in_stored_units(problem)
    threads = torch.get_num_threads()
    sums = noisy.shape[1] * max(1, per_image[0].shape[1] if per_image else 1)
    budget = memory_budget_bytes(problem.memory_budget) - problem.reader.buffer_bytes(
        _block(problem)
    )
    # A sum takes up to 16 lanes of float32, and 3 numbers in double precision.
    at_a_time = max(1, budget // (sums * (64 + 24) * (threads + 1)))
    options = {"threads": threads, "isa": instruction_set or "", **geometry}
    rows = (noisy, stored_factor(problem), state.minimum, state.total, *per_image)
    split = [row.contiguous().split(at_a_time) for row in rows]
    parts = [[row.numpy() for row in part] for part in zip(*split, strict=True)]
    total = torch.zeros(())
    for images in image_blocks(problem):
        found = [torch.from_numpy(spread(images, *arrays, **options)) for arrays in parts]
        total = total + torch.cat(found)
    return problem.summed(total)


def image_blocks(problem: PosteriorProblem) -> Iterator[np.ndarray]:
    """The images and their copies as stored, as a kernel takes them: [n, D] at a time."""
    for rows in problem.reader.rows(problem.chunk_size, _block(problem)):
        yield rows.numpy()


def _block(problem: PosteriorProblem) -> int:
    """Images at a time where not all are taken at once."""
    bytes_at_a_time = min(_BLOCK_BYTES, memory_budget_bytes(problem.memory_budget) // 4)
    return problem.chunk_size or max(1, bytes_at_a_time // problem.images[0].nbytes)


def _as_state(arrays: tuple[np.ndarray, np.ndarray, np.ndarray]) -> PosteriorState:
    return PosteriorState(*map(torch.from_numpy, arrays))

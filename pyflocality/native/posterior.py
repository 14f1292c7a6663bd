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

from pyflocality._backends import native_module
from pyflocality._budget import memory_budget_bytes
from pyflocality._problem import PosteriorProblem
from pyflocality.reference.state import PosteriorState, merge
from pyflocality.weights import QueryWeights

# Images copied at a time where their memory is not contiguous.
_COPIED_IMAGES = 4096
# Distances count in powers of two; the factor must stay positive and finite in float32.
_SMALLEST_FACTOR, _LARGEST_FACTOR = 2.0**-126, 2.0**120

_trees: WeakKeyDictionary[QueryWeights, Any] = WeakKeyDictionary()

Scan = Callable[..., tuple[np.ndarray, np.ndarray, np.ndarray]]


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
    noisy = mostly_noise(problem)
    parts = []
    for centred in (False, True):
        rows = (noisy == centred).nonzero()[:, 0]
        if len(rows) == 0 and (centred or len(problem.x) > 0):
            continue
        part = replace(
            problem, x=problem.x[rows], alpha=problem.alpha[rows], scale=problem.scale[rows]
        )
        options = {"centre": stored_centre(problem, values) if centred else None}

        def scan(
            *args: object, options: dict[str, Any] = options, **others: object
        ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
            return native_module().masked_posterior(tree, *args, **options, **others)

        parts.append((rows, _scan(part, scan, values * 160, instruction_set)))
    order = torch.cat([rows for rows, _ in parts]).argsort()
    states = zip(*(state for _, state in parts), strict=True)
    return PosteriorState(*(torch.cat(pieces)[order] for pieces in states))


def mostly_noise(problem: PosteriorProblem) -> torch.Tensor:
    """Where the noise is larger than the images are different, bool [B]: sigma / alpha > 0.5."""
    return problem.scale * problem.alpha.square() < 2.0


def stored_centre(problem: PosteriorProblem, values: int) -> np.ndarray:
    """About the mean image, in stored units, float32 [D]: any value serves, this one well."""
    return problem.images[:1024].reshape(-1, values).float().mean(0).numpy()


def difference_tree(weights: QueryWeights, image_shape: torch.Size) -> Any:  # noqa: ANN401
    """The schedule of a set of masks (`pyflocality._C.DifferenceTree`), built once."""
    if weights not in _trees:
        _trees[weights] = native_module().DifferenceTree(weights.bits, *image_shape)
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


def scan_stored(
    problem: PosteriorProblem,
    scan: Scan,
    bytes_per_query: int,
    instruction_set: str | None,
    per_query: tuple[torch.Tensor, ...] = (),
    **geometry: int,
) -> PosteriorState:
    """Run a kernel over all images, for as many noisy images at a time as the budget allows.

    Args:
        problem: The problem.
        scan: The kernel.
        bytes_per_query: Working memory per noisy image and thread.
        instruction_set: As the callers take it.
        per_query: Further float32 arguments of the kernel, a row for each noisy image.
        geometry: Further arguments of the kernel, the same for all.

    Returns:
        The state in stored units, but for its weights: they are the same in all units.
    """
    noisy = noisy_in_stored_units(problem)
    factor = problem.scale[:, None] * distance_unit(problem) * math.log2(math.e)
    factor = factor.flatten().clamp(_SMALLEST_FACTOR, _LARGEST_FACTOR).float()

    threads = torch.get_num_threads()
    budget = memory_budget_bytes(problem.memory_budget)
    at_a_time = max(1, budget // (bytes_per_query * (threads + 1)))
    options = {"threads": threads, "isa": instruction_set or "", **geometry}
    parts = []
    for rows in zip(*(part.split(at_a_time) for part in (noisy, factor, *per_query)), strict=True):
        arrays = [row.contiguous().numpy() for row in rows]
        states = [
            _as_state(scan(images, *arrays, **options))
            for images in _image_blocks(problem, noisy.shape[1])
        ]
        state = states[0]
        for other in states[1:]:
            state = merge(state, other, rows[1].double() * math.log(2.0))
        parts.append(state)
    return PosteriorState(*(torch.cat(part) for part in zip(*parts, strict=True)))


def _image_blocks(problem: PosteriorProblem, values: int) -> Iterator[np.ndarray]:
    images = problem.images
    if problem.chunk_size is None and images.is_contiguous():
        yield images.reshape(-1, values).numpy()
        return
    for part in images.split(problem.chunk_size or _COPIED_IMAGES):
        yield part.contiguous().reshape(-1, values).numpy()


def _as_state(arrays: tuple[np.ndarray, np.ndarray, np.ndarray]) -> PosteriorState:
    return PosteriorState(*map(torch.from_numpy, arrays))

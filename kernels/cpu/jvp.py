"""Posterior scans with tangents on the CPU: units as in `pyflocality.kernels.cpu.posterior`."""

from __future__ import annotations

import functools

import numpy as np
import torch
from torch import Tensor

from pyflocality._support.native import native_module
from pyflocality.kernels.cpu.posterior import (
    Scan,
    difference_tree,
    distance_unit,
    mostly_noise,
    noisy_in_stored_units,
    scan_stored,
    stored_centre,
    value_unit,
    within_range,
)
from pyflocality.posterior.problem import PosteriorProblem
from pyflocality.posterior.state import PosteriorState, merge_tangents, tangent_values, uncentred
from pyflocality.weights import QueryWeights


def global_posterior_jvp_state(
    problem: PosteriorProblem, tangents: Tensor, *, instruction_set: str | None = None
) -> PosteriorState:
    """Scan with one query per batch element, as the reference of this name."""
    values = problem.images[0].numel()
    scan = native_module().global_posterior_jvp
    centre = within_range(problem)
    return _scan(problem, tangents, scan, centre, 1, values, 4, instruction_set)


def window_posterior_jvp_state(
    problem: PosteriorProblem,
    tangents: Tensor,
    window: int,
    *,
    instruction_set: str | None = None,
) -> PosteriorState:
    """Scan with a query per pixel, as the reference of this name."""
    channels, height, width = problem.images.shape[1:]
    return _scan(
        problem,
        tangents,
        native_module().window_posterior_jvp,
        within_range(problem),
        height * width,
        channels,
        # Up to 16 lanes.
        64,
        instruction_set,
        channels=channels,
        height=height,
        width=width,
        window=window,
    )


def masked_posterior_jvp_state(
    problem: PosteriorProblem,
    tangents: Tensor,
    weights: QueryWeights,
    *,
    instruction_set: str | None = None,
) -> PosteriorState:
    """Scan with a query per output value, as the reference of this name."""
    tree = difference_tree(weights, problem.images.shape[1:])

    def scan(*args: object, **options: object) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        return native_module().masked_posterior_jvp(tree, *args, **options)

    # Distances are counted from the centre too.
    mean = torch.from_numpy(stored_centre(problem, weights.shape[1]))
    centre = torch.where(mostly_noise(problem)[:, None], mean, noisy_in_stored_units(problem))
    # Sums with lanes are those of one noisy image at a time: they do not grow with the batch.
    return _scan(problem, tangents, scan, centre, weights.shape[0], 1, 0, instruction_set)


def _scan(
    problem: PosteriorProblem,
    tangents: Tensor,
    scan: Scan,
    centre: Tensor,
    queries: int,
    values: int,
    bytes_per_sum: int,
    instruction_set: str | None,
    **geometry: int,
) -> PosteriorState:
    """Run a kernel over all images; the state in the units of the formulas.

    Args:
        problem: The problem.
        tangents: Directions [K, B, C, H, W].
        scan: The kernel.
        centre: What values are counted from, in stored units, [B, D].
        queries: Queries per noisy image.
        values: Values that a query answers.
        bytes_per_sum: Memory of a thread per query and weighted sum.
        instruction_set: As the callers take it.
        geometry: Further arguments of the kernel.
    """
    unit, shift = value_unit(problem)
    directions = tangents.detach().flatten(2).transpose(0, 1)
    sums = tangent_values(values, len(tangents))
    state = scan_stored(
        problem,
        scan,
        # And the states of a thread's piece and of the whole in double precision.
        queries * (1 + sums) * (bytes_per_sum + 16),
        instruction_set,
        (centre, directions),
        functools.partial(merge_tangents, values=values),
        **geometry,
    )
    # Values and c are in stored units, their products in the square of these.
    units = torch.full((sums,), unit, dtype=torch.float64)
    units[values + len(tangents) :] *= unit
    state = PosteriorState(
        state.minimum * distance_unit(problem), state.total, state.weighted * units
    )
    origin = centre.double() * unit + shift
    # [B, D], where a query's values lie Q apart -> [B, Q, V]
    return uncentred(state, origin.reshape(-1, values, queries).transpose(1, 2))
